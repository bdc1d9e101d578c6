# ruff: noqa: N802 - methods have the protos' names
"""Connections that a server ends by age: clients find new replicas by it, and no call fails of it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from asd.transport.channel import call_stream, call_unary
from asd.v1 import cascade_pb2, cascade_pb2_grpc, stage_pb2, stage_pb2_grpc
from services.common.channel import open_channel
from services.common.server import ServerOptions, ServiceRegistration, start_server
from services.router.__main__ import build
from services.router.settings import RouterSettings
from tests.integration.common.conftest import CALL_S
from tests.integration.router.conftest import FakePolicy, FakeStage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Serve = Callable[..., Any]

AGING = ServerOptions(max_connection_age_ms=50)
CONNECTIONS = 5
# Without the retries that gRPC makes by itself, the end of one connection in twenty fails a call.
MANY_CONNECTIONS = 60


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Return a function that serves a fake with options and returns its target."""
    async with AsyncExitStack() as stack:

        async def start(fake: Any, options: ServerOptions = AGING) -> str:
            registration = getattr(fake, "registration", None)
            service = registration() if registration else ServiceRegistration(fake.full_name, fake.add)
            server, port = await start_server("127.0.0.1:0", [service], options=options)
            stack.push_async_callback(server.stop, 0)
            return f"127.0.0.1:{port}"

        yield start


class Seen:
    """The connections that calls came over."""

    def __init__(self) -> None:
        self.peers: set[str] = set()

    async def until(self, call: Callable[[], Awaitable[Any]], count: int = CONNECTIONS) -> None:
        """Call without a pause until so many connections have been seen. Raises what a call raises."""
        async with asyncio.timeout(CALL_S):
            while len(self.peers) < count:
                await call()


class AgingStage(FakeStage):
    def __init__(self, seen: Seen, **options: Any) -> None:
        super().__init__("small", **options)
        self.seen = seen

    async def Status(self, request: Any, context: Any) -> Any:
        self.seen.peers.add(context.peer())
        return await super().Status(request, context)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.seen.peers.add(context.peer())
        async for response in super().Generate(request, context):
            yield response


class AgingPolicy(FakePolicy):
    seen: Seen

    async def Plan(self, request: Any, context: Any) -> Any:
        self.seen.peers.add(context.peer())
        return await super().Plan(request, context)


@pytest.mark.parametrize("retry", [True, False])
async def test_calls_that_meet_the_end_of_a_connection_are_answered(serve: Serve, retry: bool) -> None:
    seen = Seen()
    async with open_channel(await serve(AgingStage(seen)), retry=retry) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)

        async def ask() -> None:
            await call_unary(stub.Status, stage_pb2.StatusRequest(), timeout_ms=CALL_S * 1e3)

        await asyncio.gather(*(seen.until(ask, MANY_CONNECTIONS) for _ in range(30)))


async def test_a_stream_outlives_its_connections_age(serve: Serve) -> None:
    seen = Seen()
    stage = AgingStage(seen, pause_after=1)
    async with open_channel(await serve(stage)) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)
        prompt = stage_pb2.StageServiceGenerateRequest(prompt="hi")
        stream = call_stream(stub.Generate, prompt, timeout_ms=CALL_S * 1e3)
        assert (await anext(stream)).tokens.text == "one"
        # The connection that it came over has been given up several times over.
        await seen.until(lambda: call_unary(stub.Status, stage_pb2.StatusRequest(), timeout_ms=CALL_S * 1e3))
        stage.gate.set()
        assert [event.result.text async for event in stream][-1] == "one two three"


async def test_without_an_age_a_connection_stays(serve: Serve) -> None:
    seen = Seen()
    async with open_channel(await serve(AgingStage(seen), ServerOptions())) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)
        for _ in range(200):
            await call_unary(stub.Status, stage_pb2.StatusRequest(), timeout_ms=CALL_S * 1e3)
    assert len(seen.peers) == 1


async def test_a_grace_ends_what_does_not_end(serve: Serve) -> None:
    stage = AgingStage(Seen(), pause_after=1)
    target = await serve(stage, ServerOptions(max_connection_age_ms=50, max_connection_age_grace_ms=50))
    async with open_channel(target, retry=False) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)
        prompt = stage_pb2.StageServiceGenerateRequest(prompt="hi")
        stream = call_stream(stub.Generate, prompt, timeout_ms=CALL_S * 1e3)
        await anext(stream)
        async with asyncio.timeout(CALL_S):
            await stage.cancelled.wait()
        await stream.aclose()


async def test_the_policy_is_heard_over_every_connection(serve: Serve) -> None:
    """The router calls it once only: what meets the end of a connection must not fall to the static plan."""
    policy = AgingPolicy()
    policy.seen = Seen()
    target = await serve(policy)
    stage = FakeStage("small")
    stage_target = await serve(stage, ServerOptions())
    settings = RouterSettings(
        stages=({"name": "small", "target": stage_target, "cost": 1},),
        static_plan=("small",),
        policy={"target": target, "timeout_ms": CALL_S * 1e3},
    )
    async with AsyncExitStack() as channels:
        router = await serve(await build(settings, channels), ServerOptions())
        stub = cascade_pb2_grpc.CascadeServiceStub(await channels.enter_async_context(open_channel(router)))

        async def ask() -> None:
            answer = await stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
            assert answer.plan_source == cascade_pb2.PLAN_SOURCE_POLICY

        await policy.seen.until(ask)


async def test_the_router_is_heard_over_every_connection(serve: Serve, world: Any) -> None:
    w = await world(FakeStage("small"), static_plan=("small",))
    seen = Seen()
    generate = w.servicer.Generate

    async def count(request: Any, context: Any) -> Any:
        seen.peers.add(context.peer())
        return await generate(request, context)

    w.servicer.Generate = count
    async with open_channel(await serve(w.servicer)) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        prompt = cascade_pb2.GenerateRequest(prompt="hi")

        async def ask() -> None:
            answers = await asyncio.gather(
                *(call_unary(stub.Generate, prompt, timeout_ms=CALL_S * 1e3) for _ in range(10))
            )
            assert {answer.text for answer in answers} == {"one two three"}

        await seen.until(ask)
