"""Callers that leave at any moment, through a real router and real models: nothing works on behind them."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, suppress

import onnxruntime_genai

from asd.v1 import cascade_pb2, cascade_pb2_grpc, stage_pb2, stage_pb2_grpc
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from services.router.__main__ import build
from services.router.settings import RouterSettings
from services.stage.onnx_engine import OnnxOptions
from services.stage.residency import Residency
from services.stage.servicer import StageServicer
from suites import split
from tests.integration.stage.conftest import LiveGenerators, engine

NAMES = ("small", "medium")
CANCELS = 1000


async def start_stage(name: str, stack: AsyncExitStack) -> str:
    residency = Residency({name: engine(name)}, name)
    await residency.load(name)
    stack.push_async_callback(residency.unload, name)
    servicer = StageServicer(residency)
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    stack.push_async_callback(server.stop, 0)
    return f"127.0.0.1:{port}"


async def test_a_thousand_callers_that_leave_leave_nothing_behind(monkeypatch):
    generators = LiveGenerators()
    monkeypatch.setattr(onnxruntime_genai, "Generator", generators)
    rng = random.Random(5)
    prompts = [task.prompt for task in split("demo", 60)]
    async with AsyncExitStack() as stack:
        targets = {name: await start_stage(name, stack) for name in NAMES}
        stages = [{"name": name, "target": targets[name], "cost": 1.0} for name in NAMES]
        routers = []
        for pipelined in (True, False):
            settings = RouterSettings(
                stages=stages, static_plan=NAMES, speculation={"pipelined": pipelined, "adaptive": False}
            )
            servicer = await build(settings, stack)
            server, port = await start_server("127.0.0.1:0", [servicer.registration()])
            stack.push_async_callback(server.stop, 0)
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{port}", retry=False))
            routers.append(cascade_pb2_grpc.CascadeServiceStub(channel))

        async def ask_and_leave() -> None:
            # With and without a chain: the static plan escalates by itself.
            chain = rng.choice((NAMES, ()))
            request = cascade_pb2.GenerateRequest(prompt=rng.choice(prompts), chain=chain)
            router = rng.choice(routers)
            if rng.random() < 0.5:
                call = router.Generate(request, timeout=30)
            else:
                stream = cascade_pb2.GenerateStreamRequest(request=request, include_drafts=True)
                call = router.GenerateStream(stream, timeout=30)
            for _ in range(rng.choice((0, 3, 30, 300))):
                await asyncio.sleep(0)
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call.code()

        async with asyncio.timeout(100):
            for _ in range(CANCELS // 10):
                await asyncio.gather(*(ask_and_leave() for _ in range(10)))
            stubs = [
                stage_pb2_grpc.StageServiceStub(await stack.enter_async_context(open_channel(target)))
                for target in targets.values()
            ]
            for stub in stubs:
                while True:
                    status = await stub.Status(stage_pb2.StatusRequest(), timeout=10)
                    (model,) = status.models
                    if not (model.running_requests or model.queued_requests):
                        break
                    await asyncio.sleep(0)
                assert model.kv_cache_bytes == 0
                assert model.completed_requests + model.cancelled_requests > 0
            answer = await routers[0].Generate(
                cascade_pb2.GenerateRequest(prompt=prompts[0], chain=NAMES), timeout=30
            )
        assert answer.stage == "medium"
        # What the prefix caches may keep.
        assert generators.made > 100
        await generators.sink_to(len(NAMES) * OnnxOptions().cached_sequences)
    await generators.sink_to(0)
