"""Requests that come together, and a policy that weighs the waits that it is told of: where they go."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from services.router.clients.activation import AlwaysActive
from services.router.domain import (
    Answer,
    Decision,
    DecisionAction,
    DecisionReason,
    FinishReason,
    Objective,
    Overload,
    Plan,
    PlanSource,
    Preference,
    Request,
    Stage,
    StageAction,
    StageResult,
    Timing,
    Tokens,
    Usage,
    View,
)
from services.router.planning.draft_selection import SpeculationOptions
from services.router.planning.planner import Planner
from services.router.planning.static_plan import StaticPlan
from services.router.request import RequestState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.router.domain import Condition

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
        request: Request,
        conditions: Sequence[Condition],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> Plan:
        self.plans += 1
        self._has_been_asked()
        await self.gate.wait()
        return Plan(self._cheapest(range(len(STAGES)), conditions, min_accuracy_share))

    async def decide(
        self,
        request: Request,
        answer: Answer,
        spent_cost: float,
        spent_ms: float,
        conditions: Sequence[Condition],
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

    def _cheapest(self, stages: Sequence[int], conditions: Sequence[Condition], share: float | None) -> int:
        self.shares.add(share)
        waits_ms = {each.stage: each.expected_queue_ms for each in conditions if share is None or share < 1.0}

        def price(stage: int) -> float:
            return COSTS[stage] * (1.0 + waits_ms.get(STAGES[stage].name, 0.0) / LATENCIES_MS[stage])

        return min(stages, key=price)


def make_planner(policy: Toll, overload: Overload = Overload.DEGRADE) -> Planner:
    observer: Any = None
    plan = StaticPlan((2,), len(STAGES))
    return Planner(
        STAGES, policy, plan, observer, lambda: 0.0, SpeculationOptions(), AlwaysActive(), overload
    )


def make_progress(objective: Objective | None = None) -> RequestState:
    return RequestState(
        Request("id", "hi", objective=objective or Objective()), 60.0, View.OUTCOME, lambda: 0.0
    )


def make_answer(stage: Stage) -> Answer:
    """Return what an idle stage answers: in its mean latency, without a wait."""
    timing = Timing(queue_ms=0.0, total_ms=LATENCIES_MS[stage.index])
    result = StageResult("hi", (1,), "", FinishReason.EOS, Usage(completion_tokens=1), timing)
    return Answer(stage, StageAction.GENERATE, result, Tokens((1,), "hi"), None, timing.total_ms, stage.cost)


async def answer_some(planner: Planner, policy: Toll) -> None:
    """Have the router see each stage answer, and the policy plan and decide, one request after the other."""
    for stage in STAGES:
        for _ in range(20):
            planner.stage_answered(make_progress(), make_answer(stage), 1)
    policy.gate.set()
    for _ in range(20):
        progress = make_progress()
        assert await planner.plan(progress) == 0
        await decide(planner, progress)
    policy.gate.clear()
    policy.plans = policy.decisions = 0
    policy.shares.clear()
    policy.everybody.clear()


async def decide(planner: Planner, progress: RequestState) -> Decision:
    """Have a small answer judged."""
    progress.plan_source = PlanSource.POLICY
    progress._answer = make_answer(STAGES[0])
    return await planner.decide(progress)


async def test_a_burst_is_not_all_sent_to_one_stage() -> None:
    policy = Toll()
    planner = make_planner(policy)
    await answer_some(planner, policy)
    with ExitStack() as calls:

        async def start() -> int:
            first = await planner.plan(make_progress())
            calls.enter_context(planner.calling(STAGES[first]))
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
    planner = make_planner(policy)
    await answer_some(planner, policy)
    with ExitStack() as calls:

        async def go_on() -> int | None:
            following = (await decide(planner, make_progress())).next_stage
            calls.enter_context(planner.calling(STAGES[following or 0]))
            return following

        burst = [asyncio.create_task(go_on()) for _ in range(BURST)]
        await policy.everybody.wait()
        policy.gate.set()
        went = Counter(await asyncio.gather(*burst))
    # Where neither is the better choice: 4.2 (1 + (43 - 7) / 8) = 23.1 and 8.8 (1 + (20 - 7) / 8) = 23.1.
    assert went[1] == pytest.approx(43, abs=8)
    assert went[1] + went[2] == BURST
    assert policy.decisions <= 2 * BURST


async def test_requests_that_come_one_by_one_go_where_they_always_went() -> None:
    policy = Toll()
    planner = make_planner(policy)
    await answer_some(planner, policy)
    policy.gate.set()
    with ExitStack() as calls:
        for _ in range(8):
            first = await planner.plan(make_progress())
            calls.enter_context(planner.calling(STAGES[first]))
            assert first == 0
    assert policy.plans == 8


BEST = Objective(preference=Preference.BEST)


@pytest.mark.parametrize("question", ["plan", "decide"])
async def test_a_burst_for_the_best_is_not_told_to_step_down(question: str) -> None:
    policy = Toll()
    planner = make_planner(policy, Overload.QUEUE)
    await answer_some(planner, policy)
    with ExitStack() as calls:

        async def start() -> int | None:
            progress = make_progress(BEST)
            if question == "plan":
                stage: int | None = await planner.plan(progress)
            else:
                stage = (await decide(planner, progress)).next_stage
            calls.enter_context(planner.calling(STAGES[stage or 0]))
            return stage

        burst = [asyncio.create_task(start()) for _ in range(BURST)]
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
        (Objective(), 0.97),
        (Objective(preference=Preference.BALANCED, max_latency_ms=900.0), 0.97),
        (Objective(min_quality=0.9), 0.97),
        (BEST, 1.0),
        (Objective(lambda_=3.0), 1.0),
        (Objective(preference=Preference.FASTEST), None),
    ],
)
async def test_waits_lower_no_quality_unasked(objective: Objective, share: float | None) -> None:
    for overload, told in ((Overload.QUEUE, share), (Overload.SHED, share), (Overload.DEGRADE, None)):
        policy = Toll()
        policy.gate.set()
        planner = make_planner(policy, overload)
        await planner.plan(make_progress(objective))
        await decide(planner, make_progress(objective))
        assert policy.shares == {told}
