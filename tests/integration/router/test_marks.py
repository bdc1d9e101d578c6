# ruff: noqa: ASYNC110 - what ends by itself is awaited by asking again
"""Spans and metrics of a router that serves: its trace, cancelled calls, and adapters by the model's name.

What each of them records is in tests/unit/router/test_marks.py.
"""

from __future__ import annotations

import asyncio

import grpc
import pytest
from opentelemetry.trace import StatusCode

from asd.v1 import cascade_pb2, cascade_pb2_grpc
from tests.limits import CALL_S
from tests.recording import counts

ASK = cascade_pb2.GenerateRequest(prompt="hi")


async def test_a_plan_without_the_policy_is_marked_and_counted(world, recorded, metered):
    w = await world(policy=world.policy(), dead=("policy",))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.plan_source == cascade_pb2.PLAN_SOURCE_STATIC
    assert response.trace_id == f"{recorded.spans('asd.cascade')[0].context.trace_id:032x}"
    assert recorded.values("asd.plan", "asd.plan.source") == ["static"]
    assert counts(metered()["asd.static_plans"]) == {("plan",): 1}


@pytest.mark.parametrize("fields", [{}, {"chain": ["small", "large"]}], ids=["one stage", "chain"])
async def test_a_caller_who_cancels_marks_no_error(world, recorded, metered, fields):
    small, large = world.stage("small", pause_after=1), world.stage("large", pause_after=1)
    w = await world(small, large, static_plan=("small",))
    working = [small, large] if fields else [small]
    # Not the traced channel of `w`: OpenTelemetry's interceptor keeps a cancellation to itself.
    async with grpc.aio.insecure_channel(f"127.0.0.1:{w.port}") as channel:
        ask = cascade_pb2.GenerateRequest(prompt="hi", **fields)
        call = cascade_pb2_grpc.CascadeServiceStub(channel).Generate(ask, timeout=CALL_S)
        await asyncio.wait_for(asyncio.gather(*(stage.started.wait() for stage in working)), CALL_S)
        call.cancel()
        await asyncio.wait_for(recorded.ended.wait(), CALL_S)
    # Work downstream stops, though every channel on the way is traced.
    async with asyncio.timeout(CALL_S):
        while any(stage.running for stage in working):
            await asyncio.sleep(0)
    assert recorded.status("asd.stage") == [(StatusCode.UNSET, None)] * len(working)
    assert recorded.status("asd.cascade") == [(StatusCode.UNSET, None)]
    assert "asd.requests" not in metered()


@pytest.mark.parametrize("traced", [False, True], ids=["untraced", "traced"])
@pytest.mark.parametrize("step", ["plan", "prefill"])
async def test_unary_calls_stop_with_what_they_were_made_for(world, request, traced, step):
    if traced:
        request.getfixturevalue("recorded")
    began, ended, never = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def hang(*_):
        began.set()
        try:
            await never.wait()
        finally:
            ended.set()

    small, large = world.stage("small", pause_after=1), world.stage("large")
    policy = world.policy(likely_next="large", p_escalate=0.9)
    if step == "plan":
        policy.Plan = hang
    else:
        large.Prefill = hang
    w = await world(small, world.stage("medium"), large, policy=policy, policy_timeout_ms=CALL_S * 1e3)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{w.port}") as channel:
        call = cascade_pb2_grpc.CascadeServiceStub(channel).Generate(ASK, timeout=CALL_S)
        await asyncio.wait_for(began.wait(), CALL_S)
        if step == "plan":
            call.cancel()
        else:
            # Small's answer stands, so that nothing needs large.
            small.gate.set()
            assert (await call).stage == "small"
        await asyncio.wait_for(ended.wait(), CALL_S)


@pytest.mark.parametrize("settings", [{}, {"medium": {"model": "org/math"}}], ids=["default", "named"])
async def test_a_model_whose_own_name_ends_like_a_task_is_no_adapter_for_it(world, metered, settings, clock):
    medium = world.stage("medium")
    w = await world(medium, stage_settings=settings)
    medium.name = "org/math"
    for adapters in ((), ("math",)):
        medium.adapters = adapters
        # What adapters there are is asked again after a while.
        clock.now += 3600.0
        request = cascade_pb2.GenerateRequest(prompt="hi", stage="medium", task="math")
        await w.stub.Generate(request, timeout=CALL_S)
    assert [request.model for request in medium.requests][1] == "org/math/math"
    assert counts(metered()["asd.stage.tasks"]) == {("medium", "none"): 1, ("medium", "used"): 1}
