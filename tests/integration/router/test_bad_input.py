# ruff: noqa: PT012 - a stream fails while it is read
"""Every bad request gets its status and names its field, and the next request is answered."""

from __future__ import annotations

import grpc
import pytest

from asd.errors import InvalidRequest, QueueFull
from asd.transport.status import from_rpc_error
from asd.v1 import cascade_pb2, common_pb2
from tests.limits import CALL_S

NAN, INF = float("nan"), float("inf")


def ask(**fields):
    return cascade_pb2.GenerateRequest(**{"prompt": "hi", **fields})


def objective(**fields):
    return ask(objective=common_pb2.Objective(**fields))


def sampling(**fields):
    return ask(sampling=common_pb2.Sampling(**fields))


def turns(*messages):
    conversation = common_pb2.Conversation(
        messages=[common_pb2.Message(role=role, content=content) for role, content in messages]
    )
    return cascade_pb2.GenerateRequest(conversation=conversation)


BAD = {
    "empty prompt": (ask(prompt=""), "prompt"),
    "no input": (cascade_pb2.GenerateRequest(), "prompt"),
    "no messages": (turns(), "conversation.messages"),
    "role unspecified": (turns((0, "x")), "conversation.messages[0].role"),
    "role unknown": (turns((2, "x"), (9, "y")), "conversation.messages[1].role"),
    "empty content": (turns((2, "")), "conversation.messages[0].content"),
    "assistant last": (turns((2, "x"), (3, "y")), "conversation.messages[1].role"),
    **{
        f"lambda {value}": (objective(**{"lambda": value}), "objective.lambda")
        for value in (NAN, -1.0, INF, 1e300)
    },
    **{
        f"{name} {value}": (objective(**{name: value}), f"objective.{name}")
        for name in ("max_cost", "max_latency_ms", "min_quality")
        for value in (0.0, -1.0, NAN, INF, 1e300)
    },
    "lambda and preference": (objective(**{"lambda": 1.0, "preference": 1}), "objective.preference"),
    "preference unspecified": (objective(preference=0), "objective.preference"),
    "preference unknown": (objective(preference=77), "objective.preference"),
    "acceptance unspecified": (ask(acceptance=common_pb2.Acceptance()), "acceptance.mode"),
    "acceptance unknown": (ask(acceptance=common_pb2.Acceptance(mode=5)), "acceptance.mode"),
    "tolerant without threshold": (ask(acceptance=common_pb2.Acceptance(mode=2)), "acceptance.threshold"),
    "tolerant NaN": (
        ask(acceptance=common_pb2.Acceptance(mode=2, threshold=NAN)),
        "acceptance.threshold",
    ),
    "exact with threshold": (
        ask(acceptance=common_pb2.Acceptance(mode=1, threshold=0.5)),
        "acceptance.threshold",
    ),
    "no new tokens": (sampling(max_new_tokens=0), "sampling.max_new_tokens"),
    "temperature NaN": (sampling(temperature=NAN), "sampling.temperature"),
    "temperature 3": (sampling(temperature=3), "sampling.temperature"),
    "top_p 0": (sampling(top_p=0), "sampling.top_p"),
    "empty stop": (sampling(stop=["a", ""]), "sampling.stop[1]"),
    "nine stops": (sampling(stop=list("abcdefghi")), "sampling.stop"),
    "long session": (ask(session_id="é" * 129), "session_id"),
}


async def answered(w) -> bool:
    return (await w.stub.Generate(ask(), timeout=CALL_S)).text == "one two three"


@pytest.fixture
async def w(world):
    return await world()


async def test_bad_requests_name_their_field(w):
    for name, (request, field) in BAD.items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await w.stub.Generate(request, timeout=CALL_S)
        error = from_rpc_error(caught.value)
        assert (type(error), error.field) == (InvalidRequest, field), name
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.message, name
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            stream = w.stub.GenerateStream(cascade_pb2.GenerateStreamRequest(request=request), timeout=CALL_S)
            [event async for event in stream]
        assert from_rpc_error(caught.value).field == f"request.{field}", name
        assert await answered(w), name
    assert {call for stage in w.stages.values() for call in stage.calls} == {"generate"}


async def test_unknown_stage_is_not_found(w):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.stub.Generate(ask(stage="huge"), timeout=CALL_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(caught.value).field == "stage"
    assert "small, medium, large" in caught.value.details()
    assert await answered(w)


@pytest.mark.parametrize(
    ("raw", "code", "field"),
    [
        (b"\x0a\x02\xff\xfe", "INVALID_ARGUMENT", "prompt"),
        (
            bytes([0x12, 6, 0x0A, 4, 0x12, 2, 0xFF, 0xFE]),
            "INVALID_ARGUMENT",
            "conversation.messages[0].content",
        ),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", ""),
        (cascade_pb2.GenerateRequest(prompt="x" * 10_000_000).SerializeToString(), "RESOURCE_EXHAUSTED", ""),
    ],
    ids=["invalid prompt", "invalid content", "no message", "10 MB"],
)
async def test_bad_bytes(w, raw, code, field):
    # A channel without limits of its own, so that the router is what refuses.
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{w.port}", options=(("grpc.max_send_message_length", -1),)
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/asd.v1.CascadeService/Generate")(raw, timeout=CALL_S)
    assert caught.value.code().name == code
    assert from_rpc_error(caught.value).field == field
    assert await answered(w)


@pytest.mark.parametrize("count", [0, 1025])
async def test_batch_size(w, count):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        request = cascade_pb2.GenerateBatchRequest(requests=[ask()] * count)
        [each async for each in w.stub.GenerateBatch(request, timeout=CALL_S)]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).field == "requests"
    assert await answered(w)


async def test_one_bad_request_of_a_batch_leaves_the_others_alone(world):
    w = await world(batch_concurrency=3)
    requests = [ask(), ask(prompt=""), *[ask()] * 20, ask(stage="huge")]
    call = w.stub.GenerateBatch(cascade_pb2.GenerateBatchRequest(requests=requests), timeout=CALL_S)
    results = {each.index: each async for each in call}
    assert sorted(results) == list(range(23))
    assert (results[1].error.code, results[1].error.field) == (3, "requests[1].prompt")
    assert (results[22].error.code, results[22].error.field) == (5, "requests[22].stage")
    assert all(results[index].response.text == "one two three" for index in range(23) if index not in {1, 22})
    assert 1 < w.stages["medium"].most_running <= 3


async def test_a_request_of_a_batch_that_there_is_no_room_for_says_when_to_ask_again(world):
    medium = world.stage("medium", fail_after=0, failure=QueueFull("the queue is full"))
    w = await world(world.stage("small"), medium)
    call = w.stub.GenerateBatch(cascade_pb2.GenerateBatchRequest(requests=[ask()]), timeout=10)
    (result,) = [each async for each in call]
    assert result.error.code == 8
    assert result.error.retry_after_ms > 0


async def test_cancelled_batch_stops_all_of_it(world):
    medium = world.stage("medium", pause_after=1)
    w = await world(world.stage("small"), medium, batch_concurrency=4)
    call = w.stub.GenerateBatch(cascade_pb2.GenerateBatchRequest(requests=[ask()] * 10), timeout=CALL_S)
    await medium.started.wait()
    call.cancel()
    await medium.cancelled.wait()
    medium.gate.set()
    assert await answered(w)
    assert len(medium.calls) <= 5


async def test_stream_without_a_request(w):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [each async for each in w.stub.GenerateStream(cascade_pb2.GenerateStreamRequest(), timeout=CALL_S)]
    assert from_rpc_error(caught.value).field == "request"
