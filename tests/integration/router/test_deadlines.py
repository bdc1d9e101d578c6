"""What of a deadline reaches the wire. How the router divides it is in tests/unit/router/test_deadlines.py.

The router's clock stands still or passes by hand, so that what is left to a request is known exactly. Limits
are upper bounds. gRPC sends times below 10 s in steps of 10 ms, which is the router's margin: exact limits
are checked on what the router gives to gRPC, and by one step less on what the peers get.
"""

from __future__ import annotations

from collections import defaultdict

import grpc
import pytest

from asd.v1 import cascade_pb2
from services.common import telemetry
from services.router.planning.time_budget import MARGIN_MS

ASK = cascade_pb2.GenerateRequest(prompt="hi")
# What a caller has who sets no deadline, by the settings of these tests.
TOTAL_S = 9.0
MARGIN_S = MARGIN_MS / 1000.0
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


async def test_stages_of_a_pipelined_chain_keep_to_their_budget(world, clock, timeouts_s):
    w = await world(stage_timeout_ms=2000, default_deadline_ms=TOTAL_S * 1000)
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", chain=["small", "medium", "large"]))
    given_s = timeouts_s["StageService/Generate"] + timeouts_s["StageService/VerifyStream"]
    assert len(given_s) == 3
    assert 0.0 < max(given_s) <= 2.0
    for stage in w.stages.values():
        assert 0.0 < stage.left_s[0] <= 2.0 + STEP_S


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
async def test_the_callers_deadline_bounds_the_calls_downstream(world, clock, call):
    policy = world.policy(script={"small": "large"})
    w = await world(*three_stages(world), policy=policy, stage_timeout_ms=60_000, policy_timeout_ms=60_000)
    await call(w, ASK, timeout=8)
    for left_s in (policy.plan_left_s, policy.decide_left_s, *(s.left_s for s in w.stages.values())):
        # What gRPC adds on the way to the router, the margin takes away.
        assert max(left_s, default=1.0) <= 8.0 + STEP_S


async def test_time_spent_is_told_by_the_routers_own_clock(world):
    policy = world.policy(script={"small": "medium", "medium": "large"})
    w = await world(policy=policy)
    await w.stub.Generate(ASK, timeout=20)
    spent_ms = [each.spent_ms for each in policy.decisions]
    assert spent_ms[0] > 0.0
    assert spent_ms == sorted(set(spent_ms))


async def test_how_sure_the_policy_is_reaches_the_caller(world):
    w = await world(policy=world.policy(script={"small": "large"}))
    response = await w.stub.Generate(ASK, timeout=20)
    assert [record.p_correct_stderr for record in response.stages] == [0.01, 0.01]
    alone = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"), timeout=20)
    assert not alone.stages[0].HasField("p_correct_stderr")
