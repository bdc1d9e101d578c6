"""How the router deals out time, and what it tells the policy of time, queues and cost.

The router's clock stands still or passes by hand, so that what is left to a request is known exactly. Limits
are upper bounds. gRPC sends times below 10 s in steps of 10 ms, which is the router's margin: exact limits
are checked on what the router gives to gRPC, and by one step less on what the peers get.
"""

from __future__ import annotations

from collections import defaultdict

import grpc
import pytest

from asd.errors import BudgetSpent, Unavailable
from asd.v1 import cascade_pb2, policy_pb2
from services.common import telemetry
from services.router.planning.planner import MARGIN_MS

ASK = cascade_pb2.GenerateRequest(prompt="hi")
POLICY, STATIC = cascade_pb2.PLAN_SOURCE_POLICY, cascade_pb2.PLAN_SOURCE_STATIC
DEADLINE = policy_pb2.DECISION_REASON_DEADLINE
# What a caller has who sets no deadline, by the settings of these tests.
TOTAL_S = 9.0
MARGIN_S = 0.01
# What gRPC may add, and what arithmetic in floating point may.
STEP_S, ROUNDING_S = 0.01, 1e-9


class Recorder:
    """Keeps each call's timeout by its method's name."""

    def __init__(self, timeouts_s):
        self.timeouts_s = timeouts_s

    async def keep(self, continuation, details, request):
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        self.timeouts_s[method.removeprefix("/asd.v1.")].append(details.timeout)
        return await continuation(details, request)


class UnaryUnaryRecorder(Recorder, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary = Recorder.keep


class UnaryStreamRecorder(Recorder, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream = Recorder.keep


class StreamStreamRecorder(Recorder, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream = Recorder.keep


@pytest.fixture
def timeouts_s(monkeypatch):
    """Return the timeouts, in seconds, of all calls over channels that `world` opens, by method."""
    timeouts_s = defaultdict(list)
    recorders = [kind(timeouts_s) for kind in (UnaryUnaryRecorder, UnaryStreamRecorder, StreamStreamRecorder)]
    monkeypatch.setattr(telemetry, "client_interceptors", lambda: recorders)
    return timeouts_s


def three_stages(world, **small):
    return (world.stage("small", **small), world.stage("medium"), world.stage("large"))


def fixed(stage, **fields):
    return cascade_pb2.GenerateRequest(prompt="hi", stage=stage, **fields)


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_the_margin_is_above_the_routers_own_time():
    # 95 requests in 100 take the router at most 2 ms (README); less than that would let deadlines pass.
    assert MARGIN_MS / 1000.0 == MARGIN_S
    assert MARGIN_MS > 2.0


# What a call may take.


async def test_every_call_leaves_the_router_its_margin(world, clock, timeouts_s):
    policy = world.policy(script={"small": "large"}, likely_next="medium", p_escalate=0.9)
    # Small waits until medium is being warmed.
    small, medium, large = three_stages(world, pause_after=1)
    medium.on_call = small.gate.set
    w = await world(
        *(small, medium, large),
        policy=policy,
        stage_timeout_ms=60_000,
        policy_timeout_ms=60_000,
        default_deadline_ms=TOTAL_S * 1000,
    )
    response = await w.stub.Generate(ASK)
    assert response.stage == "large"
    most_s = TOTAL_S - MARGIN_S
    calls = {
        "PolicyService/Plan": policy.plan_left_s,
        "PolicyService/Decide": policy.decide_left_s,
        "StageService/Generate": small.left_s,
        "StageService/Prefill": medium.left_s,
        "StageService/Verify": large.left_s,
    }
    for method, left_s in calls.items():
        assert 0.0 < max(timeouts_s[method]) <= most_s + ROUNDING_S
        assert len(left_s) == len(timeouts_s[method])
        assert 0.0 < max(left_s) <= most_s + STEP_S


@pytest.mark.parametrize("drafts", [False, True])
async def test_a_stages_own_budget_bounds_its_calls(world, clock, timeouts_s, drafts):
    policy = world.policy(script={"small": "medium", "medium": "large"})
    w = await world(policy=policy, stage_timeout_ms=2000)
    request = cascade_pb2.GenerateStreamRequest(request=ASK, include_drafts=drafts)
    events = [event async for event in w.stub.GenerateStream(request, timeout=20)]
    assert events[-1].response.stage == "large"
    assert 0.0 < max(timeouts_s["StageService/Generate"] + timeouts_s["StageService/Verify"]) <= 2.0
    for stage in w.stages.values():
        (left_s,) = stage.left_s
        assert 0.0 < left_s <= 2.0 + STEP_S


async def test_the_last_stage_gets_all_that_is_left(world, clock, timeouts_s):
    w = await world(stage_timeout_ms=60_000, default_deadline_ms=TOTAL_S * 1000)
    await w.stub.Generate(fixed("large"))
    # Nothing else waits for the time.
    assert timeouts_s["StageService/Generate"] == [pytest.approx(TOTAL_S - MARGIN_S)]
    assert w.stages["large"].left_s[0] <= TOTAL_S - MARGIN_S + STEP_S


async def test_a_stage_that_others_may_follow_leaves_them_half(world, clock, timeouts_s):
    policy = world.policy(script={"small": "medium"})
    w = await world(policy=policy, stage_timeout_ms=60_000, default_deadline_ms=TOTAL_S * 1000)
    await w.stub.Generate(ASK)
    for method in ("StageService/Generate", "StageService/Verify"):
        (timeout_s,) = timeouts_s[method]
        assert 0.0 < timeout_s <= (TOTAL_S - MARGIN_S) / 2 + ROUNDING_S


async def test_what_was_spent_is_taken_from_the_later_calls(world, clock, timeouts_s):
    stages = three_stages(world)
    for stage in stages:
        stage.on_call = lambda: clock.advance(1.0)
    policy = world.policy(
        script={"small": "medium", "medium": "large"},
        on_call=lambda step: clock.advance({"plan": 2.0, "decide": 0.5}[step]),
    )
    w = await world(
        *stages,
        policy=policy,
        stage_timeout_ms=60_000,
        policy_timeout_ms=60_000,
        default_deadline_ms=TOTAL_S * 1000,
    )
    response = await w.stub.Generate(ASK)
    assert response.stage == "large"
    # Seconds that are gone when each call begins.
    gone_s = {
        "PolicyService/Plan": [0.0],
        "StageService/Generate": [2.0],
        "PolicyService/Decide": [3.0, 4.5, 6.0],
        "StageService/Verify": [3.5, 5.0],
    }
    for method, each_s in gone_s.items():
        for timeout_s, spent_s in zip(timeouts_s[method], each_s, strict=True):
            assert 0.0 < timeout_s <= TOTAL_S - spent_s - MARGIN_S + ROUNDING_S


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(("stage_timeout_ms", "most_s"), [(60_000, TOTAL_S - MARGIN_S), (2000, 2.0)])
async def test_stages_of_a_chain_keep_to_budget_and_margin(
    world, clock, timeouts_s, pipelined, stage_timeout_ms, most_s
):
    w = await world(
        stage_timeout_ms=stage_timeout_ms,
        default_deadline_ms=TOTAL_S * 1000,
        speculation={"pipelined": pipelined},
    )
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", chain=["small", "medium", "large"]))
    verify = "StageService/VerifyStream" if pipelined else "StageService/Verify"
    assert [len(timeouts_s[method]) for method in ("StageService/Generate", verify)] == [1, 2]
    assert 0.0 < max(timeouts_s["StageService/Generate"] + timeouts_s[verify]) <= most_s + ROUNDING_S
    for stage in w.stages.values():
        assert 0.0 < stage.left_s[0] <= most_s + STEP_S


async def test_the_policys_timeout_bounds_its_calls(world, clock, timeouts_s):
    policy = world.policy(script={"small": "large"})
    w = await world(policy=policy, policy_timeout_ms=1500)
    await w.stub.Generate(ASK, timeout=20)
    assert timeouts_s["PolicyService/Plan"] == [1.5]
    assert timeouts_s["PolicyService/Decide"] == [1.5, 1.5]
    assert 0.0 < max(policy.plan_left_s + policy.decide_left_s) <= 1.5 + STEP_S


# Whose deadline it is.


def generate(w, request, **options):
    return w.stub.Generate(request, **options)


async def stream(w, request, **options):
    message = cascade_pb2.GenerateStreamRequest(request=request)
    events = [event async for event in w.stub.GenerateStream(message, **options)]
    return events[-1].response


async def batch(w, request, **options):
    message = cascade_pb2.GenerateBatchRequest(requests=[request])
    (only,) = [each async for each in w.stub.GenerateBatch(message, **options)]
    return only.response


@pytest.mark.parametrize("call", [generate, stream, batch])
@pytest.mark.parametrize(
    ("timeout_s", "default_ms", "stages"),
    [
        # 30 s are expected of large: the caller's 20 s count, not the default's 60 s.
        (20, 60_000, ["small"]),
        (100, 60_000, ["small", "large"]),
        (100, 20_000, ["small", "large"]),
        (None, 20_000, ["small"]),
        (None, 60_000, ["small", "large"]),
    ],
)
async def test_the_callers_deadline_counts_and_the_default_stands_in(
    world, clock, call, timeout_s, default_ms, stages
):
    w = await world(
        policy=world.policy(script={"small": "large"}, expected_ms=30_000), default_deadline_ms=default_ms
    )
    response = await call(w, ASK, timeout=timeout_s)
    assert [record.stage for record in response.stages] == stages
    stopped = len(stages) == 1
    assert (response.stages[-1].reason == DEADLINE) is stopped
    assert bool(w.stages["large"].calls) is not stopped


@pytest.mark.parametrize("call", [generate, stream, batch])
async def test_the_callers_deadline_bounds_the_calls_downstream(world, clock, call):
    policy = world.policy(script={"small": "large"})
    w = await world(*three_stages(world), policy=policy, stage_timeout_ms=60_000, policy_timeout_ms=60_000)
    await call(w, ASK, timeout=8)
    for left_s in (policy.plan_left_s, policy.decide_left_s, *(s.left_s for s in w.stages.values())):
        # What gRPC adds on the way to the router, the margin takes away.
        assert max(left_s, default=1.0) <= 8.0 + STEP_S


@pytest.mark.parametrize(("expected_ms", "stage"), [(8990.0, "large"), (8991.0, "small")])
async def test_an_escalation_must_fit_what_the_margin_leaves(world, clock, expected_ms, stage):
    policy = world.policy(script={"small": "large"}, expected_ms=expected_ms)
    w = await world(policy=policy, default_deadline_ms=TOTAL_S * 1000)
    response = await w.stub.Generate(ASK)
    assert response.stage == stage
    assert (response.stages[0].reason == DEADLINE) is (stage == "small")


async def test_nothing_is_started_in_the_margin(world, clock):
    # The draft takes all but 5 ms, so that judging it by the policy has no time left either.
    small = world.stage("small", on_call=lambda: clock.advance(TOTAL_S - 0.005))
    policy = world.policy(script={"small": "large"})
    w = await world(
        *(small, world.stage("medium"), world.stage("large")),
        policy=policy,
        static_plan=("small", "large"),
        default_deadline_ms=TOTAL_S * 1000,
    )
    response = await w.stub.Generate(ASK)
    assert (response.stage, response.stages[0].reason) == ("small", DEADLINE)
    assert not policy.decisions
    assert not w.stages["large"].calls


async def test_a_deadline_spent_on_the_plan_asks_no_stage(world, clock):
    policy = world.policy(
        plan_failure=Unavailable("going away"), on_call=lambda _: clock.advance(TOTAL_S + 0.001)
    )
    w = await world(policy=policy, default_deadline_ms=TOTAL_S * 1000)
    error = await failure(w.stub.Generate(ASK))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "before a stage was asked" in error.details()
    assert not any(stage.calls for stage in w.stages.values())


# The breaker.


async def test_callers_in_a_hurry_do_not_open_the_breaker(world, clock, caplog):
    policy = world.policy(plan_failure=BudgetSpent("late"))
    w = await world(policy=policy, policy_timeout_ms=10_000)
    for count in range(1, 6):
        # The time left is less than the policy's own timeout: that it passed says nothing of the policy.
        assert (await w.stub.Generate(ASK, timeout=8)).plan_source == STATIC
        assert len(policy.plans) == count
    assert not [record for record in caplog.records if record.name == "services.router.planning.health"]
    policy.plan_failure = None
    assert (await w.stub.Generate(ASK, timeout=8)).plan_source == POLICY


async def test_a_policy_that_is_late_by_its_own_timeout_opens_the_breaker(world, clock):
    policy = world.policy(plan_failure=BudgetSpent("late"))
    w = await world(policy=policy, policy_timeout_ms=2000)
    sources = [(await w.stub.Generate(ASK, timeout=20)).plan_source for _ in range(4)]
    assert sources == [STATIC] * 4
    assert len(policy.plans) == 3
    policy.plan_failure = None
    assert (await w.stub.Generate(ASK, timeout=20)).plan_source == STATIC
    clock.advance(1.0)
    assert (await w.stub.Generate(ASK, timeout=20)).plan_source == POLICY


# What the policy is told.


async def test_decisions_are_told_what_was_spent(world, clock):
    stages = three_stages(world)
    for stage, seconds in zip(stages, (1.0, 2.0, 3.0), strict=True):
        stage.on_call = lambda seconds=seconds: clock.advance(seconds)
    policy = world.policy(
        script={"small": "medium", "medium": "large"},
        on_call=lambda step: clock.advance({"plan": 0.25, "decide": 0.5}[step]),
    )
    w = await world(*stages, policy=policy)
    response = await w.stub.Generate(ASK, timeout=20)
    # 0.25 + 1; then 0.5 and 2 more; then 0.5 and 3 more.
    assert [each.spent_ms for each in policy.decisions] == pytest.approx([1250.0, 3750.0, 7250.0])
    # A verification of 4 tokens in one pass: 1 + 0.022 * 4 of the 3 + 1 passes of a whole answer.
    share = 1.088 / 4
    costs = [1.6, 4.2 * share, 8.8 * share]
    assert [each.spent_cost for each in policy.decisions] == pytest.approx(
        [sum(costs[: count + 1]) for count in range(3)]
    )
    assert response.latency_ms == pytest.approx(7750.0)
    assert response.policy_ms == pytest.approx(1750.0)


async def test_time_spent_is_told_by_the_routers_own_clock(world):
    policy = world.policy(script={"small": "medium", "medium": "large"})
    w = await world(policy=policy)
    await w.stub.Generate(ASK, timeout=20)
    spent_ms = [each.spent_ms for each in policy.decisions]
    assert spent_ms[0] > 0.0
    assert spent_ms == sorted(set(spent_ms))


async def test_waiting_for_a_slow_policy_is_counted(world, clock):
    policy = world.policy(
        script={"small": "large"},
        decide_failure=Unavailable("going away"),
        on_call=lambda step: clock.advance({"plan": 0.3, "decide": 0.2}[step]),
    )
    w = await world(policy=policy)
    response = await w.stub.Generate(ASK, timeout=20)
    # What was waited for in vain counts as well, and so does the second attempt.
    assert response.policy_ms == pytest.approx(700.0)
    assert response.latency_ms == pytest.approx(700.0)


def conditions(request):
    return {
        each.stage: (each.available, each.queue_depth, each.expected_queue_ms) for each in request.conditions
    }


async def test_plans_and_decisions_are_told_of_queues(world, clock):
    policy = world.policy(script={"small": "medium"})
    w = await world(policy=policy)
    w.stages["large"].queue_ms = 100.0
    w.stages["medium"].queue_ms = 4.9
    await w.stub.Generate(fixed("large"), timeout=20)
    await w.stub.Generate(fixed("medium"), timeout=20)
    await w.stub.Generate(ASK, timeout=20)
    # A wait weighs a fifth: large's 100 ms make 20 ms, and medium's less than the millisecond that counts.
    first = {"large": (True, 0, pytest.approx(20.0))}
    assert conditions(policy.plans[0]) == first
    assert conditions(policy.decisions[0]) == first
    # Medium verified meanwhile, and waited again: 0.98 + 0.2 * (4.9 - 0.98).
    assert conditions(policy.decisions[1]) == first | {"medium": (True, 0, pytest.approx(1.764))}
    # A line that nobody joins is gone after its own length.
    clock.advance(0.01)
    await w.stub.Generate(ASK, timeout=20)
    assert conditions(policy.plans[1]) == {"large": (True, 0, pytest.approx(10.0))}


async def test_how_sure_the_policy_is_reaches_the_caller(world):
    w = await world(policy=world.policy(script={"small": "large"}))
    response = await w.stub.Generate(ASK, timeout=20)
    assert [record.p_correct_stderr for record in response.stages] == [0.01, 0.01]
    alone = await w.stub.Generate(fixed("small"), timeout=20)
    assert not alone.stages[0].HasField("p_correct_stderr")
