"""Drafts that vLLM verifies while it decodes: each request's own, gone with it; on the stand-in."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asd.errors import AsdError, InvalidRequest, ModelRefusal
from asd.v1 import common_pb2, stage_pb2
from asd.values import Constraint, FinishReason, Message, Sampling
from services.stage.domain import DraftPiece, TokenChunk, VerificationResult
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.conformance import PROMPTS, EngineAnswer, Suite, collect
from services.stage.engines.engine import ModelState
from services.stage.engines.scoring import AdapterEngine
from services.stage.engines.vllm import engine as vllm_engine
from services.stage.engines.vllm import proposer
from services.stage.engines.vllm.engine import VllmOptions
from tests.fakes import fake_vllm, vllm_batch
from tests.integration.stage.conftest import serving
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SMALL = Path(__file__).parents[4] / "models" / "small"
LONG = Message("user", "Tell me of " + "Ardia and of Statnor and " * 12)
MOST = Sampling(max_new_tokens=60)


async def load(**options: Any) -> Any:
    engine = vllm_engine.make_engine("small", SMALL, VllmOptions(**{"verify_inside": True, **options}))
    await engine.load()
    fake_vllm.forget_probe()
    return engine


async def ask(engine: Any, prompt: Message = LONG) -> EngineAnswer:
    return await collect(engine.generate((prompt,), MOST))


async def verify(
    engine: Any, ids: tuple[int, ...], finish: FinishReason, prompt: Message = LONG
) -> EngineAnswer:
    draft = Suite(engine).draft(ids, finish)
    return await collect(engine.verify((prompt,), MOST, draft, None), "first")


def altered(ids: tuple[int, ...], *positions: int) -> tuple[int, ...]:
    return tuple(each % 200 + 10 if index in positions else each for index, each in enumerate(ids))


def handed_over(llm: Any) -> list[dict[str, Any]]:
    """Return the drafts that requests had beside them."""
    return [params.extra_args for params in llm.asked if params.extra_args]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.FakeVllm:
    return fake_vllm.install(monkeypatch)


@pytest.mark.usefixtures("library")
async def test_a_right_draft_takes_two_steps_and_a_wrong_token_one_more() -> None:
    engine = await load()
    plain = await ask(engine)
    # Two drafts that were right, so that the average one is trusted to the end.
    for _ in range(2):
        right = await verify(engine, plain.result.ids, plain.result.finish)
    wrong = await verify(engine, altered(plain.result.ids, 20), plain.result.finish)
    assert right.result.ids == wrong.result.ids == plain.result.ids
    assert (plain.result.forward_passes, right.result.forward_passes) == (60, 2)
    assert wrong.result.forward_passes == 3
    assert right.verification is not None
    assert right.verification.accepted == 60
    # The step that reads the prompt writes a token, and has no proposal.
    assert (right.result.proposed_tokens, right.result.accepted_tokens) == (59, 59)
    assert right.result.accept_lengths == (59,)
    # 19 tokens and the right one for the wrong one; then the rest.
    assert (wrong.result.proposed_tokens, wrong.result.accepted_tokens) == (59 + 39, 19 + 39)
    assert wrong.result.accept_lengths == (20, 39)


@pytest.mark.usefixtures("library")
async def test_the_evidence_is_that_of_a_scoring_pass() -> None:
    inside, outside = await load(), await load(verify_inside=False)
    plain = await ask(outside)
    for positions in ((), (0,), (7,), (7, 9), (59,)):
        ids = altered(plain.result.ids, *positions)
        found, wanted = [await verify(each, ids, plain.result.finish) for each in (inside, outside)]
        assert found.verification is not None
        assert wanted.verification is not None
        assert found.verification.accepted == wanted.verification.accepted == min(positions, default=60)
        judged = found.verification.proposed
        # Of what follows the first correction, a step judges what it was handed.
        assert judged >= min(found.verification.accepted + 1, 60)
        assert found.verification.ranks.tolist() == wanted.verification.ranks[:judged].tolist()
        np.testing.assert_allclose(
            found.verification.target_logprobs, wanted.verification.target_logprobs[:judged], atol=1e-3
        )


@pytest.mark.usefixtures("library")
async def test_requests_with_the_same_prompt_have_drafts_of_their_own() -> None:
    engine = await load()
    plain = await ask(engine)
    places = (3, 11, 25, 40)
    found = await asyncio.gather(
        *(verify(engine, altered(plain.result.ids, place), plain.result.finish) for place in places),
        *(ask(engine) for _ in places),
    )
    assert {each.result.ids for each in found} == {plain.result.ids}
    kept = [each.verification.accepted for each in found if each.verification is not None]
    assert kept == list(places)


@pytest.mark.usefixtures("library")
async def test_a_draft_that_is_still_written_is_verified_as_it_comes() -> None:
    engine = await load()
    plain = await ask(engine)
    more = asyncio.Event()

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(plain.result.ids[:16], "", engine.status().fingerprint)
        await more.wait()
        yield DraftPiece(plain.result.ids[16:], "", engine.status().fingerprint)
        yield plain.result.finish

    events = engine.verify_stream((LONG,), MOST, pieces(), None)
    async with asyncio.timeout(CALL_S):
        seen = [await anext(events)]
        more.set()
        seen += [event async for event in events]
    assert isinstance(seen[0], TokenChunk)
    assert seen[-1].ids == plain.result.ids
    (evidence,) = [each for each in seen if isinstance(each, VerificationResult)]
    assert evidence.accepted == evidence.proposed


@pytest.mark.usefixtures("library")
async def test_a_draft_that_cannot_be_read_fails_its_request() -> None:
    engine = await load()

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece((1_000_000,), "", engine.status().fingerprint)
        yield FinishReason.EOS

    with pytest.raises(InvalidRequest):
        await collect(engine.verify_stream((LONG,), MOST, pieces(), None), "any")
    assert engine.status().running == 0


@pytest.mark.parametrize("is_left", [True, False])
async def test_a_call_leaves_nothing_in_the_workers(library: fake_vllm.FakeVllm, is_left: bool) -> None:
    engine = await load()
    plain = await ask(engine)
    draft = Suite(engine).draft(altered(plain.result.ids, 3), plain.result.finish)
    events = engine.verify((LONG,), MOST, draft, None)
    await anext(events)
    async for _ in events:
        if is_left:
            break
    await events.aclose()
    (llm,) = library.engines
    assert not llm.running
    keys = [drafted[proposer.KEY] for drafted in handed_over(llm)]
    assert len(keys) == 1
    assert (await ask(engine)).result.ids == plain.result.ids
    assert [llm.batch.worker.asd_outcome(key) for key in keys] == [([], 0, [])]


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=9, temperature=0.8, seed=5)])
@pytest.mark.usefixtures("library")
async def test_a_draw_with_its_seed_is_the_same_with_and_without_a_draft(sampling: Sampling) -> None:
    engine = await load()
    plain = await collect(engine.generate((LONG,), sampling))
    draft = Suite(engine).own_draft(plain)
    found = await collect(engine.verify((LONG,), sampling, draft, None), "first")
    assert found.result.ids == plain.result.ids


@pytest.mark.parametrize(
    ("seed", "is_free", "is_on_cpu", "is_resampled"),
    [
        (None, False, False, True),
        # A seed that nobody asked for.
        (5, True, False, True),
        (5, False, False, False),
        # There vLLM's rejection sampler is wrong.
        (None, False, True, False),
    ],
)
async def test_a_draw_without_a_seed_is_verified_inside_and_says_so(
    library: fake_vllm.FakeVllm, seed: int | None, is_free: bool, is_on_cpu: bool, is_resampled: bool
) -> None:
    library.is_on_cpu = is_on_cpu
    engine = await load()
    sampling = Sampling(max_new_tokens=20, temperature=0.8, seed=seed)
    for _ in range(4):
        plain = await collect(engine.generate((LONG,), replace(sampling, seed=None)))
        draft = Suite(engine).own_draft(plain)
        events = engine.verify((LONG,), sampling, draft, None, seed_is_free=is_free)
        found = await collect(events, "first")
        assert found.verification is not None
        assert found.verification.resampled is is_resampled
        kept = found.verification.accepted
        assert found.result.ids[:kept] == plain.result.ids[:kept]
        assert (
            found.result.ids[kept : kept + 1] != plain.result.ids[kept : kept + 1]
            or not plain.result.ids[kept:]
        )


@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.usefixtures("library")
async def test_a_stage_is_told_whether_anybody_asked_for_the_seed(is_free: bool) -> None:
    engine = vllm_engine.make_engine("small", SMALL, VllmOptions(verify_inside=True))
    sampling = common_pb2.Sampling(temperature=0.8, seed=5, max_new_tokens=20)
    draft = common_pb2.Draft(text=" Ardia", finish_reason=common_pb2.FINISH_REASON_LENGTH)
    asked = {"prompt": "Ardia", "sampling": sampling, "seed_is_free": is_free}
    steps = [
        stage_pb2.VerifyStreamRequest(start=stage_pb2.VerifyStreamStart(**asked)),
        stage_pb2.VerifyStreamRequest(chunk=stage_pb2.DraftChunk(text=draft.text)),
        stage_pb2.VerifyStreamRequest(end=stage_pb2.DraftEnd(finish_reason=draft.finish_reason)),
    ]
    async with serving({"small": engine}) as stage:
        for call in (
            stage.stub.Verify(stage_pb2.VerifyRequest(draft=draft, **asked), timeout=CALL_S),
            stage.stub.VerifyStream(iter(steps), timeout=CALL_S),
        ):
            events = [event async for event in call]
            found = [event.verification for event in events if event.HasField("verification")]
            assert [each.resampled for each in found] == [is_free]


@pytest.mark.usefixtures("library")
async def test_draws_inside_keep_to_the_nucleus() -> None:
    engine = await load()
    plain = await ask(engine)
    draft = Suite(engine).draft(altered(plain.result.ids, 5), plain.result.finish)
    # Of so small a nucleus the likeliest token is all.
    sampling = replace(MOST, temperature=2.0, top_p=0.01)
    found = await collect(engine.verify((LONG,), sampling, draft, None), "first")
    assert found.verification is not None
    assert found.verification.resampled
    assert found.result.ids == plain.result.ids


@pytest.mark.parametrize("is_adapter", [True, False])
async def test_tolerance_and_adapters_take_requests_of_their_own(
    library: fake_vllm.FakeVllm, tmp_path: Path, is_adapter: bool
) -> None:
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = await load(lora={"math": tmp_path})
    engine = AdapterEngine(base, "math") if is_adapter else base
    assert engine.status().verifies_inside is not is_adapter
    for sampling in (MOST, replace(MOST, temperature=0.9, seed=5)):
        plain = await collect(engine.generate((LONG,), sampling))
        draft = Suite(engine).draft(altered(plain.result.ids, 5), plain.result.finish)
        threshold = None if is_adapter else 0.3
        answers = [
            await collect(engine.verify((LONG,), sampling, draft, threshold, seed_is_free=is_free), "first")
            for is_free in (True, False)
        ]
        # Such draws keep their seed, also one that nobody asked for: the drafter drew with it.
        assert answers[0].result.ids == answers[1].result.ids
        if is_adapter:
            assert answers[0].result.ids == plain.result.ids
    assert not handed_over(library.engines[0])


async def test_a_seeded_draw_beside_a_request_near_the_context_is_as_alone(
    library: fake_vllm.FakeVllm,
) -> None:
    engine = await load(max_model_len=160)
    (llm,) = library.engines
    drawn = Sampling(max_new_tokens=60, temperature=0.9, seed=5)
    short = Message("user", "Ardia")
    alone = await collect(engine.generate((short,), drawn))
    near = Sampling(max_new_tokens=160)
    whole = await collect(engine.generate((LONG,), near))
    assert whole.result.prompt_tokens + len(whole.result.ids) == llm.context
    last = len(whole.result.ids) - 3
    draft = Suite(engine).draft(altered(whole.result.ids, last), whole.result.finish)
    beside, again, verified = await asyncio.gather(
        collect(engine.generate((short,), drawn)),
        collect(engine.generate((LONG,), near)),
        collect(engine.verify((LONG,), near, draft, None), "first"),
    )
    assert beside.result.ids == alone.result.ids
    assert again.result.ids == verified.result.ids == whole.result.ids
    assert verified.verification is not None
    assert verified.verification.accepted == last
    # The draft is followed to its last token: two of three are proposed again.
    assert verified.result.accepted_tokens >= last - 1


@pytest.mark.parametrize("wrong", [5, 40, 59])
@pytest.mark.usefixtures("library")
async def test_counts_are_the_same_whatever_runs_beside(wrong: int) -> None:
    engine = await load(proposed_tokens=16)
    plain = await ask(engine)
    draft = altered(plain.result.ids, wrong)

    def counts(answer: EngineAnswer) -> tuple[Any, ...]:
        result = answer.result
        return result.accepted_tokens, sum(result.accept_lengths), result.forward_passes

    # So that the average draft is the same for both.
    for _ in range(20):
        alone = await verify(engine, draft, plain.result.finish)
    beside, *_ = await asyncio.gather(
        verify(engine, draft, plain.result.finish),
        *(ask(engine, Message("user", "Statnor " * size)) for size in (1, 9, 40)),
    )
    assert counts(beside) == counts(alone)
    passes = alone.result.forward_passes
    assert alone.result.accept_lengths
    # A step for the prompt, and a token more for each step than it had accepted; the last may be cut off.
    assert 60 <= alone.result.accepted_tokens + passes <= 61
    assert sum(alone.result.accept_lengths) == 59


async def test_steps_of_few_tokens_change_no_answer_and_no_evidence(library: fake_vllm.FakeVllm) -> None:
    engine, outside = await load(max_batched_tokens=24), await load(verify_inside=False)
    prompts = [Message("user", "Ardia and Statnor " * size) for size in (2, 7, 12, 20)]
    plain = [await ask(outside, prompt) for prompt in prompts]
    drafts = [altered(answer.result.ids, 8, 30) for answer in plain]
    asked = list(zip(drafts, plain, prompts, strict=True))
    wanted = [await verify(outside, ids, answer.result.finish, prompt) for ids, answer, prompt in asked]
    # Prompts longer than a step, and more proposed than fits into one.
    assert max(size for size, _ in library.engines[1].prompts) > 24
    for _ in range(3):
        found = await asyncio.gather(
            *(verify(engine, ids, answer.result.finish, prompt) for ids, answer, prompt in asked)
        )
        for own, other, answer in zip(found, wanted, plain, strict=True):
            assert own.result.ids == answer.result.ids
            assert own.verification is not None
            assert other.verification is not None
            accepted = own.verification.accepted
            assert accepted == other.verification.accepted
            assert list(own.verification.ranks[: accepted + 1]) == list(
                other.verification.ranks[: accepted + 1]
            )
            tokens = len(answer.result.ids) + (answer.result.finish is FinishReason.EOS)
            assert 0 <= own.result.accepted_tokens + own.result.forward_passes - tokens <= 1


async def test_without_resync_nothing_is_proposed_after_a_wrong_token(
    library: fake_vllm.FakeVllm,
) -> None:
    engine = await load(resync=False)
    plain = await ask(engine)
    draft = altered(plain.result.ids, 20)
    found = await verify(engine, draft, plain.result.finish)
    assert (found.result.accept_lengths, found.result.forward_passes) == ((20,), 41)

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(draft[:30], "", engine.status().fingerprint)
        await asyncio.sleep(0)
        yield DraftPiece(draft[30:], "", engine.status().fingerprint)
        yield plain.result.finish

    library.engines[0].asked.clear()
    streamed = await collect(engine.verify_stream((LONG,), MOST, pieces(), None), "any")
    assert streamed.result.ids == plain.result.ids
    assert not handed_over(library.engines[0])


async def test_where_nothing_is_left_of_a_draft_none_is_handed_over(library: fake_vllm.FakeVllm) -> None:
    engine = await load()
    plain = await ask(engine)
    draft = altered(plain.result.ids[:40], 39)

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(draft[:20], "", engine.status().fingerprint)
        await asyncio.sleep(0)
        yield DraftPiece(draft[20:], "", engine.status().fingerprint)
        yield FinishReason.LENGTH

    found = await collect(engine.verify_stream((LONG,), MOST, pieces(), None), "any")
    assert found.result.ids == plain.result.ids
    assert not handed_over(library.engines[0])


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
async def test_a_draft_takes_a_slot_when_enough_of_it_has_come(
    library: fake_vllm.FakeVllm, temperature: float
) -> None:
    engine = await load()
    plain = await ask(engine)
    library.engines[0].asked.clear()
    has_begun, more = asyncio.Event(), asyncio.Event()

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(plain.result.ids[:4], "", engine.status().fingerprint)
        has_begun.set()
        await more.wait()
        yield DraftPiece(plain.result.ids[4:], "", engine.status().fingerprint)
        yield plain.result.finish

    events = engine.verify_stream((LONG,), replace(MOST, temperature=temperature), pieces(), None)
    answer = asyncio.create_task(collect(events, "any"))
    async with asyncio.timeout(CALL_S):
        await has_begun.wait()
        # Another request, from its start to its end.
        await ask(engine)
        assert engine.status().running == 0
        assert len(library.engines[0].asked) == 1
        more.set()
        assert (await answer).result.ids == plain.result.ids


def test_what_vllm_is_asked_for_is_what_a_proposer_needs() -> None:
    def arguments(*, inside: bool) -> dict[str, Any]:
        options = VllmOptions(verify_inside=inside, max_batch=7, proposed_tokens=9)
        return vllm_engine.VllmBackend("small", SMALL, read_checkpoint(SMALL), options).arguments()

    module = "services.stage.engines.vllm.proposer"
    plain, inside = arguments(inside=False), arguments(inside=True)
    assert {name: value for name, value in inside.items() if name not in plain} == {
        "speculative_config": {
            "method": "custom_class",
            "model": f"{module}.DraftProposer",
            "num_speculative_tokens": 9,
            "num_speculative_tokens_per_batch_size": [(1, 7, 9)],
        },
        "worker_extension_cls": f"{module}.WorkerExtension",
        "async_scheduling": False,
        "compilation_config": {"cudagraph_mode": "PIECEWISE"},
    }
    # vLLM refuses a logits processor beside a proposer, so the workers take it by themselves.
    assert plain.pop("logits_processors") == [f"{module.rpartition('.')[0]}.constraint:ConstraintProcessor"]
    assert inside | plain == inside


@pytest.mark.usefixtures("library")
async def test_what_the_runner_lacks_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(vllm_batch.RejectionSampler, "_get_logprobs_tensors")
    with caplog.at_level(logging.WARNING):
        await load()
    assert "_get_logprobs_tensors" in caplog.text


@pytest.mark.parametrize("is_asked", [True, False])
async def test_where_vllm_takes_no_proposer_drafts_are_scored_by_requests(
    monkeypatch: pytest.MonkeyPatch,
    library: fake_vllm.FakeVllm,
    caplog: pytest.LogCaptureFixture,
    is_asked: bool,
) -> None:
    if is_asked:
        # The user's environment names the runner that takes none.
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    else:
        monkeypatch.delitem(sys.modules, "vllm.v1.spec_decode.custom_class_proposer")
    with caplog.at_level(logging.WARNING):
        engine = await load()
    assert "takes no proposer" in caplog.text
    plain = await ask(engine)
    found = await verify(engine, plain.result.ids, plain.result.finish)
    assert found.result.ids == plain.result.ids
    assert library.engines[0].batch is None
    # That runner takes no logits processor either, and without one nothing keeps a constraint.
    constrained = replace(MOST, constraint=Constraint(choice=("yes", "no")))
    events = engine.generate((LONG,), constrained)
    if is_asked:
        assert not engine.status().constrains
        with pytest.raises(ModelRefusal):
            await collect(events)
    else:
        assert (await collect(events)).result.text in {"yes", "no"}


async def test_a_dead_engine_ends_a_verification_as_any_call(library: fake_vllm.FakeVllm) -> None:
    engine = await load()
    plain = await ask(engine)
    draft = Suite(engine).draft(altered(plain.result.ids, 30), plain.result.finish)
    events = engine.verify((Message("user", PROMPTS[0]),), MOST, draft, None)
    library.engines[0].is_dead = True
    with pytest.raises(AsdError):
        await anext(events)
    assert engine.status().state is ModelState.FAILED


@pytest.mark.usefixtures("library")
# Where the draft is ahead of the answer, where it comes too late, and in the rest.
@pytest.mark.parametrize("wrong", [2, 18, 40])
async def test_a_draft_that_comes_late_is_scored_at_its_own_tokens(wrong: int) -> None:
    inside, outside = await load(), await load(verify_inside=False)
    plain = await ask(outside)
    ids = altered(plain.result.ids, wrong)
    wanted = await verify(outside, ids, plain.result.finish)
    is_written = asyncio.Event()

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(ids[:16], "", inside.status().fingerprint)
        # The answer is ahead: nothing more of the draft is there before some of it is written.
        await is_written.wait()
        yield DraftPiece(ids[16:], "", inside.status().fingerprint)
        yield plain.result.finish

    # So cold that the likeliest token is drawn. A draw goes on without what has not come of its draft.
    events = inside.verify_stream((LONG,), replace(MOST, temperature=1e-4), pieces(), None)
    seen = []
    async with asyncio.timeout(CALL_S):
        async for event in events:
            seen.append(event)
            if sum(len(each.ids) for each in seen if isinstance(each, TokenChunk)) >= 24:
                is_written.set()
    assert seen[-1].ids == plain.result.ids
    (evidence,) = [each for each in seen if isinstance(each, VerificationResult)]
    assert wanted.verification is not None
    assert evidence.accepted == wanted.verification.accepted == wrong
    exact, found = wanted.verification.ranks[wrong], evidence.ranks[wrong]
    # Of a token that no step kept, a bound.
    assert found in {exact, min(exact, VllmOptions().top_logprobs) if wrong == 18 else exact}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("wrong", [(), (2,), (20,), (20, 30), (3, 40)])
async def test_after_a_correction_the_rest_of_a_draft_is_verified_inside_as_it_comes(
    wrong: tuple[int, ...],
) -> None:
    inside, outside = await load(), await load(verify_inside=False)
    plain = await ask(outside)
    ids = plain.result.ids
    for each in wrong:
        ids = altered(ids, each)

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        for start in range(0, len(ids), 7):
            yield DraftPiece(tuple(ids[start : start + 7]), "", inside.status().fingerprint)
            await asyncio.sleep(0)
        yield plain.result.finish

    found = await collect(inside.verify_stream((LONG,), MOST, pieces(), None), "any")
    whole = await verify(outside, ids, plain.result.finish)
    assert found.result.ids == plain.result.ids
    assert found.verification is not None
    assert whole.verification is not None
    accepted = found.verification.accepted
    assert accepted == whole.verification.accepted
    assert list(found.verification.ranks[: accepted + 1]) == list(whole.verification.ranks[: accepted + 1])
    # A pass for every token that differs, and for every 16 that come.
    assert found.result.forward_passes <= len(ids) // 16 + 3 * len(wrong) + 3
    assert found.result.accepted_tokens <= found.result.proposed_tokens
    if accepted >= 20:
        # Each step writes a token more than it had accepted; the passes that scored the draft come on top.
        assert found.result.forward_passes + found.result.accepted_tokens > len(ids)
    # The step that reads the prompt again writes a token, and has no proposal.
    assert sum(found.result.accept_lengths) <= len(ids) - bool(wrong)
