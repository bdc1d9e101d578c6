"""State of one request: its answers, cost, time and what the caller was shown. No gRPC, no protobuf."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from asd.errors import AsdError
from asd.values import DecisionAction, DecisionReason, PlanSource
from services.common.cost import prefill_cost
from services.router.domain import (
    Decision,
    Event,
    Prefilled,
    Record,
    RoutedAnswer,
    RoutedRequest,
    ScoredTokens,
    StageAnswer,
    StageResult,
    StageStart,
    Step,
    Stop,
    Verification,
    Visibility,
    predicted,
)
from services.router.stage_call import StageCall
from services.router.stream import AnswerStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    # Shows the caller an event. The cascade continues once the caller has taken it.
    Emit = Callable[[Event], Awaitable[None]]


class DraftAbandoned(Exception):  # noqa: N818 - it ends a call, and is no error
    """A stage's draft is not worth finishing."""


class RequestState:
    """State of one request on its way through the cascade.

    clock: monotonic seconds. deadline: in those. view: which events are emitted.
    """

    def __init__(
        self,
        request: RoutedRequest,
        deadline: float,
        view: Visibility,
        clock: Callable[[], float],
        emit: Emit,
    ) -> None:
        self.request = request
        self._deadline = deadline
        self._clock = clock
        self._arrived = clock()
        self._view = view
        self._emit = emit
        self._stream = AnswerStream(view)
        self._step: Step | None = None
        self._call: StageCall | None = None
        self._records: list[Record] = []
        self._answer: StageAnswer | None = None
        # Whether the answer is a draft that was abandoned.
        self._is_fragment = False
        self._spent_cost = 0.0
        self._prefilled: Prefilled | None = None

    # Time and cost.

    def left_ms(self, margin_ms: float = 0.0) -> float:
        """Return the time to the deadline less a margin, in milliseconds; 0 or less if it has passed."""
        return (self._deadline - self._clock()) * 1000.0 - margin_ms

    def whole_ms(self) -> float:
        """Return the time from when the request arrived to its deadline, in milliseconds."""
        return (self._deadline - self._arrived) * 1000.0

    def spent_ms(self) -> float:
        """Return the time since the request arrived, in milliseconds."""
        return (self._clock() - self._arrived) * 1000.0

    @property
    def spent_cost(self) -> float:
        """Cost of the answers so far, in cost units."""
        return self._spent_cost

    # Answers.

    @property
    def has_answer(self) -> bool:
        """Whether a stage has answered."""
        return self._answer is not None

    @property
    def answer(self) -> StageAnswer:
        """The latest answer. Raises AsdError before the first."""
        if self._answer is None:
            raise AsdError("no stage has answered yet")
        return self._answer

    def draft(self) -> StageResult | None:
        """Return the answer that the next stage can verify; None if it has no text.

        Tokens without text, such as a space before the first word, mean nothing to another tokenizer. Before
        the first answer, it is the one that the caller expects.
        """
        if self._answer is None:
            return predicted(self.request.prediction) if self.request.prediction else None
        return self._answer.result if self._answer.result.text else None

    @property
    def has_committed(self) -> bool:
        """Whether the caller was given final tokens."""
        return self._stream.has_committed

    @property
    def has_heard(self) -> bool:
        """Whether the running stage has sent anything."""
        return self._call is not None and self._call.has_heard

    def has_earlier_answer(self) -> bool:
        """Return whether an earlier answer can be given instead of the running stage's."""
        # A caller that names the stages wants the last one's answer.
        is_fixed = self._step is not None and self._step.provenance.source is PlanSource.FIXED
        # An abandoned draft is no answer.
        return self.has_answer and not is_fixed and not self._is_fragment and self._stream.can_revert()

    def can_leave(self) -> bool:
        """Return whether the request can go on without the rest of the running stage's answer.

        Without an earlier answer, it stays with a stage that has begun to answer.
        """
        is_fixed = self._step is not None and self._step.provenance.source is PlanSource.FIXED
        return not (is_fixed or self.has_heard) or self.has_earlier_answer()

    # Events.

    async def begin(self, step: Step) -> None:
        """Start a step: its stage works on the request."""
        self._judged(step.decision)
        if self._view is not Visibility.OUTCOME:
            await self._emit(StageStart(step.stage, step.action))
        drafters = [*([self._answer.stage] if self._answer else []), *step.drafters]
        self._step = step
        self._call = StageCall(
            step.stage,
            step.action,
            drafters[-1].name if drafters else "",
            self._clock,
            is_pipelined=bool(step.drafters),
            abandon=() if step.is_final or self.has_answer else step.abandon,
        )
        self._stream.start(is_final=step.is_final)

    async def take(self, event: ScoredTokens | Verification) -> None:
        """Take an event of the running stage, and show the caller what it changes.

        Raises DraftAbandoned once the stage's draft is not worth finishing.
        """
        call, step = self._running()
        call.take(event)
        if isinstance(event, ScoredTokens):
            await self._show(self._stream.written(event))
        elif not step.drafters:
            # If the stage encoded the draft anew, its tokens are not those that the caller was shown.
            await self._show(self._stream.verified(event.accepted_tokens if event.ids_used else 0))
        if call.is_hopeless():
            raise DraftAbandoned

    def finish(self, result: StageResult | None) -> StageAnswer:
        """Take the running stage's result, and return its answer. result: None if its draft was abandoned."""
        call, _ = self._running()
        if result is not None:
            call.finish(result)
        answer = call.unfinished_answer() if result is None else call.answer()
        if self._is_fragment or (self._answer is None and self.request.prediction):
            # The policy was fitted to verifications of the stages' whole drafts.
            answer = replace(answer, verification=None, draft_stage="")
        self._is_fragment = result is None
        self._answer = answer
        self._spent_cost += answer.cost
        return answer

    def drafted(self, answers: Sequence[StageAnswer]) -> list[StageAnswer]:
        """Record what the drafters of the running stage wrote; return the answers that are not empty."""
        written = [each for each in answers if each.tokens.ids or each.result.text]
        decision = Decision(DecisionAction.ESCALATE, DecisionReason.FIXED_STAGE)
        self._records.extend(Record(each, decision) for each in written)
        self._spent_cost += sum(each.cost for each in written)
        return written

    def prefilled(self, prefilled: Prefilled | None) -> None:
        """Record that a later stage's prefix cache was filled with the prompt."""
        if prefilled is not None:
            tokens = self.answer.result.usage.completion_tokens
            self._prefilled = replace(prefilled, cost=prefill_cost(prefilled.stage.cost, tokens))

    async def revert_to_earlier_answer(self) -> None:
        """Go back to the earlier answer, if there is one, after the running stage has failed."""
        if self.has_earlier_answer():
            await self._show(self._stream.revert())

    async def commit(self, stop: Stop) -> RoutedAnswer:
        """Make the latest answer final: show all of it, and return the outcome."""
        self._judged(stop.decision)
        result, tokens = self.answer.result, self.answer.tokens
        whole = ScoredTokens(
            result.token_ids,
            result.text,
            tokens.logprobs,
            tokens.entropies,
            tokens.top2_margins,
            details=tokens.details,
        )
        await self._show(self._stream.commit(whole))
        return RoutedAnswer(
            self.request.id,
            tuple(self._records),
            stop.provenance.source,
            stop.provenance.policy_version,
            self.spent_ms(),
            stop.provenance.policy_ms,
            self._prefilled,
            None if self.request.sampling.top_logprobs is None else whole,
        )

    def _judged(self, decision: Decision | None) -> None:
        """Record the decision on the latest answer. It replaces an earlier decision on that answer."""
        if decision is None:
            return
        if self._records and self._records[-1].answer is self.answer:
            del self._records[-1]
        self._records.append(Record(self.answer, decision))

    def _running(self) -> tuple[StageCall, Step]:
        if self._call is None or self._step is None:
            raise AsdError("no stage has been called yet")
        return self._call, self._step

    async def _show(self, events: Iterable[Event]) -> None:
        for event in events:
            await self._emit(event)
