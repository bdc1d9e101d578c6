"""For how long a call waits for a service that is away."""

from __future__ import annotations

import pytest

from asd.errors import AsdError, Away, BudgetSpent, InvalidRequest, ResourceExhausted, Unavailable
from asd.transport.patience import NEW_SECONDS, RESTART_SECONDS, Patience

FAR = 1e6


class Time:
    """Seconds that pass while something sleeps, or as a test says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


async def attempts(patience: Patience, until: float = FAR) -> int:
    """Return how often a call to a service that stays away is made again."""
    count = 0
    while await patience.wait(until):
        count += 1
    return count


async def test_a_service_that_was_there_is_waited_for_while_it_may_be_restarting(time: Time) -> None:
    patience = Patience(time, time.sleep)
    patience.there()
    left = time.now
    assert await attempts(patience) == len(time.pauses) > 10
    assert RESTART_SECONDS <= time.now - left < RESTART_SECONDS + max(time.pauses)
    # Often at first, and rarely after a while.
    assert time.pauses == sorted(time.pauses)
    assert time.pauses[0] < 0.1 < time.pauses[-1] < 1.0


async def test_a_service_that_is_gone_for_good_is_not_waited_for(time: Time) -> None:
    patience = Patience(time, time.sleep)
    patience.there()
    await attempts(patience)
    time.pauses.clear()
    for _ in range(3):
        assert await attempts(patience) == 0
    assert time.pauses == []
    # Until it has answered once more.
    patience.there()
    assert await attempts(patience)


async def test_calls_that_find_it_away_one_after_another_wait_for_one_absence(time: Time) -> None:
    patience = Patience(time, time.sleep)
    patience.there()
    began = time.now
    while time.now < began + RESTART_SECONDS:
        # Each has only the time for one more attempt.
        assert await patience.wait(time.now + 1.0)
        time.now += 1.0
    assert not await patience.wait(FAR)


async def test_an_absence_that_nobody_has_met_for_a_while_is_over(time: Time) -> None:
    patience = Patience(time, time.sleep)
    patience.there()
    # In a hurry: the call is not made again.
    assert not await patience.wait(time.now)
    time.now += 100.0
    # It has been back meanwhile, for all that is known, and is gone again.
    assert await attempts(patience, time.now + 60.0) > 10


@pytest.mark.parametrize(
    ("error", "is_there"),
    [
        (AsdError("it failed"), True),
        (InvalidRequest("top_p 7"), True),
        (ResourceExhausted("the queue is full"), True),
        (Unavailable("its stage is away"), True),
        (Away("connection refused"), False),
        (BudgetSpent("late"), False),
    ],
)
async def test_a_service_that_says_why_it_failed_is_there(
    time: Time, error: AsdError, is_there: bool
) -> None:
    patience = Patience(time, time.sleep)
    patience.there()
    await attempts(patience)
    patience.failed(error)
    assert await patience.wait(FAR) is is_there


async def test_a_service_that_never_answered_is_not_waited_for(time: Time) -> None:
    assert await attempts(Patience(time, time.sleep)) == 0


async def test_who_has_just_started_waits_a_moment_for_what_may_be_starting_too(time: Time) -> None:
    patience = Patience(time, time.sleep, new_seconds=NEW_SECONDS)
    started = time.now
    assert await attempts(patience)
    assert NEW_SECONDS <= time.now - started < NEW_SECONDS + 1.0
    assert await attempts(patience) == 0


async def test_no_call_waits_beyond_its_deadline(time: Time) -> None:
    patience = Patience(time, time.sleep)
    patience.there()
    until = time.now + 2.0
    assert await attempts(patience, until)
    # What is left is for the error to reach the caller.
    assert 1.0 < time.now < until
    assert await attempts(patience, time.now) == 0
