"""How the router deals out time, and what it tells the policy of time, queues and cost.

The clock stands still or passes by hand, so that what is left to a request is known exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import BudgetSpent
from asd.v1 import policy_pb2
from asd.values import DecisionReason
from services.router.planning.time_budget import MARGIN_MS
from tests.unit.router.small_cascade import NAMES, Policy, SmallCascade, answered, called
from tests.unit.router.small_router import ASK, SmallRouter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.router.domain import Decision, PolicyChoice, StageKnowledge

TOTAL_S = 9.0
MOST_MS = TOTAL_S * 1000.0 - MARGIN_MS
# Longer than any request here has.
LONG_MS = 60_000.0
TO_LARGE = {0: (2,)}
BY_MEDIUM = {0: (1,), 1: (2,)}


class Recording(Policy):
    """Keeps what is told of queues: by question, the expected wait at each stage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waits_ms: list[dict[str, float]] = []

    async def plan(
        self, request: Any, conditions: Sequence[StageKnowledge], *arguments: Any, **options: Any
    ) -> PolicyChoice:
        self._keep(conditions)
        return await super().plan(request, conditions, *arguments, **options)

    async def decide(
        self,
        request: Any,
        answer: Any,
        spent_cost: float,
        spent_ms: float,
        conditions: Sequence[StageKnowledge],
        *arguments: Any,
        **options: Any,
    ) -> Decision:
        self._keep(conditions)
        return await super().decide(request, answer, spent_cost, spent_ms, conditions, *arguments, **options)

    def _keep(self, conditions: Sequence[StageKnowledge]) -> None:
        assert all(each.available for each in conditions)
        self.waits_ms.append({each.stage: each.expected_queue_ms for each in conditions})


def test_the_margin_is_above_the_routers_own_time() -> None:
    # 95 requests in 100 take the router at most 2 ms (README); less than that would let deadlines pass.
    assert MARGIN_MS > 2.0


# What a call may take.


async def test_every_call_leaves_the_router_its_margin() -> None:
    policy = Policy(TO_LARGE, likely_next=1)
    cascade = SmallCascade(policy, timeout_ms=LONG_MS)
    outcome = await cascade.ask(seconds=TOTAL_S)
    assert (answered(outcome), called(cascade)) == (["small", "large"], list(NAMES))
    assert cascade.stages["medium"].calls == ["prefill"]
    given_ms = [*policy.plan_left_ms, *policy.left_ms]
    given_ms += [each for stage in cascade.stages.values() for each in stage.timeouts_ms]
    # A plan, two decisions, and three calls of stages.
    assert len(given_ms) == 6
    assert 0.0 < min(given_ms) <= max(given_ms) <= MOST_MS


async def test_a_stages_own_budget_bounds_its_calls() -> None:
    cascade = SmallCascade(Policy(BY_MEDIUM), timeout_ms=2000.0)
    await cascade.ask(seconds=20.0)
    assert [stage.timeouts_ms for stage in cascade.stages.values()] == [[2000.0]] * 3


async def test_the_last_stage_gets_all_that_is_left() -> None:
    cascade = SmallCascade(timeout_ms=LONG_MS)
    await cascade.ask(stage="large", seconds=TOTAL_S)
    # Nothing else waits for the time.
    assert cascade.stages["large"].timeouts_ms == [pytest.approx(MOST_MS)]


async def test_a_stage_that_others_may_follow_leaves_them_half() -> None:
    cascade = SmallCascade(Policy({0: (1,)}), timeout_ms=LONG_MS)
    await cascade.ask(seconds=TOTAL_S)
    for name in ("small", "medium"):
        assert cascade.stages[name].timeouts_ms == [pytest.approx(MOST_MS / 2)]


async def test_what_was_spent_is_taken_from_the_later_calls() -> None:
    policy = Policy(BY_MEDIUM)
    cascade = SmallCascade(policy, timeout_ms=LONG_MS)
    policy.on_call = lambda step: cascade.clock.advance({"plan": 2.0, "decide": 0.5}[step])
    for stage in cascade.stages.values():
        stage.on_call = lambda: cascade.clock.advance(1.0)
    assert (await cascade.ask(seconds=TOTAL_S)).answer.stage.name == "large"
    # Seconds that are gone when each call begins.
    small, medium, large = (stage.timeouts_ms for stage in cascade.stages.values())
    gone_s = {0.0: policy.plan_left_ms[0], 2.0: small[0], 3.5: medium[0], 5.0: large[0]}
    gone_s |= dict(zip((3.0, 4.5, 6.0), policy.left_ms, strict=True))
    for spent_s, given_ms in gone_s.items():
        assert 0.0 < given_ms <= MOST_MS - spent_s * 1000.0
    # Nothing follows the last one.
    assert large == [pytest.approx(MOST_MS - 5000.0)]


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(("timeout_ms", "most_ms"), [(LONG_MS, MOST_MS), (2000.0, 2000.0)])
async def test_stages_of_a_chain_keep_to_budget_and_margin(
    pipelined: bool, timeout_ms: float, most_ms: float
) -> None:
    cascade = SmallCascade(pipelined=pipelined, timeout_ms=timeout_ms)
    await cascade.ask(chain=NAMES, seconds=TOTAL_S)
    for stage in cascade.stages.values():
        (given_ms,) = stage.timeouts_ms
        assert 0.0 < given_ms <= most_ms
    assert given_ms == pytest.approx(most_ms)


# Whose deadline it is.


@pytest.mark.parametrize("call", [SmallRouter.generate, SmallRouter.stream, SmallRouter.batch])
@pytest.mark.parametrize(
    ("left_s", "default_ms", "stages"),
    [
        # 30 s are expected of large: the caller's 20 s count, not the default's 60 s.
        (20.0, 60_000.0, ["small"]),
        (100.0, 60_000.0, ["small", "large"]),
        (100.0, 20_000.0, ["small", "large"]),
        (None, 20_000.0, ["small"]),
        (None, 60_000.0, ["small", "large"]),
    ],
)
async def test_the_callers_deadline_counts_and_the_default_stands_in(
    call: Any, left_s: float | None, default_ms: float, stages: list[str]
) -> None:
    router = SmallRouter(Policy(TO_LARGE, expected_ms=30_000.0), default_deadline_ms=default_ms)
    response = await call(router, ASK, left_s)
    assert [record.stage for record in response.stages] == stages == called(router.cascade)
    stopped = response.stages[-1].reason == policy_pb2.DECISION_REASON_DEADLINE
    assert stopped is (len(stages) == 1)


@pytest.mark.parametrize(("beyond_ms", "stage"), [(0.0, "large"), (1.0, "small")])
async def test_an_escalation_must_fit_what_the_margin_leaves(beyond_ms: float, stage: str) -> None:
    cascade = SmallCascade(Policy(TO_LARGE, expected_ms=MOST_MS + beyond_ms))
    outcome = await cascade.ask(seconds=TOTAL_S)
    assert outcome.answer.stage.name == stage
    assert (outcome.records[0].decision.reason is DecisionReason.DEADLINE) is (stage == "small")


async def test_nothing_is_started_in_the_margin() -> None:
    # The draft takes all but half of the margin, so that judging it by the policy has no time left either.
    policy = Policy(TO_LARGE)
    cascade = SmallCascade(policy)
    cascade.stages["small"].on_call = lambda: cascade.clock.advance(TOTAL_S - MARGIN_MS / 2000.0)
    outcome = await cascade.ask(seconds=TOTAL_S)
    assert (answered(outcome), called(cascade)) == (["small"], ["small"])
    assert outcome.records[0].decision.reason is DecisionReason.DEADLINE
    assert not policy.decisions


async def test_a_deadline_spent_on_the_plan_asks_no_stage() -> None:
    policy = Policy(answers=0)
    cascade = SmallCascade(policy)
    policy.on_call = lambda _: cascade.clock.advance(TOTAL_S + 0.001)
    with pytest.raises(BudgetSpent, match="before a stage"):
        await cascade.ask(seconds=TOTAL_S)
    assert called(cascade) == []


# What the policy is told.


async def test_decisions_are_told_what_was_spent() -> None:
    policy = Policy(BY_MEDIUM)
    cascade = SmallCascade(policy)
    policy.on_call = lambda step: cascade.clock.advance({"plan": 0.25, "decide": 0.5}[step])
    for stage, seconds in zip(cascade.stages.values(), (1.0, 2.0, 3.0), strict=True):
        stage.on_call = lambda seconds=seconds: cascade.clock.advance(seconds)  # type: ignore[misc]
    outcome = await cascade.ask(seconds=20.0)
    costs, times_ms = zip(*policy.spent, strict=True)
    # 0.25 + 1; then 0.5 and 2 more; then 0.5 and 3 more.
    assert times_ms == pytest.approx((1250.0, 3750.0, 7250.0))
    # A verification takes one of the 3 + 1 passes of a whole answer, which cost 2 and 4.
    assert costs == pytest.approx((1.0, 1.5, 2.5))
    assert outcome.latency_ms == pytest.approx(7750.0)
    assert outcome.policy_ms == pytest.approx(1750.0)


async def test_waiting_for_a_slow_policy_is_counted() -> None:
    policy = Policy(TO_LARGE, answers=1)
    cascade = SmallCascade(policy)
    policy.on_call = lambda step: cascade.clock.advance({"plan": 0.3, "decide": 0.2}[step])
    outcome = await cascade.ask()
    # What was waited for in vain counts as well.
    assert outcome.policy_ms == pytest.approx(500.0)
    assert outcome.latency_ms == pytest.approx(500.0)


async def test_plans_and_decisions_are_told_of_queues() -> None:
    policy = Recording({0: (1,)})
    cascade = SmallCascade(policy)
    cascade.stages["large"].queue_ms = 100.0
    await cascade.ask(stage="large")
    await cascade.ask()
    plan, first, second = policy.waits_ms
    assert plan == first == second
    assert {*plan} == {"large"}
    assert 0.0 < plan["large"] < 100.0
    # Medium has waited as well by the second decision.
    cascade.stages["medium"].queue_ms = 100.0
    await cascade.ask()
    plan, first, second = policy.waits_ms[3:]
    assert plan == first
    assert ({*first}, {*second}) == ({"large"}, {"medium", "large"})
    # A line that nobody joins is gone after its own length.
    cascade.clock.advance(plan["large"] / 2000.0)
    await cascade.ask()
    assert 0.0 < policy.waits_ms[6]["large"] < plan["large"]
    cascade.clock.advance(1.0)
    await cascade.ask()
    assert policy.waits_ms[9] == {}
