"""What the onnx engine takes of memory, what it serves of a context, and what it refuses to load."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime_genai
import pytest

from asd.errors import ConversationRefused, PreconditionFailed, PromptTooLong
from asd.values import FinishReason, Message, Sampling
from services.stage.domain import DraftPiece, DraftText, Result, VerificationResult
from services.stage.engines.engine import ModelState
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.engines.onnx.export import prepare
from services.stage.engines.onnx.memory import LEAST_CAPACITY
from services.stage.generation.tokenizer import ChatTokenizer
from tests.fakes import tiny_llama
from tests.limits import CALL_S, PROCESS_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from services.stage.engines.engine import EngineStatus

LONG = 131_072
LAYERS = 2
# Keys and values of one token, float32: of both layers, two heads of 32.
TOKEN_BYTES = 2 * LAYERS * 2 * 32 * 4


@pytest.fixture
async def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that writes a tiny model and loads it; keeps what it derives apart."""
    monkeypatch.setenv("ASD_CACHE_DIR", str(tmp_path / "cache"))
    loaded: deque[OnnxEngine] = deque()

    async def make(
        options: OnnxOptions | None = None, generation: dict[str, Any] | None = None, **changes: Any
    ) -> OnnxEngine:
        tiny_llama.write(tmp_path / "model", generation=generation, **changes)
        engine = OnnxEngine("tiny", tmp_path / "model", options or OnnxOptions())
        loaded.append(engine)
        await engine.load()
        return engine

    yield make
    for engine in loaded:
        await engine.unload()


async def _ask(engine: OnnxEngine, text: str, most: int = 12) -> Result:
    events = engine.generate((Message("user", text),), Sampling(max_new_tokens=most))
    last = [event async for event in events][-1]
    assert isinstance(last, Result)
    return last


async def _settled(engine: OnnxEngine, is_so: Callable[[EngineStatus], bool]) -> EngineStatus:
    """Return the status once the model's thread has done what follows the end of a call."""
    async with asyncio.timeout(CALL_S):
        while not is_so(engine.status()):  # noqa: ASYNC110 - the thread has no event for it
            await asyncio.sleep(0)
    return engine.status()


class Buffers:
    """The library's generators and the bytes of their KV caches. Put it in the library's place of them."""

    def __init__(self) -> None:
        self._make = onnxruntime_genai.Generator
        self.alive: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        self.alive.append(self._make(*args))
        return self.alive[-1]

    def largest(self) -> int:
        """Return the bytes of the largest of all that were made."""
        return max(map(self.bytes_of, self.alive))

    @staticmethod
    def bytes_of(generator: Any) -> int:
        """Return the bytes of a generator's KV cache, as the library gives its arrays."""
        names = [f"present.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
        return sum(generator.get_output(name).nbytes for name in names)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    made = Buffers()
    monkeypatch.setattr(onnxruntime_genai, "Generator", made)
    return made


async def test_a_long_context_costs_what_its_answers_need(load: Callable[..., Any], buffers: Buffers) -> None:
    engine = await load(max_position_embeddings=LONG)
    for index in range(8):
        await _ask(engine, f"{index} beads and {index} more", 12)
    await asyncio.gather(*(_ask(engine, "lace " * index, 12) for index in range(1, 9)))
    # The thread keeps a sequence after its caller has the answer.
    status = await _settled(engine, lambda status: not status.running and status.cached_sequences == 4)
    assert status.context_length == LONG
    # Eight rows in a slot, or one: never room for 131,072 tokens.
    assert buffers.largest() <= 8 * LEAST_CAPACITY * TOKEN_BYTES
    kept = 4 * LEAST_CAPACITY * TOKEN_BYTES
    weights = sum(tensor.nbytes for tensor in tiny_llama.weights(tiny_llama.CONFIG).values())
    turns = LONG * 32 * 4
    assert status.memory_bytes == kept + weights + turns


async def test_status_says_what_the_librarys_buffers_take(load: Callable[..., Any], buffers: Buffers) -> None:
    engine = await load(OnnxOptions(cached_sequences=2), max_position_embeddings=LONG)
    idle = engine.status()
    assert idle.kv_cache_bytes == 0
    buffers.alive.clear()
    come = asyncio.Event()

    async def pieces() -> AsyncIterator[DraftPiece | FinishReason]:
        await come.wait()
        yield FinishReason.EOS

    calls = [
        engine.verify_stream(
            (Message("user", "bead " * words),), Sampling(max_new_tokens=most), pieces(), None
        )
        for words, most in ((2, 12), (4, 900), (300, 3000))
    ]
    for call in calls:
        await anext(call)
    status = engine.status()
    held = sum(map(buffers.bytes_of, buffers.alive))
    assert len(buffers.alive) == 3
    assert status.kv_cache_bytes == held == (512 + 1024 + 4096) * TOKEN_BYTES
    assert status.memory_bytes - idle.memory_bytes == held - 2 * LEAST_CAPACITY * TOKEN_BYTES
    come.set()
    for call in calls:
        async for _ in call:
            pass
    # A sequence is kept right after its call has ended. The two that were used last are.
    status = await _settled(engine, lambda status: status.memory_bytes > idle.memory_bytes + held // 2)
    assert (status.kv_cache_bytes, status.cached_sequences) == (0, 2)
    assert status.memory_bytes - idle.memory_bytes == (1024 + 4096 - 2 * LEAST_CAPACITY) * TOKEN_BYTES


async def test_a_conversation_that_outgrows_its_cache_goes_on_in_a_larger_one(
    load: Callable[..., Any], buffers: Buffers
) -> None:
    engine = await load(max_position_embeddings=4096, eos_token_id=511)
    fresh = await load(OnnxOptions(cached_sequences=0), max_position_embeddings=4096, eos_token_id=511)
    turns: tuple[Message, ...] = ()
    reused = []
    for index in range(8):
        turns = (*turns, Message("user", f"{index} beads and lace " * 12))
        options = Sampling(max_new_tokens=40)
        results = [[e async for e in each.generate(turns, options)][-1] for each in (engine, fresh)]
        assert all(isinstance(each, Result) for each in results)
        assert results[0].ids == results[1].ids  # type: ignore[union-attr]
        reused.append(results[0].cached_prompt_tokens > 0)  # type: ignore[union-attr]
        turns = (*turns, Message("assistant", results[0].text))  # type: ignore[union-attr]
    # Read anew where it doubles, from its prefix otherwise; what it outgrew is not kept.
    assert 3 <= sum(reused) < 7
    await _settled(engine, lambda status: status.cached_sequences == 1)


async def test_prompts_and_answers_of_very_different_lengths_do_not_share_a_cache(
    load: Callable[..., Any], buffers: Buffers
) -> None:
    engine = await load(OnnxOptions(max_lanes=1), max_position_embeddings=LONG, eos_token_id=511)
    asks = [_ask(engine, "lace " * 1500, 4), *(_ask(engine, f"{index} beads", 12) for index in range(7))]
    together = await asyncio.gather(*asks)
    # Padded to the longest, eight rows would take room for 8 × 1,500 tokens and more.
    assert buffers.largest() <= 8192 * TOKEN_BYTES
    alone = [await _ask(engine, f"{index} beads", 12) for index in range(7)]
    assert [each.ids for each in together[1:]] == [each.ids for each in alone]


async def test_the_served_context_is_the_smaller_of_the_settings_and_the_models(
    load: Callable[..., Any],
) -> None:
    engine = await load(OnnxOptions(max_model_len=64), max_position_embeddings=4096, eos_token_id=511)
    assert engine.status().context_length == 64
    with pytest.raises(PromptTooLong):
        await _ask(engine, "bead " * 100)
    result = await _ask(engine, "bead " * 4, 1000)
    assert (result.finish, result.prompt_tokens + len(result.ids)) == (FinishReason.LENGTH, 64)
    draft = DraftText("", result.ids, engine.status().fingerprint, FinishReason.EOS)
    options = Sampling(max_new_tokens=1000)
    events = [e async for e in engine.verify((Message("user", "bead " * 4),), options, draft, None)]
    assert isinstance(events[0], VerificationResult)
    assert events[0].accepted == len(result.ids)
    assert events[-1].ids == result.ids  # type: ignore[union-attr]
    larger = await load(OnnxOptions(max_model_len=10_000), max_position_embeddings=256)
    assert larger.status().context_length == 256


async def test_a_served_context_bounds_what_is_derived(load: Callable[..., Any], tmp_path: Path) -> None:
    engine = await load(OnnxOptions(max_model_len=512), max_position_embeddings=1 << 20)
    result = await _ask(engine, "bead " * 4)
    assert (engine.status().context_length, len(result.ids) > 0) == (512, True)
    # For a million tokens, cosines and sines are 128 MiB.
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.data")) < 1 << 20
    assert engine.status().memory_bytes < 16 << 20


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("", "nothing of a conversation"),
        ("Hello", "leaves out"),
        ("{{ 'lace ' * 99 }}{{ messages[-1].content }}", "tokens of a short conversation.*at most 64"),
    ],
)
def test_a_template_that_could_answer_nobody_is_refused(tmp_path: Path, template: str, says: str) -> None:
    tiny_llama.write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(PreconditionFailed, match=says):
        OnnxEngine("tiny", tmp_path, OnnxOptions(max_model_len=64))


async def test_a_conversation_of_no_tokens_is_refused(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(ConversationRefused):
        await _ask(await load(), "")


async def test_every_end_of_both_files_ends_an_answer(load: Callable[..., Any], tmp_path: Path) -> None:
    prompt = ChatTokenizer(tiny_llama.SMALL).encode_chat((Message("user", "3 beads"),))
    tensors = tiny_llama.weights(tiny_llama.CONFIG)
    ids = list(prompt)
    for _ in range(6):
        ids.append(int(tiny_llama.logits(tiny_llama.CONFIG, tensors, ids)[-1].argmax()))
    written = ids[len(prompt) :]
    end = next(index for index, token in enumerate(written) if token not in written[:index] and index > 1)
    engine = await load(generation={"eos_token_id": [1, written[end]]})
    for most in (end + 1, 12):
        result = await _ask(engine, "3 beads", most)
        assert (list(result.ids), result.finish) == (written[:end], FinishReason.EOS)
    # In a batch too, where the library itself must know of it.
    results = await asyncio.gather(*(_ask(engine, "3 beads") for _ in range(5)))
    assert {(each.ids, each.finish) for each in results} == {(tuple(written[:end]), FinishReason.EOS)}


async def test_a_probe_is_no_request(load: Callable[..., Any]) -> None:
    status = (await load()).status()
    assert status.state is ModelState.READY
    assert (status.completed, status.cancelled, status.running, status.queued) == (0, 0, 0, 0)
    assert (status.cached_sequences, status.kv_cache_bytes) == (0, 0)


async def test_a_model_that_computes_nonsense_is_not_loaded(tmp_path: Path, load: Callable[..., Any]) -> None:
    tensors = tiny_llama.write(tmp_path / "model")
    wrong = {"model.layers.1.mlp.up_proj.weight": np.full((80, 96), 1e38, np.float32)}
    tiny_llama.save(tmp_path / "model" / "model.safetensors", tensors | wrong)
    engine = OnnxEngine("tiny", tmp_path / "model", OnnxOptions())
    for _ in range(2):
        with pytest.raises(PreconditionFailed, match="not finite, alone"):
            await engine.load()
        assert engine.status().state is ModelState.FAILED
        assert "not finite" in engine.status().error
    with pytest.raises(PreconditionFailed, match="not loaded"):
        await _ask(engine, "3 beads")
    tiny_llama.save(tmp_path / "model" / "model.safetensors", tensors)
    await engine.load()
    assert (await _ask(engine, "3 beads")).prompt_tokens
    await engine.unload()


async def test_a_model_that_fails_in_batches_alone_is_not_loaded(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = onnxruntime_genai.Generator

    class Single:
        """A generator that takes one row."""

        def __init__(self, *args: Any) -> None:
            self._generator = make(*args)

        def append_tokens(self, tokens: Sequence[Any]) -> None:
            if len(tokens) > 1:
                raise RuntimeError("rows: 4")
            self._generator.append_tokens(tokens)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._generator, name)

    monkeypatch.setattr(onnxruntime_genai, "Generator", Single)
    with pytest.raises(PreconditionFailed, match="a batch: rows: 4"):
        await load()


# Run apart, so that nothing else of this process counts: loads a model, asks it, and says what the process
# took more, and what the engine says.
MEASURE = """
import asyncio, gc, json, sys
from pathlib import Path
import onnxruntime_genai
from asd.values import Message, Sampling
from services.stage.process_memory import resident_bytes
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions

async def main():
    engine = OnnxEngine("tiny", Path(sys.argv[1]), OnnxOptions(cached_sequences=8))
    gc.collect()
    before = resident_bytes()
    await engine.load()
    for index in range(8):
        turns = (Message("user", "abcdefgh"[index] * 20),)
        async for _ in engine.generate(turns, Sampling(max_new_tokens=8)):
            pass
    while engine.status().cached_sequences < 8:
        await asyncio.sleep(0)
    taken, status = resident_bytes() - before, engine.status()
    print(json.dumps({"taken": taken, "estimate": status.memory_bytes}))
    await engine.unload()

asyncio.run(main())
"""


def test_the_estimate_is_what_the_process_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASD_CACHE_DIR", str(tmp_path / "cache"))
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    tiny_llama.write(tmp_path / "model", max_position_embeddings=LONG, **shape, **heads)
    prepare(tmp_path / "model")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        timeout=PROCESS_S,
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    # 80 MiB of weights, 32 MiB of cosines and sines, 128 MiB of caches; for the context they were 32 GiB.
    assert measured["estimate"] > 200 << 20
    assert 0.8 < measured["taken"] / measured["estimate"] < 1.2, measured
