"""Proto ↔ domain. Nothing here decides anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from asd.v1 import cascade_pb2, common_pb2, policy_pb2, stage_pb2
from services.common.errors import AsdError
from services.router.domain import (
    AbandonRule,
    Acceptance,
    AcceptanceMode,
    Answer,
    Committed,
    Condition,
    Drafted,
    Event,
    FinishReason,
    Objective,
    Outcome,
    Plan,
    Preference,
    Prefilled,
    Record,
    Request,
    Revised,
    Role,
    Sampling,
    StageAction,
    StageResult,
    StageStarted,
    Timing,
    Tokens,
    Turn,
    Usage,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from enum import IntEnum

Input = str | tuple[Turn, ...]
Member = TypeVar("Member", bound="IntEnum")
WithInput = TypeVar(
    "WithInput",
    stage_pb2.StageServiceGenerateRequest,
    stage_pb2.VerifyRequest,
    stage_pb2.VerifyStreamStart,
    stage_pb2.PrefillRequest,
    policy_pb2.PlanRequest,
    policy_pb2.DecideRequest,
)


# From callers.


def request_from(message: cascade_pb2.GenerateRequest, request_id: str) -> Request:
    """Return a validated request as a domain value."""
    acceptance = message.acceptance
    return Request(
        id=request_id,
        input=message.prompt
        if message.WhichOneof("input") == "prompt"
        else tuple(Turn(Role(turn.role), turn.content) for turn in message.conversation.messages),
        sampling=sampling_from(message.sampling) if message.HasField("sampling") else Sampling(),
        objective=objective_from(message.objective) if message.HasField("objective") else Objective(),
        acceptance=Acceptance(
            AcceptanceMode(acceptance.mode),
            acceptance.threshold if acceptance.HasField("threshold") else None,
        )
        if message.HasField("acceptance")
        else None,
        session_id=message.session_id,
        stage=message.stage,
        chain=tuple(message.chain),
        task=message.task,
    )


def sampling_from(message: common_pb2.Sampling) -> Sampling:
    """Return sampling as a domain value."""
    return Sampling(
        max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else None,
        temperature=message.temperature,
        top_p=message.top_p if message.HasField("top_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
    )


def objective_from(message: common_pb2.Objective) -> Objective:
    """Return an objective as a domain value."""
    has = message.HasField
    return Objective(
        quality_value=cast("float", getattr(message, "lambda")) if has("lambda") else None,
        max_cost=message.max_cost if has("max_cost") else None,
        max_latency_ms=message.max_latency_ms if has("max_latency_ms") else None,
        min_quality=message.min_quality if has("min_quality") else None,
        preference=Preference(message.preference) if has("preference") else None,
    )


# To stages and policy.


def set_input(message: WithInput, value: Input) -> WithInput:
    """Put a prompt or a conversation into a message, and return the message."""
    if isinstance(value, str):
        message.prompt = value
    else:
        messages = message.conversation.messages
        for turn in value:
            messages.add(role=cast("common_pb2.Role.ValueType", turn.role), content=turn.content)
    return message


def sampling_to(sampling: Sampling) -> common_pb2.Sampling:
    """Return sampling as a message."""
    return common_pb2.Sampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=sampling.stop,
    )


def objective_to(objective: Objective) -> common_pb2.Objective:
    """Return an objective as a message."""
    message = common_pb2.Objective(
        max_cost=objective.max_cost,
        max_latency_ms=objective.max_latency_ms,
        min_quality=objective.min_quality,
        preference=cast("common_pb2.Preference.ValueType | None", objective.preference),
    )
    if objective.quality_value is not None:
        setattr(message, "lambda", objective.quality_value)
    return message


def acceptance_to(acceptance: Acceptance | None) -> common_pb2.Acceptance | None:
    """Return an acceptance as a message."""
    if acceptance is None:
        return None
    return common_pb2.Acceptance(
        mode=cast("common_pb2.AcceptanceMode.ValueType", acceptance.mode), threshold=acceptance.threshold
    )


def draft_to(draft: StageResult) -> common_pb2.Draft:
    """Return an answer as a draft for a later stage."""
    return common_pb2.Draft(
        text=draft.text,
        token_ids=draft.token_ids,
        tokenizer_fingerprint=draft.tokenizer_fingerprint,
        finish_reason=cast("common_pb2.FinishReason.ValueType", draft.finish_reason),
    )


def evidence_to(answer: Answer) -> policy_pb2.DraftEvidence:
    """Return what an answer shows, for the policy."""
    return policy_pb2.DraftEvidence(
        text=answer.result.text,
        logprobs=answer.tokens.logprobs,
        entropies=answer.tokens.entropies,
        top2_margins=answer.tokens.top2_margins,
        finish_reason=cast("common_pb2.FinishReason.ValueType", answer.result.finish_reason),
    )


def verification_to(answer: Answer) -> policy_pb2.VerificationEvidence | None:
    """Return what the verification behind an answer showed, for the policy."""
    verification = answer.verification
    if verification is None:
        return None
    return policy_pb2.VerificationEvidence(
        proposed_tokens=verification.proposed_tokens,
        accepted_tokens=verification.accepted_tokens,
        ranks=verification.ranks,
        draft_stage=answer.draft_stage,
    )


def conditions_to(conditions: Sequence[Condition]) -> list[policy_pb2.StageCondition]:
    """Return conditions as messages."""
    return [
        policy_pb2.StageCondition(
            stage=each.stage,
            available=each.available,
            queue_depth=each.queue_depth,
            expected_queue_ms=each.expected_queue_ms,
        )
        for each in conditions
    ]


# From stages and policy.


def tokens_from(message: common_pb2.TokenChunk, fingerprint: str = "") -> Tokens:
    """Return tokens as a domain value. fingerprint: of the tokenizer, where the message came with one."""
    return Tokens(
        message.token_ids,
        message.text,
        message.logprobs,
        message.entropies,
        message.top2_margins,
        fingerprint,
    )


def verification_from(message: stage_pb2.Verification) -> Verification:
    """Return a verification as a domain value."""
    return Verification(message.proposed_tokens, message.accepted_tokens, message.ranks, message.ids_used)


def result_from(message: stage_pb2.StageResult, peer: str) -> StageResult:
    """Return a stage's result as a domain value. Raises AsdError, naming the peer, where it is malformed."""
    usage, timing = message.usage, message.timing
    return StageResult(
        text=message.text,
        token_ids=message.token_ids,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        finish_reason=member(FinishReason, message.finish_reason, peer),
        usage=Usage(
            usage.prompt_tokens,
            usage.cached_prompt_tokens,
            usage.completion_tokens,
            usage.proposed_tokens,
            usage.accepted_tokens,
            usage.forward_passes,
        ),
        timing=Timing(timing.queue_ms, timing.prefill_ms, timing.decode_ms, timing.total_ms),
        model=message.model,
        accept_lengths=message.accept_lengths,
        context_length=message.context_length,
    )


def plan_from(
    message: policy_pb2.PlanResponse, first: int, likely_next: int | None, abandon_to: int | None
) -> Plan:
    """Return a plan as a domain value. first, likely_next, abandon_to: indices of its stages."""
    rules = tuple(AbandonRule(rule.tokens, rule.mean_logprob) for rule in message.abandon)
    return Plan(first, message.policy_version, message.p_escalate, likely_next, rules, abandon_to)


def member(kind: type[Member], number: int, peer: str) -> Member:
    """Return the member of an enumeration with a number. Raises AsdError, naming the peer, if there is
    none."""
    try:
        return kind(number)
    except ValueError:
        raise AsdError(f"{peer} sent {kind.__name__} {number}, which does not exist") from None


# To callers.


def response_to(outcome: Outcome, trace_id: str) -> cascade_pb2.GenerateResponse:
    """Return an outcome as the response."""
    answer, decision = outcome.answer, outcome.records[-1].decision
    result = answer.result
    return cascade_pb2.GenerateResponse(
        request_id=outcome.request_id,
        text=result.text,
        token_ids=result.token_ids,
        tokenizer_fingerprint=result.tokenizer_fingerprint,
        finish_reason=cast("common_pb2.FinishReason.ValueType", result.finish_reason),
        stage=answer.stage.name,
        stage_index=answer.stage.index,
        p_correct=decision.p_correct,
        cost=outcome.cost,
        latency_ms=outcome.latency_ms,
        policy_ms=outcome.policy_ms,
        plan_source=cast("cascade_pb2.PlanSource.ValueType", outcome.plan_source),
        policy_version=outcome.policy_version,
        stages=[
            *([prefilled_to(outcome.prefilled)] if outcome.prefilled else []),
            *(record_to(record) for record in outcome.records),
        ],
        trace_id=trace_id,
        out_of_family=outcome.is_out_of_family,
    )


def record_to(record: Record) -> cascade_pb2.StageRecord:
    """Return a stage's record as a message."""
    answer, decision = record.answer, record.decision
    usage, timing = answer.result.usage, answer.result.timing
    return cascade_pb2.StageRecord(
        stage=answer.stage.name,
        stage_index=answer.stage.index,
        action=cast("common_pb2.StageAction.ValueType", answer.action),
        usage=common_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=usage.completion_tokens,
            proposed_tokens=usage.proposed_tokens,
            accepted_tokens=usage.accepted_tokens,
            forward_passes=usage.forward_passes,
        ),
        timing=common_pb2.StageTiming(
            queue_ms=timing.queue_ms,
            prefill_ms=timing.prefill_ms,
            decode_ms=timing.decode_ms,
            total_ms=timing.total_ms,
        ),
        latency_ms=answer.latency_ms,
        cost=answer.cost,
        p_correct=decision.p_correct,
        p_correct_stderr=decision.p_correct_stderr,
        decision=cast("policy_pb2.DecisionAction.ValueType", decision.action),
        reason=cast("policy_pb2.DecisionReason.ValueType", decision.reason),
        text=answer.result.text,
        accept_lengths=answer.result.accept_lengths,
        model=answer.result.model,
        adapted=answer.result.is_adapted,
    )


def prefilled_to(prefilled: Prefilled) -> cascade_pb2.StageRecord:
    """Return the record of a stage that was warmed."""
    return cascade_pb2.StageRecord(
        stage=prefilled.stage.name,
        stage_index=prefilled.stage.index,
        action=cast("common_pb2.StageAction.ValueType", StageAction.PREFILL),
        usage=common_pb2.Usage(prompt_tokens=prefilled.prompt_tokens, forward_passes=1),
        latency_ms=prefilled.latency_ms,
        cost=prefilled.cost,
    )


def event_to(event: Event, trace_id: str) -> cascade_pb2.GenerateStreamResponse:
    """Return an event as a message of the stream."""
    if isinstance(event, Committed):
        return cascade_pb2.GenerateStreamResponse(
            commit=cascade_pb2.Commit(
                committed_tokens=event.count, tokens=None if event.tokens is None else chunk_to(event.tokens)
            )
        )
    if isinstance(event, Drafted):
        return cascade_pb2.GenerateStreamResponse(draft=chunk_to(event.tokens))
    if isinstance(event, Revised):
        return cascade_pb2.GenerateStreamResponse(
            revise=cascade_pb2.Revise(kept_tokens=event.kept_tokens, kept_bytes=event.kept_bytes)
        )
    if isinstance(event, StageStarted):
        return cascade_pb2.GenerateStreamResponse(
            stage_started=cascade_pb2.StageStarted(
                stage=event.stage.name,
                stage_index=event.stage.index,
                action=cast("common_pb2.StageAction.ValueType", event.action),
            )
        )
    return cascade_pb2.GenerateStreamResponse(response=response_to(event, trace_id))


def chunk_to(tokens: Tokens) -> common_pb2.TokenChunk:
    """Return tokens as a message."""
    return common_pb2.TokenChunk(
        token_ids=tokens.ids,
        text=tokens.text,
        logprobs=tokens.logprobs,
        entropies=tokens.entropies,
        top2_margins=tokens.top2_margins,
    )
