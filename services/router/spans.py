"""Attributes that the router sets on its spans. Prompts and answers stay off them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.values import DecisionAction
from services.common.telemetry import (
    EVALUATION_P_CORRECT,
    OPERATION_CHAT,
    PROVIDER_NAME,
    Attributes,
    Events,
    Traced,
)

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

    from asd.values import StageAction
    from services.router.domain import Decision, Provenance, RoutedAnswer, RoutedRequest, Stage, StageAnswer

# OTLP's integers are signed. A larger one would lose all spans of an export.
_MAX_INTEGER = 2**63 - 1


def describe_request(span: Traced, request: RoutedRequest) -> None:
    """Record the session of a request."""
    if span.recording and request.session_id:
        span.set(Attributes.CONVERSATION_ID, request.session_id)


def describe_plan(span: Traced, provenance: Provenance, first: Stage) -> None:
    """Record the plan and its source."""
    if span.recording:
        span.set(Attributes.PLAN_SOURCE, provenance.source.value)
        span.set(Attributes.PLAN_FIRST_STAGE, first.name)
        span.set(Attributes.POLICY_VERSION, provenance.policy_version)


def describe_call(
    span: Traced, request: RoutedRequest, stage: Stage, action: StageAction, skip_reason: str = ""
) -> None:
    """Record which stage is called, and how. skip_reason: why an existing draft is not used, or "".

    Stop sequences stay off the span: they are the caller's text.
    """
    if not span.recording:
        return
    describe_request(span, request)
    span.set(Attributes.OPERATION, OPERATION_CHAT)
    span.set(Attributes.PROVIDER, PROVIDER_NAME)
    span.set(Attributes.REQUEST_MODEL, stage.model or stage.name)
    sampling = request.sampling
    span.set(Attributes.REQUEST_TEMPERATURE, sampling.temperature)
    if sampling.top_p is not None:
        span.set(Attributes.REQUEST_TOP_P, sampling.top_p)
    if sampling.max_new_tokens is not None:
        span.set(Attributes.REQUEST_MAX_TOKENS, sampling.max_new_tokens)
    if sampling.seed is not None and not request.seed_is_free and sampling.seed <= _MAX_INTEGER:
        span.set(Attributes.REQUEST_SEED, sampling.seed)
    span.set(Attributes.SERVER_ADDRESS, stage.target)
    span.set(Attributes.STAGE_NAME, stage.name)
    span.set(Attributes.STAGE_INDEX, stage.index)
    span.set(Attributes.STAGE_ACTION, action.value)
    if request.is_held:
        span.set(Attributes.TOOL_LOOP, True)
    if request.task:
        span.set(Attributes.REQUEST_TASK, request.task)
    if skip_reason:
        span.set(Attributes.DRAFT_SKIPPED, skip_reason)


def describe_answer(span: Traced, answer: StageAnswer) -> None:
    """Record a stage's usage, times and cost."""
    if not span.recording:
        return
    result = answer.result
    span.set(Attributes.RESPONSE_MODEL, answer.model)
    span.set(Attributes.FINISH_REASONS, (result.finish_reason.value,))
    span.set(Attributes.INPUT_TOKENS, result.usage.prompt_tokens)
    span.set(Attributes.OUTPUT_TOKENS, result.usage.completion_tokens)
    span.set(Attributes.CACHED_TOKENS, result.usage.cached_prompt_tokens)
    if answer.first_message_ms is not None:
        span.set(Attributes.TIME_TO_FIRST_CHUNK, answer.first_message_ms / 1000.0)
    span.set(Attributes.STAGE_LATENCY_MS, answer.latency_ms)
    span.set(Attributes.STAGE_QUEUE_MS, result.timing.queue_ms)
    span.set(Attributes.STAGE_PREFILL_MS, result.timing.prefill_ms)
    span.set(Attributes.STAGE_DECODE_MS, result.timing.decode_ms)
    span.set(Attributes.COST, answer.cost)
    if answer.verification is not None:
        span.set(Attributes.PROPOSED_TOKENS, answer.verification.proposed_tokens)
        span.set(Attributes.ACCEPTED_TOKENS, answer.verification.accepted_tokens)


def describe_decision(
    span: Traced,
    decision: Decision,
    judged: Stage,
    provenance: Provenance,
    request_id: str,
    *,
    follows_policy: bool,
) -> None:
    """Record the decision on a stage's answer, its source and its reason; the policy's as an evaluation."""
    if not span.recording:
        return
    is_judged = decision.p_correct is not None or decision.is_out_of_family
    source = "policy" if is_judged else provenance.source.value
    if not follows_policy:
        source = "static"
    span.set(Attributes.PLAN_SOURCE, source)
    span.set(Attributes.DECISION_OUTCOME, decision.action.value)
    span.set(Attributes.DECISION_REASON, decision.reason.value)
    span.set(Attributes.STAGE_NAME, judged.name)
    span.set(Attributes.POLICY_VERSION, provenance.policy_version)
    if decision.p_correct is not None:
        span.set(Attributes.P_CORRECT, decision.p_correct)
        evaluation: dict[str, AttributeValue] = {
            Attributes.EVALUATION_NAME: EVALUATION_P_CORRECT,
            Attributes.EVALUATION_SCORE: decision.p_correct,
            Attributes.EVALUATION_LABEL: decision.action.value,
        }
        if decision.action is DecisionAction.STOP:
            # An answer that escalates is not the response.
            evaluation[Attributes.RESPONSE_ID] = request_id
        span.add_event(Events.EVALUATION, evaluation)
    if decision.is_out_of_family:
        span.set(Attributes.OUT_OF_FAMILY, True)
    if decision.predict_us is not None:
        span.set(Attributes.PREDICT_US, decision.predict_us)


def describe_outcome(span: Traced, outcome: RoutedAnswer) -> None:
    """Record the outcome of a request."""
    if not span.recording:
        return
    answer = outcome.answer
    span.set(Attributes.REQUEST_ID, outcome.request_id)
    span.set(Attributes.RESPONSE_MODEL, answer.model)
    span.set(Attributes.FINISH_REASONS, (answer.result.finish_reason.value,))
    span.set(Attributes.PLAN_SOURCE, outcome.plan_source.value)
    span.set(Attributes.POLICY_VERSION, outcome.policy_version)
    span.set(Attributes.STAGE_NAME, answer.stage.name)
    span.set(Attributes.STAGE_INDEX, answer.stage.index)
    span.set(Attributes.STAGE_COUNT, len(outcome.records))
    span.set(Attributes.DECISION_REASON, outcome.records[-1].decision.reason.value)
    span.set(Attributes.COST, outcome.cost)
    span.set(Attributes.LATENCY_MS, outcome.latency_ms)
    span.set(Attributes.POLICY_MS, outcome.policy_ms)
