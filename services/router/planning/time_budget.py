"""How a request's time is divided: what is kept of its deadline, and what a stage's call may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.router.planning.knowledge import USUAL_TIMES

if TYPE_CHECKING:
    from services.router.domain import Stage
    from services.router.planning.admission import Admission
    from services.router.planning.knowledge import Knowledge
    from services.router.request import RequestState

# Kept from every deadline, for the router's own work and the way back. Chosen: above its own p95.
MARGIN_MS = 10.0
# Kept in its place beside other requests, as a share of the whole time and at most, in milliseconds. Chosen:
# a refusal that its caller does not hear in time is none, and a busy machine takes long to say anything: with
# a tenth, most of a burst with half a second each heard nothing in time.
_SHARE_KEPT, MOST_KEPT_MS = 0.25, 250.0
# Kept of a deadline, in milliseconds, for an earlier answer to reach its caller. gRPC rounds a deadline of
# 10 to 100 s up to a tenth of a second, so that the router may think that it has so much more.
RETURN_MS = 100.0
# Share of the time left that a stage may take whose answer another stage could still replace. Chosen.
SHARE_OF_TIME = 0.5
# Share of the time left that an escalation may lose to a prefix cache that is filled ahead. Chosen.
_SHARE_FOR_PREFILL = 0.25


class TimeBudget:
    """Of one request."""

    def __init__(self, state: RequestState, knowledge: Knowledge, admission: Admission) -> None:
        self._state = state
        self._knowledge = knowledge
        self._admission = admission
        self._drafters = 0
        self._was_beside_others = False

    def works_with(self, drafters: int) -> None:
        """The request's stage works together with so many drafters."""
        self._drafters = drafters

    def left_ms(self) -> float:
        """Return the time to the deadline, less what is kept of it, in milliseconds."""
        return self._state.left_ms(self._margin_ms())

    def is_beside_others(self) -> bool:
        """Return whether the request has had other requests beside it, now or before.

        What is kept for that is not given back: a call that ends where it was to end would otherwise seem to
        have time left for another one.
        """
        self._was_beside_others |= self._knowledge.load.under_way() > 1 + self._drafters
        return self._was_beside_others

    def timeout_ms(self, stage: Stage, *, is_final: bool) -> float:
        """Return how long a stage's call may take. is_final: whether its answer will stand."""
        left_ms = self.left_ms()
        if not is_final:
            left_ms = self._part_of(left_ms, stage)
        return min(left_ms, self._knowledge.timeout_ms(stage))

    def leave_after_ms(self, stage: Stage, *, is_bound: bool) -> float:
        """Return after how long a request goes on without a stage, where it then still can.

        Whether it can may change during the call: see RequestState.can_leave. is_bound: whether there is
        neither another stage to go on with nor an earlier answer.
        """
        left_ms = self.left_ms()
        if is_bound:
            return left_ms
        # A stage that takes long for every answer may have more than half, but for the way back.
        usual_ms = min(USUAL_TIMES * self._knowledge.usual_ms(stage), left_ms - RETURN_MS)
        return max(self._part_of(left_ms, stage), usual_ms)

    def prefill_ms(self, stage: Stage) -> float:
        """Return how long filling a stage's prefix cache ahead may take."""
        return min(self._state.left_ms(MARGIN_MS) * _SHARE_FOR_PREFILL, stage.timeout_ms)

    def left_of_latency_ms(self) -> float:
        """Return what is left of max_latency_ms; infinite where there is none."""
        budget_ms = self._state.request.objective.max_latency_ms
        return float("inf") if budget_ms is None else budget_ms - self._state.spent_ms()

    def _margin_ms(self) -> float:
        """Return what is kept of the deadline: more beside other requests, who make the way back longer."""
        if not (self._admission.refuses and self.is_beside_others()):
            return MARGIN_MS
        return max(MARGIN_MS, min(self._state.whole_ms() * _SHARE_KEPT, MOST_KEPT_MS))

    def _part_of(self, left_ms: float, stage: Stage) -> float:
        """Return what a stage may take of the time left where another stage could still answer.

        All of it where its line is waited in: other requests are answered meanwhile, or it is found to hang.
        """
        is_waited = self._admission.refuses and self._knowledge.has_line(stage)
        return left_ms if is_waited else left_ms * SHARE_OF_TIME
