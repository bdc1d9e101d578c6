"""Values that the router alone knows; asd.values has those of its callers. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from asd.values import DecisionAction, Request, StageAction

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from asd.errors import AsdError
    from asd.values import DecisionReason, FinishReason, PlanSource


class Overload(Enum):
    """What becomes of requests while more is asked than the stages compute."""

    QUEUE = "queue"  # They wait; one whose deadline the line leaves no time for is refused.
    DEGRADE = "degrade"  # They wait, and a stage with a line is dearer: others may answer, less well.
    SHED = "shed"  # They are refused where the line at the wanted stage is longer than an answer.


class Refusal(Enum):
    """Why there was no room for a request."""

    CONCURRENCY = "concurrency"  # The router has max_concurrent requests under way.
    DEADLINE = "deadline"  # The line at the stage leaves no time for it.
    LINE = "line"  # The stage has a line, and overload is SHED.
    STAGE_FULL = "stage_full"  # The stage refused it.


class Visibility(Enum):
    """What a caller sees while an answer is made."""

    OUTCOME = "outcome"  # The outcome alone.
    COMMITTED = "committed"  # Final tokens.
    DRAFTS = "drafts"  # Drafts as well, though they may be revised.


@dataclass(frozen=True, slots=True)
class RoutedRequest(Request):
    """A caller's request, under the id that the router gave it."""

    id: str = field(kw_only=True)

    def __post_init__(self) -> None:
        """Leave out what a Request checks: the message has checked the types."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One model of the cascade. cost: cost units of a whole answer. timeout_ms: budget of one call."""

    name: str
    index: int
    cost: float
    timeout_ms: float
    target: str = ""
    model: str = ""

    def __str__(self) -> str:
        return f"stage {self.name} at {self.target}" if self.target else f"stage {self.name}"


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens in order. logprobs (nats), entropies (nats) and top2_margins have one entry per id.

    fingerprint: of the tokenizer; "" where the stage did not say.
    """

    ids: Sequence[int]
    text: str
    logprobs: Sequence[float] = ()
    entropies: Sequence[float] = ()
    top2_margins: Sequence[float] = ()
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """How a draft fared. proposed counts the end-of-sequence token where the draft ended with it."""

    proposed_tokens: int
    accepted_tokens: int
    ranks: Sequence[int] = ()
    ids_used: bool = True


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What a stage call consumed."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    forward_passes: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of a stage call by the stage's clock, in milliseconds."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class PeerLoad:
    """Calls of others than this router under way at a replica, as an answer from there ended.

    replica: its address. replicas: those of all that the stage has. when: by the router's clock, in seconds.
    """

    replica: str
    calls: int
    replicas: Collection[str]
    when: float


@dataclass(frozen=True, slots=True)
class StageResult:
    """Outcome of a stage call. token_ids: without the end-of-sequence token.

    accept_lengths: tokens emitted by each pass that scored a proposal. is_adapted: whether the stage was
    asked for its adapter for the type of task; the model's name does not tell. context_length: of its model,
    in tokens; 0: not known.
    """

    text: str
    token_ids: Sequence[int]
    tokenizer_fingerprint: str
    finish_reason: FinishReason
    usage: TokenUsage
    timing: Timing
    model: str = ""
    accept_lengths: Sequence[int] = ()
    is_adapted: bool = False
    others: PeerLoad | None = None
    context_length: int = 0


StageEvent = ScoredTokens | Verification | StageResult


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """A stage's whole answer with what it shows. latency_ms: from the call to the stage's last message.

    draft_stage: name of the stage whose draft it verified, or "". is_whole: False where the call was cut off,
    and the stage's own times are not known. is_pipelined: whether the draft was being written meanwhile, and
    the stage's times have its drafter's in them.
    """

    stage: Stage
    action: StageAction
    result: StageResult
    tokens: ScoredTokens
    verification: Verification | None
    latency_ms: float
    cost: float
    draft_stage: str = ""
    is_whole: bool = True
    is_pipelined: bool = False


@dataclass(frozen=True, slots=True)
class StageKnowledge:
    """What the router knows of a stage.

    queue_depth: calls under way. expected_queue_ms: wait to be expected.
    """

    stage: str
    available: bool
    queue_depth: int = 0
    expected_queue_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class AbandonRule:
    """A draft whose first tokens have a lower mean log-probability (nats) is not worth finishing."""

    tokens: int
    mean_logprob: float


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """The policy's choice of a first stage, by its index.

    p_escalate: probability that a later stage will be asked. likely_next: that stage; None: there is none.
    abandon: by ascending number of tokens. abandon_to: the stage that goes on with a draft that was given up.
    """

    first_stage: int
    policy_version: str = ""
    p_escalate: float = 0.0
    likely_next: int | None = None
    abandon: tuple[AbandonRule, ...] = ()
    abandon_to: int | None = None


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that was put into a stage's cache ahead of an escalation. prompt_tokens: of the prompt."""

    stage: Stage
    prompt_tokens: int
    latency_ms: float
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with an answer.

    next_stage: index of the stage to ask, for ESCALATE. p_correct: calibrated probability that the judged
    answer is correct; None where the policy was not asked, or had nothing to predict, as the prompt is unlike
    all that it was fitted to: is_out_of_family. expected_ms: latency to be expected of next_stage; None:
    unknown.
    """

    action: DecisionAction
    reason: DecisionReason
    next_stage: int | None = None
    p_correct: float | None = None
    p_correct_stderr: float | None = None
    policy_version: str = ""
    expected_ms: float | None = None
    predict_us: float | None = None
    is_out_of_family: bool = False

    def stopped(self, reason: DecisionReason) -> Decision:
        """Return the decision turned into a stop, for a reason of the router's."""
        return replace(self, action=DecisionAction.STOP, reason=reason, next_stage=None, expected_ms=None)


@dataclass(frozen=True, slots=True)
class Record:
    """A stage's answer and what was decided on it."""

    answer: StageAnswer
    decision: Decision

    def stopped(self, reason: DecisionReason) -> Record:
        """Return the record with the answer standing, for a reason of the router's."""
        return Record(self.answer, self.decision.stopped(reason))


@dataclass(frozen=True, slots=True)
class OpenCall:
    """One of this router's calls under way at a stage.

    stage: its index. number: later calls have higher ones. depth: how many there were as it began, itself
    included. began: by the clock, in seconds. expected_ms: the wait that was expected for it.
    """

    stage: int
    number: int
    depth: int
    began: float
    expected_ms: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who planned a request, and for how many milliseconds the policy was asked."""

    source: PlanSource
    policy_version: str = ""
    policy_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """A stage's call, as it was planned.

    decision: on the answer before it; None: there is none. draft: the answer that the stage verifies; None:
    it writes by itself, or verifies what the drafters write meanwhile. skip_reason: why it works without a
    draft that there is. timeout_ms: of the call. leave_after_ms: after so long the request goes on without
    it, where it can. is_final: whether its answer will stand. abandon: when its draft is not worth finishing.
    prefill: the stage that the request likely escalates to, whose prefix cache is filled meanwhile, for
    prefill_ms at most.
    """

    stage: Stage
    provenance: Provenance
    timeout_ms: float
    leave_after_ms: float
    is_final: bool
    decision: Decision | None = None
    draft: StageResult | None = None
    drafters: tuple[Stage, ...] = ()
    skip_reason: str = ""
    abandon: tuple[AbandonRule, ...] = ()
    prefill: Stage | None = None
    prefill_ms: float = 0.0

    @property
    def action(self) -> StageAction:
        """What the stage does."""
        return StageAction.VERIFY if self.draft or self.drafters else StageAction.GENERATE


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of a request: an answer stands. decision: on it."""

    decision: Decision
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class CallFailure:
    """How a stage's call failed. call_ms: time that it had for its own work.

    has_heard: whether anything came from it. call: None where none was made, and of drafters.
    """

    stage: Stage
    error: AsdError
    call_ms: float
    has_heard: bool
    call: OpenCall | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What the calls of a step came to.

    answers: each with the calls that were under way at its stage as it began, itself included; the step's own
    is the last one. failures: of drafters. refusals: of a stage that refused the prompt as its prefix cache
    was filled, by its index. is_abandoned: whether the answer is a draft that was not worth finishing.
    """

    answers: tuple[tuple[StageAnswer, int], ...] = ()
    failures: tuple[CallFailure, ...] = ()
    refusals: Mapping[int, AsdError] = field(default_factory=dict)
    is_abandoned: bool = False


class StageFailed(Exception):  # noqa: N818 - an error is named by its cause
    """The stage of a step has failed. drafters: those of its drafters that failed, too."""

    def __init__(self, failure: CallFailure, drafters: tuple[CallFailure, ...] = ()) -> None:
        super().__init__(failure.error.message)
        self.failure = failure
        self.drafters = drafters


@dataclass(frozen=True, slots=True)
class StageStart:
    """A stage starts on the request."""

    stage: Stage
    action: StageAction


@dataclass(frozen=True, slots=True)
class DraftPart:
    """Tokens that may still be revised."""

    tokens: ScoredTokens


@dataclass(frozen=True, slots=True)
class FinalPart:
    """Tokens that are final, counted from the answer's start. tokens: those not shown before, or None."""

    count: int
    tokens: ScoredTokens | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """Everything after these many tokens, and bytes of UTF-8, is dropped."""

    kept_tokens: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class RoutedAnswer:
    """The answer to a request: the last record's, with what led to it."""

    request_id: str
    records: tuple[Record, ...]
    plan_source: PlanSource
    policy_version: str
    latency_ms: float
    policy_ms: float
    prefilled: Prefilled | None = None

    @property
    def answer(self) -> StageAnswer:
        """The answer that stands."""
        return self.records[-1].answer

    @property
    def is_out_of_family(self) -> bool:
        """Whether the prompt is unlike all that the policy was fitted to."""
        return any(record.decision.is_out_of_family for record in self.records)

    @property
    def cost(self) -> float:
        """Sum over the stages, in cost units."""
        ahead = self.prefilled.cost if self.prefilled else 0.0
        return ahead + sum(record.answer.cost for record in self.records)


Event = StageStart | DraftPart | FinalPart | Revision | RoutedAnswer


async def show_nothing(event: Event) -> None:
    """Take an event of an answer whose caller is shown the outcome alone."""
