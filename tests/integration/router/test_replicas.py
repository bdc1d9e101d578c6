# ruff: noqa: ASYNC110 - what happens by itself is awaited by asking again
"""Replicas of a stage: conversations stay, failures move on, addresses are followed."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from asd.errors import Unavailable
from asd.v1 import cascade_pb2, common_pb2, stage_pb2
from services.common.errors import Draining
from services.common.server import ServiceRegistration, start_server
from services.router.clients.replicas import Replicas, resolve_addresses
from tests.limits import CALL_S


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
            await w.stub.Generate(ask(session), timeout=CALL_S)
        assert sorted(len(s.calls) - b for s, b in zip(stages, before, strict=True)) == [0, 0, 4]
    assert sum(bool(stage.calls) for stage in stages) > 1


async def test_calls_of_others_are_known_of_each_replica(clock, replicated):
    w, stages, _ = replicated
    for stage, others in zip(stages, (30, 50, 90), strict=True):
        stage.others = others
    session = 0
    while not all(stage.calls for stage in stages):
        session += 1
        await w.stub.Generate(ask(str(session)), timeout=CALL_S)
    assert w.load.calls(0) == 170
    assert w.load.replicas(0) == 3
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
        await w.stub.Generate(request, timeout=CALL_S)
    assert all(stage.calls for stage in larges)
    assert {call for stage in larges for call in stage.calls} == {"verify_stream"}
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_a_replica_that_is_away_is_replaced_without_an_error(replicated):
    w, stages, servers = replicated
    await w.stub.Generate(ask("a"), timeout=CALL_S)
    home = next(index for index, stage in enumerate(stages) if stage.calls)
    await servers[home].stop(0)
    response = await w.stub.Generate(ask("a"), timeout=CALL_S)
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
        assert (await w.stub.Generate(request, timeout=CALL_S)).text == larges[1].text
    # Some conversations belong to the one that refuses.
    assert larges[0].calls
    assert larges[1].calls == ["verify_stream"] * 16
    assert ["".join(chunk.text for chunk in chunks) for chunks in larges[1].streamed_drafts] == [
        small.text
    ] * 16
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_a_replica_that_refuses_is_replaced(replicated):
    w, stages, _ = replicated
    await w.stub.Generate(ask("a"), timeout=CALL_S)
    home = next(stage for stage in stages if stage.calls)
    home.fail_after, home.failure = 0, Unavailable("draining")
    response = await w.stub.Generate(ask("a"), timeout=CALL_S)
    assert response.stage == "small"


@pytest.mark.parametrize("fields", [{"stage": "large"}, {"chain": ["small", "large"]}])
@pytest.mark.parametrize("is_pipelined", [True, False])
async def test_a_stage_that_drains_and_returns_loses_no_request_that_names_it(world, fields, is_pipelined):
    small, large = world.stage("small"), world.stage("large")
    w = await world(
        small,
        large,
        static_plan=("small",),
        speculation={"pipelined": is_pipelined},
    )
    request = cascade_pb2.GenerateRequest(
        prompt="hi",
        # Of a chain with an exact one, the last stage may go alone.
        acceptance=common_pb2.Acceptance(mode=common_pb2.ACCEPTANCE_MODE_TOLERANT, threshold=0.9),
        **fields,
    )
    assert (await w.stub.Generate(request, timeout=CALL_S)).text == large.text
    large.fail_after, large.failure = 0, Draining("shutting down")
    refused = asyncio.Event()
    large.on_call = refused.set
    asked = asyncio.ensure_future(w.stub.Generate(request, timeout=CALL_S))
    await refused.wait()
    await w.stop("large")
    large.fail_after = None
    await w.start("large")
    assert (await asked).text == large.text


async def test_a_chain_does_not_wait_for_a_drafter_that_is_away(world):
    small, large = world.stage("small"), world.stage("large")
    w = await world(small, large, static_plan=("small",), stage_timeout_ms=60_000)
    request = cascade_pb2.GenerateRequest(prompt="hi", chain=["small", "large"])
    await w.stub.Generate(request, timeout=CALL_S)
    assert (small.calls, large.calls) == (["generate"], ["verify_stream"])
    await w.stop("small")
    # Who waits for it waits for half a minute.
    async with asyncio.timeout(CALL_S):
        assert (await w.stub.Generate(request, timeout=CALL_S)).text == large.text


async def test_a_busy_replica_shares_its_conversations(replicated):
    w, stages, _ = replicated
    for stage in stages:
        stage.pause_after = 0
    calls = [w.stub.Generate(ask("a"), timeout=CALL_S) for _ in range(6)]
    async with asyncio.timeout(CALL_S):
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


async def test_a_call_under_way_at_a_replica_that_leaves_is_finished_there(world):
    leaving = world.stage("small", pause_after=1)
    servers, target = await serve([leaving])
    now, names = [0.0], [[target]]
    asked = asyncio.Event()

    async def resolve(_: str) -> list[str]:
        asked.set()
        return names[0]

    replicas = Replicas("dns:///stage:1", lambda: now[0], resolve)
    replica = await replicas.choose("a")
    with replicas.calling(replica):
        call = replica.stub.Generate(stage_pb2.StageServiceGenerateRequest(prompt="hi"), timeout=CALL_S)
        await call.read()
        names[0], now[0] = ["127.0.0.1:1"], 5.0
        asked.clear()
        await replicas.choose("a")
        await asked.wait()
        assert (await replicas.choose("a")).address == "127.0.0.1:1"
        # Neither is one refused that was on its way there.
        late = replica.stub.Generate(stage_pb2.StageServiceGenerateRequest(prompt="hi"), timeout=CALL_S)
        await late.read()
        leaving.gate.set()
        for each in (call, late):
            last = None
            while (response := await each.read()) is not grpc.aio.EOF:
                last = response
            assert last.result.text == leaving.text
    await replicas.close()
    assert replica.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_new_replicas_are_looked_for_once_all_that_are_known_failed():
    now, names, looks = [0.0], [["10.0.0.1:1"]], []

    async def resolve(name: str) -> list[str]:
        looks.append(name)
        return names[0]

    replicas = Replicas("dns:///stage:1", lambda: now[0], resolve)
    await replicas.choose("a")
    names[0] = ["10.0.0.2:1"]
    # Not for each of many calls that fail together.
    assert not await replicas.find_other(["10.0.0.1:1"])
    now[0] = 1.0
    assert await replicas.find_other(["10.0.0.1:1"])
    assert (await replicas.choose("a", ["10.0.0.1:1"])).address == "10.0.0.2:1"
    assert len(looks) == 2
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
