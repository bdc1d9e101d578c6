"""Converts between messages of the contract and the router's own values; asd.convert has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.convert import (
    DECISION_ACTIONS,
    DECISION_REASONS,
    FINISH_REASONS,
    PLAN_SOURCES,
    STAGE_ACTIONS,
    Enumeration,
    Member,
    acceptance_from,
    input_from,
    objective_from,
    sampling_from,
)
from asd.errors import AsdError
from asd.v1 import cascade_pb2, common_pb2, policy_pb2, stage_pb2
from asd.values import Objective, Sampling, StageAction
from services.router.domain import (
    AbandonRule,
    DraftPart,
    Event,
    FinalPart,
    PolicyChoice,
    Prefilled,
    Record,
    Revision,
    RoutedAnswer,
    RoutedRequest,
    ScoredTokens,
    StageAnswer,
    StageKnowledge,
    StageResult,
    StageStart,
    Timing,
    TokenUsage,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_SAMPLING = Sampling()
_OBJECTIVE = Objective()


# From callers.


def request_from(message: cascade_pb2.GenerateRequest, request_id: str) -> RoutedRequest:
    """Return a validated request as a value."""
    has = message.HasField
    return RoutedRequest(
        input_from(message),
        sampling_from(message.sampling) if has("sampling") else _SAMPLING,
        objective_from(message.objective) if has("objective") else _OBJECTIVE,
        acceptance_from(message.acceptance) if has("acceptance") else None,
        message.session_id,
        message.stage,
        tuple(message.chain),
        message.task,
        message.prediction,
        message.allow_switch,
        id=request_id,
    )


# To stages and policy.


def draft_to(draft: StageResult) -> common_pb2.Draft:
    """Return an answer as a draft for a later stage."""
    return common_pb2.Draft(
        text=draft.text,
        token_ids=draft.token_ids,
        tokenizer_fingerprint=draft.tokenizer_fingerprint,
        finish_reason=FINISH_REASONS.numbers[draft.finish_reason],
    )


def evidence_to(answer: StageAnswer) -> policy_pb2.DraftEvidence:
    """Return the evidence of an answer, for the policy."""
    return policy_pb2.DraftEvidence(
        text=answer.result.text,
        logprobs=answer.tokens.logprobs,
        entropies=answer.tokens.entropies,
        top2_margins=answer.tokens.top2_margins,
        finish_reason=FINISH_REASONS.numbers[answer.result.finish_reason],
    )


def verification_to(answer: StageAnswer) -> policy_pb2.VerificationEvidence | None:
    """Return the evidence of an answer's verification, for the policy; None if it verified no draft."""
    verification = answer.verification
    if verification is None:
        return None
    return policy_pb2.VerificationEvidence(
        proposed_tokens=verification.proposed_tokens,
        accepted_tokens=verification.accepted_tokens,
        ranks=verification.ranks,
        draft_stage=answer.draft_stage,
    )


def conditions_to(conditions: Sequence[StageKnowledge]) -> list[policy_pb2.StageCondition]:
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


def tokens_from(message: common_pb2.TokenChunk, fingerprint: str = "") -> ScoredTokens:
    """Return tokens as a domain value. fingerprint: the tokenizer's, if the stage sent one."""
    return ScoredTokens(
        message.token_ids,
        message.text,
        message.logprobs,
        message.entropies,
        message.top2_margins,
        fingerprint,
        message.details,
    )


def verification_from(message: stage_pb2.Verification) -> Verification:
    """Return a verification as a domain value."""
    return Verification(
        message.proposed_tokens,
        message.accepted_tokens,
        message.ranks,
        message.ids_used,
        message.while_writing,
    )


def result_from(message: stage_pb2.StageResult, peer: str) -> StageResult:
    """Return a stage's result as a domain value. Raises AsdError, naming the peer, if it is malformed."""
    usage, timing = message.usage, message.timing
    return StageResult(
        text=message.text,
        token_ids=message.token_ids,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        finish_reason=member(FINISH_REASONS, message.finish_reason, peer),
        usage=TokenUsage(
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
        is_constrained=message.constrained,
    )


def plan_from(
    message: policy_pb2.PlanResponse, first: int, likely_next: int | None, abandon_to: int | None
) -> PolicyChoice:
    """Return a plan as a domain value. first, likely_next, abandon_to: indices of its stages."""
    rules = tuple(AbandonRule(rule.tokens, rule.mean_logprob) for rule in message.abandon)
    return PolicyChoice(first, message.policy_version, message.p_escalate, likely_next, rules, abandon_to)


def member(enumeration: Enumeration[Member], number: int, peer: str) -> Member:
    """Return the member with a number. Raises AsdError, naming the peer, if there is none."""
    found = enumeration.members.get(number)
    if found is None:
        raise AsdError(f"{peer} sent {enumeration.name} {number}, which does not exist")
    return found


# To callers.


def response_to(outcome: RoutedAnswer, trace_id: str) -> cascade_pb2.GenerateResponse:
    """Return an outcome as the response."""
    answer, decision = outcome.answer, outcome.records[-1].decision
    result = answer.result
    return cascade_pb2.GenerateResponse(
        request_id=outcome.request_id,
        text=result.text,
        token_ids=result.token_ids,
        tokenizer_fingerprint=result.tokenizer_fingerprint,
        finish_reason=FINISH_REASONS.numbers[result.finish_reason],
        stage=answer.stage.name,
        stage_index=answer.stage.index,
        p_correct=decision.p_correct,
        cost=outcome.cost,
        latency_ms=outcome.latency_ms,
        policy_ms=outcome.policy_ms,
        plan_source=PLAN_SOURCES.numbers[outcome.plan_source],
        policy_version=outcome.policy_version,
        stages=[
            *([prefilled_to(outcome.prefilled)] if outcome.prefilled else []),
            *(record_to(record) for record in outcome.records),
        ],
        trace_id=trace_id,
        out_of_family=outcome.is_out_of_family,
        scored_tokens=chunk_to(outcome.scored_tokens) if outcome.scored_tokens is not None else None,
        tool_calls=[
            common_pb2.ToolCall(id=each.id, name=each.name, arguments=each.arguments)
            for each in outcome.tool_calls
        ],
        content=outcome.content,
    )


def record_to(record: Record) -> cascade_pb2.StageRecord:
    """Return a stage's record as a message."""
    answer, decision = record.answer, record.decision
    usage, timing = answer.result.usage, answer.result.timing
    return cascade_pb2.StageRecord(
        stage=answer.stage.name,
        stage_index=answer.stage.index,
        action=STAGE_ACTIONS.numbers[answer.action],
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
        decision=DECISION_ACTIONS.numbers[decision.action],
        reason=DECISION_REASONS.numbers[decision.reason],
        text=answer.result.text,
        accept_lengths=answer.result.accept_lengths,
        model=answer.result.model,
        adapted=answer.result.is_adapted,
        constrained=answer.result.is_constrained,
    )


def prefilled_to(prefilled: Prefilled) -> cascade_pb2.StageRecord:
    """Return the record of a prefill ahead."""
    return cascade_pb2.StageRecord(
        stage=prefilled.stage.name,
        stage_index=prefilled.stage.index,
        action=STAGE_ACTIONS.numbers[StageAction.PREFILL],
        usage=common_pb2.Usage(prompt_tokens=prefilled.prompt_tokens, forward_passes=1),
        latency_ms=prefilled.latency_ms,
        cost=prefilled.cost,
    )


def event_to(event: Event, trace_id: str) -> cascade_pb2.GenerateStreamResponse:
    """Return an event as a message of the stream."""
    if isinstance(event, FinalPart):
        return cascade_pb2.GenerateStreamResponse(
            commit=cascade_pb2.Commit(
                committed_tokens=event.count, tokens=None if event.tokens is None else chunk_to(event.tokens)
            )
        )
    if isinstance(event, DraftPart):
        return cascade_pb2.GenerateStreamResponse(draft=chunk_to(event.tokens))
    if isinstance(event, Revision):
        return cascade_pb2.GenerateStreamResponse(
            revise=cascade_pb2.Revise(kept_tokens=event.kept_tokens, kept_bytes=event.kept_bytes)
        )
    if isinstance(event, StageStart):
        return cascade_pb2.GenerateStreamResponse(
            stage_started=cascade_pb2.StageStarted(
                stage=event.stage.name,
                stage_index=event.stage.index,
                action=STAGE_ACTIONS.numbers[event.action],
            )
        )
    return cascade_pb2.GenerateStreamResponse(response=response_to(event, trace_id))


def chunk_to(tokens: ScoredTokens) -> common_pb2.TokenChunk:
    """Return tokens as a message."""
    message = common_pb2.TokenChunk(
        token_ids=tokens.ids,
        text=tokens.text,
        logprobs=tokens.logprobs,
        entropies=tokens.entropies,
        top2_margins=tokens.top2_margins,
    )
    if tokens.details:
        message.details.extend(tokens.details)
    return message
