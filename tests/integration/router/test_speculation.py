# ruff: noqa: ASYNC110 - what ends by itself is awaited by asking again
"""Chains of stages, pipelined or not, prefill-ahead, early abandon, and drafts that are not worth it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from asd.errors import BrokenOff
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from services.router.clients import stage as stage_client
from tests.limits import CALL_S

FIXED = cascade_pb2.PLAN_SOURCE_FIXED
CHAIN = ("small", "medium", "large")
VERIFY = common_pb2.STAGE_ACTION_VERIFY
GENERATE = common_pb2.STAGE_ACTION_GENERATE


def ask(*chain: str, **fields) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", chain=chain, **fields)


def three_stages(world, **options):
    return (
        world.stage("small", pieces=(b"one", b" two", b" four"), **options),
        world.stage("medium", pieces=(b"one", b" two", b" five", b" six")),
        world.stage("large"),
    )


async def idle(*stages) -> None:
    async with asyncio.timeout(CALL_S):
        while any(stage.running for stage in stages):
            await asyncio.sleep(0)


@pytest.mark.parametrize("pipelined", [False, True])
async def test_a_chain_answers_as_its_last_stage_does(world, pipelined):
    w = await world(*three_stages(world), speculation={"pipelined": pipelined})
    response = await w.stub.Generate(ask(*CHAIN), timeout=CALL_S)
    last = w.stages["large"]
    assert (response.text, response.stage, response.plan_source) == (last.text, "large", FIXED)
    assert [record.stage for record in response.stages] == list(CHAIN)
    assert [record.text for record in response.stages] == [w.stages[name].text for name in CHAIN]
    assert [record.action for record in response.stages[1:]] == [VERIFY] * 2
    assert [record.decision for record in response.stages] == [
        *[policy_pb2.DECISION_ACTION_ESCALATE] * 2,
        policy_pb2.DECISION_ACTION_STOP,
    ]
    assert response.cost == pytest.approx(sum(record.cost for record in response.stages))
    verify = "verify_stream" if pipelined else "verify"
    assert [stage.calls for stage in w.stages.values()] == [["generate"], [verify], [verify]]


async def test_a_pipelined_draft_travels_as_it_is_written(world):
    w = await world(*three_stages(world))
    await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    (chunks,) = w.stages["large"].streamed_drafts
    assert "".join(chunk.text for chunk in chunks) == w.stages["small"].text
    assert len(chunks) == 3
    assert chunks[0].tokenizer_fingerprint == w.stages["small"].fingerprint


async def test_the_first_committed_token_comes_while_the_draft_is_being_written(world):
    small, medium, large = three_stages(world, pause_after=1)
    w = await world(small, medium, large)
    request = cascade_pb2.GenerateStreamRequest(request=ask("small", "large"))
    call = w.stub.GenerateStream(request, timeout=CALL_S)
    committed = []
    async for event in call:
        if event.HasField("commit"):
            committed.append(event.commit.tokens.text)
            # The draft waits for this: nothing but the target's own first token can have come.
            small.gate.set()
    assert committed[0] == "one"
    assert "".join(committed) == large.text


async def test_stages_of_a_pipeline_stop_with_the_caller(world):
    small, medium, large = three_stages(world, pause_after=1)
    w = await world(small, medium, large)
    call = w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    await asyncio.gather(*(stage.started.wait() for stage in (small, medium, large)))
    call.cancel()
    await idle(small, medium, large)


async def test_a_target_that_fails_ends_the_drafting(world):
    small = world.stage("small", pause_after=2)
    large = world.stage("large", fail_after=0)
    w = await world(small, world.stage("medium"), large)
    call = w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    await idle(small)


@pytest.mark.parametrize(("times", "has_begun"), [(1, False), (2, False), (1, True)])
async def test_a_verification_whose_end_is_lost_is_asked_for_once_more(world, monkeypatch, times, has_begun):
    """As where a stage refuses it while the draft is still being sent."""
    exchange, left, held = stage_client.call_exchange, [times], []

    async def broken_off(*arguments, **options):
        is_lost = left[0] > 0
        left[0] -= 1
        held.append(options["hold_s"] > 0.0)
        if is_lost and not has_begun:
            raise BrokenOff("the stage broke the call off")
        async for response in exchange(*arguments, **options):
            yield response
            if is_lost:
                raise BrokenOff("the stage broke the call off")

    monkeypatch.setattr(stage_client, "call_exchange", broken_off)
    w = await world(*three_stages(world))
    call = w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    if times == 1 and not has_begun:
        assert (await call).text == w.stages["large"].text
        assert w.stages["large"].calls == ["verify_stream"]
        # The draft waits, so that the reason is heard this time.
        assert held == [False, True]
        return
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert w.stages["large"].calls == ["verify_stream"] * has_begun


async def test_a_draft_keeps_its_fingerprint_where_the_verification_comes_first(world):
    small, _, large = three_stages(world)
    medium = world.stage("medium", verification_first=True)
    w = await world(small, medium, large)
    await w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    (chunks,) = large.streamed_drafts
    assert chunks[0].tokenizer_fingerprint == medium.fingerprint


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"chain": ["small"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"chain": ["small", "huge"]}, grpc.StatusCode.NOT_FOUND),
        ({"chain": ["small", "large"], "stage": "small"}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_chains_that_make_no_sense_are_refused(world, fields, code):
    w = await world()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", **fields), timeout=CALL_S)
    assert caught.value.code() == code
    assert (await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)).text


async def test_a_likely_target_is_warmed_while_the_first_stage_drafts(world):
    policy = world.policy(script={"small": "large"}, p_escalate=0.8, likely_next="large")
    w = await world(policy=policy)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert w.stages["large"].calls == ["prefill", "verify"]
    warmed = response.stages[0]
    assert (warmed.stage, warmed.action) == ("large", common_pb2.STAGE_ACTION_PREFILL)
    # One pass of the four that an answer of three tokens takes.
    assert warmed.cost == pytest.approx(8.8 / 4)
    assert response.cost == pytest.approx(sum(record.cost for record in response.stages))
    assert response.stages[-1].text == response.text


async def test_a_hopeless_draft_is_not_finished(world):
    small = world.stage("small", pause_after=2)
    rule = policy_pb2.AbandonRule(tokens=1, mean_logprob=-0.2)
    policy = world.policy(likely_next="large", abandon=(rule,))
    w = await world(small, world.stage("medium"), world.stage("large"), policy=policy)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    # The drafts have a log-probability of -0.25 per token; the third token never came.
    first, last = response.stages
    assert (first.stage, first.text) == ("small", "one two")
    assert first.reason == policy_pb2.DECISION_REASON_ABANDONED
    assert (last.stage, last.action, response.text) == ("large", VERIFY, w.stages["large"].text)
    async with asyncio.timeout(CALL_S):
        await small.cancelled.wait()
    assert len(policy.decisions) == 1
