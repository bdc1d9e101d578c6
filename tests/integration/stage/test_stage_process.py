"""`python -m services.stage`, asked over gRPC: its settings hold, and what a request says does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from tests.integration.common.conftest import running
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.integration.stage.conftest import Reference

MODELS = Path(__file__).parents[3] / "models"
EOS = common_pb2.FINISH_REASON_EOS
TOLERANT = common_pb2.ACCEPTANCE_MODE_TOLERANT
CONFIG = {
    "models": [
        {"name": "later", "path": str(MODELS / "medium"), "preload": False},
        {"name": "small", "path": str(MODELS / "small")},
    ],
    "default_model": "small",
    "memory_budget_mb": 7,
}


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    """A stub to a stage process that serves the small model."""
    async with (
        running("services.stage", CONFIG, tmp_path) as stage,
        grpc.aio.insecure_channel(stage.target) as channel,
    ):
        yield stage_pb2_grpc.StageServiceStub(channel)


async def _generate(stub: Any, prompt: str, **sampling: Any) -> stage_pb2.StageResult:
    request = stage_pb2.StageServiceGenerateRequest(prompt=prompt, sampling=common_pb2.Sampling(**sampling))
    responses = [response async for response in stub.Generate(request, timeout=CALL_S)]
    return responses[-1].result  # type: ignore[no-any-return]


async def test_a_process_has_its_models_and_its_budget(stub: Any) -> None:
    status = await stub.Status(stage_pb2.StatusRequest(), timeout=CALL_S)
    assert [(model.name, model.state) for model in status.models] == [
        ("small", stage_pb2.MODEL_STATE_READY),
        ("later", stage_pb2.MODEL_STATE_UNLOADED),
    ]
    assert status.memory_budget_bytes == 7 * 1024 * 1024
    # The medium model's weights alone take 7.1 MiB.
    with pytest.raises(grpc.aio.AioRpcError, match="the budget is 7 MiB: raise memory_budget_mb") as caught:
        await stub.Load(stage_pb2.LoadRequest(model="later"), timeout=CALL_S)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_tiny_nucleus_makes_a_sampled_answer_the_greedy_one(stub: Any) -> None:
    prompt = "Tell me of Ardia."
    greedy = (await _generate(stub, prompt, max_new_tokens=30)).text
    drawn = {"max_new_tokens": 30, "temperature": 1.0}
    whole = {(await _generate(stub, prompt, **drawn, seed=seed)).text for seed in range(6)}
    nucleus = {(await _generate(stub, prompt, **drawn, top_p=1e-6, seed=seed)).text for seed in range(6)}
    assert nucleus == {greedy}
    assert len(whole) > 1


def _in_pieces(draft: common_pb2.Draft, **fields: Any) -> Iterator[stage_pb2.VerifyStreamRequest]:
    """Yield a draft as a stream in two pieces."""
    yield stage_pb2.VerifyStreamRequest(start=stage_pb2.VerifyStreamStart(**fields))
    for ids in (draft.token_ids[:3], draft.token_ids[3:]):
        chunk = stage_pb2.DraftChunk(token_ids=ids, tokenizer_fingerprint=draft.tokenizer_fingerprint)
        yield stage_pb2.VerifyStreamRequest(chunk=chunk)
    yield stage_pb2.VerifyStreamRequest(end=stage_pb2.DraftEnd(finish_reason=draft.finish_reason))


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_tolerant_stage_keeps_likely_tokens_that_an_exact_one_refuses(
    stub: Any, reference: Reference, is_stream: bool
) -> None:
    status = await stub.Status(stage_pb2.StatusRequest(), timeout=CALL_S)
    fingerprint = status.models[0].tokenizer_fingerprint
    # Accepted tokens by threshold; without one, no acceptance is sent: exact.
    accepted = {None: 0, 1.0: 0, 0.5: 0, 0.05: 0}
    outputs = reference.outputs
    for prompt, ids, own in list(zip(reference.prompts, outputs["medium"], outputs["small"], strict=True))[
        :60
    ]:
        if ids == own:
            continue
        draft = common_pb2.Draft(token_ids=ids, tokenizer_fingerprint=fingerprint, finish_reason=EOS)
        for threshold in accepted:
            fields: dict[str, Any] = {"prompt": prompt}
            if threshold is not None:
                fields["acceptance"] = common_pb2.Acceptance(mode=TOLERANT, threshold=threshold)
            if is_stream:
                call = stub.VerifyStream(_in_pieces(draft, **fields), timeout=CALL_S)
            else:
                call = stub.Verify(stage_pb2.VerifyRequest(draft=draft, **fields), timeout=CALL_S)
            responses = [response async for response in call]
            (first,) = [each.verification for each in responses if each.HasField("verification")]
            result = responses[-1].result
            kept = first.accepted_tokens
            accepted[threshold] += kept
            assert list(result.token_ids[:kept]) == ids[:kept]
            if threshold in {None, 1.0}:
                assert list(result.token_ids) == own
    assert accepted[None] == accepted[1.0] < accepted[0.5] < accepted[0.05]
