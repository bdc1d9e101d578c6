"""The plan that stands in for the policy service while it is away. Pure."""

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
    """Stages that are asked in order; each escalates to the next, and the last one answers.

    stages: indices in the cascade, ascending, at least one. stage_count: stages of the cascade. Raises
    ValueError if they do not fit each other.
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
        """Return the plan with the last stage of the cascade behind it, where it ends before."""
        return StaticPlan(tuple(sorted({*self.stages, self.stage_count - 1})), self.stage_count)

    def first(self, avoid: Collection[int], excluded: Collection[int]) -> int | None:
        """Return the stage to ask first; None if every stage is excluded.

        avoid: stages that were away a moment ago; taken only where nothing else is left. excluded: stages
        that did not answer this request. A stage outside the plan is taken, the largest first, where the plan
        has none left.
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
    """Return what is asked while the policy service is unavailable, or where there is none.

    plan: the configured one. is_whole: whether its operator wants no more than it, since there is no policy.

    Where the caller wants quality certified or the BEST, the last stage alone: no other answer could stand.
    FASTEST is the static plan, as it is written. What is between them must not lose quality because the
    policy is late: the plan's stages draft, and the last stage of the cascade verifies. It verifies at once
    what the policy had drafted and was too late to judge (has_drafts), and writes where max_cost does not
    leave room for drafts.
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
