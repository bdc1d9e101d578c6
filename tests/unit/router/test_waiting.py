"""For how long a request waits for a stage that sleeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import Unavailable
from asd.values import PlanSource
from services.router.domain import CallFailure, RoutedRequest, Stage, StageFailed, Step, Visibility
from services.router.planning.static_plan import StaticPlan
from services.router.planning.time_budget import MARGIN_MS, SHARE_OF_TIME
from services.router.request import RequestState
from tests.unit.router.small_cascade import Observer, Policy, make_planner, show_nothing

if TYPE_CHECKING:
    from collections.abc import Collection

    from services.router.planning.planner import Planner

STAGES = [Stage(name, index, 1.0, 500.0) for index, name in enumerate(("small", "medium", "large"))]
DEADLINE_S = 10.0
LEFT_MS = DEADLINE_S * 1000.0 - MARGIN_MS


class Activator:
    """Some stages have no replica; keeps who was waited for, and for how long at most.

    awake: how often all stages are said to have one before those have lost theirs.
    """

    def __init__(self, asleep: Collection[int], awake: int = 0) -> None:
        self._asleep = frozenset(asleep)
        self._awake = awake
        self.waited: list[tuple[str, float]] = []

    @property
    def scaled_to_zero(self) -> frozenset[int]:
        self._awake -= 1
        return frozenset() if self._awake >= 0 else self._asleep

    def activate(self, stage: Stage) -> None:
        """The planner asks for it before it waits."""

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        self.waited.append((stage.name, timeout_ms))


def planner_with(sleepers: Activator, policy: Policy | None, stages: tuple[int, ...]) -> Planner:
    plan = StaticPlan(stages, len(STAGES))
    return make_planner(STAGES, policy, plan, Observer(), lambda: 0.0, activator=sleepers)


@pytest.mark.parametrize(
    ("source", "asleep", "failed", "awake", "share"),
    [
        # Nothing stands in for a stage that the caller named, whatever the stage's own limit is.
        (PlanSource.FIXED, {2}, (), 0, 1.0),
        (PlanSource.POLICY, {0, 1, 2}, (), 0, 1.0),
        (PlanSource.STATIC, {2}, (0, 1), 0, 1.0),
        # It lost its replicas once it was planned, and other stages could still answer.
        (PlanSource.POLICY, {2}, (), 2, SHARE_OF_TIME),
        (PlanSource.STATIC, {1, 2}, (), 1, SHARE_OF_TIME),
    ],
)
async def test_a_request_waits_as_long_as_nothing_else_can_answer(
    source: PlanSource, asleep: set[int], failed: tuple[int, ...], awake: int, share: float
) -> None:
    sleepers = Activator(asleep, awake)
    policy = Policy(first=2) if source is PlanSource.POLICY else None
    planner = planner_with(sleepers, policy, (2,) if not failed else (0, 1, 2))
    fields: dict[str, Any] = {"stage": "large"} if source is PlanSource.FIXED else {}
    state = RequestState(
        RoutedRequest("hi", id="id", **fields), DEADLINE_S, Visibility.OUTCOME, lambda: 0.0, show_nothing
    )
    with planner.plan_for(state) as plan:
        step = await plan.first_step()
        for _ in failed:
            gone = CallFailure(step.stage, Unavailable("gone"), 0.0, has_heard=False)
            following = await plan.after_failure(StageFailed(gone))
            assert isinstance(following, Step)
            step = following
    assert step.stage.name == "large"
    assert sleepers.waited == [("large", pytest.approx(LEFT_MS * share))]


async def test_who_is_awake_is_not_waited_for() -> None:
    sleepers = Activator({0})
    planner = planner_with(sleepers, None, (1,))
    state = RequestState(
        RoutedRequest("hi", id="id"), DEADLINE_S, Visibility.OUTCOME, lambda: 0.0, show_nothing
    )
    with planner.plan_for(state) as plan:
        assert (await plan.first_step()).stage.name == "medium"
    assert sleepers.waited == []
