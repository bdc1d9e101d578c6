"""The stage over gRPC: every error that a user can cause names its field, and the next call is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from asd.v1 import common_pb2, stage_pb2

if TYPE_CHECKING:
    from tests.integration.stage.conftest import Stage

_TIMEOUT_S = 20
Generate = stage_pb2.StageServiceGenerateRequest
Verify = stage_pb2.VerifyRequest
Prompt = "Otto has 4 bells. Otto sells 2. How many bells does Otto have now?"
EOS = common_pb2.FINISH_REASON_EOS


def _draft(**fields: object) -> common_pb2.Draft:
    return common_pb2.Draft(**{"text": "4-2=2. Answer: 2", "finish_reason": EOS, **fields})  # type: ignore[arg-type]


async def _drain(call: object) -> list[object]:
    return [message async for message in call]  # type: ignore[attr-defined]


def _field_of(error: grpc.RpcError) -> str:
    metadata = dict(error.trailing_metadata())  # type: ignore[attr-defined]
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return bad.field_violations[0].field
    return ""


_INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD = [
    (Generate(), _INVALID, "prompt"),
    (Generate(prompt=""), _INVALID, "prompt"),
    (Generate(prompt="word " * 800), _INVALID, "prompt"),
    (Generate(prompt="x", model="huge"), grpc.StatusCode.NOT_FOUND, ""),
    (Generate(prompt="x", session_id="s" * 300), _INVALID, "session_id"),
    (
        Generate(prompt="x", sampling=common_pb2.Sampling(temperature=float("nan"))),
        _INVALID,
        "sampling.temperature",
    ),
    (
        Generate(prompt="x", sampling=common_pb2.Sampling(max_new_tokens=0)),
        _INVALID,
        "sampling.max_new_tokens",
    ),
    (Generate(prompt="x", sampling=common_pb2.Sampling(stop=[""])), _INVALID, "sampling.stop[0]"),
    (
        Generate(conversation=common_pb2.Conversation(messages=[common_pb2.Message(content="x")])),
        _INVALID,
        "conversation.messages[0].role",
    ),
    (
        Generate(prompt="x", sampling=common_pb2.Sampling(constraint={"json_schema": '{"type": "odd"}'})),
        _INVALID,
        "sampling.constraint.json_schema",
    ),
    (
        Verify(
            prompt="x",
            draft=_draft(),
            sampling=common_pb2.Sampling(constraint={"regex": "[0-9]+"}),
            is_prediction=True,
        ),
        _INVALID,
        "draft",
    ),
    (Verify(prompt="x"), _INVALID, "draft.finish_reason"),
    (Verify(prompt="x", draft=_draft(token_ids=[7])), _INVALID, "draft.tokenizer_fingerprint"),
    (
        Verify(prompt="x", draft=_draft(text="", token_ids=[7], tokenizer_fingerprint="beef")),
        _INVALID,
        "draft.tokenizer_fingerprint",
    ),
    (Verify(prompt="x", draft=_draft(), acceptance=common_pb2.Acceptance()), _INVALID, "acceptance.mode"),
    (
        Verify(prompt="x", draft=_draft(), acceptance=common_pb2.Acceptance(mode=2, threshold=2)),
        _INVALID,
        "acceptance.threshold",
    ),
]


@pytest.mark.parametrize(("request_", "code", "field"), BAD, ids=[f"{i}-{b[2]}" for i, b in enumerate(BAD)])
async def test_bad_requests_name_their_field(
    stage: Stage, request_: Generate | Verify, code: grpc.StatusCode, field: str
) -> None:
    call = stage.stub.Generate if isinstance(request_, Generate) else stage.stub.Verify
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drain(call(request_, timeout=_TIMEOUT_S))  # type: ignore[operator]
    assert caught.value.code() is code
    if field:
        assert _field_of(caught.value) == field
    messages = await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S))
    assert messages[-1].result.text.endswith("Answer: 2")  # type: ignore[attr-defined]


async def test_a_stream_of_chunks_ends_with_its_sum(stage: Stage) -> None:
    messages = await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S))
    chunks = [m.tokens for m in messages if m.HasField("tokens")]  # type: ignore[attr-defined]
    result = messages[-1].result  # type: ignore[attr-defined]
    assert [i for c in chunks for i in c.token_ids] == list(result.token_ids)
    assert "".join(c.text for c in chunks) == result.text == "4-2=2. Answer: 2"
    for chunk in chunks:
        assert len(chunk.logprobs) == len(chunk.entropies) == len(chunk.top2_margins) == len(chunk.token_ids)
        assert all(logprob <= 0 for logprob in chunk.logprobs)
        assert all(0 <= margin <= 1 for margin in chunk.top2_margins)
    assert result.usage.completion_tokens == len(result.token_ids)
    assert result.finish_reason == EOS
    assert result.timing.total_ms >= result.timing.decode_ms


async def test_a_constraint_and_log_probabilities_over_the_wire(stage: Stage) -> None:
    sampling = common_pb2.Sampling(constraint={"regex": "[0-9]+-2=[0-9]"}, top_logprobs=3)
    written = await _drain(
        stage.stub.Generate(Generate(prompt=Prompt, sampling=sampling), timeout=_TIMEOUT_S)
    )
    result = written[-1].result  # type: ignore[attr-defined]
    assert result.constrained
    assert result.text == "4-2=2"
    request = Verify(prompt=Prompt, draft=_draft(), sampling=sampling)
    first, *rest = await _drain(stage.stub.Verify(request, timeout=_TIMEOUT_S))
    # Of "4-2=2. Answer: 2", the constraint allows the beginning.
    assert first.verification.allowed_tokens == first.verification.accepted_tokens == len(result.token_ids)  # type: ignore[attr-defined]
    assert rest[-1].result.text == result.text  # type: ignore[attr-defined]
    for messages in (written, rest):
        details = [d for m in messages if m.HasField("tokens") for d in m.tokens.details]  # type: ignore[attr-defined]
        assert b"".join(detail.text for detail in details) == b"4-2=2"
        assert {len(detail.likeliest) for detail in details} == {3}
        assert [detail.likeliest[0].text for detail in details] == [detail.text for detail in details]


async def test_verify_sends_its_verification_first_and_the_targets_answer(stage: Stage) -> None:
    drafted = (await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S)))[-1].result  # type: ignore[attr-defined]
    draft = _draft(
        text=drafted.text, token_ids=drafted.token_ids, tokenizer_fingerprint=drafted.tokenizer_fingerprint
    )
    messages = await _drain(stage.stub.Verify(Verify(prompt=Prompt, draft=draft), timeout=_TIMEOUT_S))
    first, last = messages[0].verification, messages[-1].result  # type: ignore[attr-defined]
    assert first.ids_used
    assert first.accepted_tokens == first.proposed_tokens == len(drafted.token_ids) + 1
    assert set(first.ranks) == {0}
    assert last.text == drafted.text
    assert last.usage.forward_passes == 1


async def test_models_load_on_demand_and_unload(stage: Stage) -> None:
    async def states() -> dict[str, int]:
        status = await stage.stub.Status(stage_pb2.StatusRequest(), timeout=_TIMEOUT_S)
        assert status.resident_bytes > 0
        return {model.name: model.state for model in status.models}

    assert await states() == {"small": stage_pb2.MODEL_STATE_READY, "medium": stage_pb2.MODEL_STATE_UNLOADED}
    messages = await _drain(stage.stub.Generate(Generate(prompt=Prompt, model="medium"), timeout=_TIMEOUT_S))
    assert messages[-1].result.model == "medium"  # type: ignore[attr-defined]
    assert (await states())["medium"] == stage_pb2.MODEL_STATE_READY
    freed = await stage.stub.Unload(stage_pb2.UnloadRequest(model="medium"), timeout=_TIMEOUT_S)
    assert freed.freed_bytes > 0
    assert (await states())["medium"] == stage_pb2.MODEL_STATE_UNLOADED
    loaded = await stage.stub.Load(stage_pb2.LoadRequest(model="medium"), timeout=_TIMEOUT_S)
    assert loaded.load_ms > 0


async def test_prefill_is_seen_by_the_next_call(stage: Stage) -> None:
    warmed = await stage.stub.Prefill(stage_pb2.PrefillRequest(prompt=Prompt), timeout=_TIMEOUT_S)
    messages = await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S))
    usage = messages[-1].result.usage  # type: ignore[attr-defined]
    assert usage.cached_prompt_tokens == warmed.prompt_tokens - 1


async def test_a_draining_stage_refuses_new_calls(stage: Stage) -> None:
    await stage.servicer.drain()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    status = await stage.stub.Status(stage_pb2.StatusRequest(), timeout=_TIMEOUT_S)
    assert status.draining


Step = stage_pb2.VerifyStreamRequest
_START = Step(start=stage_pb2.VerifyStreamStart(prompt=Prompt))
_END = Step(end=stage_pb2.DraftEnd(finish_reason=EOS))
BAD_STREAMS = [
    ([], "start"),
    ([_END], "start"),
    ([Step(start=stage_pb2.VerifyStreamStart())], "start.prompt"),
    (
        [
            Step(
                start=stage_pb2.VerifyStreamStart(
                    prompt="x", sampling=common_pb2.Sampling(temperature=float("inf"))
                )
            )
        ],
        "start.sampling.temperature",
    ),
    (
        [Step(start=stage_pb2.VerifyStreamStart(prompt="x", acceptance=common_pb2.Acceptance()))],
        "start.acceptance.mode",
    ),
    ([_START, _START], "start"),
    ([_START, Step()], "event"),
    ([_START, Step(end=stage_pb2.DraftEnd())], "end.finish_reason"),
    ([_START], "end"),
]


@pytest.mark.parametrize(
    ("steps", "field"), BAD_STREAMS, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD_STREAMS)]
)
async def test_bad_streams_name_their_field(stage: Stage, steps: list[Step], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drain(stage.stub.VerifyStream(iter(steps), timeout=_TIMEOUT_S))
    assert caught.value.code() == _INVALID
    assert _field_of(caught.value) == field
    assert await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S))


async def test_a_streamed_draft_gives_what_a_whole_one_gives(stage: Stage) -> None:
    alone = await _drain(stage.stub.Generate(Generate(prompt=Prompt), timeout=_TIMEOUT_S))
    result = alone[-1].result  # type: ignore[attr-defined]
    fingerprint = alone[0].tokenizer_fingerprint  # type: ignore[attr-defined]
    assert fingerprint == result.tokenizer_fingerprint
    chunk = stage_pb2.DraftChunk(
        token_ids=result.token_ids, text=result.text, tokenizer_fingerprint=fingerprint
    )
    responses = await _drain(
        stage.stub.VerifyStream(iter([_START, Step(chunk=chunk), _END]), timeout=_TIMEOUT_S)
    )
    kinds = [response.WhichOneof("event") for response in responses]  # type: ignore[attr-defined]
    assert kinds.count("verification") == kinds.count("result") == 1
    final = responses[-1].result  # type: ignore[attr-defined]
    assert list(final.token_ids) == list(result.token_ids)
    assert sum(final.accept_lengths) <= len(result.token_ids) + 1
    assert responses[0].tokenizer_fingerprint == fingerprint  # type: ignore[attr-defined]
