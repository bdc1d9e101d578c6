"""Requests to a cascade and their answers, as frozen values. Pure: no gRPC, no protobuf.

Fields, units and ranges are those of protos/asd/v1; costs are in cost units, times in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, Unpack


class Role(StrEnum):
    """Who wrote a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class ToolChoice(StrEnum):
    """Whether the model has to call a tool. NAMED: the one with a given name."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


class Preference(StrEnum):
    """A preference for speed or quality."""

    FASTEST = "fastest"
    BALANCED = "balanced"
    BEST = "best"


class AcceptanceMode(StrEnum):
    """Rule by which a target accepts draft tokens."""

    EXACT = "exact"
    TOLERANT = "tolerant"


class FinishReason(StrEnum):
    """Why generation ended."""

    EOS = "eos"
    LENGTH = "length"
    STOP = "stop"


class StageAction(StrEnum):
    """What a stage did. PREFILL filled the prefix cache ahead of an escalation."""

    GENERATE = "generate"
    VERIFY = "verify"
    PREFILL = "prefill"


class DecisionAction(StrEnum):
    """What to do with an answer."""

    STOP = "stop"
    ESCALATE = "escalate"


class DecisionReason(StrEnum):
    """The reason for a decision."""

    VALUE = "value"
    LAST_STAGE = "last_stage"
    MAX_COST = "max_cost"
    MAX_LATENCY = "max_latency"
    MIN_QUALITY = "min_quality"
    FIXED_STAGE = "fixed_stage"
    STATIC_PLAN = "static_plan"
    DEADLINE = "deadline"
    STAGE_UNAVAILABLE = "stage_unavailable"
    ABANDONED = "abandoned"
    OUT_OF_FAMILY = "out_of_family"


class PlanSource(StrEnum):
    """Where the first stage and the decisions came from."""

    POLICY = "policy"
    STATIC = "static"
    FIXED = "fixed"


# A member, or its value.
RoleName = Role | Literal["system", "user", "assistant", "tool"]
ToolChoiceName = ToolChoice | Literal["auto", "none", "required", "named"]
PreferenceName = Preference | Literal["fastest", "balanced", "best"]
AcceptanceModeName = AcceptanceMode | Literal["exact", "tolerant"]


def _check_number(name: str, value: object, *, whole: bool = False) -> None:
    """Raise TypeError unless a value is None or a number. bool counts as none."""
    kind = Integral if whole else Real
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise TypeError(f"{name} is a {'whole ' if whole else ''}number, not {value!r}")


def _check_names(name: str, value: object) -> None:
    """Raise TypeError unless a value is a tuple or list of strings. A string alone is refused too."""
    if not isinstance(value, tuple | list) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} is a tuple of strings, not {value!r}")


@dataclass(frozen=True)
class Tool:
    """A tool that the model may ask for. parameters: JSON Schema of its arguments, as JSON; "": none."""

    name: str
    description: str = ""
    parameters: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asked for. arguments: a JSON object, as JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    tool_calls: of the assistant. tool_call_id: of a tool, the call that it answers.
    """

    role: RoleName
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True)
class Tools:
    """Tools of a conversation. name: the one to call, with NAMED. single_call: one call an answer at most."""

    tools: tuple[Tool, ...]
    choice: ToolChoiceName = ToolChoice.AUTO
    name: str = ""
    single_call: bool = False


class Conversation(tuple[Message, ...]):
    """Messages, oldest first, with the tools that the model may call."""

    tools: Tools

    def __new__(cls, messages: Iterable[Message], tools: Tools) -> Conversation:
        """Return the messages with their tools."""
        made = super().__new__(cls, messages)
        made.tools = tools
        return made

    def __getnewargs__(self) -> tuple[tuple[Message, ...], Tools]:
        # For copies and pickles.
        return tuple(self), self.tools

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conversation) and self.tools == other.tools and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.tools))


def tools_of(turns: object) -> Tools | None:
    """Return the tools of a conversation; None if it has none."""
    return turns.tools if isinstance(turns, Conversation) else None


@dataclass(frozen=True)
class Constraint:
    """What an answer must be: a value of a JSON Schema, a match of a regular expression, or one of several.

    Exactly one is given, else TypeError is raised. json_schema: as JSON, or as the object.
    """

    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if [self.json_schema, self.regex, self.choice].count(None) != 2:
            raise TypeError("a constraint is a json_schema, a regex or a choice: give exactly one of them")
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        if self.regex is not None and not isinstance(self.regex, str):
            raise TypeError(f"regex is a string, not {self.regex!r}")
        if self.choice is not None:
            _check_names("choice", self.choice)
            object.__setattr__(self, "choice", tuple(self.choice))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None: the stage's default.

    constraint: what the answer must be. top_logprobs: how many of the likeliest tokens to report at each
    position (0 to 20); None: no log-probabilities are reported.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        # What protobuf says of a wrong type names no field.
        for name in ("temperature", "top_p"):
            _check_number(name, getattr(self, name))
        for name in ("max_new_tokens", "seed", "top_logprobs"):
            _check_number(name, getattr(self, name), whole=True)
        _check_names("stop", self.stop)
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise TypeError(f"constraint is a Constraint, not {self.constraint!r}")


@dataclass(frozen=True)
class Objective:
    """What to optimise. `quality_value` is the contract's `lambda`: the worth of a certainly right answer.

    All fields None: the policy's BALANCED. `quality_value` and `preference` exclude each other.
    """

    quality_value: float | None = None
    max_cost: float | None = None
    max_latency_ms: float | None = None
    min_quality: float | None = None
    preference: PreferenceName | None = None

    def __post_init__(self) -> None:
        for name in ("quality_value", "max_cost", "max_latency_ms", "min_quality"):
            _check_number(name, getattr(self, name))


@dataclass(frozen=True)
class Acceptance:
    """Rule by which a target stage accepts draft tokens; `threshold` belongs to "tolerant"."""

    mode: AcceptanceModeName = "exact"
    threshold: float | None = None


class Options(TypedDict, total=False):
    """Options of a question: fields of Objective, Sampling and Request."""

    preference: PreferenceName | None
    quality_value: float | None
    max_cost: float | None
    max_latency_ms: float | None
    min_quality: float | None
    max_new_tokens: int | None
    temperature: float
    top_p: float | None
    seed: int | None
    stop: Sequence[str]
    constraint: Constraint | None
    top_logprobs: int | None
    tools: Tools | Sequence[Tool] | None
    acceptance: Acceptance | None
    session_id: str
    stage: str
    chain: Sequence[str]
    task: str
    prediction: str
    allow_switch: bool


@dataclass(frozen=True)
class Request:
    """One question to a cascade: a user message, or a conversation that ends with one or a tool's result.

    input: a Conversation, where it has tools. stage: the one stage that must answer. chain: stages that all
    work on the answer; the first drafts, each later one verifies. Without either, the policy decides. task:
    type of task, such as "math": stages with an adapter for it answer with the adapter. prediction: the
    answer that is expected, which the first stage verifies as a draft. allow_switch: whether another stage
    than the one that asked for tool calls may go on with their results.
    """

    input: str | tuple[Message, ...]
    sampling: Sampling = Sampling()
    objective: Objective = Objective()
    acceptance: Acceptance | None = None
    session_id: str = ""
    stage: str = ""
    chain: tuple[str, ...] = ()
    task: str = ""
    prediction: str = ""
    allow_switch: bool = False

    def __post_init__(self) -> None:
        # protobuf's error for a wrong type names no field.
        for name in ("stage", "task", "session_id", "prediction"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} is a string, not {value!r}")
        _check_names("chain", self.chain)

    @classmethod
    def of(cls, question: Question, **options: Unpack[Options]) -> Request:
        """Return the request for a question with its options. A Request has them already.

        Raises TypeError for an unknown option, or one of the wrong type.
        """
        if isinstance(question, Request):
            if options:
                raise TypeError(f"a Request holds its options: set {', '.join(options)} there")
            return question
        given: dict[str, Any] = dict(options)
        sampling = Sampling(**_take(given, Sampling))
        objective = Objective(**_take(given, Objective))
        unknown = given.keys() - Options.__annotations__.keys()
        if unknown:
            known = ", ".join(sorted({*Options.__annotations__, "timeout_ms"}))
            raise TypeError(f"there is no option {min(unknown)}: the options are {known}")
        turns = question if isinstance(question, str) else _turns(question)
        tools = _tools(given.pop("tools", None))
        if tools is not None:
            turns = Conversation((Message(Role.USER, turns),) if isinstance(turns, str) else turns, tools)
        return cls(turns, sampling, objective, **given)


Question = str | Sequence[Message] | Request


def _tools(given: object) -> Tools | None:
    """Return the tools of an option. Raises TypeError for anything else."""
    if given is None or isinstance(given, Tools):
        return given
    if isinstance(given, list | tuple) and all(isinstance(each, Tool) for each in given):
        return Tools(tuple(given)) if given else None
    raise TypeError(f"tools are a list of Tool, or Tools, not {given!r}")


def _turns(question: object) -> tuple[Message, ...]:
    """Return a conversation's messages. Raises TypeError for anything else."""
    if isinstance(question, Conversation):
        return question
    turns = tuple(question) if isinstance(question, list | tuple) else None
    if turns is None or not all(isinstance(each, Message) for each in turns):
        raise TypeError(f"a question is a text, a list of Message or a Request, not {question!r}")
    return turns


def _take(given: dict[str, Any], kind: type[Sampling | Objective]) -> dict[str, Any]:
    """Remove the fields of a kind of value from the given options, and return them."""
    return {each.name: given.pop(each.name) for each in fields(kind) if each.name in given}


@dataclass(frozen=True)
class StageRecord:
    """What one stage did for a request.

    Counts and times are 0 if the stage failed. An enumeration that is not set is "unspecified", and a value
    that only a newer server knows is its number, here and in Answer. `p_correct` is None if the policy was
    not called or made no prediction.
    accept_lengths: tokens emitted by each pass that scored a proposal. cached_prompt_tokens: of
    prompt_tokens, from the prefix cache. model: as the stage calls it; "" if no result came. adapted: whether
    its adapter for the type of task answered. constrained: whether it kept a constraint.
    """

    stage: str
    stage_index: int
    action: StageAction | str
    latency_ms: float
    cost: float
    decision: DecisionAction | str
    reason: DecisionReason | str
    p_correct: float | None
    p_correct_stderr: float | None
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    proposed_tokens: int
    accepted_tokens: int
    forward_passes: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    text: str
    accept_lengths: tuple[int, ...] = ()
    model: str = ""
    adapted: bool = False
    constrained: bool = False


@dataclass(frozen=True)
class Answer:
    """The answer to one request, with one record per stage that was called, in order.

    `out_of_family`: the prompt is unlike all that the policy was fitted to, so `p_correct` is None.
    `scored_tokens`: the tokens with their log-probabilities, if `top_logprobs` asked for them. `content`: the
    text without its tool calls.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    tokenizer_fingerprint: str
    finish_reason: FinishReason | str
    stage: str
    stage_index: int
    p_correct: float | None
    cost: float
    latency_ms: float
    policy_ms: float
    plan_source: PlanSource | str
    policy_version: str
    trace_id: str
    stages: tuple[StageRecord, ...]
    out_of_family: bool = False
    scored_tokens: Tokens | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = ""

    @property
    def message(self) -> Message:
        """The answer as a turn of the conversation, for the request that follows."""
        return Message(Role.ASSISTANT, self.content, self.tool_calls)


@dataclass(frozen=True)
class ReportReceipt:
    """What a policy service did with a report.

    reports: requests reported so far for the answer's policy. reported_before: whether this request was
    reported before. If so, the drift detector counts the first report, and a refit uses the last.
    """

    reports: int
    reported_before: bool = False


@dataclass(frozen=True)
class StageStarted:
    """A stage begins to work: it generates an answer, or verifies a draft and continues it."""

    stage: str
    stage_index: int
    action: StageAction | str


@dataclass(frozen=True)
class Candidate:
    """A token that could stand at a position. text: its bytes. logprob: natural log, at temperature 1."""

    token_id: int
    text: bytes
    logprob: float


@dataclass(frozen=True)
class TokenDetail:
    """A token's bytes, which need not be whole characters, and the likeliest tokens at its position."""

    text: bytes
    likeliest: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Tokens in order; the text that they add, which may be empty while a character is incomplete.

    details: one per token, if `top_logprobs` asked for them.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    details: tuple[TokenDetail, ...] = ()


@dataclass(frozen=True)
class Drafted:
    """Tokens that a later stage may still revise."""

    tokens: Tokens


@dataclass(frozen=True)
class Committed:
    """The first `committed_tokens` tokens are final; `tokens` holds those that were not drafts before."""

    committed_tokens: int
    tokens: Tokens = Tokens()


@dataclass(frozen=True)
class Revised:
    """Everything after `kept_tokens` tokens, that is after `kept_bytes` bytes of UTF-8 text, is dropped."""

    kept_tokens: int
    kept_bytes: int


Event = StageStarted | Drafted | Committed | Revised | Answer


@dataclass(frozen=True)
class Failure:
    """Why a request of a batch has no answer. code: a google.rpc.Code. field: the one at fault, or "".

    retry_after_s: seconds after which the same request may succeed; None: not known.
    """

    code: int
    message: str
    field: str
    retry_after_s: float | None = None


@dataclass(frozen=True)
class BatchItem:
    """The outcome of `requests[index]` of a batch."""

    index: int
    outcome: Answer | Failure


@dataclass(frozen=True)
class StageDescription:
    """A stage of the cascade. The fields of its model are empty while the stage is unavailable.

    adapters: types of task that its model has adapters for. constrains, takes_tools: whether it keeps
    constraints, and knows tools. most_top_logprobs: how many likeliest tokens it reports. verifies_inside:
    whether it verifies a draft in the request that writes the answer.
    """

    stage: str
    stage_index: int
    model: str
    engine: str
    parameters: int
    context_length: int
    cost: float
    available: bool
    queue_depth: int
    asleep: bool = False
    adapters: tuple[str, ...] = ()
    constrains: bool = False
    takes_tools: bool = False
    most_top_logprobs: int = 0
    verifies_inside: bool = False


@dataclass(frozen=True)
class PolicyStage:
    """The policy's figures for a stage, from its calibration prompts."""

    stage: str
    cost: float
    latency_ms: float
    accuracy: float
    calibration_error: float


@dataclass(frozen=True)
class PolicyDescription:
    """The policy in force."""

    policy_version: str
    stages: tuple[PolicyStage, ...]
    quality_value_fastest: float
    quality_value_balanced: float
    quality_value_best: float
    train_prompts: int
    calibration_prompts: int


@dataclass(frozen=True)
class Description:
    """Description of a cascade. `policy` is None while the policy service is unavailable."""

    stages: tuple[StageDescription, ...]
    policy: PolicyDescription | None
    static_plan: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class StreamedText:
    """The text of a stream so far: the final part, and the draft after it.

    `ends` holds (tokens, bytes) from the answer's start to the end of each chunk. Commits count tokens, but
    text comes in chunks, so a commit takes effect up to the last chunk that it covers completely.
    """

    text: str = ""
    final_bytes: int = 0
    ends: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def final(self) -> str:
        """The part that will not change."""
        return self.text.encode()[: self.final_bytes].decode(errors="ignore")

    @property
    def draft(self) -> str:
        """The part that a later stage may revise."""
        return self.text[len(self.final) :]

    def after(self, event: Event) -> StreamedText:
        """Return the text after an event."""
        match event:
            case Drafted(tokens):
                return self._add(tokens)
            case Committed(committed_tokens, tokens):
                grown = self._add(tokens) if tokens.token_ids or tokens.text else self
                covered = [end for count, end in grown.ends if count <= committed_tokens]
                return StreamedText(grown.text, max([self.final_bytes, *covered]), grown.ends)
            case Revised(kept_tokens, kept_bytes):
                kept = self.text.encode()[:kept_bytes].decode(errors="ignore")
                ends = tuple(end for end in self.ends if end[0] < kept_tokens)
                return StreamedText(
                    kept, min(self.final_bytes, kept_bytes), (*ends, (kept_tokens, kept_bytes))
                )
            case Answer(text=text):
                return StreamedText(text, len(text.encode()), ((len(event.token_ids), len(text.encode())),))
            case StageStarted():
                return self

    def _add(self, tokens: Tokens) -> StreamedText:
        count, size = self.ends[-1] if self.ends else (0, 0)
        end = (count + len(tokens.token_ids), size + len(tokens.text.encode()))
        return StreamedText(self.text + tokens.text, self.final_bytes, (*self.ends, end))
