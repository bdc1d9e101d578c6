"""The plan that stands in for the policy service while it is away. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """Stages that are asked in order; each escalates to the next, and the last one answers.

    stages: places in the cascade, ascending, at least one. stage_count: stages of the cascade. Raises
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
