"""One call to a stage, and the events that it has sent so far. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.errors import AsdError
from asd.values import FinishReason, StageAction
from services.common.cost import generate_cost, verify_cost
from services.router.domain import ScoredTokens, StageAnswer, StageResult, Timing, TokenUsage, Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.router.domain import AbandonRule, Stage


class StageCall:
    """Collects what a stage sends.

    draft_stage: the stage whose draft it verifies, or "". is_pipelined: whether that draft is still being
    written. abandon: rules by which its own draft is abandoned. clock: monotonic seconds.
    """

    def __init__(
        self,
        stage: Stage,
        action: StageAction,
        draft_stage: str,
        clock: Callable[[], float],
        *,
        is_pipelined: bool = False,
        abandon: Sequence[AbandonRule] = (),
    ) -> None:
        self._abandon = list(abandon)
        self.stage = stage
        self.action = action
        self._draft_stage = draft_stage
        self._is_pipelined = is_pipelined
        self._clock = clock
        self._started = clock()
        self._first_message: float | None = None
        self._ended: float | None = None
        self._result: StageResult | None = None
        self._verification: Verification | None = None
        # Messages with tokens, and tokens in them, that came before the verification.
        self._unverified_messages = 0
        self._unverified_tokens = 0
        self._fingerprint = ""
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._entropies: list[float] = []
        self._top2_margins: list[float] = []
        self._details: list[Any] = []

    def take(self, event: ScoredTokens | Verification) -> None:
        """Take an event that the stage sends while it works."""
        if self._first_message is None:
            self._first_message = self._clock()
        if isinstance(event, ScoredTokens):
            self._fingerprint = self._fingerprint or event.fingerprint
            self._ids.extend(event.ids)
            if self._verification is None:
                self._unverified_messages += bool(event.ids)
                self._unverified_tokens += len(event.ids)
            self._texts.append(event.text)
            self._logprobs.extend(event.logprobs)
            self._entropies.extend(event.entropies)
            self._top2_margins.extend(event.top2_margins)
            self._details.extend(event.details)
        else:
            self._verification = event

    def finish(self, result: StageResult) -> None:
        """Take the stage's result."""
        self._result = result
        # A chain waits for its last stage after this one.
        self._ended = self._clock()

    @property
    def has_heard(self) -> bool:
        """Whether the stage sent anything."""
        return self._first_message is not None or self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the stage sent its result."""
        return self._result is not None

    def is_hopeless(self) -> bool:
        """Return whether the draft is not worth finishing. Each rule is applied once, at its token count.

        A draft that ends within a rule's tokens is never abandoned, as in fitting.
        """
        while self._abandon and len(self._logprobs) > self._abandon[0].tokens:
            rule = self._abandon.pop(0)
            if sum(self._logprobs[: rule.tokens]) / rule.tokens < rule.mean_logprob:
                return True
        return False

    def answer(self) -> StageAnswer:
        """Return the stage's whole answer. Raises AsdError if it sent no result."""
        if self._result is None:
            raise AsdError(f"{self.stage}: the call ended without a result")
        return self._answer(self._result)

    def unfinished_answer(self) -> StageAnswer:
        """Return what the stage has written so far, for a call that was cut off.

        Its usage is counted from the messages; the passes of a verification are an estimate.
        """
        if self._result is not None:
            return self._answer(self._result)
        verification = self._verification
        return self._answer(
            StageResult(
                "".join(self._texts),
                tuple(self._ids),
                self._fingerprint,
                FinishReason.LENGTH,
                TokenUsage(
                    completion_tokens=len(self._ids),
                    proposed_tokens=verification.proposed_tokens if verification else 0,
                    accepted_tokens=verification.accepted_tokens if verification else 0,
                    forward_passes=self._passes_so_far(),
                ),
                Timing(total_ms=self._latency_ms()),
            )
        )

    def _latency_ms(self) -> float:
        """Return the time until the result came, or until now, in milliseconds."""
        return self._ms_until(self._clock() if self._ended is None else self._ended)

    def _ms_until(self, moment: float) -> float:
        return (moment - self._started) * 1000.0

    def _passes_so_far(self) -> int:
        """Return an upper bound on the forward passes of a call that has sent no result.

        Generation takes one pass per token. Verification emits several tokens per pass. While the stage
        agrees with the draft, each pass is one message (or none if a stop sequence may begin: its tokens come
        with the next message). The pass that corrects the draft starts with the verification. Later passes
        may accept parts of the draft again, and only a result would tell how many; one token each is assumed.
        """
        count = len(self._ids)
        if self.action is StageAction.GENERATE:
            return count
        passes = self._unverified_messages
        if self._verification is not None:
            # The correction may have been sent before the draft arrived that it corrects.
            corrected = max(min(self._verification.accepted_tokens + 1, count), self._unverified_tokens)
            passes += (corrected > self._unverified_tokens) + count - corrected
        return passes

    def _answer(self, result: StageResult) -> StageAnswer:
        usage = result.usage
        if self.action is StageAction.VERIFY:
            cost = verify_cost(
                self.stage.cost, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens
            )
        else:
            cost = generate_cost(self.stage.cost)
        tokens = ScoredTokens(
            self._ids,
            "".join(self._texts),
            self._logprobs,
            self._entropies,
            self._top2_margins,
            details=self._details,
        )
        return StageAnswer(
            self.stage,
            self.action,
            result,
            tokens,
            self._verification,
            self._latency_ms(),
            cost,
            self._draft_stage if self._verification else "",
            is_whole=self.has_ended,
            is_pipelined=self._is_pipelined,
            first_message_ms=None if self._first_message is None else self._ms_until(self._first_message),
        )
