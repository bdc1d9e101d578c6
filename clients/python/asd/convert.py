"""Messages of the contract ↔ asd.values. Nothing here decides anything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor

from asd.errors import InvalidRequest
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from asd.values import (
    Acceptance,
    Answer,
    BatchItem,
    Committed,
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
    ReportReceipt,
    Request,
    Revised,
    Sampling,
    StageAction,
    StageDescription,
    StageRecord,
    StageStarted,
    Tokens,
)

if TYPE_CHECKING:
    from enum import StrEnum

    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper as EnumTypeWrapper

# Of a request to the router. gRPC's default, which callers know. Messages between services may be twice as
# large.
MAX_REQUEST_BYTES = 4 * 1024 * 1024

Member = TypeVar("Member", bound="StrEnum")
# Of each enumeration, the members of its values by number.
_MEMBERS: dict[type[StrEnum], dict[int, StrEnum]] = {}
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")

# Of the types that counts have.
_LARGEST = {FieldDescriptor.TYPE_UINT32: 2**32 - 1, FieldDescriptor.TYPE_UINT64: 2**64 - 1}


# To the cascade.


def request_to(request: Request) -> cascade_pb2.GenerateRequest:
    """Return a request as a message.

    Raises InvalidRequest for values that no message can hold: a negative count, text that is not UTF-8, more
    bytes than a request may have. All other rules are the server's.
    """
    message = cascade_pb2.GenerateRequest(sampling=_sampling_to(request.sampling))
    _fill_input(message, request.input)
    message.objective.CopyFrom(_objective_to(request.objective))
    if request.acceptance is not None:
        message.acceptance.CopyFrom(_acceptance_to(request.acceptance))
    _assign(message, "session_id", request.session_id)
    _assign(message, "stage", request.stage)
    _assign(message, "task", request.task)
    for index, stage in enumerate(request.chain):
        _encode(stage, f"chain[{index}]")
        message.chain.append(stage)
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
    """Return the report of how an answer turned out.

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


def _fill_input(message: cascade_pb2.GenerateRequest, value: str | tuple[Message, ...]) -> None:
    if isinstance(value, str):
        _assign(message, "prompt", value)
        return
    message.conversation.SetInParent()
    for index, turn in enumerate(value):
        added = message.conversation.messages.add(role=common_pb2.Role.Value(f"ROLE_{turn.role.upper()}"))
        _assign(added, "content", turn.content, f"conversation.messages[{index}].")


def _largest(value: str | tuple[Message, ...]) -> str:
    if isinstance(value, str):
        return "prompt"
    sizes = [len(turn.content) for turn in value]
    return f"conversation.messages[{sizes.index(max(sizes))}].content" if sizes else "conversation"


def _sampling_to(sampling: Sampling) -> common_pb2.Sampling:
    message = common_pb2.Sampling(temperature=sampling.temperature, top_p=sampling.top_p)
    for name in ("max_new_tokens", "seed"):
        value = getattr(sampling, name)
        if value is not None:
            _assign(message, name, value, "sampling.")
    for index, sequence in enumerate(sampling.stop):
        _encode(sequence, f"sampling.stop[{index}]")
        message.stop.append(sequence)
    return message


def _objective_to(objective: Objective) -> common_pb2.Objective:
    message = common_pb2.Objective(
        max_cost=objective.max_cost,
        max_latency_ms=objective.max_latency_ms,
        min_quality=objective.min_quality,
        preference=None
        if objective.preference is None
        else common_pb2.Preference.Value(f"PREFERENCE_{objective.preference.upper()}"),
    )
    if objective.quality_value is not None:
        # `lambda` is a keyword of Python.
        setattr(message, "lambda", objective.quality_value)
    return message


def _acceptance_to(acceptance: Acceptance) -> common_pb2.Acceptance:
    return common_pb2.Acceptance(
        mode=common_pb2.AcceptanceMode.Value(f"ACCEPTANCE_MODE_{acceptance.mode.upper()}"),
        threshold=acceptance.threshold,
    )


def _assign(message: Any, name: str, value: str | int, path: str = "") -> None:
    if isinstance(value, str):
        _encode(value, path + name)
    try:
        setattr(message, name, value)
    except ValueError as error:
        most = _LARGEST.get(message.DESCRIPTOR.fields_by_name[name].type)
        wanted = str(error) if most is None else f"it must be from 0 to {most}"
        raise InvalidRequest(f"{name} cannot be {value}: {wanted}", field=path + name) from error


def _encode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} is not valid UTF-8", field=field) from error


# From the cascade.


def event_from(message: cascade_pb2.GenerateStreamResponse) -> Event | None:
    """Return an event of a stream; None for a kind that this version does not know."""
    match message.WhichOneof("event"):
        case "stage_started":
            started = message.stage_started
            return StageStarted(
                started.stage,
                started.stage_index,
                _member(StageAction, common_pb2.StageAction, started.action),
            )
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
        finish_reason=_member(FinishReason, common_pb2.FinishReason, message.finish_reason),
        stage=message.stage,
        stage_index=message.stage_index,
        p_correct=message.p_correct if message.HasField("p_correct") else None,
        cost=message.cost,
        latency_ms=message.latency_ms,
        policy_ms=message.policy_ms,
        plan_source=_member(PlanSource, cascade_pb2.PlanSource, message.plan_source),
        policy_version=message.policy_version,
        trace_id=message.trace_id,
        stages=tuple(_record_from(record) for record in message.stages),
        out_of_family=message.out_of_family,
    )


def _record_from(message: cascade_pb2.StageRecord) -> StageRecord:
    usage, timing = message.usage, message.timing
    return StageRecord(
        stage=message.stage,
        stage_index=message.stage_index,
        action=_member(StageAction, common_pb2.StageAction, message.action),
        latency_ms=message.latency_ms,
        cost=message.cost,
        decision=_member(DecisionAction, policy_pb2.DecisionAction, message.decision),
        reason=_member(DecisionReason, policy_pb2.DecisionReason, message.reason),
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
        lambda_fastest=message.lambda_fastest,
        lambda_balanced=message.lambda_balanced,
        lambda_best=message.lambda_best,
        train_prompts=message.train_prompts,
        calibration_prompts=message.calibration_prompts,
    )


def _tokens_from(message: common_pb2.TokenChunk) -> Tokens:
    return Tokens(tuple(message.token_ids), message.text, tuple(message.logprobs))


def _member(kind: type[Member], enum: EnumTypeWrapper[Any], number: int) -> Member | str:
    """Return the member that a number stands for.

    "unspecified" for 0; the number as text where only a newer server knows it.
    """
    members = _MEMBERS.get(kind)
    if members is None:
        prefix = f"{_CAPITAL.sub('_', kind.__name__).upper()}_"
        named = ((value, name.removeprefix(prefix)) for name, value in enum.items())
        members = _MEMBERS[kind] = {value: kind[name] for value, name in named if name in kind.__members__}
    if number not in members:
        return str(number) if number else "unspecified"
    return cast("Member", members[number])
