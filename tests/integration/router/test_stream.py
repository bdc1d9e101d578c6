"""GenerateStream: what a caller holds after every event is what stands."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from asd.transport.status import DETAILS_KEY
from asd.v1 import cascade_pb2, common_pb2
from tests.limits import CALL_S


class Reader:
    """Follows the events as the proto's comments say."""

    def __init__(self) -> None:
        self.data = b""
        self.tokens = 0
        self.committed = 0
        self.committed_bytes = b""
        self.events: list[str] = []
        self.starts: list[tuple[str, int]] = []
        self.response = None

    def take(self, message) -> None:
        kind = message.WhichOneof("event")
        assert self.response is None, "an event came after the response"
        self.events.append(kind)
        if kind == "stage_started":
            self.starts.append((message.stage_started.stage, message.stage_started.action))
        elif kind == "draft":
            self._append(message.draft)
        elif kind == "commit":
            if message.commit.HasField("tokens"):
                self._append(message.commit.tokens)
            assert message.commit.committed_tokens > self.committed, "a commit must commit something"
            self.committed = message.commit.committed_tokens
            assert self.committed <= self.tokens
        elif kind == "revise":
            assert message.revise.kept_tokens >= self.committed, "committed tokens are final"
            self.tokens = message.revise.kept_tokens
            self.data = self.data[: message.revise.kept_bytes]
            self.data.decode()
        else:
            self.response = message.response

    def _append(self, chunk) -> None:
        count = len(chunk.token_ids)
        assert count == len(chunk.logprobs) == len(chunk.entropies) == len(chunk.top2_margins)
        self.tokens += count
        self.data += chunk.text.encode()


async def read(w, *, drafts, request=None, reader=None) -> Reader:
    reader = reader or Reader()
    message = cascade_pb2.GenerateStreamRequest(
        request=request or cascade_pb2.GenerateRequest(prompt="hi"), include_drafts=drafts
    )
    async for event in w.stub.GenerateStream(message, timeout=CALL_S):
        reader.take(event)
    return reader


def check_end(reader: Reader, text: str, tokens: int) -> None:
    assert reader.data.decode() == text
    assert reader.response.text == text
    assert reader.tokens == reader.committed == tokens == len(reader.response.token_ids)


# Tokens cut inside characters: é is C3 A9, 木 is E6 9C A8, 😀 is F0 9F 98 80.
DRAFT = (b"caf", b"\xc3", b"\xa9 ", b"\xe6\x9c", b"\xa8", b" old")
TARGETS = {
    "same": DRAFT,
    "all new": (b"neu", b" \xc3", b"\xa9"),
    "prefix within a character": (
        b"caf",
        b"\xc3",
        b"\xa9 ",
        b"\xe6\x9c",
        b"\xad",
        b" new \xf0\x9f",
        b"\x98\x80",
    ),
    "prefix ends inside a character": (b"caf", b"\xc3", b"\xa8", b"!"),
    "shorter": (b"caf", b"\xc3", b"\xa9 "),
    "longer": (*DRAFT, b"er", b"!"),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("chunks", [(1, 1), (2, 1), (1, 3), (3, 2), (9, 9)])
@pytest.mark.parametrize("next_stage", ["medium", "large"])
@pytest.mark.parametrize("same_tokenizer", [True, False])
async def test_escalated_stream_holds_what_the_target_wrote(
    world, target, chunks, next_stage, same_tokenizer
):
    small = world.stage("small", pieces=DRAFT, chunk=chunks[0])
    others = [
        world.stage(name, pieces=target, chunk=chunks[1], fingerprint=("f" if same_tokenizer else "e") * 64)
        for name in ("medium", "large")
    ]
    w = await world(small, *others, policy=world.policy(script={"small": next_stage}))
    shown = await read(w, drafts=True)
    check_end(shown, b"".join(target).decode(), len(target))
    assert shown.starts == [
        ("small", common_pb2.STAGE_ACTION_GENERATE),
        (next_stage, common_pb2.STAGE_ACTION_VERIFY),
    ]
    plain = await read(w, drafts=False)
    check_end(plain, b"".join(target).decode(), len(target))
    assert set(plain.events) == {"stage_started", "commit", "response"}
    unary = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert unary.text == plain.response.text == shown.response.text
    assert unary.token_ids == plain.response.token_ids == shown.response.token_ids


async def test_accepted_tokens_are_committed_by_count_and_the_rest_revised(world):
    small = world.stage("small", pieces=(b"one", b" two", b" four"))
    large = world.stage("large")
    w = await world(small, world.stage("medium"), large, policy=world.policy(script={"small": "large"}))
    stream = w.stub.GenerateStream(
        cascade_pb2.GenerateStreamRequest(
            request=cascade_pb2.GenerateRequest(prompt="hi"), include_drafts=True
        ),
        timeout=CALL_S,
    )
    events = [event async for event in stream]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == [
        *["stage_started", "draft", "draft", "draft"],
        *["stage_started", "commit", "revise", "commit", "response"],
    ]
    assert events[5].commit.committed_tokens == 2
    assert not events[5].commit.HasField("tokens")
    assert (events[6].revise.kept_tokens, events[6].revise.kept_bytes) == (2, len("one two"))
    assert events[7].commit.committed_tokens == 3
    assert events[7].commit.tokens.text == " three"


async def test_drafts_that_stand_are_committed_by_count(world):
    w = await world(policy=world.policy())
    reader = await read(w, drafts=True)
    assert reader.events == ["stage_started", "draft", "draft", "draft", "commit", "response"]
    check_end(reader, "one two three", 3)


async def test_plain_stream_of_an_early_stop_comes_in_one_commit(world):
    w = await world(policy=world.policy())
    reader = await read(w, drafts=False)
    assert reader.events == ["stage_started", "commit", "response"]
    check_end(reader, "one two three", 3)


@pytest.mark.parametrize("case", ["fixed", "last", "static"])
async def test_stage_known_to_be_final_streams_as_it_writes(world, case):
    stages = [world.stage(name, pause_after=1) for name in ("small", "medium", "large")]
    policy = world.policy(first="large") if case == "last" else None
    w = await world(*stages, policy=policy)
    request = cascade_pb2.GenerateRequest(prompt="hi", stage="small" if case == "fixed" else "")
    call = w.stub.GenerateStream(cascade_pb2.GenerateStreamRequest(request=request), timeout=CALL_S)
    reader = Reader()
    events = aiter(call)
    while reader.committed < 1:
        reader.take(await anext(events))
    # The stage waits, so these tokens came while it was writing.
    assert reader.events == ["stage_started", "commit"]
    for stage in stages:
        stage.gate.set()
    async for event in events:
        reader.take(event)
    check_end(reader, "one two three", 3)
    assert reader.events == ["stage_started", "commit", "commit", "commit", "response"]


async def test_three_stages_in_turn(world):
    small = world.stage("small", pieces=(b"a", b"b", b"c", b"d"))
    medium = world.stage("medium", pieces=(b"a", b"b", b"x", b"y", b"z"), chunk=2)
    large = world.stage("large", pieces=(b"a", b"b", b"x", b"y", b"!"))
    w = await world(small, medium, large, policy=world.policy(script={"small": "medium", "medium": "large"}))
    for drafts in (True, False):
        reader = await read(w, drafts=drafts)
        check_end(reader, "abxy!", 5)
        assert [name for name, _ in reader.starts] == ["small", "medium", "large"]


async def test_cancelled_stream_stops_the_stage(world):
    stage = world.stage("small", pause_after=1)
    w = await world(stage, static_plan=("small",))
    call = w.stub.GenerateStream(
        cascade_pb2.GenerateStreamRequest(
            request=cascade_pb2.GenerateRequest(prompt="hi", stage="small"), include_drafts=True
        ),
        timeout=CALL_S,
    )
    await call.read()
    await call.read()
    call.cancel()
    await asyncio.wait_for(stage.cancelled.wait(), CALL_S)
    assert stage.running == 0


async def test_cancelled_unary_call_stops_the_stage_and_frees_its_place(world):
    stage = world.stage("small", pause_after=1)
    w = await world(stage, static_plan=("small",), max_concurrent=1)
    call = w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    await asyncio.wait_for(asyncio.gather(stage.started.wait(), asyncio.sleep(0)), CALL_S)
    with pytest.raises(grpc.RpcError) as full:
        await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert full.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_concurrent" in full.value.details()
    status = status_pb2.Status.FromString(dict(full.value.trailing_metadata())[DETAILS_KEY])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert all(each.Unpack(detail) for each, detail in zip(status.details, (info, retry), strict=True))
    assert info.reason == "OVERLOADED"
    assert retry.retry_delay.ToNanoseconds() > 0
    call.cancel()
    await asyncio.wait_for(stage.cancelled.wait(), CALL_S)
    stage.gate.set()
    assert (await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)).text
