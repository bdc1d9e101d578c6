"""The gateway's metrics, by the names of OpenTelemetry's conventions for HTTP, and its access log."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.semconv.attributes.http_attributes import (
    HTTP_REQUEST_METHOD,
    HTTP_RESPONSE_STATUS_CODE,
    HTTP_ROUTE,
)
from opentelemetry.semconv.metrics import MetricInstruments
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from services.common import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable

ACCESS_LOG = "services.gateway.access"
# Methods that the paths know, and those that clients try.
_METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}


class Instruments:
    """The gateway's OpenTelemetry instruments. Build it after telemetry is set up."""

    def __init__(self) -> None:
        self._duration = telemetry.duration_histogram(
            HTTP_SERVER_REQUEST_DURATION, "time to the end of an answer"
        )

    def watch_active(self, count: Callable[[], int]) -> None:
        """Report how many answers are in flight, whenever metrics are read."""
        telemetry.meter().create_observable_up_down_counter(
            MetricInstruments.HTTP_SERVER_ACTIVE_REQUESTS,
            callbacks=[lambda _: [telemetry.observation(count())]],
            unit="{request}",
            description="answers in flight",
        )

    def ended(self, method: str, route: str, status: int, duration_ms: float) -> None:
        """A request has ended. route: "" for an unknown path. status: 0 if the caller left before it."""
        self._duration.record_ms(duration_ms, http_attributes(method, route, status))


def http_attributes(method: str, route: str, status: int) -> dict[str, Any]:
    """Return the conventions' attributes of a request; see Instruments.ended."""
    # Methods and paths of callers' own would make a series each.
    attributes: dict[str, Any] = {HTTP_REQUEST_METHOD: method if method in _METHODS else "_OTHER"}
    if route:
        attributes[HTTP_ROUTE] = route
    if status:
        attributes[HTTP_RESPONSE_STATUS_CODE] = status
    return attributes


def setup_prometheus() -> Callable[[], bytes]:
    """Return what renders the process's metrics for Prometheus. Call it after telemetry.setup_telemetry."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
    provider = metrics.get_meter_provider()
    if isinstance(provider, MeterProvider):
        provider.add_metric_reader(reader)
    else:
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "asd-gateway"}
        telemetry.use_meter_provider(MeterProvider(metric_readers=[reader], resource=Resource.create(named)))
    return lambda: generate_latest(registry)


class AccessLog:
    """Writes a line of JSON for each request, if it is on. It never gets a prompt, a token or a query."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._logger = logging.getLogger(ACCESS_LOG)
        if is_on and not self._logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(handler)
            self._logger.propagate = False
            self._logger.setLevel(logging.INFO)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line."""
        if self.is_on:
            self._logger.info(json.dumps(line, default=str))
