"""The router's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common import telemetry
from services.common.telemetry import OPERATION_CHAT, PROVIDER_NAME, Attributes, Metrics

if TYPE_CHECKING:
    from services.common.errors import AsdError
    from services.router.domain import Answer, Outcome, Stage


class Instruments:
    """Counts what the router does, through OpenTelemetry. Build it after set-up."""

    def __init__(self) -> None:
        meter = telemetry.meter()
        self._enabled = telemetry.metrics_enabled()
        self._static_plans = meter.create_counter(
            Metrics.STATIC_PLANS, unit="{plan}", description="times the static plan stood in for the policy"
        )
        self._requests = meter.create_counter(
            Metrics.REQUESTS, unit="{request}", description="answered requests, by answering stage"
        )
        self._early_stops = meter.create_counter(
            Metrics.EARLY_STOPS, unit="{request}", description="requests answered before the last stage"
        )
        self._stage_requests = meter.create_counter(
            Metrics.STAGE_REQUESTS, unit="{request}", description="stage calls that gave an answer"
        )
        self._stage_failures = meter.create_counter(
            Metrics.STAGE_FAILURES, unit="{request}", description="stage calls that failed"
        )
        self._proposed = meter.create_counter(
            Metrics.PROPOSED_TOKENS, unit="{token}", description="draft tokens proposed to a target"
        )
        self._accepted = meter.create_counter(
            Metrics.ACCEPTED_TOKENS, unit="{token}", description="draft tokens that a target accepted"
        )
        self._prompt = meter.create_counter(
            Metrics.PROMPT_TOKENS, unit="{token}", description="tokens of prompts that stages answered"
        )
        self._cached = meter.create_counter(
            Metrics.CACHED_PROMPT_TOKENS, unit="{token}", description="of them, taken from the prefix cache"
        )
        self._cost = meter.create_histogram(
            Metrics.REQUEST_COST, unit="{cost_unit}", description="cost of a request"
        )
        self._duration = telemetry.duration_histogram(Metrics.REQUEST_DURATION, "duration of a request")
        self._stage_duration = telemetry.duration_histogram(
            Metrics.STAGE_DURATION, "duration of a stage call"
        )
        self._policy_duration = telemetry.duration_histogram(
            Metrics.POLICY_DURATION, "time that a request waited for the policy"
        )

    def static_plan_used(self, step: str) -> None:
        """The static plan stood in for the policy at a step, "plan" or "decide"."""
        if self._enabled:
            self._static_plans.add(1, {Attributes.PLAN_STEP: step})

    def stage_answered(self, answer: Answer) -> None:
        """A stage gave a whole answer."""
        if not self._enabled:
            return
        attributes = {
            Attributes.STAGE_NAME: answer.stage.name,
            Attributes.STAGE_ACTION: answer.action.name.lower(),
        }
        self._stage_requests.add(1, attributes)
        self._stage_duration.record_ms(answer.latency_ms, attributes)
        stage = {Attributes.STAGE_NAME: answer.stage.name}
        self._prompt.add(answer.result.usage.prompt_tokens, stage)
        self._cached.add(answer.result.usage.cached_prompt_tokens, stage)
        if answer.verification is not None:
            self._proposed.add(answer.verification.proposed_tokens, stage)
            self._accepted.add(answer.verification.accepted_tokens, stage)

    def stage_failed(self, stage: Stage, error: AsdError) -> None:
        """A stage call failed."""
        if self._enabled:
            self._stage_failures.add(
                1, {Attributes.STAGE_NAME: stage.name, Attributes.ERROR_TYPE: type(error).__name__}
            )

    def request_answered(self, outcome: Outcome, stage_count: int) -> None:
        """A request was answered, in a cascade of so many stages."""
        if not self._enabled:
            return
        stage = outcome.answer.stage
        source = outcome.plan_source.name.lower()
        self._requests.add(1, {Attributes.STAGE_NAME: stage.name, Attributes.PLAN_SOURCE: source})
        if stage.index < stage_count - 1:
            self._early_stops.add(1, {Attributes.STAGE_NAME: stage.name})
        self._cost.record(outcome.cost)
        self._duration.record_ms(
            outcome.latency_ms,
            {
                Attributes.OPERATION: OPERATION_CHAT,
                Attributes.PROVIDER: PROVIDER_NAME,
                Attributes.REQUEST_MODEL: stage.model or stage.name,
            },
        )
        self._policy_duration.record_ms(outcome.policy_ms)
