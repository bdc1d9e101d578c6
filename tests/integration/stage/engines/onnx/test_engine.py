"""The onnx engine against transformers' recorded output: alone, batched, verified, cached and cancelled."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asd.errors import InvalidRequest, ResourceExhausted
from asd.values import FinishReason, Message, Sampling
from services.stage.domain import DraftPiece, DraftText, Result, TokenChunk, VerificationResult
from services.stage.model_pool import ModelPool
from tests.integration.stage.conftest import LiveGenerators, Reference, engine
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.stage.engines.onnx.engine import OnnxEngine

_GREEDY = Sampling()


@pytest.fixture
async def small() -> AsyncIterator[OnnxEngine]:
    model = engine("small")
    await model.load()
    yield model
    await model.unload()


async def _generate(
    model: OnnxEngine, prompt: str | tuple[Message, ...], sampling: Sampling = _GREEDY
) -> tuple[Result, list[TokenChunk]]:
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    events = [event async for event in model.generate(turns, sampling)]
    chunks = [event for event in events if isinstance(event, TokenChunk)]
    result = events[-1]
    assert isinstance(result, Result)
    assert tuple(i for chunk in chunks for i in chunk.ids) == result.ids
    assert "".join(chunk.text for chunk in chunks) == result.text
    return result, chunks


async def _verify(
    model: OnnxEngine, prompt: str, draft: DraftText, threshold: float | None = None, most: int | None = None
) -> tuple[Result, VerificationResult]:
    sampling = Sampling(max_new_tokens=most)
    events = [event async for event in model.verify((Message("user", prompt),), sampling, draft, threshold)]
    first, result = events[0], events[-1]
    assert isinstance(first, VerificationResult)
    assert isinstance(result, Result)
    return result, first


def _draft(model: OnnxEngine, ids: list[int], finish: FinishReason = FinishReason.EOS) -> DraftText:
    return DraftText("", tuple(ids), model.status().fingerprint, finish)


async def _all(tasks: list[object], at_a_time: int = 16) -> list[object]:
    gate = asyncio.Semaphore(at_a_time)

    async def run(task: object) -> object:
        async with gate:
            return await task  # type: ignore[misc]

    return await asyncio.gather(*map(run, tasks))


@pytest.mark.parametrize(("name", "count"), [("small", 500), ("medium", 500), ("large", 150)])
async def test_greedy_output_equals_that_of_transformers(name: str, count: int, reference: Reference) -> None:
    model = engine(name, threads=2)
    await model.load()
    results = await _all([_generate(model, prompt) for prompt in reference.prompts[:count]])
    outputs = [list(result.ids) for result, _ in results]  # type: ignore[misc]
    await model.unload()
    assert len(outputs) == count
    assert outputs == reference.outputs[name][:count]


async def test_batched_tokens_carry_the_signals_that_they_have_alone(
    small: OnnxEngine, reference: Reference
) -> None:
    prompts = reference.prompts[:24]
    together = await asyncio.gather(*(_generate(small, prompt) for prompt in prompts))
    for prompt, (_, chunks) in zip(prompts, together, strict=True):
        _, alone = await _generate(small, prompt)
        for column in ("logprobs", "entropies", "margins"):
            batched, single = (np.concatenate([getattr(c, column) for c in cs]) for cs in (chunks, alone))
            # float32 sums in another order differ by about 1e-6.
            np.testing.assert_allclose(batched, single, atol=2e-4)


@pytest.mark.parametrize(
    ("draft_model", "target"), [("small", "medium"), ("small", "large"), ("medium", "large")]
)
@pytest.mark.parametrize("resync", [False, True])
async def test_verified_drafts_give_what_the_target_writes_alone(
    draft_model: str, target: str, resync: bool, reference: Reference
) -> None:
    model = engine(target, threads=2, resync=resync)
    await model.load()
    prompts = reference.prompts[:60]
    saved = 0
    for prompt, ids, wanted in zip(
        prompts, reference.outputs[draft_model], reference.outputs[target], strict=False
    ):
        result, first = await _verify(model, prompt, _draft(model, ids))
        assert list(result.ids) == wanted
        common = next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), None)
        if common is None:
            common = min(len(ids), len(wanted)) + (ids == wanted)
        assert first.accepted == common
        # One pass for the draft, then one for each token after the correction, the end mark included.
        is_whole = common == len(ids) + 1
        passes = 1 + (0 if is_whole else len(wanted) + 1 - common - 1)
        assert result.forward_passes <= passes if resync else result.forward_passes == passes
        saved += passes - result.forward_passes
    assert (saved > 20) is resync
    await model.unload()


async def test_a_draft_is_verified_while_it_is_written(reference: Reference) -> None:
    target = engine("medium")
    await target.load()
    fingerprint = target.status().fingerprint
    for index in range(40):
        prompt, ids = reference.prompts[index], reference.outputs["small"][index]

        async def pieces(ids: list[int] = ids) -> AsyncIterator[DraftPiece | FinishReason]:
            for start in range(0, len(ids), 5):
                yield DraftPiece(tuple(ids[start : start + 5]), "", fingerprint)
                await asyncio.sleep(0)
            yield FinishReason.EOS

        call = target.verify_stream((Message("user", prompt),), _GREEDY, pieces(), None)
        events = [event async for event in call]
        assert isinstance(events[-1], Result)
        assert list(events[-1].ids) == reference.outputs["medium"][index]
        assert sum(isinstance(event, VerificationResult) for event in events) == 1
    assert target.status().running == 0
    await target.unload()


async def test_a_wrong_id_in_a_draft_that_comes_ends_the_call(small: OnnxEngine) -> None:
    fingerprint = small.status().fingerprint

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece((9999,), "", fingerprint)

    with pytest.raises(InvalidRequest) as caught:
        async for _ in small.verify_stream((Message("user", "x"),), _GREEDY, pieces(), None):
            pass
    assert caught.value.field == "chunk.token_ids"
    result, _ = await _generate(small, "True or false? 3 plus 22 is more than 24.")
    assert result.ids


async def test_a_sampled_draft_is_kept_where_the_target_draws_the_same(
    small: OnnxEngine, reference: Reference
) -> None:
    sampling = Sampling(temperature=0.7, seed=11)
    target = engine("medium")
    await target.load()
    kept = 0
    for prompt in reference.prompts[:20]:
        draft, _ = await _generate(small, prompt, sampling)
        alone, _ = await _generate(target, prompt, sampling)
        call = target.verify((Message("user", prompt),), sampling, _draft(target, list(draft.ids)), None)
        events = [event async for event in call]
        result = events[-1]
        assert isinstance(result, Result)
        assert result.ids == alone.ids
        kept += result.accepted_tokens
    # Shared noise: without it, 20 sampled answers would share their first tokens at most.
    assert kept > 200
    await target.unload()


async def test_random_drafts_change_no_token(small: OnnxEngine, reference: Reference) -> None:
    rng = random.Random(7)
    for prompt, wanted in list(zip(reference.prompts, reference.outputs["small"], strict=True))[:40]:
        ids = [rng.randrange(5, 512) if rng.random() < 0.1 else token for token in wanted]
        ids = ids[: rng.randint(0, len(ids))] + [rng.randrange(5, 512) for _ in range(rng.randint(0, 5))]
        finish = rng.choice(list(FinishReason))
        result, first = await _verify(small, prompt, _draft(small, ids, finish))
        assert list(result.ids) == wanted
        assert 0 <= first.accepted <= first.proposed == len(first.ranks)


async def test_a_verified_answer_is_as_long_as_a_generated_one(
    small: OnnxEngine, reference: Reference
) -> None:
    prompt, wanted = reference.prompts[4], reference.outputs["small"][4]
    for most in (1, 3, len(wanted), len(wanted) + 1):
        alone, _ = await _generate(small, prompt, Sampling(max_new_tokens=most))
        checked, _ = await _verify(small, prompt, _draft(small, wanted), most=most)
        assert (checked.ids, checked.finish) == (alone.ids, alone.finish)


async def test_tolerant_verification_keeps_tokens_that_exact_refuses(
    small: OnnxEngine, reference: Reference
) -> None:
    accepted = {None: 0, 0.05: 0}
    for prompt, ids in list(zip(reference.prompts, reference.outputs["medium"], strict=True))[:60]:
        for threshold in accepted:
            _, first = await _verify(small, prompt, _draft(small, ids), threshold)
            accepted[threshold] += first.accepted
    assert accepted[0.05] > accepted[None]


async def test_text_of_another_tokenizer_is_encoded_anew(small: OnnxEngine, reference: Reference) -> None:
    result, _ = await _generate(small, reference.prompts[2])
    draft = DraftText(result.text, (9, 9, 9), "0" * 64, FinishReason.EOS)
    checked, first = await _verify(small, reference.prompts[2], draft)
    assert not first.ids_used
    assert checked.ids == result.ids
    assert first.accepted == first.proposed


async def test_a_longer_conversation_reuses_its_prefix_and_changes_no_token(
    small: OnnxEngine, reference: Reference
) -> None:
    for index in (0, 5, 20):
        question = Message("user", reference.prompts[index])
        first, _ = await _generate(small, (question,))
        turns = (question, Message("assistant", first.text), Message("user", reference.prompts[index + 1]))
        again, _ = await _generate(small, turns)
        assert again.cached_prompt_tokens >= first.prompt_tokens
        fresh = engine("small", cached_sequences=0)
        await fresh.load()
        alone, _ = await _generate(fresh, turns)
        await fresh.unload()
        assert alone.cached_prompt_tokens == 0
        assert again.ids == alone.ids


async def test_prefill_warms_the_prompt(small: OnnxEngine, reference: Reference) -> None:
    prompt = reference.prompts[33]
    warmed = await small.prefill((Message("user", prompt),))
    result, _ = await _generate(small, prompt)
    assert warmed.cached_prompt_tokens == 0
    assert result.cached_prompt_tokens == warmed.prompt_tokens - 1
    assert list(result.ids) == reference.outputs["small"][33]


async def test_sampling_repeats_with_its_seed(small: OnnxEngine) -> None:
    options = [Sampling(temperature=1.0, seed=seed, max_new_tokens=30) for seed in (1, 1, 2)]
    texts = [(await _generate(small, "Tell me of Ardia.", option))[0].text for option in options]
    assert texts[0] == texts[1] != texts[2]


async def test_a_stop_sequence_ends_the_answer_before_itself(small: OnnxEngine, reference: Reference) -> None:
    whole, _ = await _generate(small, reference.prompts[0])
    cut, _ = await _generate(small, reference.prompts[0], Sampling(stop=("Answer",)))
    assert cut.finish is FinishReason.STOP
    assert cut.text == whole.text[: whole.text.index("Answer")]


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(small: OnnxEngine) -> None:
    with pytest.raises(InvalidRequest, match=r"\d+ tokens; small .* 511") as caught:
        await _generate(small, "word " * 800)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("draft", "field"),
    [
        (DraftText("", (9999,), "own", FinishReason.EOS), "draft.token_ids"),
        (DraftText("", (9,), "f" * 64, FinishReason.EOS), "draft.tokenizer_fingerprint"),
    ],
)
async def test_drafts_that_cannot_be_used_are_refused(
    small: OnnxEngine, draft: DraftText, field: str
) -> None:
    fingerprint = small.status().fingerprint if draft.fingerprint == "own" else draft.fingerprint
    with pytest.raises(InvalidRequest) as caught:
        await _verify(small, "x", DraftText(draft.text, draft.ids, fingerprint, draft.finish))
    assert caught.value.field == field


@pytest.mark.parametrize("at", [0, 3, None])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_draft_that_writes_on_past_the_targets_end_changes_nothing(
    small: OnnxEngine, reference: Reference, at: int | None, seed: int | None, streamed: bool
) -> None:
    """As a drafter with the same tokenizer and another end token does. at: where; None: behind the answer."""
    fingerprint = small.status().fingerprint
    sampling = _GREEDY if seed is None else Sampling(temperature=1.0, seed=seed)
    for prompt in reference.prompts[:8]:
        plain, _ = await _generate(small, prompt, sampling)
        ids = (*plain.ids[:at], 1, *plain.ids[:5])

        async def pieces(ids: tuple[int, ...] = ids) -> AsyncIterator[DraftPiece | FinishReason]:
            for start in range(0, len(ids), 4):
                yield DraftPiece(ids[start : start + 4], "", fingerprint)
                await asyncio.sleep(0)
            yield FinishReason.EOS

        turns = (Message("user", prompt),)
        call = (
            small.verify_stream(turns, sampling, pieces(), None)
            if streamed
            else small.verify(turns, sampling, DraftText("", ids, fingerprint, FinishReason.EOS), None)
        )
        events = [event async for event in call]
        result, kept = events[-1], len(plain.ids[:at])
        assert isinstance(result, Result)
        assert (result.ids, result.finish) == (plain.ids, plain.finish)
        (verification,) = [event for event in events if isinstance(event, VerificationResult)]
        assert (verification.proposed, verification.accepted) == (kept, kept)


@pytest.mark.parametrize("cached", [4, 0])
async def test_a_thousand_random_cancels_leave_no_computation_and_no_cache(
    cached: int, reference: Reference, generators: LiveGenerators
) -> None:
    model = engine("small", max_queue=64, cached_sequences=cached)
    await model.load()
    fingerprint = model.status().fingerprint
    rng = random.Random(3)

    async def pieces(ids: list[int]) -> AsyncIterator[DraftPiece | FinishReason]:
        for start in range(0, len(ids), 6):
            yield DraftPiece(tuple(ids[start : start + 6]), "", fingerprint)
            await asyncio.sleep(0)
        if rng.random() < 0.5:
            # The drafter is abandoned as well: the end never comes.
            await asyncio.Event().wait()
        yield FinishReason.EOS

    async def start_and_leave(index: int) -> None:
        turns = (Message("user", reference.prompts[index]),)
        draft = reference.outputs["medium"][index]
        calls = (
            lambda: model.generate(turns, _GREEDY),
            lambda: model.generate(turns, Sampling(temperature=0.7, seed=index)),
            lambda: model.verify(turns, _GREEDY, _draft(model, draft), None),
            lambda: model.verify_stream(turns, _GREEDY, pieces(draft), None),
            lambda: model.verify_stream(turns, _GREEDY, pieces(draft), 0.1),
        )
        events = rng.choice(calls)()
        for _ in range(rng.randint(0, 3)):
            step = asyncio.ensure_future(anext(events, None))
            for _ in range(rng.choice((0, 20, 2000))):
                if step.done():
                    break
                await asyncio.sleep(0)
            if not step.done():
                # In the middle of a pass, or while it waits for a draft that never comes.
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)
                break
            if step.result() is None or rng.random() < 0.3:
                break
        await events.aclose()

    async with asyncio.timeout(CALL_S):
        for _ in range(100):
            await asyncio.gather(*(start_and_leave(rng.randrange(500)) for _ in range(10)))
        # A last call is served after all others have left.
        result, _ = await _generate(model, reference.prompts[0])
    assert list(result.ids) == reference.outputs["small"][0]
    status = model.status()
    assert (status.running, status.queued, status.kv_cache_bytes) == (0, 0, 0)
    assert status.cancelled > 100
    assert status.cached_sequences <= cached
    assert generators.made > 100
    await generators.sink_to(cached)
    await model.unload()
    await generators.sink_to(0)


async def test_models_that_make_room_for_each_other_lose_no_call(reference: Reference) -> None:
    engines = {name: engine(name) for name in ("small", "medium")}
    pool = ModelPool(engines, "small", max(each.status().memory_bytes for each in engines.values()))  # type: ignore[arg-type]

    async def ask(name: str, index: int) -> list[int] | None:
        try:
            async with pool.use(name) as (_, model):
                result, _ = await _generate(model, reference.prompts[index])  # type: ignore[arg-type]
        except ResourceExhausted:
            return None
        return list(result.ids)

    async with asyncio.timeout(CALL_S):
        for index in range(20):
            names = ["small", "medium", "small"]
            answers = await asyncio.gather(*(ask(name, index) for name in names))
            for name, answer in zip(names, answers, strict=True):
                assert answer in (None, reference.outputs[name][index])
            assert any(answers)
    for model in engines.values():
        await model.unload()
