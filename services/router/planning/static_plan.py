"""The plan that replaces the policy service while it is unavailable. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asd.values import Preference
from services.common.cost import is_above

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from asd.values import Objective
    from services.router.domain import Stage


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """Stages that are called in order; each escalates to the next, and the last one answers.

    stages: indices in the cascade, ascending, at least one. stage_count: stages of the cascade. Raises
    ValueError if they do not match.
    """

    stages: tuple[int, ...]
    stage_count: int

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("the static plan names no stage")
        if list(self.stages) != sorted(set(self.stages)):
            raise ValueError("the static plan must name stages once each, in the cascade's order")
        if not 0 <= self.stages[0] <= self.stages[-1] < self.stage_count:
            raise ValueError("the static plan names a stage that the cascade does not have")

    def ending_with_the_last(self) -> StaticPlan:
        """Return the plan, extended by the last stage of the cascade if it ends earlier."""
        return StaticPlan(tuple(sorted({*self.stages, self.stage_count - 1})), self.stage_count)

    def first(self, avoid: Collection[int], excluded: Collection[int]) -> int | None:
        """Return the first stage to call; None if every stage is excluded.

        avoid: stages that were unavailable a moment ago; used only if no other is left. excluded: stages that
        did not answer this request. If the plan has no stage left, the largest stage outside it is used.
        """
        others = (index for index in reversed(range(self.stage_count)) if index not in self.stages)
        candidates = [index for index in (*self.stages, *others) if index not in excluded]
        return next(
            (index for index in candidates if index not in avoid), candidates[0] if candidates else None
        )

    def next_after(self, stage: int, excluded: Collection[int] = ()) -> int | None:
        """Return the stage to escalate to; None if the stage's answer stands."""
        return next((index for index in self.stages if index > stage and index not in excluded), None)


def plan_without_policy(
    objective: Objective, plan: StaticPlan, stages: Sequence[Stage], *, is_whole: bool, has_drafts: bool
) -> StaticPlan:
    """Return the stages to call while the policy service is unavailable, or if there is none.

    plan: the configured plan. is_whole: whether there is no policy service, so that the plan is followed as
    it is written.

    For min_quality and BEST, it is the last stage alone: no other answer could stand. For FASTEST, it is the
    configured plan. All other requests must not lose quality because the policy is late: the plan's stages
    draft, and the last stage of the cascade verifies. If there is a draft that the policy was too late to
    judge (has_drafts), the last stage verifies it at once. If max_cost does not allow drafts, it generates.
    """
    last = len(stages) - 1
    alone = StaticPlan((last,), len(stages))
    if objective.min_quality is not None or objective.preference == Preference.BEST:
        return alone
    is_fastest = objective.preference == Preference.FASTEST and objective.quality_value is None
    if is_whole or is_fastest:
        return plan
    cost = sum(stages[index].cost for index in {*plan.stages, last})
    is_too_dear = objective.max_cost is not None and is_above(cost, objective.max_cost)
    return alone if is_too_dear or has_drafts else plan.ending_with_the_last()
