"""Where one request stands: what was asked, answered, spent and shown. Pure."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.cost import prefill_cost
from services.common.errors import AsdError, BudgetSpent, Overloaded
from services.router.domain import (
    AbandonRule,
    Answer,
    Decision,
    DecisionAction,
    DecisionReason,
    Event,
    Failure,
    Outcome,
    PlanSource,
    Prefilled,
    Record,
    Refusal,
    Request,
    Stage,
    StageAction,
    StageResult,
    Tokens,
    Verification,
    View,
)
from services.router.stage_call import StageCall
from services.router.stream import AnswerStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from services.router.planning.draft_selection import DraftChoice
    from services.router.planning.load import Call

    Emit = Callable[[Event], Awaitable[None]]


class DraftAbandoned(Exception):  # noqa: N818 - it ends a call, and is no error
    """A stage's draft is not worth finishing."""


class RequestState:
    """State of one request on its way through the cascade. Times by a monotonic clock in seconds."""

    def __init__(self, request: Request, deadline: float, view: View, clock: Callable[[], float]) -> None:
        self.request = request
        self.view = view
        self.plan_source = PlanSource.STATIC
        self.policy_version = ""
        # False once the policy was away: the static plan holds from there on.
        self.follows_policy = True
        # Stages that this request does without, by place, with why: they did not answer, or cannot take it.
        self.failed: dict[int, AsdError] = {}
        self.policy_ms = 0.0
        # Time that the running stage had for its own work, in milliseconds, and whether it sent anything.
        self.call_ms = 0.0
        # The running stage's call, and why there was no room for the request.
        self.call: Call | None = None
        self.refusal: Refusal | None = None
        # Whether other requests were at stages, or on their way to one, while this one was.
        self.was_beside_others = False
        self.has_heard = False
        self.spent_cost = 0.0
        self._deadline = deadline
        self._clock = clock
        self._arrived = clock()
        self._delivery = AnswerStream(view)
        self._records: list[Record] = []
        self._answer: Answer | None = None
        self._new_answers: list[Answer] = []
        self._new_failures: list[Failure] = []
        # Whether the answer is a draft that was given up.
        self._is_fragment = False
        self._may_abandon = False
        # True once the answer that stands is not the last started stage's.
        self._is_earlier = False
        self._prefilled: Prefilled | None = None
        # The stages of a chain, by place, that are still to work on it; empty without a chain.
        self.chain: tuple[int, ...] = ()
        # Of a chain, those that draft while the running stage verifies.
        self.upstream: tuple[int, ...] = ()
        # What was chosen where a stage could verify a draft, by the stage's place.
        self.choices: dict[int, DraftChoice] = {}
        # Stage that an escalation likely goes to; rules for giving a draft up, and the stage that goes on.
        self.likely_next: int | None = None
        self.p_escalate = 0.0
        self.abandon_to: int | None = None
        self.abandon: tuple[AbandonRule, ...] = ()
        self.is_abandoned = False

    # Time.

    def left_ms(self, margin_ms: float = 0.0) -> float:
        """Return the time to the deadline less a margin, in milliseconds; 0 or less if it has passed."""
        return (self._deadline - self._clock()) * 1000.0 - margin_ms

    def whole_ms(self) -> float:
        """Return the time from when the request arrived to its deadline, in milliseconds."""
        return (self._deadline - self._arrived) * 1000.0

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
        """Return the answer for the next stage to verify; None if there is nothing to verify.

        Tokens without text, such as a space before the first word, mean nothing to another tokenizer.
        """
        if self._answer is None:
            return None
        return self._answer.result if self._answer.result.text else None

    @property
    def drafter(self) -> str:
        """Name of the stage whose answer the next one may verify, or ""."""
        return self._answer.stage.name if self._answer else ""

    def start(self, stage: Stage, action: StageAction, drafter: str, *, is_final: bool) -> None:
        """A stage starts on the request, on a drafter's draft where it verifies. is_final: it will stand."""
        self._run = StageCall(stage, action, drafter, self._clock, is_pipelined=bool(self.upstream))
        self.has_heard = False
        self._may_abandon = not is_final
        self._delivery.start(is_final=is_final)

    async def take(self, event: Tokens | Verification, emit: Emit) -> None:
        """Take what the running stage sends; emit what it changes for the caller.

        Raises DraftAbandoned once the stage's draft is not worth finishing; it then counts as answered.
        """
        self.has_heard = True
        self._run.take(event)
        if isinstance(event, Tokens):
            await _emit_all(self._delivery.written(event), emit)
        elif not self.upstream:
            # Re-encoded tokens are not those that the caller was shown.
            await _emit_all(self._delivery.verified(event.accepted_tokens if event.ids_used else 0), emit)
        if self._is_hopeless():
            raise DraftAbandoned

    def finish(self, result: StageResult) -> None:
        """Take the running stage's result."""
        self.has_heard = True
        self._run.finish(result)

    def _is_hopeless(self) -> bool:
        """Return whether the running stage's draft is not worth finishing."""
        if not (self.abandon and self._may_abandon) or self._answer is not None or self._run.has_ended:
            return False
        rule = self.abandon[0]
        logprobs = self._run.logprobs
        # As in fitting: a draft that ends here is heard to its end.
        if len(logprobs) <= rule.tokens:
            return False
        self.abandon = self.abandon[1:]
        self.is_abandoned = sum(logprobs[: rule.tokens]) / rule.tokens < rule.mean_logprob
        return self.is_abandoned or self._is_hopeless()

    def take_answer(self) -> Answer:
        """Return the running stage's answer, and keep it. Raises AsdError if the stage sent no result."""
        answer = self._run.unfinished_answer() if self.is_abandoned else self._run.answer()
        if self._is_fragment:
            # The policy knows what verifying a whole draft shows; this one was cut off.
            answer = replace(answer, verification=None, draft_stage="")
        self._is_fragment = self.is_abandoned
        self._answer = answer
        self._new_answers.append(answer)
        self.spent_cost += answer.cost
        return answer

    def new_answers(self) -> list[Answer]:
        """Return the answers since the last call of this, of every stage that worked."""
        answers, self._new_answers = self._new_answers, []
        return answers

    def failure(self, place: int, error: AsdError) -> Failure:
        """Return the running stage's failure."""
        return Failure(place, error, self.call_ms, self.has_heard)

    def drafted_upstream(
        self, answers: Sequence[Answer], failures: Sequence[Failure], waited_ms: float
    ) -> None:
        """Record what the earlier stages of a chain wrote while the running one verified it.

        failures: of those that did not finish. waited_ms: what the running one waited for a draft.
        """
        self._new_failures.extend(failures)
        self.call_ms -= waited_ms
        for answer in answers:
            if answer.tokens.ids or answer.result.text:
                decision = Decision(DecisionAction.ESCALATE, DecisionReason.FIXED_STAGE)
                self._records.append(Record(answer, decision))
                self._new_answers.append(answer)
                self.spent_cost += answer.cost

    def new_failures(self) -> list[Failure]:
        """Return the failures of drafters since the last call of this."""
        failures, self._new_failures = self._new_failures, []
        return failures

    def warmed(self, prefilled: Prefilled | None) -> None:
        """Record a prompt that was put into a later stage's cache."""
        if prefilled is not None:
            tokens = self.answer.result.usage.completion_tokens
            cost = prefill_cost(prefilled.stage.cost, tokens)
            self._prefilled = replace(prefilled, cost=cost)

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
        """Record a decision on the latest answer, in the place of an earlier one on it."""
        if self._records and self._records[-1].answer is self.answer:
            del self._records[-1]
        self._records.append(Record(self.answer, decision))
        if decision.policy_version:
            self.policy_version = decision.policy_version

    def has_earlier_answer(self) -> bool:
        """Return whether an earlier answer can be given in the place of the running stage's."""
        # Who names the stages wants the last one's answer.
        is_fixed = self.plan_source is PlanSource.FIXED
        # A draft that was given up is no answer.
        return not (is_fixed or self._is_fragment) and bool(self._records) and self._delivery.can_revert()

    def can_leave(self) -> bool:
        """Return whether the request can go on without what the running stage has yet to send.

        Without an earlier answer it stays with a stage that is at work.
        """
        is_silent = self.plan_source is not PlanSource.FIXED and not self.has_heard
        return is_silent or self.has_earlier_answer()

    async def revert(self, emit: Emit) -> None:
        """Drop what is not of the earlier answer, where there is one: the running stage has failed."""
        if self.has_earlier_answer():
            await _emit_all(self._delivery.revert(), emit)

    def keep_earlier_answer(self, error: AsdError) -> None:
        """Let the earlier answer stand after the running stage failed."""
        reason = (
            DecisionReason.DEADLINE
            if isinstance(error, BudgetSpent | Overloaded)
            else DecisionReason.STAGE_UNAVAILABLE
        )
        self._records[-1] = self._records[-1].stopped(reason)
        self._is_earlier = True

    async def settle(self, emit: Emit) -> None:
        """Commit the answer that stands."""
        result, tokens = self.answer.result, self.answer.tokens
        whole = Tokens(result.token_ids, result.text, tokens.logprobs, tokens.entropies, tokens.top2_margins)
        await _emit_all(self._delivery.settle(whole, is_earlier=self._is_earlier), emit)

    def outcome(self) -> Outcome:
        """Return the outcome."""
        return Outcome(
            self.request.id,
            tuple(self._records),
            self.plan_source,
            self.policy_version,
            self.spent_ms(),
            self.policy_ms,
            self._prefilled,
        )


async def _emit_all(events: Iterable[Event], emit: Emit) -> None:
    for event in events:
        await emit(event)
