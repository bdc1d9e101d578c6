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

from asd.v1 import cascade_pb2, cascade_pb2_grpc
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server

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
        self.spans = {}

    async def Export(self, request, context):  # noqa: N802 - the proto's name
        for resource in request.resource_spans:
            service = attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                self.spans.update({span.span_id: (service, span) for span in scope.spans})
        return collector.ExportTraceServiceResponse()


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
                await process.wait()

            stack.push_async_callback(stop)
            line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().split()
            assert line[0] == "READY"
            return line[2], stop

        yield start


async def test_spans_are_linked_across_processes(spawn, tmp_path):
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
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_METRICS_EXPORTER": "none",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    fakes = str(Path(__file__).with_name("conftest.py"))
    peers = {
        name: await spawn(environment, "-c", PEER, fakes, name)
        for name in ("policy", "small", "medium", "large")
    }
    config = tmp_path / "router.yaml"
    stages = [
        {"name": name, "target": peers[name][0], "cost": cost}
        for name, cost in (("small", 1.6), ("medium", 4.2), ("large", 8.8))
    ]
    config.write_text(
        yaml.safe_dump(
            {
                "listen": "127.0.0.1:0",
                "policy": {"target": peers["policy"][0], "timeout_ms": 5000},
                "stages": stages,
                "static_plan": ["medium"],
            }
        )
    )
    target, stop_router = await spawn(environment, "-m", "services.router", "--config", str(config))
    async with open_channel(target) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        response = await stub.Generate(cascade_pb2.GenerateRequest(prompt="a secret prompt"), timeout=20)
        await peers["policy"][1]()
        static = await stub.Generate(cascade_pb2.GenerateRequest(prompt="a secret prompt"), timeout=20)
    for stop in (stop_router, *(stop for _, stop in peers.values())):
        await stop()
    await server.stop(0)

    def tree(trace_id):
        edges = set()
        for service, span in receiver.spans.values():
            if span.trace_id.hex() == trace_id:
                parent = receiver.spans.get(span.parent_span_id)
                edges.add(((parent[0], parent[1].name) if parent else None, (service, span.name)))
        return edges

    def found(trace_id, name):
        chosen = [s for _, s in receiver.spans.values() if s.trace_id.hex() == trace_id and s.name == name]
        return [attributes(span) for span in sorted(chosen, key=lambda span: span.start_time_unix_nano)]

    router, policy = "asd-router", "asd-policy"
    rpc, plan, decide = (
        "/asd.v1.CascadeService/Generate",
        "/asd.v1.PolicyService/Plan",
        "/asd.v1.PolicyService/Decide",
    )
    generate, verify = "/asd.v1.StageService/Generate", "/asd.v1.StageService/Verify"
    assert tree(response.trace_id) == {
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
    first, second = found(response.trace_id, "asd.stage")
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
    assert [each["asd.decision.outcome"] for each in found(response.trace_id, "asd.decide")] == [
        "escalate",
        "stop",
    ]
    assert found(response.trace_id, "asd.plan")[0]["asd.plan.source"] == "policy"
    assert found(static.trace_id, "asd.plan")[0]["asd.plan.source"] == "static"
    assert found(static.trace_id, "asd.cascade")[0]["asd.plan.source"] == "static"
    assert not any(b"secret" in span.SerializeToString() for _, span in receiver.spans.values())
