"""What the GPU engines ask of their libraries, and what they make of their answers; stand-ins throughout."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, ModelRefusal, PreconditionFailed, QueueFull, ResourceExhausted
from asd.values import FinishReason, Message, Sampling
from services.stage.domain import DraftPiece
from services.stage.engines import check
from services.stage.engines import scoring as scoring_engine
from services.stage.engines.check import main as check_main
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.conformance import CHECKS, PROMPTS, EngineAnswer, Suite, collect
from services.stage.engines.engine import ModelState
from services.stage.engines.factory import make_engines
from services.stage.engines.tensorrt_llm import engine as tensorrt_llm_engine
from services.stage.engines.tensorrt_llm.engine import TensorrtLlmOptions
from services.stage.engines.vllm import engine as vllm_engine
from services.stage.engines.vllm.engine import VllmOptions
from services.stage.generation import call
from services.stage.settings import ModelSettings
from tests.fakes import fake_tensorrt_llm, fake_vllm
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MODELS = Path(__file__).parents[4] / "models"
SMALL = MODELS / "small"
LONG = Message("user", "Tell me of " + "Ardia and of Statnor and " * 12)


async def _vllm(**options: Any) -> Any:
    engine = vllm_engine.make_engine("small", SMALL, VllmOptions(**options))
    await engine.load()
    fake_vllm.forget_probe()
    return engine


async def _tensorrt_llm(**options: Any) -> Any:
    engine = tensorrt_llm_engine.make_engine("small", SMALL, TensorrtLlmOptions(**options))
    await engine.load()
    fake_tensorrt_llm.forget_probe()
    return engine


async def _ask(engine: Any, *turns: Message, **sampling: Any) -> EngineAnswer:
    return await collect(engine.generate(turns, Sampling(**{"max_new_tokens": 24, **sampling})))


async def _verify(engine: Any, answer: EngineAnswer, *turns: Message) -> EngineAnswer:
    draft = Suite(engine).own_draft(answer)
    return await collect(engine.verify(turns, Sampling(max_new_tokens=24), draft, None), "first")


# The calls are the library's.


def test_the_vllm_stand_in_has_the_signatures_of_the_wheel() -> None:
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
    }
    methods = fake_vllm.SIGNATURES["AsyncLLM"]["methods"]
    for name, wanted in methods.items():
        found = {
            each.name: kinds[each.kind] + "?" * (each.default is not inspect.Parameter.empty)
            for each in inspect.signature(getattr(fake_vllm.AsyncLLM, name)).parameters.values()
            if each.name != "self"
        }
        assert found == wanted, name
    assert [each.name for each in fake_vllm.RequestOutputKind] == fake_vllm.SIGNATURES["RequestOutputKind"][
        "fields"
    ]
    for name in ("LoRARequest", "Logprob", "CompletionOutput"):
        fields = inspect.signature(getattr(fake_vllm, name)).parameters
        assert set(fields) <= set(fake_vllm.SIGNATURES[name]["fields"]), name


def test_every_argument_of_vllms_engine_exists() -> None:
    options = VllmOptions(
        quantization="fp8",
        max_model_len=256,
        max_batched_tokens=2048,
        kv_cache_gib=2,
        cuda_graph_tokens=512,
        sleep_level=1,
        lora={"math": SMALL},
    )
    arguments = vllm_engine.VllmBackend("small", SMALL, read_checkpoint(SMALL), options).arguments()
    known = {
        *fake_vllm.SIGNATURES["EngineArgs"]["fields"],
        *fake_vllm.SIGNATURES["AsyncEngineArgs"]["fields"],
    }
    assert set(arguments) <= known
    assert arguments["kv_cache_memory_bytes"] == 2 * 1024**3
    assert arguments["max_num_batched_tokens"] == 2048
    assert arguments["max_cudagraph_capture_size"] == 512
    assert (arguments["enable_sleep_mode"], arguments["max_loras"]) == (True, 1)


@pytest.mark.parametrize("line", ["1.2", "1.3"])
async def test_every_call_to_tensorrt_llm_exists_in_both_lines(
    monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """The stand-in refuses any name that the line's signatures lack, and a positional argument."""
    library = fake_tensorrt_llm.install(monkeypatch, line)
    engine = await _tensorrt_llm(prefix_caching=True, kv_cache_dtype="fp8")
    answer = await _ask(engine, LONG)
    await _verify(engine, answer, LONG)
    await _ask(engine, LONG, temperature=0.5, top_p=0.9, seed=3)
    (llm,) = library.engines
    assert [each["streaming"] for each in llm.requests] == [True, False, True]
    with pytest.raises(TypeError, match="priority") if line == "1.2" else pytest.raises(KeyError):
        llm.generate_async(priority=1)


# TensorRT-LLM's traps.


async def test_rows_of_a_prompt_are_those_of_the_token_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry i of the list scores token i + 1: with the index as it is elsewhere, an own answer is refused."""
    fake_tensorrt_llm.install(monkeypatch)
    engine = await _tensorrt_llm()
    answer = await _ask(engine, LONG)
    evidence = (await _verify(engine, answer, LONG)).verification
    assert evidence is not None
    assert evidence.accepted == evidence.proposed > 10
    assert not evidence.ranks.any()


async def test_rows_that_block_reuse_took_fail_the_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = fake_tensorrt_llm.install(monkeypatch)
    engine = await _tensorrt_llm(prefix_caching=True)
    answer = await _ask(engine, LONG)
    accepted = (await _verify(engine, answer, LONG)).verification
    assert accepted is not None
    assert accepted.accepted == accepted.proposed
    # Without a salt of its own the pass would find the prompt's blocks.
    monkeypatch.setattr(tensorrt_llm_engine.secrets, "token_hex", lambda _: None)
    with pytest.raises(AsdError, match="failed on"):
        await _verify(engine, answer, LONG)
    assert library.engines[0].blocks
    assert "rows for" in caplog.text
    assert "reused is missing" in caplog.text


async def test_a_scoring_pass_asks_for_one_token_and_no_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_tensorrt_llm.install(monkeypatch)
    engine = await _tensorrt_llm(prefix_caching=True)
    answer = await _ask(engine, LONG)
    await _verify(engine, answer, LONG)
    generate, score = library.engines[0].requests[:2]
    assert "cache_salt" not in generate
    assert score["cache_salt"]
    assert score["sampling_params"].max_tokens == 1
    assert score["sampling_params"].ignore_eos
    assert generate["sampling_params"] is not score["sampling_params"]
    with pytest.raises(ValueError, match="must be > 0"):
        library.engines[0].generate_async(
            inputs={"prompt_token_ids": [5]},
            sampling_params=fake_tensorrt_llm.SamplingParams(end_id=1, max_tokens=0),
        )


async def test_block_reuse_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_tensorrt_llm.install(monkeypatch)
    await _tensorrt_llm()
    assert not library.engines[0].reuses


# Cancelling.


@pytest.mark.parametrize("kind", ["vllm", "tensorrt_llm"])
async def test_a_call_that_is_left_is_aborted_in_the_library(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    library: Any
    if kind == "vllm":
        library, engine = fake_vllm.install(monkeypatch), await _vllm()
    else:
        library, engine = fake_tensorrt_llm.install(monkeypatch), await _tensorrt_llm()
    llm = library.engines[0]
    events = engine.generate((LONG,), Sampling(max_new_tokens=200))
    await anext(events)
    assert len(llm.running) == 1
    await events.aclose()
    async with asyncio.timeout(CALL_S):
        while llm.running:  # noqa: ASYNC110 - the stand-in has no event
            await asyncio.sleep(0)
    assert (len(llm.aborted) if kind == "vllm" else llm.aborted) == 1
    assert engine.status().cancelled == 1
    assert (await _ask(engine, LONG)).result.ids


# vLLM's cache, sleep, adapters and death.


@pytest.mark.parametrize("runner", [1, 2])
async def test_cached_scoring_reads_the_prompt_and_computes_the_draft(
    monkeypatch: pytest.MonkeyPatch, runner: int
) -> None:
    library = fake_vllm.install(monkeypatch, runner)
    engine = await _vllm(cached_scoring=True, resync=False)
    answer = await _ask(engine, LONG)
    prompt = answer.result.prompt_tokens
    first = await _verify(engine, answer, LONG)
    # The answer's own blocks were in the cache: the first try found them, and the pass was done without.
    assert first.verification is not None
    assert first.verification.accepted == first.verification.proposed
    passes = library.engines[0].prompts[1:]
    assert [cached > 0 for _, cached in passes[:2]] == [True, False]
    other = await _ask(engine, Message("user", PROMPTS[1]))
    again = await _verify(engine, other, LONG)
    assert again.result.ids == answer.result.ids
    assert prompt - 2 * fake_vllm.BLOCK < again.result.cached_prompt_tokens < prompt
    plain = await _vllm(cached_scoring=False)
    assert (await _verify(plain, other, LONG)).result.cached_prompt_tokens == 0


@pytest.mark.parametrize("marks", range(16))
async def test_what_is_prefilled_ahead_is_never_computed_again(
    monkeypatch: pytest.MonkeyPatch, marks: int
) -> None:
    library = fake_vllm.install(monkeypatch)
    engine = await _vllm(resync=False)
    prompt = Message("user", LONG.content + "!" * marks)
    draft = await _ask(await _vllm(), Message("user", PROMPTS[1]))
    llm = library.engines[0]
    prefilled = await engine.prefill((prompt,))
    answer = await _verify(engine, draft, prompt)
    size = answer.result.prompt_tokens
    assert prefilled.prompt_tokens == size
    (first, _), (scored, cached), *_ = llm.prompts
    # The first pass is the prompt's but for its last token, the second one takes all whole blocks of that:
    # also where the prompt itself ends with a block.
    assert (first, scored) == (size - 1, size + len(draft.result.ids) + 1)
    assert cached == (size - 1) // fake_vllm.BLOCK * fake_vllm.BLOCK
    assert answer.result.cached_prompt_tokens == cached


@pytest.mark.parametrize("marks", range(16))
async def test_the_pieces_of_a_draft_are_computed_once(monkeypatch: pytest.MonkeyPatch, marks: int) -> None:
    library = fake_vllm.install(monkeypatch)
    writer, engine = await _vllm(), await _vllm(resync=False)
    prompt = Message("user", LONG.content + "!" * marks)
    own = await _ask(writer, prompt, max_new_tokens=60)
    status = engine.status()

    passes = library.engines[1].prompts

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        for count, index in enumerate(range(0, len(own.result.ids), 16)):
            while len(passes) < count:  # noqa: ASYNC110
                # Until the piece before has been scored: the stand-in has no event.
                await asyncio.sleep(0)
            yield DraftPiece(own.result.ids[index : index + 16], "", status.fingerprint)
        yield own.result.finish

    events = engine.verify_stream((prompt,), Sampling(max_new_tokens=60), pieces(), None)
    answer = await collect(events, evidence="any")
    assert answer.result.ids == own.result.ids
    assert len(passes) == answer.result.forward_passes > 1
    # Every pass but the first takes what the one before it computed from the cache, but for part of a block.
    for (length, _), (_, cached) in itertools.pairwise(passes):
        assert length - fake_vllm.BLOCK < cached <= length


async def test_what_follows_a_correction_is_scored_while_that_keeps_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vllm.install(monkeypatch)
    engine = await _vllm()
    ids = (await _ask(engine, LONG, max_new_tokens=60)).result.ids
    # Wrong in the first token, and in every one.
    once, throughout = [
        tuple(each if index >= wrong else (each + 1) % 400 + 7 for index, each in enumerate(ids))
        for wrong in (1, len(ids))
    ]

    async def is_scored_again(draft: tuple[int, ...]) -> bool:
        """Verify it; return whether more than the draft was scored."""
        proposal = Suite(engine).draft(draft, FinishReason.LENGTH)
        call = engine.verify((LONG,), Sampling(max_new_tokens=60), proposal, None)
        answer = await collect(call, "first")
        assert answer.result.ids == ids
        return answer.result.proposed_tokens > len(draft)

    assert [await is_scored_again(once) for _ in range(3)] == [True] * 3
    # Three that kept all make up for many; then one in 16 is tried all the same.
    tried = [await is_scored_again(throughout) for _ in range(80)]
    last = tried.index(False)
    assert 5 < last < 40
    assert [index - last for index in range(last, 80) if tried[index]] == list(range(15, 80 - last, 16))


@pytest.mark.parametrize(("level", "loads"), [(1, 1), (2, 2)])
async def test_a_sleeping_model_wakes(monkeypatch: pytest.MonkeyPatch, level: int, loads: int) -> None:
    library = fake_vllm.install(monkeypatch)
    engine = await _vllm(sleep_level=level)
    before = await _ask(engine, LONG)
    await engine.unload()
    (llm,) = library.engines
    assert llm.asleep
    await engine.load()
    assert (await _ask(engine, LONG)).result.ids == before.result.ids
    assert (len(library.engines), llm.loads, llm.is_shut) == (1, loads, False)
    await engine.close()
    assert llm.is_shut


ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def make_adapter(directory: Path, **changes: Any) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 64}, "its rank is 64: set max_lora_rank, which is 16"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "changes lm_head, which vLLM leaves out in verification",
        ),
        ({"modules_to_save": ["embed_tokens"]}, "changes embed_tokens"),
        ({"target_modules": None}, "not a LoRA adapter's"),
        ({"r": "many"}, "not a LoRA adapter's"),
        (None, "adapter_config.json is missing"),
    ],
)
async def test_an_adapter_that_cannot_be_served_is_refused_when_its_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any] | None, sentence: str
) -> None:
    library = fake_vllm.install(monkeypatch)
    if changes is not None:
        make_adapter(tmp_path, **changes)
    with pytest.raises(PreconditionFailed, match=sentence) as refused:
        await _vllm(lora={"math": tmp_path})
    assert f"adapter math: {tmp_path}" in str(refused.value)
    assert not library.engines


async def test_adapters_are_models_of_their_own_over_one_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = fake_vllm.install(monkeypatch)
    make_adapter(tmp_path)
    section = {"lora": {"math": tmp_path, "code": tmp_path}}
    engines = make_engines(ModelSettings(name="m", path=SMALL, engine="vllm", vllm=section), 8)  # type: ignore[arg-type]
    assert list(engines) == ["m", "m/math", "m/code"]
    await engines["m/code"].load()
    assert engines["m"].status().state is ModelState.READY
    answers = [(await _ask(each, LONG)).result.ids for each in engines.values()]
    assert len(set(answers)) == 3
    assert len(library.engines) == 1
    assert engines["m/math"].status().memory_bytes == 0 < engines["m"].status().memory_bytes
    events = engines["m/math"].generate((LONG,), Sampling(max_new_tokens=50))
    await anext(events)
    with pytest.raises(ResourceExhausted):
        await engines["m"].unload()
    await events.aclose()


async def test_a_dead_engine_is_loaded_anew_by_the_next_load(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_vllm.install(monkeypatch)
    engine = await _vllm()
    before = await _ask(engine, LONG)
    library.engines[0].is_dead = True
    with pytest.raises(AsdError, match="failed on"):
        await _ask(engine, LONG)
    assert engine.status().state is ModelState.FAILED
    await engine.load()
    assert (await _ask(engine, LONG)).result.ids == before.result.ids
    assert len(library.engines) == 2


@pytest.mark.parametrize("fake", [fake_vllm, fake_tensorrt_llm])
async def test_a_library_that_computes_nonsense_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, fake: Any
) -> None:
    library = fake.install(monkeypatch)
    make = vllm_engine.make_engine if fake is fake_vllm else tensorrt_llm_engine.make_engine
    options: Any = VllmOptions() if fake is fake_vllm else TensorrtLlmOptions()
    engine = make("small", SMALL, options)
    sound = fake.likeliest
    monkeypatch.setattr(fake, "likeliest", lambda *given: [(t, math.nan, r) for t, _, r in sound(*given)])
    with pytest.raises(PreconditionFailed, match="not finite, alone"):
        await engine.load()
    assert engine.status().state is ModelState.FAILED
    assert library.engines[0].is_shut
    monkeypatch.setattr(fake, "likeliest", sound)
    await engine.load()
    status = engine.status()
    assert (status.state, status.completed, status.cancelled) == (ModelState.READY, 0, 0)


async def test_a_library_that_refuses_the_probe_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr(fake_vllm.AsyncLLM, "check", _refuse_batches())
    engine = vllm_engine.make_engine("small", SMALL, VllmOptions())
    with pytest.raises(PreconditionFailed, match=r"a batch: .*rows: 1"):
        await engine.load()
    await vllm_engine.make_engine("small", SMALL, VllmOptions(max_batch=1)).load()


def _refuse_batches() -> Callable[..., None]:
    def check(llm: Any, *_: Any) -> None:
        if llm.running:
            raise ValueError("rows: 1")

    return check


@pytest.mark.parametrize(("given", "served"), [(None, 512), (256, 256), (4096, 512)])
async def test_the_served_context_is_the_smaller_of_the_settings_and_the_models(
    monkeypatch: pytest.MonkeyPatch, given: int | None, served: int
) -> None:
    library = fake_vllm.install(monkeypatch)
    engine = await _vllm(max_model_len=given)
    assert engine.status().context_length == served
    assert library.engines[0].args.max_model_len == (given and served)
    fake_tensorrt_llm.install(monkeypatch, "1.3")
    assert (await _tensorrt_llm(max_model_len=given)).status().context_length == served


async def test_what_the_library_refuses_is_a_models_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_vllm.install(monkeypatch)
    engine = await _vllm()
    library.engines[0].context = 8
    with pytest.raises(ModelRefusal, match="longer than 8"):
        await _ask(engine, LONG)
    assert engine.status().state is ModelState.READY


# Queue and drafts that come.


async def test_a_full_queue_refuses_and_serves_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    engine = await _vllm(max_batch=1, max_queue=2)
    outcomes = await asyncio.gather(*(_ask(engine, LONG) for _ in range(6)), return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, BaseException)]
    assert [type(each) for each in refused] == [QueueFull] * 3
    assert (await _ask(engine, LONG)).result.queue_ms < 5
    status = engine.status()
    assert (status.running, status.queued, status.completed) == (0, 0, 4)


async def test_a_draft_that_is_still_being_written_holds_no_place_in_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vllm.install(monkeypatch)
    engine = await _vllm(max_batch=1)

    answer = await _ask(engine, LONG)

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(answer.result.ids[:16], "", engine.status().fingerprint)
        await asyncio.Event().wait()
        yield FinishReason.EOS

    held = engine.verify_stream((LONG,), Sampling(), pieces(), None)
    async with asyncio.timeout(CALL_S):
        # It has been in the batch once.
        assert (await anext(held)).ids
        waiting = asyncio.ensure_future(anext(held))
        assert (await _ask(engine, LONG)).result.ids == answer.result.ids
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await held.aclose()


async def test_waiting_for_a_draft_is_no_waiting_in_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers take queue_ms for how busy a stage is."""
    fake_vllm.install(monkeypatch)
    engine = await _vllm()
    answer = await _ask(engine, LONG)
    late = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late)
    for module in (call, scoring_engine):
        monkeypatch.setattr(module, "time", clock)

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        nonlocal late
        late = 1000.0
        yield DraftPiece(answer.result.ids, "", engine.status().fingerprint)
        yield answer.result.finish

    events = engine.verify_stream((LONG,), Sampling(max_new_tokens=24), pieces(), None)
    result = (await collect(events, "first")).result
    assert result.total_ms > 1e6
    assert result.queue_ms < 1e5


async def test_the_library_itself_ends_an_answer_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that only our side ends goes on for a step, and has to be aborted."""
    library = fake_vllm.install(monkeypatch)
    engine = await _vllm()
    answer = await _ask(engine, Message("user", PROMPTS[0]), max_new_tokens=60)
    assert answer.result.finish is FinishReason.EOS
    assert library.engines[0].aborted == []


async def test_the_rest_of_a_draft_is_proposed_again_after_a_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vllm.install(monkeypatch)
    sampling = Sampling(max_new_tokens=60)
    passes = {}
    for resync in (False, True):
        engine = await _vllm(resync=resync)
        plain = await _ask(engine, LONG, max_new_tokens=60)
        ids = list(plain.result.ids)
        assert len(ids) > 50
        for index in (5, 20):
            ids[index] = ids[index] % 200 + 10
        draft = Suite(engine).draft(ids, plain.result.finish)
        found = await collect(engine.verify((LONG,), sampling, draft, None), "first")
        assert found.result.ids == plain.result.ids
        passes[resync] = found.result.forward_passes
        if resync:
            # Up to each wrong token and the one in its place; then the rest of the 60 tokens.
            assert found.result.accept_lengths == (6, 15, 39)
    assert passes[True] == 3 < passes[False]


async def test_what_is_certain_of_a_draft_goes_out_before_all_of_it_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vllm.install(monkeypatch)
    engine = await _vllm()
    answer = await _ask(engine, LONG, max_new_tokens=40)
    more = asyncio.Event()

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece(answer.result.ids[:16], "", engine.status().fingerprint)
        await more.wait()
        yield DraftPiece(answer.result.ids[16:], "", engine.status().fingerprint)
        yield answer.result.finish

    events = engine.verify_stream((LONG,), Sampling(max_new_tokens=40), pieces(), None)
    async with asyncio.timeout(CALL_S):
        chunk = await anext(events)
        assert chunk.ids == answer.result.ids[:16]
        more.set()
        rest = [event async for event in events]
    assert rest[-1].ids == answer.result.ids
    assert rest[-1].accept_lengths[0] == 16 + len(answer.result.ids[16:]) + (
        answer.result.finish is FinishReason.EOS
    )


@pytest.mark.parametrize(
    ("install", "make"), [(fake_vllm.install, _vllm), (fake_tensorrt_llm.install, _tensorrt_llm)]
)
@pytest.mark.parametrize("at", [0, 3, 20, None])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_draft_that_writes_on_past_the_targets_end_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, install: Any, make: Any, at: int | None, streamed: bool
) -> None:
    """As a drafter with the same tokenizer and another end token does. at: where; None: behind the answer."""
    install(monkeypatch)
    engine = await make()
    fingerprint, end = engine.status().fingerprint, 1
    for prompt in (LONG, Message("user", PROMPTS[0])):
        plain = await _ask(engine, prompt, max_new_tokens=40)
        ids = (*plain.result.ids[:at], end, *plain.result.ids[:5])

        async def pieces(ids: tuple[int, ...] = ids) -> AsyncIterator[DraftPiece | FinishReason]:
            for start in range(0, len(ids), 4):
                yield DraftPiece(ids[start : start + 4], "", fingerprint)
                await asyncio.sleep(0)
            yield FinishReason.EOS

        sampling = Sampling(max_new_tokens=40)
        found = await collect(
            engine.verify_stream((prompt,), sampling, pieces(), None)
            if streamed
            else engine.verify((prompt,), sampling, Suite(engine).draft(ids), None),
            "any",
        )
        assert (found.result.ids, found.result.finish) == (plain.result.ids, plain.result.finish)
        kept = len(plain.result.ids[:at])
        assert found.verification is not None
        assert (found.verification.proposed, found.verification.accepted) == (kept, kept)


# Installation.


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vllm_engine.make_engine("m", SMALL, VllmOptions()), "vllm is not installed: use the image"),
        (
            lambda: tensorrt_llm_engine.make_engine("m", SMALL, TensorrtLlmOptions()),
            "tensorrt_llm is not installed: use the image",
        ),
    ],
)
async def test_a_missing_library_is_told_in_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(PreconditionFailed, match=sentence):
        await make().load()


def test_asd_engine_check_runs_the_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_vllm.install(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        check_main(["check", str(SMALL), "--options", "{max_batch: 1}"])
    assert ended.value.code == 2
    assert "max_batch" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        check_main(["check", str(SMALL), "--options", "{verify_inside: true}", "--json"])
    report = json.loads(capsys.readouterr().out)
    outcomes = report["checks"]
    assert (ended.value.code, report["verifies_inside"]) == (0, True)
    assert len(outcomes) == len(CHECKS)
    assert not [each for each in outcomes if each["error"]]


def test_asd_engine_check_covers_adapters_and_holds_the_model_against_another_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch)
    options = f"{{lora: {{math: {make_adapter(tmp_path)}}}}}"
    with pytest.raises(SystemExit) as ended:
        check_main(["check", str(SMALL), "--options", options, "--beside", "onnx", "--json"])
    report = json.loads(capsys.readouterr().out)
    outcomes = report["checks"]
    assert not report["verifies_inside"]
    assert [each["check"] for each in outcomes if each["check"].startswith("math: ")] == [
        f"math: {each['check']}" for each in outcomes[len(CHECKS) - 2 : -2]
    ]
    assert (ended.value.code, len(outcomes), [each for each in outcomes if each["error"]]) == (
        0,
        2 * len(CHECKS) - 2,
        [],
    )
    # What it is held against matters: another model's answers are not its.
    monkeypatch.setattr(check, "greedy_answers", lambda *_: _wrong_answers())
    with pytest.raises(SystemExit) as ended:
        check_main(["check", str(SMALL), "--beside", "onnx", "--json"])
    outcomes = json.loads(capsys.readouterr().out)["checks"]
    assert ended.value.code == 1
    assert "at token 0" in outcomes[0]["error"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["README.md"], "README.md: no such directory"),
        ([str(SMALL), "--options", "threads"], "--options 'threads' is no mapping"),
        ([str(SMALL), "--engine", "onnx", "--options", "{path: x}"], "path is an argument of its own"),
        ([str(SMALL), "--options", "{dtyp: x}"], "dtyp is no option of engine vllm: did you mean dtype?"),
        (
            [str(SMALL), "--engine", "onnx", "--options", "{verify_inside: true}"],
            "verify_inside is no option of engine onnx: it is of vllm; known: max_batch, threads, ",
        ),
        ([str(SMALL), "--max-new-tokens", "7"], "'7' is no number from 8 on"),
        ([str(SMALL), "--max-batch", "0"], "'0' is no number from 1 on"),
        ([str(SMALL), "--tie-margin", "nan"], "'nan' is no number from 0 to below 1"),
    ],
)
def test_wrong_arguments_of_asd_engine_check_are_told_in_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        check_main(["check", *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


async def _wrong_answers() -> list[tuple[int, ...]]:
    return [(7,) * 48 for _ in PROMPTS]
