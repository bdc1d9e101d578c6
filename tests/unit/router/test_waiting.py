"""For how long a request waits for a stage that sleeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from services.common.errors import Unavailable
from services.router.domain import PlanSource, Request, Stage, View
from services.router.planning.draft_selection import SpeculationOptions
from services.router.planning.planner import MARGIN_MS, Planner
from services.router.planning.static_plan import StaticPlan
from services.router.request import RequestState

if TYPE_CHECKING:
    from collections.abc import Collection

STAGES = [Stage(name, index, 1.0, 500.0) for index, name in enumerate(("small", "medium", "large"))]
DEADLINE_S = 10.0
LEFT_MS = DEADLINE_S * 1000.0 - MARGIN_MS


class Activator:
    """Some stages sleep; keeps who was waited for, and for how long at most."""

    def __init__(self, asleep: Collection[int]) -> None:
        self.asleep = frozenset(asleep)
        self.waited: list[tuple[str, float]] = []

    def wake(self, stage: Stage) -> None:
        raise AssertionError("waiting wakes")

    async def until_awake(self, stage: Stage, timeout_ms: float) -> None:
        self.waited.append((stage.name, timeout_ms))


@pytest.mark.parametrize(
    ("source", "asleep", "failed", "share"),
    [
        # Nothing stands in for a stage that the caller named, whatever the stage's own limit is.
        (PlanSource.FIXED, {2}, (), 1.0),
        (PlanSource.POLICY, {0, 1, 2}, (), 1.0),
        (PlanSource.STATIC, {2}, (0, 1), 1.0),
        # It fell asleep just now, and others could still answer.
        (PlanSource.POLICY, {2}, (), 0.5),
        (PlanSource.STATIC, {1, 2}, (), 0.5),
    ],
)
async def test_a_request_waits_as_long_as_nothing_else_can_answer(
    source: PlanSource, asleep: set[int], failed: tuple[int, ...], share: float
) -> None:
    sleepers = Activator(asleep)
    observer: Any = None
    plan = StaticPlan((2,), len(STAGES))
    planner = Planner(STAGES, None, plan, observer, lambda: 0.0, SpeculationOptions(), sleepers)
    progress = RequestState(Request("id", "hi"), DEADLINE_S, View.OUTCOME, lambda: 0.0)
    progress.plan_source = source
    progress.failed = {place: Unavailable("gone") for place in failed}
    await planner.until_awake(progress, STAGES[2:])
    assert sleepers.waited == [("large", pytest.approx(LEFT_MS * share))]


async def test_who_is_awake_is_not_waited_for() -> None:
    sleepers = Activator({0})
    observer: Any = None
    plan = StaticPlan((2,), len(STAGES))
    planner = Planner(STAGES, None, plan, observer, lambda: 0.0, SpeculationOptions(), sleepers)
    progress = RequestState(Request("id", "hi"), DEADLINE_S, View.OUTCOME, lambda: 0.0)
    await planner.until_awake(progress, STAGES[1:])
    assert sleepers.waited == []
