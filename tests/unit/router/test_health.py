"""The log has a line where a service's health changes, and none for the requests in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asd.errors import AsdError, PromptTooLong, Unavailable
from services.router.domain import Stage
from services.router.planning.health import AWAY_SECONDS, LONGEST_AWAY_SECONDS, Health, StageHealth
from tests.unit.router.small_cascade import Clock, Policy, SmallCascade

if TYPE_CHECKING:
    from collections.abc import Callable

GONE = Unavailable("stage small at host:0: connection refused")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what gives the log's lines so far."""
    caplog.set_level("INFO", logger="services.router.planning.health")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_spell_has_a_line_at_its_beginning_and_one_at_its_end(lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    health = Health("stage small at host:0", clock)
    health.answered()
    assert not lines()
    for _ in range(3):
        for _ in range(5):
            health.failed(GONE, "and avoided")
        clock.now += 10.0
    (line,) = lines()
    # The name once, and the reason.
    assert line.count("stage small at host:0") == 1
    assert "unhealthy" in line
    assert "connection refused" in line
    for _ in range(5):
        health.answered()
    assert len(lines()) == 2
    assert "healthy again" in lines()[-1]
    health.failed(GONE, "and avoided")
    assert len(lines()) == 3


def test_what_fails_now_and_then_does_not_fill_the_log(lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    health = Health("the policy service", clock)
    for _ in range(1000):
        health.failed(GONE, "and the static plan stands in for it")
        clock.now += 0.01
        health.answered()
    assert len(lines()) == 1
    # Two lines a second are the most.
    for _ in range(10):
        clock.now += 1.5
        health.answered()
        health.failed(GONE, "and the static plan stands in for it")
    assert len(lines()) == 21


def test_a_stage_is_avoided_for_longer_each_time_that_it_hangs() -> None:
    clock = Clock()
    health = StageHealth(Stage("small", 0, 1.0, 1000.0), clock)
    lengths = []
    for _ in range(9):
        health.hung(GONE)
        # At the same time: no further time.
        health.hung(GONE)
        started = clock.now
        while health.is_avoided:
            clock.now += AWAY_SECONDS / 64
        lengths.append(clock.now - started)
    doubled = [min(AWAY_SECONDS * 2.0**times, LONGEST_AWAY_SECONDS) for times in range(9)]
    assert lengths == pytest.approx(doubled, abs=AWAY_SECONDS / 32)
    assert lengths[-1] == pytest.approx(lengths[-2])
    health.answered()
    health.went_away(GONE)
    assert health.is_avoided
    clock.now += AWAY_SECONDS
    assert not health.is_avoided
    # It has answered in between: the next time is the first one.
    health.hung(GONE)
    clock.now += AWAY_SECONDS
    assert not health.is_avoided


async def test_a_routers_log_tells_of_stages_and_not_of_requests(lines: Callable[[], list[str]]) -> None:
    cascade = SmallCascade(Policy(), small={"fail_after": 0, "failure": GONE})
    small = cascade.stages["small"]
    for _ in range(3):
        await cascade.ask()
        cascade.clock.now += 2.0
    assert len(lines()) == 1
    small.failure = None
    small.fail_after = None
    for _ in range(3):
        await cascade.ask()
    assert [line.count("small") for line in lines()] == [1, 1]
    # A refusal is no ill health; a fault is, though others are sent there all the same.
    small.fail_after, small.failure = 0, PromptTooLong("600 tokens")
    await cascade.ask()
    assert len(lines()) == 2
    small.failure = AsdError("fault 7")
    await cascade.ask()
    await cascade.ask()
    assert len(lines()) == 3
    assert "fault 7" in lines()[-1]
