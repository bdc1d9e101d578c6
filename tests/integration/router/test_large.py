"""Requests as large as the router takes them reach policy and stages; larger ones are refused."""

from __future__ import annotations

import grpc
import pytest

from asd.transport.status import from_rpc_error
from asd.v1 import cascade_pb2, common_pb2
from tests.limits import CALL_S

MOST = 4 * 1024 * 1024
POLICY = cascade_pb2.PLAN_SOURCE_POLICY


def ask(size: int, *, is_conversation: bool = False) -> cascade_pb2.GenerateRequest:
    """Return a request of so many bytes."""

    def of(length: int) -> cascade_pb2.GenerateRequest:
        if not is_conversation:
            return cascade_pb2.GenerateRequest(prompt="x" * length)
        turn = common_pb2.Message(role=common_pb2.ROLE_USER, content="x" * length)
        return cascade_pb2.GenerateRequest(conversation=common_pb2.Conversation(messages=[turn]))

    around = of(size).ByteSize() - size
    request = of(size - around)
    assert request.ByteSize() == size
    return request


@pytest.mark.parametrize("is_conversation", [False, True])
async def test_the_largest_request_is_planned_verified_and_decided(world, is_conversation):
    policy = world.policy(script={"small": "medium", "medium": "large"}, p_escalate=0.9, likely_next="large")
    # A draft of 30,000 tokens beside the prompt.
    pieces = (b"word ",) * 30_000
    stages = [world.stage(name, pieces=pieces, chunk=1000) for name in ("small", "medium", "large")]
    w = await world(*stages, policy=policy, policy_timeout_ms=60_000, stage_timeout_ms=60_000)
    request = ask(MOST, is_conversation=is_conversation)
    response = await w.stub.Generate(request, timeout=CALL_S)
    assert (response.stage, response.plan_source) == ("large", POLICY)
    assert [stage.calls for stage in stages] == [["generate"], ["verify"], ["prefill", "verify"]]
    assert len(policy.decisions) == 3
    # With room for nothing but the chain's names.
    request = ask(MOST - 20, is_conversation=is_conversation)
    request.chain.extend(["small", "large"])
    assert (await w.stub.Generate(request, timeout=CALL_S)).stage == "large"
    assert stages[-1].calls[-1] == "verify_stream"


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def test_a_larger_request_is_refused_with_what_to_change(world):
    w = await world()
    sentence = (
        "the request has 4194305 bytes, and 4194304 are the most that it may have: shorten the prompt or the "
        "conversation"
    )
    for is_conversation in (False, True):
        request = ask(MOST + 1, is_conversation=is_conversation)
        stream = w.stub.GenerateStream(cascade_pb2.GenerateStreamRequest(request=request), timeout=CALL_S)
        for call in (w.stub.Generate(request, timeout=CALL_S), stream.read()):
            assert await refused(call) == (grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
    batch = cascade_pb2.GenerateBatchRequest(requests=[ask(MOST + 1), ask(100)])
    answers = {each.index: each async for each in w.stub.GenerateBatch(batch, timeout=CALL_S)}
    assert (answers[0].error.message, answers[0].error.field) == (sentence, "requests[0]")
    assert answers[1].response.text == "one two three"
    assert [len(stage.calls) for stage in w.stages.values()] == [0, 1, 0]


async def test_a_batch_of_too_many_is_refused_by_its_bytes(world):
    """Its requests are counted before they are decoded: four million of them would take seconds."""
    w = await world()
    call = w.channel.unary_stream("/asd.v1.CascadeService/GenerateBatch")
    for raw, name in ((b"\x0a\x00" * (4 << 20), "requests"), (b"\x3a\x00" * (4 << 20), "")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(raw, timeout=CALL_S).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(caught.value).field == name
