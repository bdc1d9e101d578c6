# ruff: noqa: ASYNC110 - what happens by itself is awaited by asking again
"""Replicas of a stage: conversations stay, failures move on, addresses are followed."""

from __future__ import annotations

import asyncio

import pytest

from asd.v1 import cascade_pb2
from services.common.errors import Unavailable
from services.common.server import ServiceRegistration, start_server
from services.router.replicas import Replicas, resolve_addresses


def ask(session: str) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", session_id=session, stage="small")


async def serve(stages) -> tuple[list, str]:
    """Return a server for each replica of a stage, and their target."""
    servers, targets = [], []
    for stage in stages:
        server, port = await start_server("127.0.0.1:0", [ServiceRegistration(stage.full_name, stage.add)])
        servers.append(server)
        targets.append(f"127.0.0.1:{port}")
    return servers, ",".join(targets)


@pytest.fixture
async def replicated(world):
    """Return a router whose stage has three replicas, the replicas, and their servers."""
    stages = [world.stage("small") for _ in range(3)]
    servers, target = await serve(stages)
    w = await world(static_plan=("small",), stages=({"name": "small", "target": target, "cost": 1.6},))
    yield w, stages, servers
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_a_conversation_stays_on_the_replica_that_holds_its_prefix(replicated):
    w, stages, _ = replicated
    for session in ("a", "b", "c", "d", "e", "f"):
        before = [len(stage.calls) for stage in stages]
        for _ in range(4):
            await w.stub.Generate(ask(session), timeout=5)
        assert sorted(len(s.calls) - b for s, b in zip(stages, before, strict=True)) == [0, 0, 4]
    assert sum(bool(stage.calls) for stage in stages) > 1


async def test_calls_of_others_are_known_of_each_replica(clock, replicated):
    w, stages, _ = replicated
    for stage, others in zip(stages, (30, 50, 90), strict=True):
        stage.others = others
    session = 0
    while not all(stage.calls for stage in stages):
        session += 1
        await w.stub.Generate(ask(str(session)), timeout=5)
    load = w.servicer._cascade._planner._load
    assert load.calls(0) == 170
    assert load.replicas(0) == 3
    callers = {request.caller for stage in stages for request in stage.requests}
    assert len(callers) == 1
    assert callers != {0}


async def test_a_target_is_busy_by_the_calls_at_each_replica(world):
    larges = [world.stage("large", others=5) for _ in range(2)]
    servers, target = await serve(larges)
    w = await world(
        world.stage("small"),
        larges[0],
        static_plan=("small",),
        stage_settings={"large": {"target": target}},
    )
    for session in range(60):
        request = cascade_pb2.GenerateRequest(prompt="hi", session_id=str(session), chain=["small", "large"])
        await w.stub.Generate(request, timeout=5)
    assert all(stage.calls for stage in larges)
    assert {call for stage in larges for call in stage.calls} == {"verify_stream"}
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_a_replica_that_is_away_is_replaced_without_an_error(replicated):
    w, stages, servers = replicated
    await w.stub.Generate(ask("a"), timeout=5)
    home = next(index for index, stage in enumerate(stages) if stage.calls)
    await servers[home].stop(0)
    response = await w.stub.Generate(ask("a"), timeout=5)
    assert response.text == stages[0].text
    assert sum(len(stage.calls) for index, stage in enumerate(stages) if index != home) == 1


async def test_a_replica_that_refuses_is_replaced_in_a_pipeline(world):
    small, larges = world.stage("small"), [world.stage("large") for _ in range(2)]
    larges[0].fail_after, larges[0].failure = 0, Unavailable("draining")
    servers, target = await serve(larges)
    w = await world(
        small,
        larges[0],
        static_plan=("small",),
        stage_settings={"large": {"target": target}},
    )
    for session in range(16):
        request = cascade_pb2.GenerateRequest(prompt="hi", session_id=str(session), chain=["small", "large"])
        assert (await w.stub.Generate(request, timeout=5)).text == larges[1].text
    # Some conversations belong to the one that refuses.
    assert larges[0].calls
    assert larges[1].calls == ["verify_stream"] * 16
    assert ["".join(chunk.text for chunk in chunks) for chunks in larges[1].streamed_drafts] == [
        small.text
    ] * 16
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_a_replica_that_refuses_is_replaced(replicated):
    w, stages, _ = replicated
    await w.stub.Generate(ask("a"), timeout=5)
    home = next(stage for stage in stages if stage.calls)
    home.fail_after, home.failure = 0, Unavailable("draining")
    response = await w.stub.Generate(ask("a"), timeout=5)
    assert response.stage == "small"


async def test_a_busy_replica_shares_its_conversations(replicated):
    w, stages, _ = replicated
    for stage in stages:
        stage.pause_after = 0
    calls = [w.stub.Generate(ask("a"), timeout=5) for _ in range(6)]
    async with asyncio.timeout(5):
        while sum(stage.running for stage in stages) < 6:
            await asyncio.sleep(0)
    # A quarter above a fair share of two is three at most.
    assert max(stage.running for stage in stages) <= 3
    for stage in stages:
        stage.gate.set()
    await asyncio.gather(*calls)


async def test_addresses_are_followed_as_they_come_and_go():
    now, names = [0.0], [["10.0.0.1:1", "10.0.0.2:1"]]
    asked = asyncio.Event()

    async def resolve(name: str) -> list[str]:
        assert name == "stage:1"
        asked.set()
        if not names:
            raise OSError("no such name")
        return names[-1]

    async def chosen(count: int = 40) -> set[str]:
        return {(await replicas.choose(str(number))).address for number in range(count)}

    replicas = Replicas("dns:///stage:1", lambda: now[0], resolve)
    assert await chosen() == {"10.0.0.1:1", "10.0.0.2:1"}
    names[0] = ["10.0.0.2:1", "10.0.0.3:1"]
    assert await chosen() == {"10.0.0.1:1", "10.0.0.2:1"}
    now[0] = 5.0
    asked.clear()
    await chosen(1)
    await asked.wait()
    assert await chosen() == {"10.0.0.2:1", "10.0.0.3:1"}
    # A name server that is away takes nothing from what is known.
    names.clear()
    now[0] = 10.0
    asked.clear()
    await chosen(1)
    await asked.wait()
    assert await chosen() == {"10.0.0.2:1", "10.0.0.3:1"}
    await replicas.close()


async def test_a_name_without_addresses_is_unavailable():
    async def resolve(name: str) -> list[str]:
        return []

    replicas = Replicas("dns:///stage:1", lambda: 0.0, resolve)
    with pytest.raises(Unavailable, match="stage:1 has no replica"):
        await replicas.choose("a")
    await replicas.close()


async def test_resolving_keeps_the_port():
    assert "127.0.0.1:50061" in await resolve_addresses("localhost:50061")
