"""The caller's plan: a stage, or a chain of stages, that the request names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.errors import AsdError, InvalidRequest, ModelRefusal
from asd.values import AcceptanceMode, DecisionAction, DecisionReason
from services.router.domain import Decision

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.domain import RoutedRequest, Stage
    from services.router.planning.knowledge import Knowledge


class FixedPlan:
    """The plan of one request that names its stages.

    skips: whether a target (second argument) does better without the draft of a drafter (first argument).
    """

    def __init__(
        self,
        request: RoutedRequest,
        knowledge: Knowledge,
        skips: Callable[[Stage, Stage], bool],
        *,
        is_pipelined: bool,
    ) -> None:
        self._request = request
        self._knowledge = knowledge
        self._skips = skips
        self._is_pipelined = is_pipelined
        # Stages of the chain that have yet to work on the request, in order.
        self.following: tuple[Stage, ...] = ()
        # Stages that draft while the running stage verifies.
        self.drafters: tuple[Stage, ...] = ()

    def first(self) -> Stage:
        """Return the stage to begin with. Raises NotFound for one that the cascade does not have."""
        if self._request.chain:
            return self._first_of_chain()
        stage = self._knowledge.named(self._request.stage, "stage")
        self._knowledge.activate({stage.index})
        return stage

    def decide(self) -> Decision:
        """Return what to do with an answer."""
        if not self.following:
            return Decision(DecisionAction.STOP, DecisionReason.FIXED_STAGE)
        following, *rest = self.following
        self.following = tuple(rest)
        return Decision(DecisionAction.ESCALATE, DecisionReason.FIXED_STAGE, following.index)

    def instead(self, error: AsdError) -> Stage:
        """Return the stage to call after one has failed. Raises the error if only that one may answer."""
        if not (self.following and isinstance(error, ModelRefusal)):
            raise error
        # The failed drafter is not needed: the caller wants the last stage's answer.
        following, *rest = self.following
        self.following = tuple(rest)
        return following

    def _first_of_chain(self) -> Stage:
        """Return the stage that a chain begins with, or that verifies while the earlier ones draft."""
        names = self._request.chain
        chain = [self._knowledge.named(name, f"chain[{index}]") for index, name in enumerate(names)]
        indices = [stage.index for stage in chain]
        if indices != sorted(set(indices)) or len(indices) < 2:
            known = ", ".join(stage.name for stage in self._knowledge.stages)
            raise InvalidRequest(
                f"chain must name two or more stages in the order of the cascade ({known})", field="chain"
            )
        self._knowledge.activate(indices)
        # If drafts save nothing, the last stage generates alone: an exact answer is the same.
        kept = [chain.pop()]
        acceptance = self._request.acceptance
        is_exact = acceptance is None or acceptance.mode == AcceptanceMode.EXACT
        while chain and not is_exact:
            kept.insert(0, chain.pop())
        while chain and not self._skips(chain[-1], kept[0]):
            kept.insert(0, chain.pop())
        # A draft in pieces takes a pass for each piece, and the wait for it holds a slot.
        is_free = not any(
            self._knowledge.is_busy(each) or self._knowledge.has_line(each) for each in kept[1:]
        )
        # The first stage verifies the caller's own draft, if there is one, before the next.
        if self._is_pipelined and is_free and not self._request.prediction:
            self.drafters = tuple(kept[:-1])
            return kept[-1]
        self.following = tuple(kept[1:])
        return kept[0]
