"""Every metric and span reaches a collector that speaks OTLP: the test's own, by the protocol's stubs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from asd.v1 import cascade_pb2, cascade_pb2_grpc, policy_pb2, policy_pb2_grpc
from services.common.telemetry import Metrics, Spans
from tests.integration.common.conftest import CALL_S, PROCESS_S, running
from tests.integration.common.test_metrics import documented
from tests.integration.common.test_tls import router_config
from tests.integration.scaler.test_scaler import api, kubeconfig  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[3]
STAGES = ("small", "medium", "large")
# What Prometheus adds to a metric's name.
SUFFIXES = ("", "_total", "_seconds", "_bytes")


class Receiver:
    """Keeps what comes, by the service that it is of."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}
        self.spans: dict[str, set[str]] = {}

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            for resource in request.resource_metrics:
                of = self.metrics.setdefault(service_of(resource), {})
                of.update({each.name: each for scope in resource.scope_metrics for each in scope.metrics})
            return metrics_service_pb2.ExportMetricsServiceResponse()
        for resource in request.resource_spans:
            of_spans = self.spans.setdefault(service_of(resource), set())
            of_spans |= {each.name for scope in resource.scope_spans for each in scope.spans}
        return trace_service_pb2.ExportTraceServiceResponse()


def service_of(resource: Any) -> str:
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    return names["service.name"]


def names_in(registry: type) -> set[str]:
    """Return the names that a class of the telemetry module holds."""
    return {value for name, value in vars(registry).items() if name.isupper()}


def points(metric: Any) -> list[Any]:
    """Return a metric's points, whichever kind it is of."""
    return list(getattr(metric, metric.WhichOneof("data")).data_points)


def documented_names(service: str) -> set[str]:
    """Return the names of a service's metrics by the documents, as OpenTelemetry has them."""
    by_prometheus = {
        name.replace(".", "_") + suffix: name for name in names_in(Metrics) for suffix in SUFFIXES
    }
    return {by_prometheus[name] for name in documented(service)}


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    """A collector that the services of the test are told of."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    receiver, server = Receiver(), grpc.aio.server()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    yield receiver
    await server.stop(0)


async def test_every_instrument_and_every_span_is_received(receiver: Receiver) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.monitoring.exported", "otlp"), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PROCESS_S):
        _, log = await process.communicate()
    assert (process.returncode, log.decode()) == (0, "")
    received = receiver.metrics["asd-all"]
    assert set(received) == names_in(Metrics)
    for name, metric in received.items():
        assert points(metric), name
    (loaded,) = points(received[Metrics.MODELS_LOADED])
    assert (loaded.WhichOneof("value"), loaded.as_int) == ("as_int", 1)
    assert receiver.spans["asd-all"] == names_in(Spans)


async def test_what_the_services_themselves_count_is_received(
    receiver: Receiver,
    api: tuple[Any, str],  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their own figures, not those of stand-ins: each process sends them at the latest as it ends."""
    config = tmp_path / "kubeconfig"
    config.write_text(kubeconfig(api[1]))
    monkeypatch.setenv("KUBECONFIG", str(config))
    models = [{"name": name, "path": str(ROOT / "models" / name)} for name in STAGES]
    artifact = str(ROOT / "policy_service" / "policy.zip")
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:

        async def start(module: str, **settings: Any) -> Any:
            folder = tmp_path / module
            folder.mkdir()
            return await stack.enter_async_context(running(module, settings, folder))

        policy = await start(
            "policy_service",
            artifact=artifact,
            shadow_artifact=artifact,
            reports_path=str(tmp_path / "reports.jsonl"),
        )
        stage = await start("services.stage", models=models)
        router = await start(
            "services.router",
            **router_config(
                stages=[
                    {"name": name, "target": stage.target, "model": name, "cost": cost}
                    for name, cost in zip(STAGES, (1.0, 3.0, 10.0), strict=True)
                ],
                policy={"target": policy.target, "timeout_ms": CALL_S * 1e3},
            ),
        )
        manager = await start(
            "services.scaler",
            poll_seconds=0.01,
            stages=[{"name": "large", "deployment": "asd-large", "target": stage.target}],
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(router.target))
        ask = cascade_pb2.GenerateRequest(prompt="True or false? 3 plus 22 is more than 24.")
        cascade = cascade_pb2_grpc.CascadeServiceStub(channel)
        answer = await cascade.Generate(ask, timeout=CALL_S)
        # A verification is counted, too.
        await cascade.Generate(
            cascade_pb2.GenerateRequest(prompt=ask.prompt, prediction=answer.text), timeout=CALL_S
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(policy.target))
        report = policy_pb2.ReportRequest(
            request_id=answer.request_id,
            stage=answer.stage,
            p_correct=answer.p_correct,
            policy_version=answer.policy_version,
            correct=True,
        )
        await policy_pb2_grpc.PolicyServiceStub(channel).Report(report, timeout=CALL_S)
        for process in (router, manager, policy, stage):
            code, log = await process.stop(signal.SIGTERM)
            assert (code, "Traceback" in log, "Exception" in log) == (0, False, False), log
    assert set(receiver.metrics["asd-stage"]) == documented_names("stage")
    # Counted once a shadow was asked, or a stage was scaled.
    assert set(receiver.metrics["asd-policy"]) | {Metrics.SHADOW_DECISIONS} == documented_names("policy")
    assert set(receiver.metrics["asd-manager"]) | {Metrics.MANAGER_SCALINGS} == documented_names("manager")
    router_metrics = receiver.metrics["asd-router"]
    assert {Metrics.REQUESTS, Metrics.STAGE_REQUESTS, Metrics.REQUEST_DURATION} <= set(router_metrics)
    assert set(router_metrics) <= documented_names("router")
    assert {Spans.CASCADE, Spans.PLAN, Spans.STAGE, Spans.DECIDE} <= receiver.spans["asd-router"]
    loaded = {
        point.attributes[0].value.string_value: point.as_int
        for point in points(receiver.metrics["asd-stage"][Metrics.MODELS_LOADED])
    }
    assert loaded == dict.fromkeys(STAGES, 1)
