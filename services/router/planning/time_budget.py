"""How a request's time is divided: the margin before its deadline, and the time of each stage's call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.router.planning.knowledge import USUAL_TIMES

if TYPE_CHECKING:
    from services.router.domain import Stage
    from services.router.planning.admission import Admission
    from services.router.planning.knowledge import Knowledge
    from services.router.request import RequestState

# Margin before every deadline, for the router's own work and the response. Chosen: above the router's p95.
MARGIN_MS = 10.0
# Margin beside other requests instead: a share of the whole time, and its maximum in milliseconds. Chosen: a
# refusal must reach its caller in time, and a busy machine responds slowly. With a tenth, most callers of a
# burst with half a second each heard nothing in time.
_SHARE_KEPT, MOST_KEPT_MS = 0.25, 250.0
# Margin before a deadline, in milliseconds, for an earlier answer to reach its caller. gRPC rounds a deadline
# of 10 to 100 s up to a tenth of a second, so the router may overestimate the time left by that much.
RETURN_MS = 100.0
# Share of the time left that a stage may take if another stage could still replace its answer. Chosen.
SHARE_OF_TIME = 0.5
# Share of the time left that filling a prefix cache ahead may delay an escalation. Chosen.
_SHARE_FOR_PREFILL = 0.25


class TimeBudget:
    """The time budget of one request."""

    def __init__(self, state: RequestState, knowledge: Knowledge, admission: Admission) -> None:
        self._state = state
        self._knowledge = knowledge
        self._admission = admission
        self._drafters = 0
        self._was_beside_others = False

    def works_with(self, drafters: int) -> None:
        """Set the number of drafters that work together with the request's stage."""
        self._drafters = drafters

    def left_ms(self) -> float:
        """Return the time to the deadline less the margin, in milliseconds."""
        return self._state.left_ms(self._margin_ms())

    def is_beside_others(self) -> bool:
        """Return whether the router has had other requests in flight during this one.

        The larger margin stays once it applied. Otherwise a call that ends at its timeout would seem to leave
        time for another one.
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
        """Return after how long a request leaves a slow stage, if it then still can.

        RequestState.can_leave tells whether it can, which may change during the call. is_bound: whether the
        request has neither another stage nor an earlier answer.
        """
        left_ms = self.left_ms()
        if is_bound:
            return left_ms
        # A stage that is slow for every answer may take more than half, less the time for the response.
        usual_ms = min(USUAL_TIMES * self._knowledge.usual_ms(stage), left_ms - RETURN_MS)
        return max(self._part_of(left_ms, stage), usual_ms)

    def prefill_ms(self, stage: Stage) -> float:
        """Return how long filling a stage's prefix cache ahead may take."""
        return min(self._state.left_ms(MARGIN_MS) * _SHARE_FOR_PREFILL, stage.timeout_ms)

    def left_of_latency_ms(self) -> float:
        """Return what is left of max_latency_ms; infinite if it is not set."""
        budget_ms = self._state.request.objective.max_latency_ms
        return float("inf") if budget_ms is None else budget_ms - self._state.spent_ms()

    def _margin_ms(self) -> float:
        """Return the margin before the deadline: larger beside other requests, which delay the response."""
        if not (self._admission.refuses and self.is_beside_others()):
            return MARGIN_MS
        return max(MARGIN_MS, min(self._state.whole_ms() * _SHARE_KEPT, MOST_KEPT_MS))

    def _part_of(self, left_ms: float, stage: Stage) -> float:
        """Return how much of the time left a stage may take if another stage could still answer.

        All of it if the request waits in the stage's queue. Meanwhile the stage answers other requests, or is
        found to hang.
        """
        is_waited = self._admission.refuses and self._knowledge.has_line(stage)
        return left_ms if is_waited else left_ms * SHARE_OF_TIME
