"""Spans of router, policy and stage, as a real OTLP receiver gets them from separate processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import yaml
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc

from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from tests.limits import CALL_S

ROOT = Path(__file__).parents[3]
PEER = """
import asyncio, runpy, sys
from services.common import telemetry
from services.common.server import ServiceRegistration, serve
fakes = runpy.run_path(sys.argv[1])
name = sys.argv[2]
telemetry.setup_telemetry("asd-" + name)
fake = fakes["FakePolicy"](script={"small": "large"}) if name == "policy" else fakes["FakeStage"](name)
asyncio.run(serve(name, "127.0.0.1:0", [ServiceRegistration(fake.full_name, fake.add)], drain_seconds=1))
"""


class Receiver(collector_grpc.TraceServiceServicer):
    def __init__(self):
        # By id: the service's name and the span.
        self.spans = {}
        # In which a process sends its spans here.
        self.environment = {}

    async def Export(self, request, context):  # noqa: N802 - the proto's name
        for resource in request.resource_spans:
            service = attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                self.spans.update({span.span_id: (service, span) for span in scope.spans})
        return collector.ExportTraceServiceResponse()

    def edges(self, trace_id):
        """Return a trace's spans as (parent, child), each (service, name); None for what has no parent."""
        edges = set()
        for service, span in self.spans.values():
            if span.trace_id.hex() == trace_id:
                parent = self.spans.get(span.parent_span_id)
                edges.add(((parent[0], parent[1].name) if parent else None, (service, span.name)))
        return edges

    def found(self, trace_id, name):
        """Return the attributes of a trace's spans of a name, in the order of their starts."""
        chosen = [s for _, s in self.spans.values() if s.trace_id.hex() == trace_id and s.name == name]
        return [attributes(span) for span in sorted(chosen, key=lambda span: span.start_time_unix_nano)]


def attributes(holder):
    kinds = {each.key: each.value for each in holder.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in kinds.items()}


@pytest.fixture
async def spawn():
    async with AsyncExitStack() as stack:

        async def start(environment, *arguments):
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE
            )

            async def stop():
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), CALL_S)
                except TimeoutError:
                    process.kill()
                    raise

            stack.push_async_callback(stop)
            line = (await asyncio.wait_for(process.stdout.readline(), CALL_S)).decode().split()
            assert line[0] == "READY"
            return line[2], stop

        yield start


@pytest.fixture
async def receiver():
    """Return an OTLP receiver that listens."""
    receiver = Receiver()
    server, port = await start_server(
        "127.0.0.1:0",
        [
            ServiceRegistration(
                "opentelemetry.proto.collector.trace.v1.TraceService",
                lambda server: collector_grpc.add_TraceServiceServicer_to_server(receiver, server),
            )
        ],
    )
    receiver.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_METRICS_EXPORTER": "none",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    yield receiver
    await server.stop(0)


def write_config(path, **settings):
    path.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **settings}))
    return str(path)


async def test_spans_are_linked_across_processes(receiver, spawn, tmp_path):
    fakes = str(Path(__file__).with_name("conftest.py"))
    peers = {
        name: await spawn(receiver.environment, "-c", PEER, fakes, name)
        for name in ("policy", "small", "medium", "large")
    }
    stages = [
        {"name": name, "target": peers[name][0], "cost": cost}
        for name, cost in (("small", 1.6), ("medium", 4.2), ("large", 8.8))
    ]
    config = write_config(
        tmp_path / "router.yaml",
        policy={"target": peers["policy"][0], "timeout_ms": CALL_S * 1e3},
        stages=stages,
        static_plan=["medium"],
    )
    target, stop_router = await spawn(receiver.environment, "-m", "services.router", "--config", config)
    async with open_channel(target) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        response = await stub.Generate(cascade_pb2.GenerateRequest(prompt="a secret prompt"), timeout=CALL_S)
        await peers["policy"][1]()
        static = await stub.Generate(cascade_pb2.GenerateRequest(prompt="a secret prompt"), timeout=CALL_S)
    for stop in (stop_router, *(stop for _, stop in peers.values())):
        await stop()

    router, policy = "asd-router", "asd-policy"
    rpc, plan, decide = (
        "/asd.v1.CascadeService/Generate",
        "/asd.v1.PolicyService/Plan",
        "/asd.v1.PolicyService/Decide",
    )
    generate, verify = "/asd.v1.StageService/Generate", "/asd.v1.StageService/Verify"
    assert receiver.edges(response.trace_id) == {
        (None, (router, rpc)),
        ((router, rpc), (router, "asd.cascade")),
        ((router, "asd.cascade"), (router, "asd.plan")),
        ((router, "asd.plan"), (router, plan)),
        ((router, plan), (policy, plan)),
        ((router, "asd.cascade"), (router, "asd.stage")),
        ((router, "asd.stage"), (router, generate)),
        ((router, generate), ("asd-small", generate)),
        ((router, "asd.stage"), (router, verify)),
        ((router, verify), ("asd-large", verify)),
        ((router, "asd.cascade"), (router, "asd.decide")),
        ((router, "asd.decide"), (router, decide)),
        ((router, decide), (policy, decide)),
    }
    first, second = receiver.found(response.trace_id, "asd.stage")
    assert (first["asd.stage.name"], first["asd.stage.action"]) == ("small", "generate")
    assert (second["asd.stage.name"], second["asd.stage.action"]) == ("large", "verify")
    assert second["gen_ai.operation.name"] == "chat"
    assert second["gen_ai.response.model"] == "large"
    assert second["gen_ai.usage.output_tokens"] == 3
    assert second["asd.verify.accepted_tokens"] == 4
    assert [record.latency_ms for record in response.stages] == [
        first["asd.stage.latency_ms"],
        second["asd.stage.latency_ms"],
    ]
    assert [each["asd.decision.outcome"] for each in receiver.found(response.trace_id, "asd.decide")] == [
        "escalate",
        "stop",
    ]
    assert receiver.found(response.trace_id, "asd.plan")[0]["asd.plan.source"] == "policy"
    assert receiver.found(static.trace_id, "asd.plan")[0]["asd.plan.source"] == "static"
    assert receiver.found(static.trace_id, "asd.cascade")[0]["asd.plan.source"] == "static"
    assert not any(b"secret" in span.SerializeToString() for _, span in receiver.spans.values())


def check_stage_span(span, record):
    """Check a stage's span against its record in the response, times included."""
    assert span["asd.stage.name"] == record.stage
    assert span["asd.stage.index"] == record.stage_index
    assert span["asd.stage.latency_ms"] == record.latency_ms > 0.0
    timing = record.timing
    assert timing.total_ms > 0.0
    assert span["asd.stage.queue_ms"] == timing.queue_ms
    assert span["asd.stage.prefill_ms"] == timing.prefill_ms
    assert span["asd.stage.decode_ms"] == timing.decode_ms
    # The call takes what the stage measured, and the way there and back.
    assert timing.prefill_ms + timing.decode_ms <= timing.total_ms * 1.001
    assert timing.total_ms <= record.latency_ms
    assert span["asd.cost"] == record.cost
    assert span["gen_ai.usage.output_tokens"] == record.usage.completion_tokens > 0


async def test_the_real_processes_send_linked_spans(receiver, spawn, tmp_path):
    policy_config = write_config(
        tmp_path / "policy.yaml", artifact=str(ROOT / "policy_service" / "policy.zip")
    )
    models = [{"name": "small", "path": str(ROOT / "models" / "small")}]
    stage_config = write_config(tmp_path / "stage.yaml", models=models)
    policy, stage = await asyncio.gather(
        spawn(receiver.environment, "-m", "policy_service", "--config", policy_config),
        spawn(receiver.environment, "-m", "services.stage", "--config", stage_config),
    )
    # The policy is for three stages; one process stands for them all.
    costs = {"small": 1.6, "medium": 4.2, "large": 8.8}
    router_config = write_config(
        tmp_path / "router.yaml",
        policy={"target": policy[0], "timeout_ms": CALL_S * 1e3},
        stages=[{"name": name, "target": stage[0], "cost": cost} for name, cost in costs.items()],
        static_plan=["medium"],
    )
    router = await spawn(receiver.environment, "-m", "services.router", "--config", router_config)
    request = cascade_pb2.GenerateRequest(
        prompt="Max has 9 beads. Max finds 10 more. How many beads does Max have now?",
        # Nothing is as sure as that, so that every stage but the last escalates.
        objective=common_pb2.Objective(min_quality=1.0, **{"lambda": 0.0}),
    )
    async with open_channel(router[0]) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        response = await stub.Generate(request, timeout=CALL_S)
        fixed = await stub.Generate(
            cascade_pb2.GenerateRequest(prompt=request.prompt, stage="medium"), timeout=CALL_S
        )
    for _, stop in (router, policy, stage):
        await stop()

    assert response.plan_source == cascade_pb2.PLAN_SOURCE_POLICY
    # The larger stage may have been warmed meanwhile.
    records = [each for each in response.stages if each.action != common_pb2.STAGE_ACTION_PREFILL]
    assert len(records) > 1
    service = "asd-router"
    # Others may come between or beside these.
    assert receiver.edges(response.trace_id) >= {
        (None, (service, "/asd.v1.CascadeService/Generate")),
        ((service, "/asd.v1.CascadeService/Generate"), (service, "asd.cascade")),
        ((service, "asd.cascade"), (service, "asd.plan")),
        ((service, "asd.cascade"), (service, "asd.stage")),
        ((service, "asd.cascade"), (service, "asd.decide")),
        *across(service, "asd.plan", "/asd.v1.PolicyService/Plan", "asd-policy"),
        *across(service, "asd.decide", "/asd.v1.PolicyService/Decide", "asd-policy"),
        *across(service, "asd.stage", "/asd.v1.StageService/Generate", "asd-stage"),
        *across(service, "asd.stage", "/asd.v1.StageService/Verify", "asd-stage"),
    }
    spans = receiver.found(response.trace_id, "asd.stage")
    for span, record in zip(spans, records, strict=True):
        check_stage_span(span, record)
    assert [span["asd.stage.action"] for span in spans] == ["generate", *["verify"] * (len(spans) - 1)]
    (whole,) = receiver.found(response.trace_id, "asd.cascade")
    assert whole["asd.latency_ms"] == response.latency_ms
    assert whole["asd.policy.latency_ms"] == response.policy_ms
    assert sum(span["asd.stage.latency_ms"] for span in spans) + response.policy_ms <= response.latency_ms
    assert all(span["asd.policy.predict_us"] > 0 for span in receiver.found(response.trace_id, "asd.decide"))

    # A request of its own is a trace of its own, in which the policy has no part.
    assert receiver.edges(fixed.trace_id) >= set(
        across(service, "asd.stage", "/asd.v1.StageService/Generate", "asd-stage")
    )
    assert "asd-policy" not in {child[0] for _, child in receiver.edges(fixed.trace_id)}
    check_stage_span(receiver.found(fixed.trace_id, "asd.stage")[0], fixed.stages[0])
    resources = {name for name, _ in receiver.spans.values()}
    assert resources == {"asd-router", "asd-policy", "asd-stage"}
    assert not any(b"beads" in span.SerializeToString() for _, span in receiver.spans.values())


def across(service, caller, method, peer):
    """Return the edges from a span over a call to the process that serves it."""
    return [((service, caller), (service, method)), ((service, method), (peer, method))]
