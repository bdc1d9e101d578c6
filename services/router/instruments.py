"""The router's metrics."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from asd.transport.status import status_of
from asd.values import DecisionAction
from services.common import telemetry
from services.common.telemetry import (
    MODALITY_TEXT,
    OPERATION_CHAT,
    PROVIDER_NAME,
    Attributes,
    GenAi,
    Metrics,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.util.types import AttributeValue

    from asd.errors import AsdError
    from services.router.domain import Refusal, RoutedAnswer, Stage, StageAnswer
    from services.router.planning.draft_selection import SkipReason

# They range from a small stage's verification to all stages in turn, in the default cost units.
_COST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 50.0)


class _TokenCounter:
    """Counts tokens of stage calls: by stage under asd's name, by model under the GenAI name."""

    def __init__(self, meter: Meter, name: str, description: str) -> None:
        self._by_stage = meter.create_counter(name, "{token}", description)
        self._by_model = meter.create_counter(GenAi.METRICS[name], "{token}", description)

    def add(
        self, tokens: int, stage: Mapping[str, AttributeValue], model: Mapping[str, AttributeValue]
    ) -> None:
        self._by_stage.add(tokens, stage)
        self._by_model.add(tokens, model)


class RouterInstruments:
    """The router's OpenTelemetry instruments. Build it after telemetry is set up."""

    def __init__(self) -> None:
        self._meter = meter = telemetry.meter()
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
        self._out_of_family = meter.create_counter(
            Metrics.OUT_OF_FAMILY,
            unit="{request}",
            description="answered requests unlike all that the policy was fitted to",
        )
        self._stage_requests = meter.create_counter(
            Metrics.STAGE_REQUESTS, unit="{request}", description="stage calls that gave an answer"
        )
        self._tasks = meter.create_counter(
            Metrics.STAGE_TASKS,
            unit="{request}",
            description="stage calls of requests that name a type of task",
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
        self._prompt = _TokenCounter(meter, Metrics.PROMPT_TOKENS, "tokens of prompts that stages answered")
        self._cached = _TokenCounter(
            meter, Metrics.CACHED_PROMPT_TOKENS, "of them, taken from the prefix cache"
        )
        self._completion = _TokenCounter(
            meter, Metrics.COMPLETION_TOKENS, "tokens that stages wrote or accepted"
        )
        self._failures = meter.create_counter(
            Metrics.REQUEST_FAILURES, unit="{request}", description="requests that ended with an error"
        )
        self._refusals = meter.create_counter(
            Metrics.REQUESTS_REFUSED, unit="{request}", description="requests that there was no room for"
        )
        self._active = meter.create_up_down_counter(
            Metrics.ACTIVE_REQUESTS, unit="{request}", description="requests under way; a batch counts each"
        )
        self._decisions = meter.create_counter(
            Metrics.DECISIONS, unit="{decision}", description="decisions on stages' answers"
        )
        self._escalations = meter.create_counter(
            Metrics.ESCALATIONS, unit="{request}", description="requests handed on to a later stage"
        )
        self._skips = meter.create_counter(
            Metrics.DRAFTS_SKIPPED, unit="{draft}", description="drafts that a stage did without"
        )
        self._prefills = meter.create_counter(
            Metrics.PREFILLS_AHEAD, unit="{request}", description="prompts read ahead of an escalation"
        )
        self._cost = meter.create_histogram(
            Metrics.REQUEST_COST,
            unit="{cost_unit}",
            description="cost of a request",
            explicit_bucket_boundaries_advisory=_COST_BUCKETS,
        )
        self._queue_duration = telemetry.duration_histogram(
            Metrics.STAGE_QUEUE_DURATION, "time that a stage call waited in the stage's queue"
        )
        self._prefill_duration = telemetry.duration_histogram(
            Metrics.STAGE_PREFILL_DURATION, "time that a stage took to read a prompt"
        )
        self._decode_duration = telemetry.duration_histogram(
            Metrics.STAGE_DECODE_DURATION, "time that a stage took to write or verify"
        )
        self._duration = telemetry.duration_histogram(Metrics.REQUEST_DURATION, "duration of a request")
        self._stage_duration = telemetry.duration_histogram(
            Metrics.STAGE_DURATION, "duration of a stage call"
        )
        self._inference_duration = telemetry.duration_histogram(
            GenAi.METRICS[Metrics.STAGE_DURATION], "duration of a stage call"
        )
        self._time_to_first_chunk = telemetry.duration_histogram(
            Metrics.TIME_TO_FIRST_CHUNK, "time from a stage call to the stage's first message"
        )
        self._policy_duration = telemetry.duration_histogram(
            Metrics.POLICY_DURATION, "time that a request waited for the policy"
        )

    def static_plan_used(self, step: str) -> None:
        """The static plan replaced the policy at a step, "plan" or "decide"."""
        if self._enabled:
            self._static_plans.add(1, {Attributes.PLAN_STEP: step})

    def stage_answered(self, answer: StageAnswer, task: str, *, is_adapted: bool) -> None:
        """A stage answered. task: the request's type of task, or "". is_adapted: if an adapter was used."""
        if not self._enabled:
            return
        attributes = {
            Attributes.STAGE_NAME: answer.stage.name,
            Attributes.STAGE_ACTION: answer.action.value,
        }
        self._stage_requests.add(1, attributes)
        if task and answer.is_whole:
            # The task's name is left out: callers choose it, and could create any number of series.
            self._tasks.add(
                1,
                {
                    Attributes.STAGE_NAME: answer.stage.name,
                    Attributes.TASK_ADAPTER: "used" if is_adapted else "none",
                },
            )
        self._stage_duration.record_ms(answer.latency_ms, attributes)
        inference = telemetry.inference_attributes(answer.stage.model or answer.stage.name, answer.model)
        self._inference_duration.record_ms(answer.latency_ms, inference)
        if answer.first_message_ms is not None:
            self._time_to_first_chunk.record_ms(answer.first_message_ms, inference)
        stage = {Attributes.STAGE_NAME: answer.stage.name}
        tokens = {**inference, Attributes.MODALITY: MODALITY_TEXT}
        self._prompt.add(answer.result.usage.prompt_tokens, stage, tokens)
        self._cached.add(answer.result.usage.cached_prompt_tokens, stage, tokens)
        self._completion.add(answer.result.usage.completion_tokens, stage, tokens)
        timing = answer.result.timing
        self._queue_duration.record_ms(timing.queue_ms, stage)
        self._prefill_duration.record_ms(timing.prefill_ms, stage)
        self._decode_duration.record_ms(timing.decode_ms, stage)
        if answer.verification is not None:
            self._proposed.add(answer.verification.proposed_tokens, stage)
            self._accepted.add(answer.verification.accepted_tokens, stage)

    def draft_skipped(self, stage: Stage, reason: SkipReason) -> None:
        """A stage works without a draft although there is one."""
        if self._enabled:
            self._skips.add(1, {Attributes.STAGE_NAME: stage.name, Attributes.DRAFT_SKIPPED: reason.value})

    def request_refused(self, reason: Refusal) -> None:
        """A request was refused for lack of capacity."""
        if self._enabled:
            self._refusals.add(1, {Attributes.REFUSAL_REASON: reason.value})

    def stage_failed(self, stage: Stage, error: AsdError, duration_ms: float | None) -> None:
        """A stage call failed. duration_ms: None if no call was made, and for drafters."""
        if not self._enabled:
            return
        kind = {Attributes.ERROR_TYPE: type(error).__name__}
        self._stage_failures.add(1, {Attributes.STAGE_NAME: stage.name, **kind})
        if duration_ms is not None:
            inference = telemetry.inference_attributes(stage.model or stage.name)
            self._inference_duration.record_ms(duration_ms, {**inference, **kind})

    @contextmanager
    def request_under_way(self) -> Iterator[None]:
        """Count the block as a request in flight, and as a failed one if it ends with an error."""
        if not self._enabled:
            yield
            return
        self._active.add(1)
        try:
            yield
        except Exception as error:
            self._failures.add(1, {Attributes.ERROR_TYPE: status_of(error).name})
            raise
        finally:
            self._active.add(-1)

    def watch_sleep(self, stages: Sequence[Stage], asleep: Callable[[], frozenset[int]]) -> None:
        """Export which stages are scaled to zero. asleep: is called at each export."""

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            inactive = asleep()
            return [
                telemetry.observation(int(stage.index in inactive), {Attributes.STAGE_NAME: stage.name})
                for stage in stages
            ]

        self._meter.create_observable_gauge(
            Metrics.ASLEEP, [observe], "{stage}", "1 where a stage has no replica, else 0"
        )

    def request_answered(self, outcome: RoutedAnswer, stage_count: int) -> None:
        """A request was answered. stage_count: stages of the cascade."""
        if not self._enabled:
            return
        stage = outcome.answer.stage
        source = outcome.plan_source.value
        answered = {Attributes.STAGE_NAME: stage.name, Attributes.PLAN_SOURCE: source}
        self._requests.add(1, answered)
        if stage.index < stage_count - 1:
            self._early_stops.add(1, answered)
        if outcome.is_out_of_family:
            self._out_of_family.add(1, {Attributes.STAGE_NAME: stage.name})
        for record, following in zip(outcome.records, (*outcome.records[1:], None), strict=True):
            decision = record.decision
            judged = {
                Attributes.STAGE_NAME: record.answer.stage.name,
                Attributes.DECISION_REASON: decision.reason.value,
            }
            self._decisions.add(1, {**judged, Attributes.DECISION_OUTCOME: decision.action.value})
            if decision.action is DecisionAction.ESCALATE and following is not None:
                self._escalations.add(1, {**judged, Attributes.NEXT_STAGE_NAME: following.answer.stage.name})
        if outcome.prefilled is not None:
            self._prefills.add(1, {Attributes.STAGE_NAME: outcome.prefilled.stage.name})
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
