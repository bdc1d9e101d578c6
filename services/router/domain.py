"""The router's own values; asd.values has those that callers share. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from asd.values import DecisionAction, FinishReason, Request, StageAction

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from asd.errors import AsdError
    from asd.values import DecisionReason, PlanSource, ToolCall


class Overload(Enum):
    """What happens to requests while they arrive faster than the stages answer."""

    QUEUE = "queue"  # They wait. One that the queue leaves no time for before its deadline is refused.
    DEGRADE = "degrade"  # They wait, and a queue adds to a stage's cost: lesser stages may answer.
    SHED = "shed"  # They are refused if the queue at the wanted stage is longer than an answer.


class Refusal(Enum):
    """Why a request was refused for lack of capacity."""

    CONCURRENCY = "concurrency"  # The router has max_concurrent requests in flight.
    DEADLINE = "deadline"  # The queue at the stage leaves no time for it.
    LINE = "line"  # The stage has a queue, and overload is SHED.
    STAGE_FULL = "stage_full"  # The stage refused it.


class Visibility(Enum):
    """Which events a caller sees."""

    OUTCOME = "outcome"  # The outcome alone.
    COMMITTED = "committed"  # Final tokens.
    DRAFTS = "drafts"  # Drafts as well, though they may be revised.


@dataclass(frozen=True, slots=True)
class RoutedRequest(Request):
    """A caller's request with the id that the router gave it.

    seed_is_free: whether the router drew the seed, since the caller gave none. is_held: whether `stage` is
    the one that asked for the tool calls whose results the request has.
    """

    id: str = field(kw_only=True)
    seed_is_free: bool = field(default=False, kw_only=True)
    is_held: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Skip the checks of Request: protobuf has checked the types already."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One model of the cascade. cost: of a whole answer, in cost units. timeout_ms: of one call."""

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

    fingerprint: of the tokenizer; "" if the stage did not send one. details: the contract's messages as they
    came; one per id, if the request asks for them.
    """

    ids: Sequence[int]
    text: str
    logprobs: Sequence[float] = ()
    entropies: Sequence[float] = ()
    top2_margins: Sequence[float] = ()
    fingerprint: str = ""
    details: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """What a stage made of a draft. proposed_tokens includes the draft's end-of-sequence token, if any.

    while_writing: the draft took no pass of its own.
    """

    proposed_tokens: int
    accepted_tokens: int
    ranks: Sequence[int] = ()
    ids_used: bool = True
    while_writing: bool = False


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens and forward passes of a stage call."""

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
    """Calls of other callers in flight at a replica when it ended an answer.

    replica: its address. replicas: addresses of all replicas. when: by the router's clock, in seconds.
    """

    replica: str
    calls: int
    replicas: Collection[str]
    when: float


@dataclass(frozen=True, slots=True)
class StageResult:
    """Result of a stage call. token_ids: without the end-of-sequence token.

    accept_lengths: tokens emitted by each pass that scored a proposal. is_adapted: whether the call named an
    adapter; the model's name does not tell. others: calls of other callers. context_length: the model's, in
    tokens; 0: unknown. is_constrained: whether a constraint was kept. is_prediction: the
    caller expects this answer; no stage has written it.
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
    is_constrained: bool = False
    is_prediction: bool = False


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """A stage's answer and its evidence. latency_ms: from the call to the stage's last message.

    first_message_ms: from the call to its first message; None: it sent none before its result.
    draft_stage: name of the stage whose draft it verified, or "". is_whole: False if the call was cut off;
    the stage's own times are then unknown. is_pipelined: whether the draft was still being written; the
    stage's times then include its drafter's.
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
    first_message_ms: float | None = None

    @property
    def model(self) -> str:
        """Name of the model that answered."""
        return self.result.model or self.stage.name


@dataclass(frozen=True, slots=True)
class StageKnowledge:
    """The router's view of a stage. queue_depth: calls in flight. expected_queue_ms: expected wait."""

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

    p_escalate: probability that the request escalates. likely_next: to this stage; None: to none. abandon: by
    ascending number of tokens. abandon_to: the stage that verifies an abandoned draft.
    """

    first_stage: int
    policy_version: str = ""
    p_escalate: float = 0.0
    likely_next: int | None = None
    abandon: tuple[AbandonRule, ...] = ()
    abandon_to: int | None = None


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill ahead of an escalation. prompt_tokens: length of the prompt."""

    stage: Stage
    prompt_tokens: int
    latency_ms: float
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with an answer.

    next_stage: index of the stage to call, for ESCALATE. p_correct: calibrated probability that the answer
    is correct. It is None if the policy was not called, or if the prompt is unlike all that the policy was
    fitted to (is_out_of_family). expected_ms: expected latency of next_stage; None: unknown.
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
        """Return the decision as a stop, with the router's own reason."""
        return replace(self, action=DecisionAction.STOP, reason=reason, next_stage=None, expected_ms=None)


@dataclass(frozen=True, slots=True)
class Record:
    """A stage's answer and the decision on it."""

    answer: StageAnswer
    decision: Decision

    def stopped(self, reason: DecisionReason) -> Record:
        """Return the record with a stop as its decision, for the router's own reason."""
        return Record(self.answer, self.decision.stopped(reason))


@dataclass(frozen=True, slots=True)
class OpenCall:
    """One of this router's calls in flight at a stage.

    stage: its index. number: ascends in order of start. depth: calls in flight when it began, itself
    included. began: clock seconds. expected_ms: the wait that was expected for it.
    """

    stage: int
    number: int
    depth: int
    began: float
    expected_ms: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a request's plan came from. policy_ms: time spent on calls to the policy."""

    source: PlanSource
    policy_version: str = ""
    policy_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """A planned call to a stage.

    decision: on the answer before it; None: there is none. draft: the answer that the stage verifies; None:
    it generates, or verifies drafts while the drafters write them. skip_reason: why an existing draft is not
    used, or "". timeout_ms: of the call. leave_after_ms: time after which the request goes on without the
    stage, if it can. is_final: whether its answer will stand. abandon: rules by which its draft is abandoned.
    prefill: a later stage whose prefix cache is filled meanwhile. prefill_ms: timeout of that.
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
    """The end of a request: the latest answer stands. decision: on that answer."""

    decision: Decision
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class CallFailure:
    """How a stage's call failed. call_ms: time that it had for its own work.

    has_heard: whether it sent anything. call: None if no call was made, and for drafters.
    """

    stage: Stage
    error: AsdError
    call_ms: float
    has_heard: bool
    call: OpenCall | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a step's calls.

    answers: each with the number of calls in flight at its stage when it began, itself included; the step's
    own answer is last. failures: of drafters. refusals: errors of stages that refused a prefill, by index.
    is_abandoned: whether the answer is an abandoned draft.
    """

    answers: tuple[tuple[StageAnswer, int], ...] = ()
    failures: tuple[CallFailure, ...] = ()
    refusals: Mapping[int, AsdError] = field(default_factory=dict)
    is_abandoned: bool = False


class StageFailed(Exception):  # noqa: N818 - an error is named by its cause
    """A step's stage has failed. drafters: failures of its drafters."""

    def __init__(self, failure: CallFailure, drafters: tuple[CallFailure, ...] = ()) -> None:
        super().__init__(failure.error.message)
        self.failure = failure
        self.drafters = drafters


@dataclass(frozen=True, slots=True)
class StageStart:
    """A stage begins to work on the request."""

    stage: Stage
    action: StageAction


@dataclass(frozen=True, slots=True)
class DraftPart:
    """Tokens that may still be revised."""

    tokens: ScoredTokens


@dataclass(frozen=True, slots=True)
class FinalPart:
    """The answer's first count tokens are final. tokens: those not shown before, or None."""

    count: int
    tokens: ScoredTokens | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """Everything after this many tokens, and bytes of UTF-8, is dropped."""

    kept_tokens: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class RoutedAnswer:
    """The answer to a request: the last record's, with the records that led to it.

    scored_tokens: the answer's, if the request asks for their log-probabilities. tool_calls: those in the
    answer. content: its text without them; "" if there are none.
    """

    request_id: str
    records: tuple[Record, ...]
    plan_source: PlanSource
    policy_version: str
    latency_ms: float
    policy_ms: float
    prefilled: Prefilled | None = None
    scored_tokens: ScoredTokens | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = ""

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


def predicted(text: str) -> StageResult:
    """Return the answer that a caller expects, as a draft for the first stage."""
    return StageResult(text, (), "", FinishReason.EOS, TokenUsage(), Timing(), is_prediction=True)


async def show_nothing(event: Event) -> None:
    """Ignore an event: the caller sees the outcome alone."""
