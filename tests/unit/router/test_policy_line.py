"""Calls to the policy service: few at a time, others in line, and nobody waits for each one that fails."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from asd.errors import AsdError, BudgetSpent, Unavailable
from asd.v1 import policy_pb2
from asd.values import FinishReason, Objective, StageAction
from services.router.clients.breaker import Breaker
from services.router.clients.call_limit import CallLimit
from services.router.clients.policy import POLICY_CALLS, GrpcPolicy
from services.router.domain import (
    RoutedRequest,
    ScoredTokens,
    Stage,
    StageAnswer,
    StageResult,
    Timing,
    TokenUsage,
)
from services.router.planning.health import Health
from tests.unit.router.small_cascade import NAMES, Clock

TIMEOUT_MS = 100.0
PLANNED = policy_pb2.PlanResponse(first_stage="small", policy_version="v1")


class Channel:
    """A channel whose unary calls wait until a test ends them. timeouts: of each call, in seconds."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []
        self.messages: list[Any] = []
        self.under_way: list[asyncio.Future[Any]] = []

    def unary_unary(self, *_: Any, **__: Any) -> Any:
        async def call(message: Any, **options: Any) -> Any:
            self.timeouts.append(options["timeout"])
            self.messages.append(message)
            self.under_way.append(asyncio.get_running_loop().create_future())
            return await self.under_way[-1]

        # A call can be cancelled.
        return lambda message, **options: asyncio.ensure_future(call(message, **options))

    def end(self, *, is_late: bool) -> int:
        """End what is under way; return how many calls that were."""
        calls, self.under_way = self.under_way, []
        for call in calls:
            if is_late:
                nothing = grpc.aio.Metadata()
                code = grpc.StatusCode.DEADLINE_EXCEEDED
                call.set_exception(grpc.aio.AioRpcError(code, nothing, nothing, "Deadline Exceeded"))
            else:
                call.set_result(PLANNED)
        return len(calls)


class World:
    """A policy client on such a channel, and requests that it plans."""

    def __init__(self, timeout_ms: float = TIMEOUT_MS) -> None:
        self.clock, self.channel = Clock(), Channel()
        channel: Any = self.channel
        breaker, health = Breaker(self.clock), Health("the policy", self.clock)
        self.policy = GrpcPolicy("host:1", channel, NAMES, timeout_ms, breaker, health, self.clock)

    async def ask(self, count: int, timeout_ms: float = 60_000.0) -> list[asyncio.Task[Any]]:
        """Return requests, each as far as it comes by itself."""
        request = RoutedRequest("hi", id="id")
        plans = [self.policy.plan(request, (), timeout_ms, min_accuracy_share=None) for _ in range(count)]
        tasks = [asyncio.ensure_future(plan) for plan in plans]
        await settled()
        return tasks

    async def serve(self, tasks: list[asyncio.Task[Any]], seconds: float, *, is_late: bool) -> list[int]:
        """Let calls take so long each until all requests are through; return how many ran at a time."""
        rounds = []
        while not all(task.done() for task in tasks):
            self.clock.now += seconds
            rounds.append(self.channel.end(is_late=is_late))
            await settled()
        return rounds


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(400):
        await asyncio.sleep(0)


def errors(tasks: list[asyncio.Task[Any]]) -> list[type[BaseException] | None]:
    return [type(task.exception()) if task.exception() else None for task in tasks]


async def test_a_burst_is_planned_few_at_a_time_each_call_with_its_whole_timeout():
    world = World()
    tasks = await world.ask(64)
    rounds = await world.serve(tasks, 0.09, is_late=False)
    assert errors(tasks) == [None] * 64
    assert sum(rounds) == 64
    assert 1 < max(rounds) <= 16
    # The last ones waited for several timeouts in line, and none of it was taken from their own.
    assert world.channel.timeouts == [TIMEOUT_MS / 1000.0] * 64


async def test_nobody_in_line_waits_for_each_call_that_is_late():
    world = World()
    tasks = await world.ask(200)
    rounds = await world.serve(tasks, 0.1, is_late=True)
    # Three timeouts open the breaker; who still waits then is refused at once.
    assert len(rounds) == 3
    kinds = errors(tasks)
    assert kinds.count(BudgetSpent) == sum(rounds)
    assert kinds.count(Unavailable) == 200 - sum(rounds)


async def test_callers_in_a_hurry_do_not_open_the_breaker(caplog: pytest.LogCaptureFixture):
    world = World()
    for _ in range(6):
        # The time left is less than the policy's own timeout: that it passed says nothing of the policy.
        tasks = await world.ask(1, timeout_ms=TIMEOUT_MS - 1.0)
        assert await world.serve(tasks, 0.1, is_late=True) == [1]
        assert errors(tasks) == [BudgetSpent]
    assert caplog.messages == []


async def test_a_policy_that_is_late_by_its_own_timeout_is_left_alone_for_a_while():
    world = World()
    for _ in range(3):
        await world.serve(await world.ask(1), 0.1, is_late=True)
    assert errors(await world.ask(1)) == [Unavailable]
    world.clock.advance(1.0)
    tasks = await world.ask(1)
    await world.serve(tasks, 0.01, is_late=False)
    assert errors(tasks) == [None]


async def test_while_the_breaker_is_open_nobody_stands_in_line():
    world = World()
    await world.serve(await world.ask(200), 0.1, is_late=True)
    before = len(world.channel.timeouts)
    probes = []
    # Probes that hang take every place in the end: more than there are.
    for _ in range(40):
        world.clock.now += 1.0
        probes += await world.ask(1)
    tasks = await world.ask(20)
    assert errors(tasks) == [Unavailable] * 20
    assert await world.serve(probes, 0.1, is_late=False) == [len(world.channel.timeouts) - before]


async def test_a_single_pause_of_the_machine_does_not_open_the_breaker():
    world = World()
    tasks = await world.ask(16)
    world.clock.now += 0.1
    late = world.channel.end(is_late=True)
    await settled()
    await world.serve(tasks, 0.01, is_late=False)
    assert errors(tasks).count(BudgetSpent) == late
    assert errors(tasks).count(None) == 16 - late


async def test_the_wait_in_line_is_taken_from_the_requests_own_time():
    # So long that the line, which has the loop's clock, is left by nobody.
    world = World(timeout_ms=60_000.0)
    tasks = await world.ask(24, timeout_ms=60_000.0)
    rounds = await world.serve(tasks, 5.0, is_late=False)
    assert errors(tasks) == [None] * 24
    assert len(rounds) > 1
    assert world.channel.timeouts == [60.0 - 5.0 * place for place, n in enumerate(rounds) for _ in range(n)]


async def test_a_request_leaves_the_line_where_its_time_is_short_and_takes_no_place_with_it():
    limit = CallLimit(1)
    async with limit.place(1_000.0, "the policy"):
        assert limit.is_full
        with pytest.raises(BudgetSpent):
            async with limit.place(0.0, "the policy"):
                raise AssertionError("there was no place")
    assert not limit.is_full
    with pytest.raises(AsdError):
        async with limit.place(0.0, "the policy"):
            raise AsdError("of the block")
    assert not limit.is_full


ANSWER = StageAnswer(
    Stage("small", 0, 1.0, 1000.0),
    StageAction.GENERATE,
    StageResult("a", (1,), "f", FinishReason.EOS, TokenUsage(), Timing()),
    ScoredTokens((1,), "a"),
    None,
    5.0,
    1.0,
)


def within(max_latency_ms: float | None) -> RoutedRequest:
    return RoutedRequest("hi", id="id", objective=Objective(max_latency_ms=max_latency_ms))


@pytest.mark.parametrize(
    ("timeout_ms", "max_latency_ms", "spent_ms", "waits"),
    [
        (60_000.0, None, 0.0, True),
        (60_000.0, 60_000.0, 0.0, True),
        # Nothing is left of the latency budget, or hardly anything.
        (60_000.0, 100.0, 100.0, False),
        (60_000.0, 100.0, 200.0, False),
        (60_000.0, 1e-3, 0.0, False),
        # A few timeouts of the policy are over.
        (1e-3, None, 0.0, False),
    ],
)
async def test_the_wait_in_line_keeps_within_the_latency_budget_and_a_few_timeouts(
    timeout_ms: float, max_latency_ms: float | None, spent_ms: float, *, waits: bool
):
    world = World(timeout_ms)
    before = await world.ask(64)
    under_way = len(world.channel.timeouts)
    asked = world.policy.decide(
        within(max_latency_ms), ANSWER, 1.0, spent_ms, (), 60_000.0, min_accuracy_share=None
    )
    task = asyncio.ensure_future(asked)
    await settled()
    assert task.done() is not waits
    if not waits:
        assert errors([task]) == [BudgetSpent]
    assert len(world.channel.timeouts) == under_way
    for each in (*before, task):
        each.cancel()
    await settled()


async def test_the_policy_is_told_the_wait_in_line_as_time_spent():
    world = World(timeout_ms=60_000.0)
    first = await world.ask(POLICY_CALLS)
    ways = [
        world.policy.decide(within(500.0), ANSWER, 1.0, 40.0, (), 60_000.0, min_accuracy_share=None),
        world.policy.plan(within(500.0), (), 60_000.0, min_accuracy_share=None),
    ]
    tasks = [asyncio.ensure_future(way) for way in ways]
    await settled()
    assert len(world.channel.messages) == POLICY_CALLS
    await world.serve([*first], 0.1, is_late=False)
    decide, plan = world.channel.messages[POLICY_CALLS:]
    assert decide.spent_ms == pytest.approx(140.0)
    assert decide.objective.max_latency_ms == 500.0
    # A plan is told no time spent: what is left is its budget.
    assert plan.objective.max_latency_ms == pytest.approx(400.0)
    for task in tasks:
        task.cancel()
    await settled()
