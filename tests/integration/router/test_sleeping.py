"""Stages that sleep, by a manager's word: they are woken, and requests are answered by what is awake."""

# ruff: noqa: N802 - methods have the protos' names

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
import pytest

from asd.errors import Unavailable
from asd.v1 import cascade_pb2, manager_pb2, manager_pb2_grpc
from services.common.server import ServiceRegistration, start_server
from tests.limits import CALL_S, HANGS_MS


@dataclass
class FakeManager(manager_pb2_grpc.ManagerServiceServicer):
    """Says which stages sleep, and keeps which were to be woken. looked: how often it was asked."""

    asleep: set[str]
    managed: tuple[str, ...] = ("small", "medium", "large")
    failure: Exception | None = None
    woken: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    looked: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def Wake(self, request, context):
        self.woken.append(request.stage)
        self.asked.set()
        if self.failure is not None:
            raise self.failure
        return manager_pb2.WakeResponse()

    async def Status(self, request, context):
        async with self.changed:
            self.looked += 1
            self.changed.notify_all()
        return manager_pb2.ManagerServiceStatusResponse(
            stages=[
                manager_pb2.ManagedStage(
                    stage=name,
                    state=manager_pb2.SLEEP_STATE_ASLEEP
                    if name in self.asleep
                    else manager_pb2.SLEEP_STATE_AWAKE,
                )
                for name in self.managed
            ]
        )

    async def told(self) -> None:
        """Wait until the router has heard what holds now: it asks again only when it has the answer."""
        async with asyncio.timeout(CALL_S), self.changed:
            until = self.looked + 2
            await self.changed.wait_for(lambda: self.looked >= until)

    def add(self, server):
        manager_pb2_grpc.add_ManagerServiceServicer_to_server(self, server)


@pytest.fixture
async def sleepy(world):
    """Return a function that starts a cascade some stages of which sleep; it returns world and manager."""
    started = []

    async def start(*asleep: str, **options):
        manager = FakeManager(set(asleep))
        server, port = await start_server(
            "127.0.0.1:0", [ServiceRegistration("asd.v1.ManagerService", manager.add)]
        )
        started.append(server)
        target = {"target": f"127.0.0.1:{port}", "poll_ms": 1, "timeout_ms": CALL_S * 1e3}
        w = await world(manager=target, **options)
        await manager.told()
        return w, manager

    yield start
    await asyncio.gather(*(server.stop(0) for server in started))


def ask(**fields) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", **fields)


def used(w) -> dict[str, list[str]]:
    return {name: stage.calls for name, stage in w.stages.items() if stage.calls}


async def woken(manager: FakeManager) -> list[str]:
    """Return what was to be woken, once something was."""
    async with asyncio.timeout(CALL_S):
        await manager.asked.wait()
    return manager.woken


async def test_a_plan_that_begins_with_a_sleeper_is_made_again_without_it(world, sleepy):
    policy = world.policy(first="small")
    w, manager = await sleepy("small", policy=policy)
    answer = await w.stub.Generate(ask(), timeout=CALL_S)
    # The fake policy takes the first stage that is there.
    assert (answer.stage, answer.plan_source) == ("medium", cascade_pb2.PLAN_SOURCE_POLICY)
    first, second = policy.plans
    assert [each for each in first.conditions if not each.available] == []
    assert [each.stage for each in second.conditions if not each.available] == ["small"]
    assert await woken(manager) == ["small"]
    await w.stub.Generate(ask(), timeout=CALL_S)
    # It takes a while to come, and was asked for just now.
    assert manager.woken == ["small"]


async def test_whoever_names_a_sleeper_waits_for_it(sleepy):
    w, manager = await sleepy("large")
    call = w.stub.Generate(ask(stage="large"), timeout=CALL_S)
    assert await woken(manager) == ["large"]
    await manager.told()
    assert used(w) == {}
    manager.asleep.clear()
    answer = await call
    assert (answer.stage, answer.text) == ("large", "one two three")


async def test_a_chain_waits_for_those_of_its_stages_that_sleep(sleepy):
    w, manager = await sleepy("small", "large")
    call = w.stub.Generate(ask(chain=["small", "large"]), timeout=CALL_S)
    await woken(manager)
    await manager.told()
    assert sorted(manager.woken) == ["large", "small"]
    manager.asleep.remove("large")
    await manager.told()
    assert used(w) == {}
    manager.asleep.clear()
    assert (await call).stage == "large"
    assert used(w) == {"small": ["generate"], "large": ["verify_stream"]}


async def test_where_everything_sleeps_the_request_waits(world, sleepy):
    policy = world.policy(first="small")
    w, manager = await sleepy("small", "medium", "large", policy=policy)
    call = w.stub.Generate(ask(), timeout=CALL_S)
    assert await woken(manager) == ["small"]
    await manager.told()
    assert used(w) == {}
    manager.asleep.clear()
    assert (await call).stage == "small"


async def test_a_stream_waits_as_well(sleepy):
    w, manager = await sleepy("large")
    call = w.stub.GenerateStream(
        cascade_pb2.GenerateStreamRequest(request=ask(stage="large")), timeout=CALL_S
    )
    await woken(manager)
    manager.asleep.clear()
    last = [event async for event in call][-1]
    assert last.response.text == "one two three"


async def test_a_stage_that_cannot_be_woken_is_waited_for_until_the_deadline(sleepy):
    w, manager = await sleepy("large")
    manager.failure = Unavailable("the Kubernetes API cannot be reached")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.stub.Generate(ask(stage="large"), timeout=HANGS_MS / 1e3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert used(w) == {}


async def test_describe_shows_who_sleeps_and_does_not_ask_it(sleepy):
    w, _ = await sleepy("large")
    described = await w.stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_S)
    assert [(each.stage, each.available, each.asleep) for each in described.stages] == [
        ("small", True, False),
        ("medium", True, False),
        ("large", False, True),
    ]
    assert (described.stages[2].cost, described.stages[2].model) == (8.8, "")


async def test_a_manager_that_is_away_takes_nothing_from_a_cascade(world):
    w = await world(manager={"target": "127.0.0.1:1", "poll_ms": 1}, static_plan=("small",))
    assert (await w.stub.Generate(ask(), timeout=CALL_S)).stage == "small"
