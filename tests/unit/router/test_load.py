"""How busy the stages are: the wait to be expected there, and the calls under way."""

from __future__ import annotations

import heapq
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from services.router.domain import PeerLoad
from services.router.planning.load import (
    DEVIATIONS,
    FIRST_CAPACITY,
    FULL,
    HALF_LIFE_S,
    NEWEST,
    NEWEST_CHOICE,
    NEWEST_DEVIATION,
    Load,
    Question,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Calls that a stage is taken to compute at a time before it has shown it, and one call's time.
PLACES, CALL_MS = int(FIRST_CAPACITY), 40.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load(2, clock)


def test_a_stage_that_was_never_asked_is_idle(load: Load, clock: Clock) -> None:
    clock.now += 1000.0
    assert [load.expected_queue_ms(stage) for stage in (0, 1)] == [0.0, 0.0]
    assert [load.own_calls(stage) for stage in (0, 1)] == [0, 0]


def test_a_new_wait_moves_the_mean_by_its_weight(load: Load) -> None:
    mean_ms = 0.0
    for queue_ms in (100.0, 50.0, 0.0):
        load.answered(0, 1, queue_ms, 0.0)
        mean_ms += NEWEST * (queue_ms - mean_ms)
        assert load.expected_queue_ms(0) == pytest.approx(mean_ms)
    assert load.expected_queue_ms(1) == 0.0


ONE, OTHER = "10.0.0.1:50060", "10.0.0.2:50060"


def heard(
    load: Load,
    clock: Clock,
    replica: str,
    calls: int,
    *,
    replicas: tuple[str, ...] = (ONE, OTHER),
    ago_s: float = 0.0,
) -> None:
    load.heard(1, PeerLoad(replica, calls, replicas, clock.now - ago_s))


def test_calls_of_others_count_until_they_were_heard_of_long_ago(load: Load, clock: Clock) -> None:
    with load.calling(1):
        heard(load, clock, ONE, 12)
        heard(load, clock, OTHER, 9)
        assert (load.calls(1), load.own_calls(1), load.replicas(1)) == (22, 1, 2)
        assert (load.calls(0), load.replicas(0)) == (0, 1)
        heard(load, clock, OTHER, 0)
        assert load.calls(1) == 13
    seen = []
    for _ in range(5):
        clock.now += HALF_LIFE_S
        seen.append(load.calls(1))
    # Twelve, halved each time.
    assert seen == [6, 3, 2, 1, 0]


def test_a_replica_that_has_gone_stays_in_no_sum(load: Load, clock: Clock) -> None:
    heard(load, clock, ONE, 12)
    heard(load, clock, OTHER, 4, replicas=(OTHER,))
    assert (load.calls(1), load.replicas(1)) == (4, 1)


def test_what_is_heard_late_of_calls_of_others_is_old(load: Load, clock: Clock) -> None:
    heard(load, clock, ONE, 8, ago_s=HALF_LIFE_S)
    assert load.calls(1) == 4
    heard(load, clock, ONE, 2)
    heard(load, clock, ONE, 64, ago_s=1.0)
    assert load.calls(1) == 2
    heard(load, clock, ONE, 0)
    heard(load, clock, ONE, 64, ago_s=1.0)
    assert load.calls(1) == 0


def test_equal_waits_are_what_is_expected_in_the_end(load: Load) -> None:
    for _ in range(10):
        load.answered(1, 1, 30.0, 0.0)
    assert load.expected_queue_ms(1) == pytest.approx(30.0 * (1.0 - (1.0 - NEWEST) ** 10))


def test_a_long_mean_that_nothing_renews_halves_and_ends(load: Load, clock: Clock) -> None:
    mean_ms = 4_000.0 * HALF_LIFE_S
    load.answered(0, 1, mean_ms / NEWEST, 0.0)
    seen = []
    for _ in range(3):
        seen.append(load.expected_queue_ms(0))
        # Looking does not keep it fresh.
        assert load.expected_queue_ms(0) == seen[-1]
        clock.now += HALF_LIFE_S
    assert seen == pytest.approx([mean_ms, mean_ms / 2, mean_ms / 4])
    # It is gone after its own length: whoever was in that line has been served.
    clock.now += HALF_LIFE_S - 0.1
    assert load.expected_queue_ms(0) == pytest.approx(100.0)
    clock.now += 0.2
    assert load.expected_queue_ms(0) == 0.0


def test_a_new_wait_is_added_to_what_is_left(load: Load, clock: Clock) -> None:
    load.answered(0, 1, 80.0 / NEWEST, 0.0)
    clock.now += 0.04
    # Of the 80 ms, 40 are left.
    load.answered(0, 1, 100.0, 0.0)
    mean_ms = 40.0 + NEWEST * (100.0 - 40.0)
    assert load.expected_queue_ms(0) == pytest.approx(mean_ms)
    # And it goes on from here.
    clock.now += 0.026
    assert load.expected_queue_ms(0) == pytest.approx(mean_ms - 26.0)


def test_calls_under_way_are_counted_per_stage(load: Load) -> None:
    with load.calling(0):
        with load.calling(0), load.calling(1):
            assert [load.own_calls(stage) for stage in (0, 1)] == [2, 1]
        assert [load.own_calls(stage) for stage in (0, 1)] == [1, 0]
    assert load.own_calls(0) == 0


def test_a_call_that_fails_is_no_longer_under_way(load: Load) -> None:
    with pytest.raises(RuntimeError), load.calling(1):
        raise RuntimeError
    assert load.own_calls(1) == 0


def under_way(load: Load, stage: int, count: int) -> ExitStack:
    calls = ExitStack()
    for _ in range(count):
        calls.enter_context(load.calling(stage))
    return calls


def test_a_call_is_told_how_many_are_under_way_with_it(load: Load) -> None:
    with load.calling(0) as first, load.calling(0) as second, load.calling(1) as other:
        assert (first.depth, second.depth, other.depth) == (1, 2, 1)


def test_calls_under_way_beyond_the_capacity_are_waited_for_before_any_wait_was_measured(load: Load) -> None:
    load.answered(0, 1, 0.0, CALL_MS)
    # Each that ends makes room for one.
    for count in (0, PLACES - 1, PLACES, PLACES + 1, 8 * PLACES):
        with under_way(load, 0, count):
            wait_ms = max(count + 1 - FIRST_CAPACITY, 0.0) * CALL_MS / FIRST_CAPACITY
            assert load.expected_queue_ms(0) == pytest.approx(wait_ms)
            assert (wait_ms > 0.0) is (count >= PLACES)
    assert load.expected_queue_ms(0) == 0.0
    # Of a stage that has not answered yet, nothing is known.
    with under_way(load, 1, 64):
        assert load.expected_queue_ms(1) == 0.0


def test_the_longer_of_both_waits_holds(load: Load, clock: Clock) -> None:
    load.answered(0, 1, 0.0, 40.0)
    load.answered(0, 1, 100.0 / NEWEST, 40.0)
    assert load.expected_queue_ms(0) == pytest.approx(100.0)
    with under_way(load, 0, 100 * PLACES):
        line_ms = load.expected_queue_ms(0)
        assert line_ms > 100.0
        clock.now += 1e6
        assert load.expected_queue_ms(0) == line_ms
    assert load.expected_queue_ms(0) == 0.0


@pytest.mark.parametrize("places", [2, 8, 64])
def test_a_burst_that_has_passed_is_forgotten_at_once(load: Load, places: int) -> None:
    waits = []
    for depth, wait_ms, service_ms in served(places, 4 * places, 100 * places):
        load.answered(0, depth, wait_ms, service_ms)
        waits.append(wait_ms)
    assert max(waits) > 100.0
    # Nothing of this router is under way, and no wait was longer than its own calls made it.
    assert load.expected_queue_ms(0) < 0.15 * max(waits)


def served(places: int, clients: int, calls: int) -> Iterator[tuple[int, float, float]]:
    """Yield depth, wait and computing time of each call, as they end, of clients that ask again at once.

    A slow reference for a stage: so many calls at a time, first come first served, for 20 to 60 ms each.
    """
    free = [0.0] * places
    ends: list[tuple[float, int, float, float]] = []
    now = 0.0
    for call in range(clients + calls):
        if len(ends) == clients:
            now, *seen = heapq.heappop(ends)
            yield seen[0], seen[1], seen[2]
        # Multiples of the golden ratio spread evenly.
        service_ms = 20.0 + 40.0 * (call * 0.6180339887 % 1.0)
        start = max(now, heapq.heappop(free))
        heapq.heappush(free, start + service_ms)
        heapq.heappush(ends, (start + service_ms, len(ends) + 1, start - now, service_ms))


@pytest.mark.parametrize("places", [1, 4, 8, 64])
@pytest.mark.parametrize("lines", [1.5, 4.0])
def test_the_capacity_of_a_stage_is_learned_from_waits(
    load: Load, clock: Clock, places: int, lines: float
) -> None:
    clients = round(places * lines) + 1
    waits = []
    for depth, wait_ms, service_ms in served(places, clients, 40 * clients):
        load.answered(0, depth, wait_ms, service_ms)
        waits.append(wait_ms)
    assert load.capacity(0) == pytest.approx(places, rel=0.15)
    clock.now += 1e6
    with under_way(load, 0, clients - 1):
        # The line alone foretells what the next caller waits: as long as callers waited of late.
        wait_ms = sum(waits[-20 * clients :]) / (20 * clients)
        assert load.expected_queue_ms(0) == pytest.approx(wait_ms, rel=0.25)


def test_where_nobody_waits_the_capacity_is_at_least_what_was_under_way(load: Load) -> None:
    for call in served(64, 48, 200):
        load.answered(0, *call)
    assert load.capacity(0) == pytest.approx(48.0)
    assert load.certain_queue_ms(0) == 0.0
    # And a quiet hour does not unlearn it.
    for _ in range(100):
        load.answered(0, 1, 0.0, 40.0)
    assert load.capacity(0) >= 40.0


def test_a_short_wait_for_the_pass_under_way_does_not_mean_that_a_stage_is_full(load: Load) -> None:
    for _ in range(100):
        load.answered(0, 2, 0.9 * FULL * CALL_MS, CALL_MS)
    assert load.capacity(0) == FIRST_CAPACITY


def test_what_others_ask_of_a_stage_does_not_keep_it_avoided(load: Load, clock: Clock) -> None:
    load.answered(0, 1, 0.0, 40.0)
    for _ in range(100):
        load.answered(0, 1, 4000.0, 40.0)
    assert load.capacity(0) == 1.0
    assert load.expected_queue_ms(0) == pytest.approx(4000.0, rel=0.01)
    clock.now += 1e6
    assert load.expected_queue_ms(0) == 0.0


def test_requests_that_are_being_planned_count_where_plans_went_of_late(load: Load) -> None:
    load.answered(0, 1, 0.0, 40.0)
    with ExitStack() as asked:
        for _ in range(32):
            asked.enter_context(load.asking(Question.PLAN))
        # Where they will go is not known before the first answer.
        assert load.expected_queue_ms(0) == 0.0
        for stage in (0, 0, 0, 1):
            load.chosen(Question.PLAN, stage)
        # Three of four: 24, and the next one is the 25th.
        wait_ms = (24 + 1 - FIRST_CAPACITY) * CALL_MS / FIRST_CAPACITY
        assert load.expected_queue_ms(0) == pytest.approx(wait_ms)
        assert load.own_calls(0) == 0
    assert load.expected_queue_ms(0) == 0.0


def test_answers_to_another_question_say_nothing_of_where_plans_go(load: Load) -> None:
    load.answered(0, 1, 0.0, 40.0)
    load.chosen(Question.DECIDE, 0)
    load.chosen(Question.DECIDE, None)
    with ExitStack() as asked:
        for _ in range(40):
            asked.enter_context(load.asking(Question.PLAN))
        assert load.expected_queue_ms(0) == 0.0
        for _ in range(40):
            asked.enter_context(load.asking(Question.DECIDE))
        # Half of the decisions stop.
        wait_ms = (20 + 1 - FIRST_CAPACITY) * CALL_MS / FIRST_CAPACITY
        assert load.expected_queue_ms(0) == pytest.approx(wait_ms)


def test_old_plans_are_forgotten(load: Load) -> None:
    load.answered(1, 1, 0.0, 40.0)
    for stage in (0,) * 1000 + (1,) * 90:
        load.chosen(Question.PLAN, stage)
    with ExitStack() as asked:
        for _ in range(100):
            asked.enter_context(load.asking(Question.PLAN))
        coming = 100 * (1.0 - (1.0 - NEWEST_CHOICE) ** 90)
        wait_ms = (coming + 1 - FIRST_CAPACITY) * CALL_MS / FIRST_CAPACITY
        assert load.expected_queue_ms(1) == pytest.approx(wait_ms)


def test_a_guess_of_the_capacity_is_no_wait(load: Load) -> None:
    load.answered(0, 1, 0.0, 40.0)
    with under_way(load, 0, 40), load.calling(0) as call:
        assert (load.certain_queue_ms(0), load.left_to_wait_ms(call)) == (0.0, 0.0)
        # One waits that has a place by the guess: others may be why.
        load.answered(0, 4, CALL_MS / 2, CALL_MS)
        assert load.certain_queue_ms(0) == pytest.approx(NEWEST * CALL_MS / 2)
        # 32 of 64 are computed at a time.
        load.answered(0, 64, CALL_MS, CALL_MS)
        assert load.capacity(0) == pytest.approx(32.0)
        assert load.certain_queue_ms(0) == pytest.approx(10 * CALL_MS / 32)
        assert load.left_to_wait_ms(call) == pytest.approx(9 * CALL_MS / 32)


def show_a_line(load: Load) -> None:
    """Have sixteen calls wait for as long as they are computed: eight are at a time."""
    load.answered(0, 1, 0.0, 40.0)
    for _ in range(300):
        load.answered(0, 16, 40.0, 40.0)
    assert load.capacity(0) == pytest.approx(8.0)


def test_a_call_in_the_line_is_told_what_is_left_of_it(load: Load) -> None:
    show_a_line(load)
    with under_way(load, 0, 4), load.calling(0) as early, under_way(load, 0, 10), load.calling(0) as late:
        # The fifth is computed with the first eight. Of the sixteen, the last waits for eight to end.
        assert load.left_to_wait_ms(early) == pytest.approx(0.0, abs=1e-9)
        assert load.left_to_wait_ms(late) == pytest.approx(8 * 5.0)
        with under_way(load, 0, 10):
            # Who comes later is behind it.
            assert load.left_to_wait_ms(late) == pytest.approx(40.0)


def test_a_line_gets_shorter_as_calls_before_one_end(load: Load) -> None:
    show_a_line(load)
    first = under_way(load, 0, 6)
    with under_way(load, 0, 6), load.calling(0) as call:
        assert load.left_to_wait_ms(call) == pytest.approx(5 * 5.0)
        first.close()
        assert load.left_to_wait_ms(call) == pytest.approx(0.0, abs=1e-9)


def test_few_calls_take_longer_than_the_mean_and_some_deviations(load: Load) -> None:
    assert load.longest_ms(0) == 0.0
    load.answered(0, 1, 0.0, 40.0)
    # Of one, half is taken to be the deviation.
    assert load.longest_ms(0) == pytest.approx(40.0 + DEVIATIONS * 20.0)
    load.answered(0, 1, 0.0, 80.0)
    mean_ms, deviation_ms = 40.0 + NEWEST * 40.0, 20.0 + NEWEST_DEVIATION * (40.0 - 20.0)
    assert load.longest_ms(0) == pytest.approx(mean_ms + DEVIATIONS * deviation_ms)


def test_a_call_that_ran_out_of_time_takes_that_at_least(load: Load, clock: Clock) -> None:
    load.answered(0, 1, 0.0, CALL_MS)
    with under_way(load, 0, PLACES), load.calling(0) as late:
        assert late.expected_ms > 0.0
        # What it was expected to wait is not what it takes.
        clock.now += (CALL_MS + 20.0 + late.expected_ms) / 1000.0
        load.ran_out(late)
        learned_ms = CALL_MS + NEWEST * 20.0
        assert load.service_ms(0) == pytest.approx(learned_ms)
    with load.calling(0) as hurried:
        clock.now += CALL_MS / 2000.0
        load.ran_out(hurried)
        assert load.service_ms(0) == pytest.approx(learned_ms)


def test_what_a_call_waited_for_others_is_not_what_it_takes(load: Load, clock: Clock) -> None:
    for _ in range(100):
        load.answered(0, 1, 1000.0, 40.0)
    with load.calling(0) as late:
        clock.now += 1.05
        load.ran_out(late)
    assert load.service_ms(0) == pytest.approx(40.0 + NEWEST * 10.0, abs=0.01)
