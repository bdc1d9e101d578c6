"""Callers that leave at any moment, through a real router and real models: nothing works on behind them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import onnxruntime_genai
import pytest

from asd.v1 import cascade_pb2, cascade_pb2_grpc, stage_pb2, stage_pb2_grpc
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from services.router.__main__ import build
from services.router.settings import RouterSettings
from services.stage.engines.onnx.engine import OnnxOptions
from services.stage.model_pool import ModelPool as Residency
from services.stage.servicer import StageServicer
from suites import split
from tests.integration.stage.conftest import LiveGenerators, engine

if TYPE_CHECKING:
    import grpc

NAMES = ("small", "medium")
CANCELS = 1000
TOGETHER = 10
# Calls of stages that have begun for a request, and messages with tokens that its caller has had, at which
# callers leave: a request calls two stages, and shows tokens of both.
CALLS, CHUNKS = (0, 1, 2), (1, 2, 10)


class Calls:
    """How many calls of stages have begun, by session."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._reached: defaultdict[tuple[str, int], asyncio.Event] = defaultdict(asyncio.Event)

    def begun(self, session: str) -> None:
        self._counts[session] += 1
        self._reached[session, self._counts[session]].set()

    async def reach(self, session: str, count: int) -> None:
        """Return once so many have begun."""
        if count:
            await self._reached[session, count].wait()


class NotingServicer(StageServicer):
    """A stage that says when a call has begun."""

    def __init__(self, residency: Residency, calls: Calls) -> None:
        super().__init__(residency)
        self._calls = calls

    def _admit(self, request, path=""):
        self._calls.begun(request.session_id)
        return super()._admit(request, path)


async def start_stage(name: str, calls: Calls, stack: AsyncExitStack) -> str:
    residency = Residency({name: engine(name)}, name)
    await residency.load(name)
    stack.push_async_callback(residency.unload, name)
    servicer = NotingServicer(residency, calls)
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    stack.push_async_callback(server.stop, 0)
    return f"127.0.0.1:{port}"


async def start_router(targets: dict[str, str], stack: AsyncExitStack, *, pipelined: bool):
    settings = RouterSettings(
        stages=[{"name": name, "target": targets[name], "cost": 1.0} for name in NAMES],
        static_plan=NAMES,
        speculation={"pipelined": pipelined, "adaptive": False},
    )
    servicer = await build(settings, stack)
    server, port = await start_server("127.0.0.1:0", [servicer.registration()])
    stack.push_async_callback(server.stop, 0)
    channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{port}", retry=False))
    return cascade_pb2_grpc.CascadeServiceStub(channel)


async def leave(call: grpc.aio.Call) -> None:
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call.code()


async def leave_at_calls(router, request, count: int, calls: Calls) -> None:
    """Leave once so many calls of stages have begun, or with the answer where that is earlier."""
    call = router.Generate(request, timeout=600)
    begun = asyncio.create_task(calls.reach(request.session_id, count))
    ended = asyncio.create_task(call.code())
    await asyncio.wait([begun, ended], return_when=asyncio.FIRST_COMPLETED)
    begun.cancel()
    await leave(call)
    await asyncio.gather(begun, ended, return_exceptions=True)


async def leave_at_tokens(router, request, count: int) -> None:
    """Leave with so many messages with tokens, or with the answer where it has fewer."""
    stream = cascade_pb2.GenerateStreamRequest(request=request, include_drafts=True)
    call = router.GenerateStream(stream, timeout=600)
    async for event in call:
        count -= event.WhichOneof("event") in {"draft", "commit"}
        if count <= 0:
            break
    await leave(call)


# A hang ends it; a busy machine must not.
@pytest.mark.timeout(900)
async def test_a_thousand_callers_that_leave_leave_nothing_behind(monkeypatch):
    generators = LiveGenerators()
    monkeypatch.setattr(onnxruntime_genai, "Generator", generators)
    rng = random.Random(5)
    prompts = [task.prompt for task in split("demo", 60)]
    calls = Calls()
    async with AsyncExitStack() as stack:
        targets = {name: await start_stage(name, calls, stack) for name in NAMES}
        routers = [await start_router(targets, stack, pipelined=each) for each in (True, False)]
        saw_tokens = 0

        def leave_one(number: int):
            nonlocal saw_tokens
            # With and without a chain: the static plan escalates by itself.
            request = cascade_pb2.GenerateRequest(
                prompt=rng.choice(prompts), chain=rng.choice((NAMES, ())), session_id=str(number)
            )
            router = rng.choice(routers)
            if rng.random() < 0.5:
                return leave_at_calls(router, request, rng.choice(CALLS), calls)
            saw_tokens += 1
            return leave_at_tokens(router, request, rng.choice(CHUNKS))

        for start in range(0, CANCELS, TOGETHER):
            await asyncio.gather(*(leave_one(start + number) for number in range(TOGETHER)))
        asked = 0
        for target in targets.values():
            stub = stage_pb2_grpc.StageServiceStub(await stack.enter_async_context(open_channel(target)))
            while True:
                status = await stub.Status(stage_pb2.StatusRequest(), timeout=600)
                (model,) = status.models
                if not (model.running_requests or model.queued_requests):
                    break
            assert model.kv_cache_bytes == 0
            asked += model.completed_requests + model.cancelled_requests
        # Whoever saw tokens had a model write them.
        assert asked >= saw_tokens > CANCELS // 3
        answer = await routers[0].Generate(
            cascade_pb2.GenerateRequest(prompt=prompts[0], chain=NAMES), timeout=600
        )
        assert answer.stage == "medium"
        # What the prefix caches may keep.
        await generators.sink_to(len(NAMES) * OnnxOptions().cached_sequences)
    await generators.sink_to(0)
