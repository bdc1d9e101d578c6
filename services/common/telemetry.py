"""All names of spans, attributes and metrics of asd, and the set-up of OpenTelemetry.

Names follow OpenTelemetry's `gen_ai.*` and `rpc.*` conventions where one fits (GenAI conventions 0.1.0, still
in development), and `asd.*` only where none does. Some `asd.*` names are older than their convention: they
stay, and the convention's name is exported beside them (`GenAi` is the table). Prompts and answers never go
onto a span. Standard latency histograms are in seconds and our fields in milliseconds: the conversion happens
here and nowhere else.

Nothing is exported, and a span costs next to nothing, unless OTEL_EXPORTER_OTLP_ENDPOINT (or its traces and
metrics variants), OTEL_TRACES_EXPORTER or OTEL_METRICS_EXPORTER is set. A service can also serve its metrics
to Prometheus (`metrics_listen`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, SupportsIndex

from opentelemetry import metrics, trace
from opentelemetry.trace import Status, StatusCode

from asd.errors import AsdError, InvalidRequest
from asd.transport.proxy import proxy_arguments
from services.common.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.util.types import AttributeValue

INSTRUMENTATION: Final = "asd"


class Spans:
    """Span names."""

    CASCADE: Final = "asd.cascade"
    PLAN: Final = "asd.plan"
    STAGE: Final = "asd.stage"
    DECIDE: Final = "asd.decide"


class Events:
    """Names of events on spans."""

    EVALUATION: Final = "gen_ai.evaluation.result"


class Attributes:
    """Attribute names."""

    OPERATION: Final = "gen_ai.operation.name"
    PROVIDER: Final = "gen_ai.provider.name"
    REQUEST_MODEL: Final = "gen_ai.request.model"
    REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
    REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
    REQUEST_TOP_P: Final = "gen_ai.request.top_p"
    REQUEST_SEED: Final = "gen_ai.request.seed"
    CONVERSATION_ID: Final = "gen_ai.conversation.id"
    RESPONSE_MODEL: Final = "gen_ai.response.model"
    RESPONSE_ID: Final = "gen_ai.response.id"
    FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
    TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
    INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
    CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
    MODALITY: Final = "gen_ai.token.modality"
    EVALUATION_NAME: Final = "gen_ai.evaluation.name"
    EVALUATION_SCORE: Final = "gen_ai.evaluation.score.value"
    EVALUATION_LABEL: Final = "gen_ai.evaluation.score.label"
    ERROR_TYPE: Final = "error.type"
    SERVER_ADDRESS: Final = "server.address"

    STAGE_NAME: Final = "asd.stage.name"
    STAGE_INDEX: Final = "asd.stage.index"
    STAGE_ACTION: Final = "asd.stage.action"
    STAGE_COUNT: Final = "asd.stage.count"
    NEXT_STAGE_NAME: Final = "asd.stage.next_name"
    SCALING: Final = "asd.manager.scaling"
    STAGE_LATENCY_MS: Final = "asd.stage.latency_ms"
    STAGE_QUEUE_MS: Final = "asd.stage.queue_ms"
    STAGE_PREFILL_MS: Final = "asd.stage.prefill_ms"
    STAGE_DECODE_MS: Final = "asd.stage.decode_ms"
    CACHED_TOKENS: Final = "asd.stage.cached_prompt_tokens"
    PROPOSED_TOKENS: Final = "asd.verify.proposed_tokens"
    ACCEPTED_TOKENS: Final = "asd.verify.accepted_tokens"
    VERIFY_PLACE: Final = "asd.verify.place"
    DRAFT_SKIPPED: Final = "asd.draft.skipped"
    PLAN_SOURCE: Final = "asd.plan.source"
    PLAN_STEP: Final = "asd.plan.step"
    PLAN_FIRST_STAGE: Final = "asd.plan.first_stage"
    DECISION_OUTCOME: Final = "asd.decision.outcome"
    DECISION_REASON: Final = "asd.decision.reason"
    P_CORRECT: Final = "asd.decision.p_correct"
    OUT_OF_FAMILY: Final = "asd.decision.out_of_family"
    PREDICT_US: Final = "asd.policy.predict_us"
    POLICY_VERSION: Final = "asd.policy.version"
    REQUEST_TASK: Final = "asd.request.task"
    TOOL_LOOP: Final = "asd.tool_loop.held"
    TASK_ADAPTER: Final = "asd.task.adapter"
    REQUEST_ID: Final = "asd.request.id"
    COST: Final = "asd.cost"
    LATENCY_MS: Final = "asd.latency_ms"
    POLICY_MS: Final = "asd.policy.latency_ms"
    REFUSAL_REASON: Final = "asd.refusal.reason"
    SHADOW_OUTCOME: Final = "asd.shadow.outcome"


class Metrics:
    """Metric names."""

    REQUEST_DURATION: Final = "gen_ai.server.request.duration"
    TTFT: Final = "gen_ai.server.time_to_first_token"
    TPOT: Final = "gen_ai.server.time_per_output_token"
    INFERENCE_DURATION: Final = "gen_ai.client.inference.duration"
    TIME_TO_FIRST_CHUNK: Final = "gen_ai.client.inference.time_to_first_chunk"
    INFERENCE_INPUT_TOKENS: Final = "gen_ai.client.inference.usage.input_tokens"
    INFERENCE_OUTPUT_TOKENS: Final = "gen_ai.client.inference.usage.output_tokens"
    INFERENCE_CACHE_READ_TOKENS: Final = "gen_ai.client.inference.usage.cache_read.input_tokens"
    REQUESTS: Final = "asd.requests"
    STAGE_REQUESTS: Final = "asd.stage.requests"
    STAGE_DURATION: Final = "asd.stage.duration"
    STAGE_TASKS: Final = "asd.stage.tasks"
    STAGE_FAILURES: Final = "asd.stage.failures"
    STAGE_QUEUE_DURATION: Final = "asd.stage.queue_duration"
    STAGE_PREFILL_DURATION: Final = "asd.stage.prefill_duration"
    STAGE_DECODE_DURATION: Final = "asd.stage.decode_duration"
    COMPLETION_TOKENS: Final = "asd.stage.completion_tokens"
    REQUEST_FAILURES: Final = "asd.request.failures"
    REQUESTS_REFUSED: Final = "asd.requests_refused"
    ACTIVE_REQUESTS: Final = "asd.active_requests"
    DECISIONS: Final = "asd.decisions"
    ESCALATIONS: Final = "asd.escalations"
    DRAFTS_SKIPPED: Final = "asd.drafts_skipped"
    PREFILLS_AHEAD: Final = "asd.prefills_ahead"
    ASLEEP: Final = "asd.stage.asleep"
    EARLY_STOPS: Final = "asd.early_stops"
    OUT_OF_FAMILY: Final = "asd.out_of_family"
    STATIC_PLANS: Final = "asd.static_plans"
    POLICY_DURATION: Final = "asd.policy.duration"
    REQUEST_COST: Final = "asd.request.cost"
    PROPOSED_TOKENS: Final = "asd.verify.proposed_tokens"
    ACCEPTED_TOKENS: Final = "asd.verify.accepted_tokens"
    PROMPT_TOKENS: Final = "asd.stage.prompt_tokens"
    CACHED_PROMPT_TOKENS: Final = "asd.stage.cached_prompt_tokens"
    QUEUE_DEPTH: Final = "asd.stage.queue_depth"
    RUNNING_REQUESTS: Final = "asd.stage.running_requests"
    COMPLETED_REQUESTS: Final = "asd.stage.completed_requests"
    VERIFICATIONS: Final = "asd.stage.verifications"
    CANCELLED_REQUESTS: Final = "asd.stage.cancelled_requests"
    KV_CACHE: Final = "asd.stage.kv_cache"
    CACHED_SEQUENCES: Final = "asd.stage.cached_sequences"
    MODELS_LOADED: Final = "asd.stage.models_loaded"
    MODEL_MEMORY: Final = "asd.stage.model_memory"
    MODEL_MEMORY_BUDGET: Final = "asd.stage.model_memory_budget"
    IDLE: Final = "asd.stage.idle"
    MANAGED_WANTED: Final = "asd.manager.wanted_replicas"
    MANAGED_READY: Final = "asd.manager.ready_replicas"
    MANAGER_SCALINGS: Final = "asd.manager.scalings"
    REPORTS: Final = "asd.policy.reports"
    REPORTED_P_CORRECT: Final = "asd.policy.reported_p_correct"
    REPORTED_ACCURACY: Final = "asd.policy.reported_accuracy"
    REPORTED_ECE: Final = "asd.policy.reported_calibration_error"
    DRIFT_EVIDENCE: Final = "asd.policy.drift_evidence"
    DRIFT_ALARM: Final = "asd.policy.drift_alarm"
    SHADOW_DECISIONS: Final = "asd.policy.shadow_decisions"


PROVIDER_NAME: Final = "asd"
OPERATION_CHAT: Final = "chat"
MODALITY_TEXT: Final = "text"
# Name of the policy's evaluation of an answer: the calibrated probability that it is correct.
EVALUATION_P_CORRECT: Final = "p_correct"


class GenAi:
    """Names of the GenAI conventions 0.1.0, by asd's own names for the same values. Both are exported."""

    ATTRIBUTES: Final[Mapping[str, str]] = {
        Attributes.REQUEST_ID: Attributes.RESPONSE_ID,
        Attributes.CACHED_TOKENS: Attributes.CACHE_READ_TOKENS,
    }
    METRICS: Final[Mapping[str, str]] = {
        Metrics.STAGE_DURATION: Metrics.INFERENCE_DURATION,
        Metrics.PROMPT_TOKENS: Metrics.INFERENCE_INPUT_TOKENS,
        Metrics.CACHED_PROMPT_TOKENS: Metrics.INFERENCE_CACHE_READ_TOKENS,
        Metrics.COMPLETION_TOKENS: Metrics.INFERENCE_OUTPUT_TOKENS,
    }


# OTel's advice for gen_ai.server.request.duration, extended downwards for the embedded family.
_DURATION_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
# OTel's advice for each of these.
_DOUBLING_BUCKETS_S = tuple(0.01 * 2**power for power in range(14))
_ADVISED_BUCKETS_S = {
    Metrics.INFERENCE_DURATION: _DOUBLING_BUCKETS_S,
    Metrics.TIME_TO_FIRST_CHUNK: _DOUBLING_BUCKETS_S,
    Metrics.TTFT: (
        0.001,
        0.005,
        0.01,
        0.02,
        0.04,
        0.06,
        0.08,
        0.1,
        0.25,
        0.5,
        0.75,
        1.0,
        2.5,
        5.0,
        7.5,
        10.0,
    ),
    Metrics.TPOT: (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
}


@dataclass(slots=True)
class _State:
    """Exporters of this process; setup_telemetry sets them once at start-up."""

    provider: trace.TracerProvider | None = None
    tracer: trace.Tracer | None = None
    metered: bool = False


_state = _State()


class Traced:
    """A span as a context manager; it does nothing if tracing is off.

    An exception marks the span as failed; cancellation does not.
    """

    __slots__ = ("_attributes", "_kind", "_manager", "_name", "span")

    def __init__(
        self,
        name: str,
        attributes: Mapping[str, AttributeValue] | None = None,
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    ) -> None:
        self._name = name
        self._attributes = attributes
        self._kind = kind
        self.span: trace.Span = trace.INVALID_SPAN

    def __enter__(self) -> Self:
        if _state.tracer is None:
            return self
        self._manager = _state.tracer.start_as_current_span(
            self._name,
            kind=self._kind,
            attributes=self._attributes,
            record_exception=False,
            set_status_on_exception=False,
        )
        self.span = self._manager.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        if self.span is trace.INVALID_SPAN:
            return
        if isinstance(error, Exception):
            self.span.set_attribute(Attributes.ERROR_TYPE, type(error).__name__)
            text = error.message if isinstance(error, AsdError) else type(error).__name__
            if isinstance(error, InvalidRequest):
                # Its message may quote the request.
                text = error.field or type(error).__name__
            self.span.set_status(Status(StatusCode.ERROR, text))
        self._manager.__exit__(None, None, None)

    @property
    def recording(self) -> bool:
        """True if attributes are kept; ask before computing costly ones."""
        return self.span is not trace.INVALID_SPAN

    def set(self, name: str, value: AttributeValue) -> None:
        """Set an attribute, and the one that the GenAI conventions have for it."""
        self.span.set_attribute(name, value)
        convention = GenAi.ATTRIBUTES.get(name)
        if convention is not None:
            self.span.set_attribute(convention, value)

    def add_event(self, name: str, attributes: Mapping[str, AttributeValue]) -> None:
        """Add an event with the current time."""
        self.span.add_event(name, attributes)


def current_trace_id() -> str:
    """Return the trace id of the current span as 32 lower-case hex digits; "" if tracing is off."""
    if _state.tracer is None:
        return ""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def inference_attributes(requested: str, answered: str = "") -> dict[str, AttributeValue]:
    """Return the attributes of an inference's metrics. requested, answered: its models; "": it failed."""
    attributes: dict[str, AttributeValue] = {
        Attributes.OPERATION: OPERATION_CHAT,
        Attributes.PROVIDER: PROVIDER_NAME,
        Attributes.REQUEST_MODEL: requested,
    }
    if answered:
        attributes[Attributes.RESPONSE_MODEL] = answered
    return attributes


def metrics_enabled() -> bool:
    """Return whether metrics are recorded."""
    return _state.metered


def use_tracer_provider(provider: trace.TracerProvider | None) -> None:
    """Record spans with a provider; with None, stop recording. For set-up and for tests."""
    _state.provider = provider
    _state.tracer = provider.get_tracer(INSTRUMENTATION, VERSION) if provider else None


def use_meter_provider(provider: metrics.MeterProvider) -> None:
    """Record metrics with a provider. For set-up and for tests; once in a process."""
    metrics.set_meter_provider(provider)
    _state.metered = True


def server_interceptors() -> list[Any]:
    """Return the interceptors that trace a grpc.aio server; none if tracing is off."""
    if _state.provider is None:
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters

    # Health checks are left out: they would outnumber the requests.
    served = filters.negate(filters.health_check())
    return [aio_server_interceptor(tracer_provider=_state.provider, filter_=served)]  # type: ignore[no-untyped-call]


def client_interceptors() -> list[Any] | None:
    """Return the interceptors that trace a grpc.aio channel; None if tracing is off."""
    if _state.provider is None:
        return None
    from opentelemetry.instrumentation.grpc import aio_client_interceptors

    return list(aio_client_interceptors(tracer_provider=_state.provider))  # type: ignore[no-untyped-call]


def setup_telemetry(service_name: str, metrics_listen: str = "") -> None:
    """Set up traces and metrics by the standard OTEL_* variables. Call it once, first in a process.

    metrics_listen: address of Prometheus' /metrics; "": none. Raises SystemExit with a sentence if it cannot
    listen there.
    """
    setup_tracing(service_name)
    setup_metrics(service_name, metrics_listen)


def setup_tracing(service_name: str) -> bool:
    """Export spans if the environment asks for it, and return whether it does.

    Raises ValueError if a variable asks for an exporter or protocol that asd does not have.
    """
    kind = _exporter("TRACES")
    if kind == "none":
        return False
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exporter: SpanExporter
    if kind == "otlp":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(channel_options=proxy_arguments())  # type: ignore[arg-type]
    else:
        import sys

        # Standard output is for the READY line.
        exporter = ConsoleSpanExporter(out=sys.stderr)
    provider = TracerProvider(resource=_resource(service_name))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    use_tracer_provider(provider)
    return True


def setup_metrics(service_name: str, listen: str = "") -> bool:
    """Export metrics if the environment asks for it, and serve them at listen; return whether it does either.

    Raises ValueError if a variable asks for an exporter or protocol that asd does not have, SystemExit if it
    cannot listen on the address.
    """
    kind = _exporter("METRICS")
    if kind == "none" and not listen:
        return False
    from opentelemetry.sdk.metrics import MeterProvider

    readers: list[MetricReader] = []
    if kind != "none":
        readers.append(_periodic_reader(kind))
    if listen:
        readers.append(_serve_metrics(listen))
    use_meter_provider(MeterProvider(metric_readers=readers, resource=_resource(service_name)))
    return True


def _periodic_reader(kind: str) -> MetricReader:
    """Return a reader that exports metrics by "otlp" or "console"."""
    from opentelemetry.sdk.metrics.export import (
        ConsoleMetricExporter,
        MetricExporter,
        PeriodicExportingMetricReader,
    )

    exporter: MetricExporter
    if kind == "otlp":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

        exporter = OTLPMetricExporter(channel_options=proxy_arguments())  # type: ignore[arg-type]
    else:
        import sys

        exporter = ConsoleMetricExporter(out=sys.stderr)
    return PeriodicExportingMetricReader(exporter)


def _serve_metrics(listen: str) -> MetricReader:
    """Serve /metrics in a thread of its own, and return its reader. Raises SystemExit if it cannot listen."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import CollectorRegistry, ProcessCollector

    from services.common.metrics_server import serve_registry

    host, colon, port = listen.rpartition(":")
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    try:
        if not colon:
            raise ValueError(listen)
        serve_registry(registry, host.strip("[]"), int(port))
    except (OSError, OverflowError, ValueError) as error:
        reason = "not host:port"
        if isinstance(error, OSError):
            # Errors of the system have a positive number, and the standard library adds the address to their
            # text. An unknown host has a negative number.
            is_system = error.errno is not None and error.errno > 0
            reason = (os.strerror(error.errno or 0) if is_system else str(error.strerror)).lower()
        raise SystemExit(f"asd: metrics_listen: cannot listen on {listen}: {reason}") from error
    return PrometheusMetricReader(scope_info_enabled=False, registry=registry)


def shutdown_telemetry() -> None:
    """Export the data that is still buffered. Blocks for at most a few seconds."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        shutdown = getattr(provider, "shutdown", None)
        if shutdown is not None:
            shutdown()


def meter() -> metrics.Meter:
    """Return the meter of asd's instruments, which cost nothing if metrics are off."""
    return metrics.get_meter(INSTRUMENTATION, VERSION)


def observation(value: float, attributes: Mapping[str, AttributeValue] | None = None) -> metrics.Observation:
    """Return a callback's observation as a plain number.

    The exporters take only `int` and `float`. protobuf 7 refuses a bool or a NumPy number, and a single one
    loses all metrics of the process.
    """
    return metrics.Observation(int(value) if isinstance(value, SupportsIndex) else float(value), attributes)


def duration_histogram(name: str, description: str) -> DurationHistogram:
    """Return a histogram of durations that takes milliseconds."""
    return DurationHistogram(
        meter().create_histogram(
            name,
            unit="s",
            description=description,
            explicit_bucket_boundaries_advisory=_ADVISED_BUCKETS_S.get(name, _DURATION_BUCKETS_S),
        )
    )


class DurationHistogram:
    """A histogram in seconds that takes milliseconds."""

    __slots__ = ("_histogram",)

    def __init__(self, histogram: metrics.Histogram) -> None:
        self._histogram = histogram

    def record_ms(self, duration_ms: float, attributes: Mapping[str, AttributeValue] | None = None) -> None:
        """Record a duration, given in milliseconds."""
        self._histogram.record(duration_ms / 1000.0, attributes)


def _exporter(signal: str) -> str:
    """Return "otlp", "console" or "none" for TRACES or METRICS."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    default = "otlp" if any(os.environ.get(name) for name in endpoints) else "none"
    kind = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() or default
    if kind not in {"otlp", "console", "none"}:
        raise ValueError(f"OTEL_{signal}_EXPORTER={kind} is not supported: use otlp, console or none")
    if kind == "otlp":
        protocol_names = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next((os.environ[name] for name in protocol_names if os.environ.get(name)), "grpc")
        if protocol != "grpc":
            raise ValueError(f"{protocol_names[1]}={protocol} is not supported: use grpc")
    return kind


def _resource(service_name: str) -> Resource:
    from opentelemetry.sdk.resources import Resource

    attributes = {"service.version": VERSION, "service.namespace": "asd"}
    # Attributes given here would override the environment, against the convention.
    if not os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = service_name
    return Resource.create(attributes)
