"""Where one request stands: what was asked, answered, spent and shown. Pure."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.common.cost import generate_cost, verify_cost
from services.common.errors import AsdError, BudgetSpent
from services.router.delivery import Delivery
from services.router.domain import (
    Answer,
    Decision,
    DecisionReason,
    Event,
    Outcome,
    PlanSource,
    Record,
    Request,
    Stage,
    StageAction,
    StageResult,
    Tokens,
    Verification,
    View,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Progress:
    """State of one request on its way through the cascade. Times by a monotonic clock in seconds."""

    def __init__(self, request: Request, deadline: float, view: View, clock: Callable[[], float]) -> None:
        self.request = request
        self.view = view
        self.plan_source = PlanSource.STATIC
        self.policy_version = ""
        # False once the policy was away: the static plan holds from there on.
        self.follows_policy = True
        # Stages that did not answer, with why.
        self.failed: dict[int, AsdError] = {}
        self.policy_ms = 0.0
        self.spent_cost = 0.0
        self._deadline = deadline
        self._clock = clock
        self._arrived = clock()
        self._delivery = Delivery(view)
        self._records: list[Record] = []
        self._answer: Answer | None = None
        # True once the answer that stands is not the last started stage's.
        self._is_earlier = False

    # Time.

    def left_ms(self, margin_ms: float = 0.0) -> float:
        """Return the time to the deadline less a margin, in milliseconds; 0 or less if it has passed."""
        return (self._deadline - self._clock()) * 1000.0 - margin_ms

    def spent_ms(self) -> float:
        """Return the time since the request arrived, in milliseconds."""
        return (self._clock() - self._arrived) * 1000.0

    @contextmanager
    def waiting_for_policy(self) -> Iterator[None]:
        """Count the time of the block as spent on the policy service."""
        started = self._clock()
        try:
            yield
        finally:
            self.policy_ms += (self._clock() - started) * 1000.0

    # A stage's run.

    def draft(self) -> StageResult | None:
        """Return the answer for the next stage to verify; None if it must write its own.

        This version's rule of acceptance needs temperature 0: above it, a later stage writes anew.
        """
        if self._answer is None or self.request.sampling.temperature > 0:
            return None
        result = self._answer.result
        return result if result.text or result.token_ids else None

    def start(self, stage: Stage, action: StageAction, *, is_final: bool) -> None:
        """A stage starts on the request."""
        self._stage, self._action = stage, action
        self._started = self._clock()
        self._result: StageResult | None = None
        self._verification: Verification | None = None
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._entropies: list[float] = []
        self._top2_margins: list[float] = []
        self._delivery.start(is_final=is_final)

    def written(self, tokens: Tokens) -> Iterator[Event]:
        """Take tokens from the running stage; return what the caller is shown of them."""
        self._ids.extend(tokens.ids)
        self._texts.append(tokens.text)
        self._logprobs.extend(tokens.logprobs)
        self._entropies.extend(tokens.entropies)
        self._top2_margins.extend(tokens.top2_margins)
        return self._delivery.written(tokens)

    def verified(self, verification: Verification) -> Iterator[Event]:
        """Take the running stage's verification; return what it changes for the caller."""
        self._verification = verification
        # Re-encoded tokens are not those that the caller was shown.
        return self._delivery.verified(verification.accepted_tokens if verification.ids_used else 0)

    def finished(self, result: StageResult) -> None:
        """Take the running stage's result."""
        self._result = result

    def take_answer(self) -> Answer:
        """Return the running stage's whole answer, and keep it. Raises AsdError if the stage sent no
        result."""
        result, stage = self._result, self._stage
        if result is None:
            raise AsdError(f"{stage}: the call ended without a result")
        if self._action is StageAction.VERIFY:
            usage = result.usage
            cost = verify_cost(
                stage.cost, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens
            )
        else:
            cost = generate_cost(stage.cost)
        tokens = Tokens(self._ids, "".join(self._texts), self._logprobs, self._entropies, self._top2_margins)
        latency_ms = (self._clock() - self._started) * 1000.0
        draft_stage = self._answer.stage.name if self._answer and self._verification else ""
        self._answer = Answer(
            stage, self._action, result, tokens, self._verification, latency_ms, cost, draft_stage
        )
        self.spent_cost += cost
        return self._answer

    @property
    def answer(self) -> Answer:
        """The latest whole answer. Raises AsdError before the first."""
        if self._answer is None:
            raise AsdError("no stage has answered yet")
        return self._answer

    # What follows from it.

    @property
    def has_committed(self) -> bool:
        """Whether the caller was given final tokens."""
        return self._delivery.has_committed

    def judged(self, decision: Decision) -> None:
        """Record a decision on the latest answer."""
        self._records.append(Record(self.answer, decision))
        if decision.policy_version:
            self.policy_version = decision.policy_version

    def keep_earlier_answer(self, error: AsdError) -> bool:
        """Let the earlier answer stand after the running stage failed; return whether that can be done."""
        if not self._records or not self._delivery.can_settle_earlier():
            return False
        reason = (
            DecisionReason.DEADLINE if isinstance(error, BudgetSpent) else DecisionReason.STAGE_UNAVAILABLE
        )
        self._records[-1] = self._records[-1].stopped(reason)
        self._is_earlier = True
        return True

    def settle(self) -> Iterator[Event]:
        """Return what commits the answer that stands."""
        result, tokens = self.answer.result, self.answer.tokens
        whole = Tokens(result.token_ids, result.text, tokens.logprobs, tokens.entropies, tokens.top2_margins)
        return self._delivery.settle(whole, is_earlier=self._is_earlier)

    def outcome(self) -> Outcome:
        """Return the outcome."""
        return Outcome(
            self.request.id,
            tuple(self._records),
            self.plan_source,
            self.policy_version,
            self.spent_ms(),
            self.policy_ms,
        )
