"""What a router records in a test: its spans and its metrics, as fixtures, and how to read them."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common import telemetry


class Ending(SpanProcessor):
    """Sets its event when a request's span has ended."""

    def __init__(self):
        self.event = asyncio.Event()

    def on_end(self, span):
        if span.name == "asd.cascade":
            self.event.set()


class Recorded:
    """The spans that were recorded, by the order in which they started."""

    def __init__(self, exporter, ending):
        self._exporter, self.ended = exporter, ending.event

    def spans(self, name):
        found = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time)

    def values(self, name, attribute):
        return [span.attributes.get(attribute) for span in self.spans(name)]

    def status(self, name):
        return [(span.status.status_code, span.attributes.get("error.type")) for span in self.spans(name)]


@pytest.fixture
def recorded():
    """Record the spans of routers that are built from here on."""
    exporter, ending, provider = InMemorySpanExporter(), Ending(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.add_span_processor(ending)
    telemetry.use_tracer_provider(provider)
    yield Recorded(exporter, ending)
    telemetry.use_tracer_provider(None)
    provider.shutdown()


@pytest.fixture
def metered(monkeypatch):
    """Record the metrics of routers that are built from here on; return what reads them, by name."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    monkeypatch.setattr(telemetry, "meter", lambda: provider.get_meter("asd"))
    monkeypatch.setattr(telemetry, "metrics_enabled", lambda: True)

    def read():
        data = reader.get_metrics_data()
        # None: nothing was measured.
        scopes = [scope for each in (data.resource_metrics if data else ()) for scope in each.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    yield read
    provider.shutdown()


def counts(metric):
    """Return a counter's points, by the values of their attributes in the order of their names."""
    return {
        tuple(value for _, value in sorted(point.attributes.items())): point.value
        for point in metric.data.data_points
    }


def sums(metric):
    """Return the number and the sum of a histogram's values, by the values of their attributes."""
    return {
        tuple(value for _, value in sorted(point.attributes.items())): (point.count, point.sum)
        for point in metric.data.data_points
    }
