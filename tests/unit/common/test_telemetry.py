"""Spans and histograms as their exporters get them, and what the environment may ask for."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asd.errors import Unavailable
from services.common import telemetry
from services.common.telemetry import Attributes, GenAi, Metrics, Traced, duration_histogram, observation
from tests.recording import metered  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan


DOCS = Path(__file__).parents[3] / "docs" / "telemetry.md"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.use_tracer_provider(provider)
    yield exporter
    telemetry.use_tracer_provider(None)
    provider.shutdown()


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_a_span_keeps_its_attributes_and_has_no_status(exporter: InMemorySpanExporter) -> None:
    with Traced("outer", {"a": 1}) as outer:
        assert outer.recording
        outer.set("b", "two")
        trace_id = telemetry.current_trace_id()
        with Traced("inner"):
            pass
    inner, span = exporter.get_finished_spans()
    assert dict(span.attributes or {}) == {"a": 1, "b": "two"}
    assert span.status.status_code is StatusCode.UNSET
    assert inner.parent is not None
    assert inner.parent.span_id == span.context.span_id
    assert trace_id == f"{span.context.trace_id:032x}"


def test_an_attribute_comes_under_asds_name_and_the_conventions(exporter: InMemorySpanExporter) -> None:
    with Traced("call") as span:
        span.set("asd.request.id", "r1")
        span.set("asd.cost", 1.5)
    assert dict(only(exporter).attributes or {}) == {
        "asd.request.id": "r1",
        "gen_ai.response.id": "r1",
        "asd.cost": 1.5,
    }


def test_the_table_of_conventions_is_documented() -> None:
    rows = re.findall(r"^\| `(asd\.\S+)` \| `(gen_ai\.\S+)` \| (\w+) \|$", DOCS.read_text(), re.MULTILINE)
    documented = {
        kind: {name: convention for name, convention, of in rows if of == kind}
        for kind in ("attribute", "metric")
    }
    assert documented == {"attribute": GenAi.ATTRIBUTES, "metric": GenAi.METRICS}


def test_an_error_of_ours_marks_the_span_with_its_message(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(Unavailable), Traced("call"):
        raise Unavailable("small is away")
    span = only(exporter)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "small is away")
    assert span.attributes is not None
    assert span.attributes[Attributes.ERROR_TYPE] == "Unavailable"


def test_a_foreign_error_marks_the_span_without_its_text(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="secret"), Traced("call"):
        raise ValueError("a secret prompt")
    span = only(exporter)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ValueError")
    assert span.attributes is not None
    assert span.attributes[Attributes.ERROR_TYPE] == "ValueError"
    assert not span.events


@pytest.mark.parametrize("stop", [asyncio.CancelledError, GeneratorExit])
def test_a_span_that_is_cut_short_ends_without_an_error(
    exporter: InMemorySpanExporter, stop: type[BaseException]
) -> None:
    with pytest.raises(stop), Traced("call"):
        raise stop
    span = only(exporter)
    assert span.status.status_code is StatusCode.UNSET
    assert not span.attributes


def test_without_a_provider_nothing_is_recorded(exporter: InMemorySpanExporter) -> None:
    telemetry.use_tracer_provider(None)
    with Traced("call", {"a": 1}) as span:
        span.set("b", 2)
        assert not span.recording
        assert telemetry.current_trace_id() == ""
    assert telemetry.server_interceptors() == []
    assert telemetry.client_interceptors() is None
    assert exporter.get_finished_spans() == ()


def test_durations_are_recorded_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    monkeypatch.setattr(telemetry, "meter", lambda: provider.get_meter("test"))
    histogram = duration_histogram("asd.test.duration", "a duration")
    histogram.record_ms(1500.0, {"stage": "small"})
    histogram.record_ms(7.0, {"stage": "small"})
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert metric.unit == "s"
    assert (point.count, point.sum) == (2, pytest.approx(1.507))
    assert (point.min, point.max) == (pytest.approx(0.007), pytest.approx(1.5))
    assert dict(point.attributes) == {"stage": "small"}
    # The two lie in (0.005, 0.01] and (1, 2.5].
    counted = [
        bound for bound, count in zip(point.explicit_bounds, point.bucket_counts, strict=False) if count
    ]
    assert counted == [0.01, 2.5]
    provider.shutdown()


@pytest.mark.parametrize(
    ("name", "advised"),
    [
        (
            Metrics.INFERENCE_DURATION,
            (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
        ),
        (
            Metrics.TPOT,
            (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
        ),
    ],
)
def test_a_duration_of_the_conventions_has_the_buckets_that_they_advise(
    metered: Any,  # noqa: F811 - the fixture
    name: str,
    advised: tuple[float, ...],
) -> None:
    duration_histogram(name, "a duration").record_ms(1.0)
    (point,) = metered()[name].data.data_points
    assert point.explicit_bounds == advised


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nothing_is_set_up_unasked(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert not telemetry.setup_tracing("asd-test")
    assert not telemetry.setup_metrics("asd-test")
    assert telemetry.client_interceptors() is None
    assert not telemetry.metrics_enabled()


@pytest.mark.parametrize(
    ("variable", "value", "asks_for"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "use otlp, console or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "use grpc"),
    ],
)
def test_an_exporter_that_asd_lacks_is_refused(
    environment: pytest.MonkeyPatch, variable: str, value: str, asks_for: str
) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    environment.setenv(variable, value)
    with pytest.raises(ValueError, match=asks_for) as caught:
        telemetry.setup_tracing("asd-test")
    assert f"{variable}={value}" in str(caught.value)
    assert telemetry.client_interceptors() is None


@pytest.mark.parametrize(
    ("value", "number"),
    [(True, 1), (np.bool_(True), 1.0), (np.int64(3), 3), (np.float32(0.5), 0.5), (2, 2), (0.25, 0.25)],
)
def test_what_is_observed_is_a_plain_number(value: float, number: float) -> None:
    """Exporters of protobuf 7 lose all metrics of a process over one that is not."""
    seen = observation(value, {"stage": "small"})
    assert (type(seen.value), seen.value) == (type(number), number)
    assert seen.attributes == {"stage": "small"}
