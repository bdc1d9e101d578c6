"""Converts between messages of the contract and asd.values."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.descriptor import FieldDescriptor

from asd.errors import InvalidRequest
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from asd.values import (
    Acceptance,
    AcceptanceMode,
    Answer,
    BatchItem,
    Candidate,
    Committed,
    Constraint,
    Conversation,
    DecisionAction,
    DecisionReason,
    Description,
    Drafted,
    Event,
    Failure,
    FinishReason,
    Message,
    Objective,
    PlanSource,
    PolicyDescription,
    PolicyStage,
    Preference,
    ReportReceipt,
    Request,
    Revised,
    Role,
    Sampling,
    StageAction,
    StageDescription,
    StageRecord,
    StageStarted,
    TokenDetail,
    Tokens,
    Tool,
    ToolCall,
    ToolChoice,
    Tools,
    tools_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper as EnumTypeWrapper

# Largest request to the router: gRPC's default, which callers know. Messages between services may be twice as
# large.
MAX_REQUEST_BYTES = 4 * 1024 * 1024

Member = TypeVar("Member", bound=StrEnum)
Input = str | tuple[Message, ...]
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")

# Largest values of the types of counts.
_LARGEST = {FieldDescriptor.TYPE_UINT32: 2**32 - 1, FieldDescriptor.TYPE_UINT64: 2**64 - 1}


class Enumeration(Generic[Member]):
    """One enumeration in both forms: members of asd.values, and numbers of the contract.

    members: by number, without UNSPECIFIED. numbers: by member, or by its value.
    """

    def __init__(self, kind: type[Member], enum: EnumTypeWrapper[Any]) -> None:
        self.name = kind.__name__
        self._prefix = f"{_CAPITAL.sub('_', self.name).upper()}_"
        self.members: dict[int, Member] = {enum.Value(self._prefix + each.name): each for each in kind}
        self.numbers: dict[str, Any] = {member: number for number, member in self.members.items()}

    def number_of(self, name: str, field: str) -> Any:
        """Return the number of a member, or of its value. Raises InvalidRequest for another name.

        field: what the name was given for.
        """
        number = self.numbers.get(name) if isinstance(name, str) else None
        if number is None:
            known = ", ".join(f'"{each}"' for each in self.numbers)
            raise InvalidRequest(f"{field} is one of {known}, not {name!r}", field=field)
        return number

    def read(self, number: int) -> Member | str:
        """Return the member with a number.

        "unspecified" for 0; the number as text if only a newer server knows it.
        """
        return self.members.get(number) or (str(number) if number else "unspecified")


ROLES = Enumeration(Role, common_pb2.Role)
TOOL_CHOICES = Enumeration(ToolChoice, common_pb2.ToolChoice)
PREFERENCES = Enumeration(Preference, common_pb2.Preference)
ACCEPTANCE_MODES = Enumeration(AcceptanceMode, common_pb2.AcceptanceMode)
FINISH_REASONS = Enumeration(FinishReason, common_pb2.FinishReason)
STAGE_ACTIONS = Enumeration(StageAction, common_pb2.StageAction)
DECISION_ACTIONS = Enumeration(DecisionAction, policy_pb2.DecisionAction)
DECISION_REASONS = Enumeration(DecisionReason, policy_pb2.DecisionReason)
PLAN_SOURCES = Enumeration(PlanSource, cascade_pb2.PlanSource)


# To the cascade.


def request_to(request: Request) -> cascade_pb2.GenerateRequest:
    """Return a request as a message.

    Raises InvalidRequest for values that no message can hold: a negative count, text that is not UTF-8, more
    bytes than a request may have. All other rules are the server's.
    """
    message = cascade_pb2.GenerateRequest(sampling=sampling_to(request.sampling))
    set_input(message, request.input)
    message.objective.CopyFrom(objective_to(request.objective))
    if request.acceptance is not None:
        message.acceptance.CopyFrom(acceptance_to(request.acceptance))
    _assign(message, "session_id", request.session_id)
    _assign(message, "stage", request.stage)
    _assign(message, "task", request.task)
    _assign(message, "prediction", request.prediction)
    message.allow_switch = request.allow_switch
    _extend(message.chain, request.chain, "chain")
    size = message.ByteSize()
    if size > MAX_REQUEST_BYTES:
        field = _largest(request.input)
        raise InvalidRequest(
            f"{field} is too long: the request has {size:,} bytes, and {MAX_REQUEST_BYTES:,} are the most "
            "that it may have",
            field=field,
        )
    return message


def report_to(answer: Answer, *, correct: bool) -> policy_pb2.ReportRequest:
    """Return the report on whether an answer was correct.

    Raises InvalidRequest if the policy gave no probability for the answer.
    """
    if answer.out_of_family:
        raise InvalidRequest(
            "the answer has no predicted quality (its prompt is unlike what the policy was fitted to): there "
            "is nothing to compare a report with",
            field="p_correct",
        )
    if answer.p_correct is None or not answer.policy_version:
        raise InvalidRequest(
            f"the policy did not judge this answer (plan_source: {answer.plan_source}), so there is nothing "
            "to report about it",
            field="p_correct",
        )
    return policy_pb2.ReportRequest(
        request_id=answer.request_id,
        stage=answer.stage,
        p_correct=answer.p_correct,
        policy_version=answer.policy_version,
        correct=correct,
    )


def set_input(message: Any, value: Input) -> None:
    """Put a prompt or a conversation into a message's `input`. Raises InvalidRequest as request_to does."""
    if isinstance(value, str):
        _assign(message, "prompt", value)
        return
    conversation = message.conversation
    conversation.SetInParent()
    for index, turn in enumerate(value):
        where = f"conversation.messages[{index}]"
        try:
            conversation.messages.add(
                role=ROLES.number_of(turn.role, f"{where}.role"),
                content=turn.content,
                tool_calls=[
                    _call_to(each, f"{where}.tool_calls[{i}]") for i, each in enumerate(turn.tool_calls)
                ],
                tool_call_id=turn.tool_call_id,
            )
        except UnicodeEncodeError as error:
            raise _not_utf8(f"{where}.content") from error
    tools = tools_of(value)
    if tools is not None:
        conversation.tools.CopyFrom(_tools_to(tools))


def _call_to(call: ToolCall, where: str) -> common_pb2.ToolCall:
    try:
        return common_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
    except UnicodeEncodeError as error:
        raise _not_utf8(where) from error


def _tools_to(tools: Tools) -> common_pb2.Tools:
    try:
        return common_pb2.Tools(
            tools=[
                common_pb2.Tool(name=each.name, description=each.description, parameters=each.parameters)
                for each in tools.tools
            ],
            choice=TOOL_CHOICES.number_of(tools.choice, "conversation.tools.choice"),
            name=tools.name,
            single_call=tools.single_call,
        )
    except UnicodeEncodeError as error:
        raise _not_utf8("conversation.tools") from error


def _largest(value: Input) -> str:
    if isinstance(value, str):
        return "prompt"
    sizes = [len(turn.content) for turn in value]
    return f"conversation.messages[{sizes.index(max(sizes))}].content" if sizes else "conversation"


def sampling_to(sampling: Sampling) -> common_pb2.Sampling:
    """Return sampling as a message. Raises InvalidRequest as request_to does."""
    try:
        return common_pb2.Sampling(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
            constraint=None if sampling.constraint is None else _constraint_to(sampling.constraint),
            top_logprobs=sampling.top_logprobs,
        )
    except ValueError:
        # protobuf's error names no field, so assign them one by one.
        message = common_pb2.Sampling()
        for name in ("max_new_tokens", "seed", "top_logprobs"):
            value = getattr(sampling, name)
            if value is not None:
                _assign(message, name, value, "sampling.")
        _extend(message.stop, sampling.stop, "sampling.stop")
        raise


def _constraint_to(constraint: Constraint) -> common_pb2.Constraint:
    message = common_pb2.Constraint()
    where = "sampling.constraint."
    if constraint.choice is not None:
        message.choice.SetInParent()
        _extend(message.choice.texts, constraint.choice, f"{where}choice.texts")
    elif constraint.regex is not None:
        _assign(message, "regex", constraint.regex, where)
    else:
        assert isinstance(constraint.json_schema, str)
        _assign(message, "json_schema", constraint.json_schema, where)
    return message


def details_to(details: Sequence[TokenDetail]) -> list[common_pb2.TokenDetail]:
    """Return tokens' details as messages."""
    return [
        common_pb2.TokenDetail(
            text=each.text,
            likeliest=[
                common_pb2.Candidate(token_id=c.token_id, text=c.text, logprob=c.logprob)
                for c in each.likeliest
            ],
        )
        for each in details
    ]


def objective_to(objective: Objective) -> common_pb2.Objective:
    """Return an objective as a message."""
    preference = objective.preference
    message = common_pb2.Objective(
        max_cost=objective.max_cost,
        max_latency_ms=objective.max_latency_ms,
        min_quality=objective.min_quality,
        preference=None if preference is None else PREFERENCES.number_of(preference, "objective.preference"),
    )
    if objective.quality_value is not None:
        # `lambda` is a keyword of Python.
        setattr(message, "lambda", objective.quality_value)
    return message


def acceptance_to(acceptance: Acceptance) -> common_pb2.Acceptance:
    """Return an acceptance as a message."""
    return common_pb2.Acceptance(
        mode=ACCEPTANCE_MODES.number_of(acceptance.mode, "acceptance.mode"), threshold=acceptance.threshold
    )


def _assign(message: Any, name: str, value: str | int, path: str = "") -> None:
    try:
        setattr(message, name, value)
    except UnicodeEncodeError as error:
        raise _not_utf8(path + name) from error
    except ValueError as error:
        most = _LARGEST.get(message.DESCRIPTOR.fields_by_name[name].type)
        wanted = str(error) if most is None else f"it must be from 0 to {most}"
        raise InvalidRequest(f"{name} cannot be {value}: {wanted}", field=path + name) from error


def _extend(texts: Any, values: tuple[str, ...], field: str) -> None:
    for index, value in enumerate(values):
        try:
            texts.append(value)
        except UnicodeEncodeError as error:
            raise _not_utf8(f"{field}[{index}]") from error


def _not_utf8(field: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is not valid UTF-8", field=field)


# From callers, for services. The messages were checked (services.common.validation).


def input_from(message: Any) -> Input:
    """Return the prompt or the conversation of a message's `input`."""
    if message.WhichOneof("input") == "prompt":
        prompt: str = message.prompt
        return prompt
    conversation = message.conversation
    turns = tuple(
        Message(
            ROLES.members[turn.role], turn.content, tuple(map(_call_from, turn.tool_calls)), turn.tool_call_id
        )
        for turn in conversation.messages
    )
    return Conversation(turns, _tools_from(conversation.tools)) if conversation.HasField("tools") else turns


def _call_from(message: common_pb2.ToolCall) -> ToolCall:
    return ToolCall(message.id, message.name, message.arguments)


def _tools_from(message: common_pb2.Tools) -> Tools:
    return Tools(
        tuple(Tool(each.name, each.description, each.parameters) for each in message.tools),
        TOOL_CHOICES.members.get(message.choice, ToolChoice.AUTO),
        message.name,
        message.single_call,
    )


def _constraint_from(message: common_pb2.Constraint) -> Constraint:
    match message.WhichOneof("rule"):
        case "choice":
            return Constraint(choice=tuple(message.choice.texts))
        case "regex":
            return Constraint(regex=message.regex)
        case _:
            return Constraint(json_schema=message.json_schema)


def sampling_from(message: common_pb2.Sampling) -> Sampling:
    """Return sampling as a value."""
    return Sampling(
        max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else None,
        temperature=message.temperature,
        top_p=message.top_p if message.HasField("top_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        constraint=_constraint_from(message.constraint) if message.HasField("constraint") else None,
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
    )


def objective_from(message: common_pb2.Objective) -> Objective:
    """Return an objective as a value."""
    has = message.HasField
    return Objective(
        quality_value=getattr(message, "lambda") if has("lambda") else None,
        max_cost=message.max_cost if has("max_cost") else None,
        max_latency_ms=message.max_latency_ms if has("max_latency_ms") else None,
        min_quality=message.min_quality if has("min_quality") else None,
        preference=PREFERENCES.members[message.preference] if has("preference") else None,
    )


def acceptance_from(message: common_pb2.Acceptance) -> Acceptance:
    """Return an acceptance as a value."""
    threshold = message.threshold if message.HasField("threshold") else None
    return Acceptance(ACCEPTANCE_MODES.members[message.mode], threshold)


# From the cascade.


def event_from(message: cascade_pb2.GenerateStreamResponse) -> Event | None:
    """Return an event of a stream; None for a kind that this version does not know."""
    match message.WhichOneof("event"):
        case "stage_started":
            started = message.stage_started
            return StageStarted(started.stage, started.stage_index, STAGE_ACTIONS.read(started.action))
        case "draft":
            return Drafted(_tokens_from(message.draft))
        case "commit":
            return Committed(message.commit.committed_tokens, _tokens_from(message.commit.tokens))
        case "revise":
            return Revised(message.revise.kept_tokens, message.revise.kept_bytes)
        case "response":
            return answer_from(message.response)
        case _:
            return None


def batch_item_from(message: cascade_pb2.GenerateBatchResponse) -> BatchItem:
    """Return the outcome of one request of a batch."""
    if message.WhichOneof("outcome") == "response":
        return BatchItem(message.index, answer_from(message.response))
    error = message.error
    after_s = error.retry_after_ms / 1000.0 if error.HasField("retry_after_ms") else None
    return BatchItem(message.index, Failure(error.code, error.message, error.field, after_s))


def answer_from(message: cascade_pb2.GenerateResponse) -> Answer:
    """Return an answer as a value."""
    return Answer(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        finish_reason=FINISH_REASONS.read(message.finish_reason),
        stage=message.stage,
        stage_index=message.stage_index,
        p_correct=message.p_correct if message.HasField("p_correct") else None,
        cost=message.cost,
        latency_ms=message.latency_ms,
        policy_ms=message.policy_ms,
        plan_source=PLAN_SOURCES.read(message.plan_source),
        policy_version=message.policy_version,
        trace_id=message.trace_id,
        stages=tuple(_record_from(record) for record in message.stages),
        out_of_family=message.out_of_family,
        scored_tokens=_tokens_from(message.scored_tokens) if message.HasField("scored_tokens") else None,
        tool_calls=tuple(map(_call_from, message.tool_calls)),
        content=message.content if message.tool_calls else message.text,
    )


def _record_from(message: cascade_pb2.StageRecord) -> StageRecord:
    usage, timing = message.usage, message.timing
    return StageRecord(
        stage=message.stage,
        stage_index=message.stage_index,
        action=STAGE_ACTIONS.read(message.action),
        latency_ms=message.latency_ms,
        cost=message.cost,
        decision=DECISION_ACTIONS.read(message.decision),
        reason=DECISION_REASONS.read(message.reason),
        p_correct=message.p_correct if message.HasField("p_correct") else None,
        p_correct_stderr=message.p_correct_stderr if message.HasField("p_correct_stderr") else None,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        proposed_tokens=usage.proposed_tokens,
        accepted_tokens=usage.accepted_tokens,
        forward_passes=usage.forward_passes,
        queue_ms=timing.queue_ms,
        prefill_ms=timing.prefill_ms,
        decode_ms=timing.decode_ms,
        text=message.text,
        accept_lengths=tuple(message.accept_lengths),
        model=message.model,
        adapted=message.adapted,
        constrained=message.constrained,
    )


def description_from(message: cascade_pb2.DescribeResponse) -> Description:
    """Return the state of a cascade as a value."""
    return Description(
        stages=tuple(
            StageDescription(
                stage=stage.stage,
                stage_index=stage.stage_index,
                model=stage.model,
                engine=stage.engine,
                parameters=stage.parameters,
                context_length=stage.context_length,
                cost=stage.cost,
                available=stage.available,
                queue_depth=stage.queue_depth,
                asleep=stage.asleep,
                adapters=tuple(stage.adapters),
                constrains=stage.constrains,
                takes_tools=stage.takes_tools,
                most_top_logprobs=stage.most_top_logprobs,
                verifies_inside=stage.verifies_inside,
            )
            for stage in message.stages
        ),
        policy=_policy_from(message.policy) if message.HasField("policy") else None,
        static_plan=tuple(message.static_plan),
        version=message.version,
    )


def receipt_from(message: policy_pb2.ReportResponse) -> ReportReceipt:
    """Return the receipt of a report as a value."""
    return ReportReceipt(message.reports, message.reported_before)


def _policy_from(message: policy_pb2.PolicyServiceDescribeResponse) -> PolicyDescription:
    return PolicyDescription(
        policy_version=message.policy_version,
        stages=tuple(
            PolicyStage(stage.stage, stage.cost, stage.latency_ms, stage.accuracy, stage.calibration_error)
            for stage in message.stages
        ),
        quality_value_fastest=message.lambda_fastest,
        quality_value_balanced=message.lambda_balanced,
        quality_value_best=message.lambda_best,
        train_prompts=message.train_prompts,
        calibration_prompts=message.calibration_prompts,
    )


def _tokens_from(message: common_pb2.TokenChunk) -> Tokens:
    details = tuple(
        TokenDetail(each.text, tuple(Candidate(c.token_id, c.text, c.logprob) for c in each.likeliest))
        for each in message.details
    )
    return Tokens(tuple(message.token_ids), message.text, tuple(message.logprobs), details)
