"""Requests that come together, and a policy that weighs the waits that it is told of: where they go."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from asd.values import DecisionAction, DecisionReason, FinishReason, Objective, Preference, StageAction
from services.router.domain import (
    Decision,
    Overload,
    PolicyChoice,
    Report,
    RoutedRequest,
    ScoredTokens,
    Stage,
    StageAnswer,
    StageResult,
    Step,
    Timing,
    TokenUsage,
    Visibility,
)
from services.router.planning.admission import LEAST_SHARE
from services.router.planning.draft_selection import SpeculationOptions
from services.router.planning.static_plan import StaticPlan
from services.router.request import RequestState
from tests.unit.router.small_cascade import Observer, make_planner, show_nothing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.router.domain import StageKnowledge
    from services.router.planning.planner import Planner, RequestPlan

COSTS, LATENCIES_MS = (1.6, 4.2, 8.8), (20.0, 40.0, 80.0)
STAGES = [Stage(name, index, COSTS[index], 5000.0) for index, name in enumerate(("small", "medium", "large"))]
BURST = 64


@dataclass
class Toll:
    """Takes the stage that is cheapest with its wait: its cost once more for each answer that a call waits
    for, as the policy service has it, unless waits do not count. Answers only once everybody who will ask has
    asked.
    """

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    everybody: asyncio.Event = field(default_factory=asyncio.Event)
    # Stages that an escalation may go to.
    later: Sequence[int] = (1, 2)
    plans: int = 0
    decisions: int = 0
    # How far waits may lower quality, as told.
    shares: set[float | None] = field(default_factory=set)

    async def plan(
        self,
        request: RoutedRequest,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> PolicyChoice:
        self.plans += 1
        self._has_been_asked()
        await self.gate.wait()
        return PolicyChoice(self._cheapest(range(len(STAGES)), conditions, min_accuracy_share))

    async def decide(
        self,
        request: RoutedRequest,
        answer: StageAnswer,
        spent_cost: float,
        spent_ms: float,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> Decision:
        self.decisions += 1
        self._has_been_asked()
        await self.gate.wait()
        following = self._cheapest(self.later, conditions, min_accuracy_share)
        return Decision(DecisionAction.ESCALATE, DecisionReason.VALUE, following, 0.5)

    def _has_been_asked(self) -> None:
        if self.plans + self.decisions == BURST:
            self.everybody.set()

    def _cheapest(
        self, stages: Sequence[int], conditions: Sequence[StageKnowledge], share: float | None
    ) -> int:
        self.shares.add(share)
        waits_ms = {each.stage: each.expected_queue_ms for each in conditions if share is None or share < 1.0}

        def price(stage: int) -> float:
            return COSTS[stage] * (1.0 + waits_ms.get(STAGES[stage].name, 0.0) / LATENCIES_MS[stage])

        return min(stages, key=price)


def planner_of(policy: Toll, overload: Overload = Overload.DEGRADE) -> Planner:
    plan = StaticPlan((2,), len(STAGES))
    options = SpeculationOptions(adaptive=False)
    return make_planner(STAGES, policy, plan, Observer(), lambda: 0.0, options, overload=overload)


def make_state(objective: Objective | None = None) -> RequestState:
    request = RoutedRequest("hi", id="id", objective=objective or Objective())
    return RequestState(request, 60.0, Visibility.OUTCOME, lambda: 0.0, show_nothing)


def make_answer(stage: Stage) -> StageAnswer:
    """Return what an idle stage answers: in its mean latency, without a wait."""
    timing = Timing(queue_ms=0.0, total_ms=LATENCIES_MS[stage.index])
    result = StageResult("hi", (1,), "", FinishReason.EOS, TokenUsage(completion_tokens=1), timing)
    return StageAnswer(
        stage, StageAction.GENERATE, result, ScoredTokens((1,), "hi"), None, timing.total_ms, stage.cost
    )


async def answer_some(planner: Planner, policy: Toll) -> None:
    """Have the router see each stage answer, and the policy plan and decide, one request after the other."""
    for stage in STAGES:
        for _ in range(20):
            planner.knowledge.learn_answer(make_answer(stage), 1)
    policy.gate.set()
    for _ in range(20):
        assert await first_of(planner, make_state()) == 0
        with ExitStack() as requests:
            await next_after(await answered(planner, requests))
    policy.gate.clear()
    forget(policy)


def forget(policy: Toll) -> None:
    policy.plans = policy.decisions = 0
    policy.shares.clear()
    policy.everybody.clear()


async def first_of(planner: Planner, state: RequestState) -> int:
    """Return the stage that a request begins with."""
    with planner.plan_for(state) as plan:
        return (await plan.first_step()).stage.index


async def answered(planner: Planner, requests: ExitStack, objective: Objective | None = None) -> RequestPlan:
    """Return the plan of a request that small has answered. requests: ends it."""
    state = make_state(objective)
    plan = requests.enter_context(planner.plan_for(state))
    await state.begin(replace(await plan.first_step(), stage=STAGES[0]))
    state.finish(make_answer(STAGES[0]).result)
    return plan


async def next_after(plan: RequestPlan) -> int:
    """Return the stage that follows an answer."""
    step = await plan.after_answer(Report())
    assert isinstance(step, Step)
    return step.stage.index


async def test_a_burst_is_not_all_sent_to_one_stage() -> None:
    policy = Toll()
    planner = planner_of(policy)
    await answer_some(planner, policy)
    with ExitStack() as calls:

        async def start() -> int:
            first = await first_of(planner, make_state())
            calls.enter_context(planner.load.calling(first))
            return first

        burst = [asyncio.create_task(start()) for _ in range(BURST)]
        await policy.everybody.wait()
        # Everybody was told something before anybody was sent anywhere.
        policy.gate.set()
        went = Counter(await asyncio.gather(*burst))
    # Where no stage is the better choice. Each computes 8 at a time, and the n-th beyond waits n / 8 answers:
    # 1.6 (1 + (43 - 7) / 8) = 8.8, 4.2 (1 + (16 - 7) / 8) = 8.9, and large costs 8.8 without a line.
    assert went[0] == pytest.approx(43, abs=4)
    assert went[1] == pytest.approx(16, abs=4)
    assert sum(went.values()) == BURST
    # Who found the line longer than was told asked once more, and nobody twice.
    assert policy.plans <= 2 * BURST


async def test_escalations_that_come_together_are_not_all_sent_to_one_stage() -> None:
    policy = Toll()
    planner = planner_of(policy)
    await answer_some(planner, policy)
    with ExitStack() as requests, ExitStack() as calls:
        policy.gate.set()
        plans = [await answered(planner, requests) for _ in range(BURST)]
        policy.gate.clear()
        forget(policy)

        async def go_on(plan: RequestPlan) -> int:
            following = await next_after(plan)
            calls.enter_context(planner.load.calling(following))
            return following

        burst = [asyncio.create_task(go_on(plan)) for plan in plans]
        await policy.everybody.wait()
        policy.gate.set()
        went = Counter(await asyncio.gather(*burst))
    # Where neither is the better choice: 4.2 (1 + (43 - 7) / 8) = 23.1 and 8.8 (1 + (20 - 7) / 8) = 23.1.
    assert went[1] == pytest.approx(43, abs=8)
    assert went[1] + went[2] == BURST
    assert policy.decisions <= 2 * BURST


async def test_requests_that_come_one_by_one_go_where_they_always_went() -> None:
    policy = Toll()
    planner = planner_of(policy)
    await answer_some(planner, policy)
    policy.gate.set()
    with ExitStack() as calls:
        for _ in range(8):
            first = await first_of(planner, make_state())
            calls.enter_context(planner.load.calling(first))
            assert first == 0
    assert policy.plans == 8


BEST = Objective(preference=Preference.BEST)


@pytest.mark.parametrize("question", ["plan", "decide"])
async def test_a_burst_for_the_best_is_not_told_to_step_down(question: str) -> None:
    policy = Toll()
    planner = planner_of(policy, Overload.QUEUE)
    await answer_some(planner, policy)
    with ExitStack() as requests, ExitStack() as calls:
        policy.gate.set()
        plans = [await answered(planner, requests, BEST) for _ in range(BURST)]
        policy.gate.clear()
        forget(policy)

        async def start(plan: RequestPlan) -> int:
            asked = first_of(planner, make_state(BEST)) if question == "plan" else next_after(plan)
            stage = await asked
            calls.enter_context(planner.load.calling(stage))
            return stage

        burst = [asyncio.create_task(start(plan)) for plan in plans]
        await policy.everybody.wait()
        policy.gate.set()
        went = Counter(await asyncio.gather(*burst))
    assert went == {0 if question == "plan" else 1: BURST}
    assert policy.shares == {1.0}
    # Nor is anybody asked again whose line has grown: the answer would be the same.
    assert policy.plans + policy.decisions == BURST


@pytest.mark.parametrize(
    ("objective", "share"),
    [
        (Objective(), LEAST_SHARE),
        (Objective(preference=Preference.BALANCED, max_latency_ms=900.0), LEAST_SHARE),
        (Objective(min_quality=0.9), LEAST_SHARE),
        (BEST, 1.0),
        (Objective(quality_value=3.0), 1.0),
        (Objective(preference=Preference.FASTEST), None),
    ],
)
async def test_waits_lower_no_quality_unasked(objective: Objective, share: float | None) -> None:
    for overload, told in ((Overload.QUEUE, share), (Overload.SHED, share), (Overload.DEGRADE, None)):
        policy = Toll()
        policy.gate.set()
        planner = planner_of(policy, overload)
        with ExitStack() as requests:
            await next_after(await answered(planner, requests, objective))
        assert policy.shares == {told}
