"""A stand-in for vLLM 0.25.1 with the signatures of tests/data/vllm_signatures.json.

Behaves as its source says where our engine depends on it: chunks of several tokens, prompt log-probabilities
that lack what was cached, ranks, refusals, aborts, sleep levels, logits processors.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import sys
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from services.stage.engines.vllm import proposer
from tests.fakes.reference_model import ReferenceModel, draw, likeliest
from tests.fakes.vllm_batch import Batch, Request, own_processors, processed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import pytest

SIGNATURES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "vllm_signatures.json").read_text()
)
BLOCK = 16


class EngineDeadError(Exception):
    pass


class AdapterLogitsProcessor:
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class _Fields:
    """An object whose fields are those of the signatures: another one is refused."""

    name = ""
    defaults: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        known = set(SIGNATURES[self.name]["fields"])
        if self.name == "AsyncEngineArgs":
            known |= set(SIGNATURES["EngineArgs"]["fields"])
        for key in given:
            if key not in known:
                raise TypeError(f"{self.name}.__init__() got an unexpected keyword argument {key!r}")
        self.__dict__.update(self.defaults | given)


class SamplingParams(_Fields):
    name = "SamplingParams"
    defaults = {  # noqa: RUF012
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "max_tokens": 16,
        "logprobs": None,
        "prompt_logprobs": None,
        "flat_logprobs": False,
        "detokenize": True,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "skip_reading_prefix_cache": None,
        "extra_args": None,
    }

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1:
            raise ValueError("temperature or top_p out of range")
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None


class AsyncEngineArgs(_Fields):
    name = "AsyncEngineArgs"
    defaults = {"max_logprobs": 20, "enable_prefix_caching": True, "max_model_len": None}  # noqa: RUF012


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class FlatLogprobs:
    """Lists of all positions' entries, and where each position's begin and end."""

    def __init__(self) -> None:
        self.start_indices: list[int] = []
        self.end_indices: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int] = []

    def append(self, row: list[tuple[int, float, int]]) -> None:
        self.start_indices.append(len(self.token_ids))
        for token, logprob, rank in row:
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None


@dataclass
class FakeVllm:
    """The library as a test sees it. runner: 1 or 2, the model runner, which decides how rows are cut."""

    runner: int = 1
    is_on_cpu: bool = False
    engines: list[AsyncLLM] = field(default_factory=list)


_library = FakeVllm()


def forget_probe() -> None:
    """Forget what the newest engine was asked while it was loaded."""
    _library.engines[-1].prompts.clear()
    _library.engines[-1].asked.clear()


class AsyncLLM:
    """vLLM's engine. loads: how often weights were read."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self.args = args
        self.model = ReferenceModel(args.model)
        self.context = args.max_model_len or self.model.context
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.blocks: set[tuple[int, ...]] = set()
        self.asleep: set[str] = set()
        self.has_weights = True
        self.is_shut = False
        self.is_dead = False
        self.loads = 1
        self.prompts: list[tuple[int, int]] = []
        self.asked: list[SamplingParams] = []
        has_proposer = getattr(args, "speculative_config", None) is not None
        if has_proposer and getattr(args, "logits_processors", None):
            raise ValueError(
                "Custom logits processors are not supported when speculative decoding is enabled."
            )
        self.batch = Batch(args, self.model, self.context, self._finish) if has_proposer else None
        config = SimpleNamespace(model_config=SimpleNamespace(model=args.model))
        self.processors = [
            _class(name)(config, "cpu", False) for name in getattr(args, "logits_processors", None) or ()
        ]

    @classmethod
    def from_engine_args(
        cls,
        engine_args: AsyncEngineArgs,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
    ) -> AsyncLLM:
        engine = cls(engine_args)
        _library.engines.append(engine)
        return engine

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut = True

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        if not getattr(self.args, "enable_sleep_mode", False):
            raise ValueError("Sleep mode is not enabled in the model config")
        self.asleep = {"weights", "kv_cache"}
        self.has_weights = level == 1
        self.blocks.clear()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        self.asleep -= set(tags or ("weights", "kv_cache"))

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,  # noqa: ASYNC109 - as it is there
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if method != "reload_weights":
            if self.is_dead:
                raise EngineDeadError
            await asyncio.sleep(0)
            assert self.batch is not None
            return [getattr(self.batch.worker, method)(*args, **(kwargs or {}))]
        assert "weights" not in self.asleep, "memory of the weights is not mapped"
        self.has_weights = True
        self.loads += 1
        return [None]

    async def generate(
        self,
        prompt: dict[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: dict[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        ids = list(prompt["prompt_token_ids"])
        self.check(ids, sampling_params, lora_request)
        self.running.add(request_id)
        self.asked.append(sampling_params)
        try:
            await asyncio.sleep(0)
            async with aclosing(self._run(ids, sampling_params, request_id, lora_request)) as outputs:
                async for output in outputs:
                    if self.is_dead:
                        raise EngineDeadError
                    yield output
                    await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise
        finally:
            self.running.discard(request_id)

    def check(self, ids: list[int], params: SamplingParams, lora: LoRARequest | None) -> None:
        if self.is_dead or self.is_shut:
            raise EngineDeadError
        assert not self.asleep, "a request while the engine sleeps"
        assert self.has_weights, "the weights were dropped and not read again"
        if len(ids) >= self.context:
            raise ValueError(f"The prompt (length {len(ids)}) is longer than {self.context}")
        if not ids or max(ids) >= self.model.vocabulary:
            raise ValueError(f"Token id {max(ids, default=-1)} is out of vocabulary")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.args.max_logprobs:
                raise ValueError(f"Requested {name} above max_logprobs")
        if lora is not None and not getattr(self.args, "enable_lora", False):
            raise ValueError(f"Got lora_request {lora} but LoRA is not enabled!")

    async def _run(
        self, ids: list[int], params: SamplingParams, request_id: str, lora: LoRARequest | None
    ) -> AsyncGenerator[RequestOutput, None]:
        adapter = 0 if lora is None else lora.lora_int_id
        cached = self._cached(ids, params, adapter)
        self.prompts.append((len(ids), cached))
        sequence = self.model.sequence(adapter)
        rows = sequence.append(ids)
        prompt_logprobs = self._prompt_logprobs(ids, rows, params, cached)
        tokens, entries = [], []
        since = step = 0
        if self.batch is None:
            steps = self._steps(rows[-1], sequence, params)
        else:
            steps = self.batch.steps(Request(request_id, ids, params, adapter, cached))
        async with aclosing(steps):
            async for written in steps:
                step += 1
                for token, row in written:
                    tokens.append(token)
                    if params.logprobs is not None:
                        entries.append(likeliest(row, token, params.logprobs))
                finish = self._finish(ids, tokens, params)
                if finish:
                    self._fill([*ids, *tokens[:-1]], adapter)
                # A reader that is slower than the engine gets several tokens at once.
                if finish or (params.output_kind is RequestOutputKind.DELTA and step % 3):
                    is_delta = params.output_kind is RequestOutputKind.DELTA
                    first = since if is_delta else 0
                    known = _entries(entries[first:], params)
                    completion = CompletionOutput(0, "", tokens[first:], None, known, finish)
                    yield RequestOutput(
                        request_id, None, ids, prompt_logprobs, [completion], finish is not None, cached
                    )
                    since = len(tokens)
                if finish:
                    return

    async def _steps(
        self, row: Any, sequence: Any, params: SamplingParams
    ) -> AsyncGenerator[list[tuple[int, Any]], None]:
        """Yield what each step writes of a request that steps alone, where nothing is proposed."""
        rng = np.random.default_rng(params.seed)
        processors = own_processors(self.processors, params)
        written: list[int] = []
        while True:
            token = draw(processed(row, processors, written), params.temperature, params.top_p, rng)
            written.append(token)
            yield [(token, row)]
            row = sequence.append([token])[0]

    def _finish(self, ids: list[int], tokens: list[int], params: SamplingParams) -> str | None:
        if not params.ignore_eos and tokens[-1] in (params.stop_token_ids or ()):
            return "stop"
        is_long = len(tokens) >= (params.max_tokens or 10**9) or len(ids) + len(tokens) >= self.context
        return "length" if is_long else None

    def _prompt_logprobs(self, ids: list[int], rows: Any, params: SamplingParams, cached: int) -> Any:
        """Rows of what was computed: the first runner has nonsense for the rest, the second nothing."""
        if params.prompt_logprobs is None:
            return None
        known: Any = FlatLogprobs() if params.flat_logprobs else []
        known.append([] if params.flat_logprobs else None)
        first = cached if _library.runner == 2 else 0
        for place in range(first, len(ids) - 1):
            row = likeliest(rows[place], ids[place + 1], params.prompt_logprobs)
            if place < cached:
                row = [(0, 0.0, 0)]
            known.append(row if params.flat_logprobs else {t: Logprob(p, r) for t, p, r in row})
        return known

    def _cached(self, ids: list[int], params: SamplingParams, adapter: int) -> int:
        if not self.args.enable_prefix_caching or params.skip_reading_prefix_cache:
            return 0
        length = 0
        # The last token is computed in any case: its logits are wanted.
        while length + BLOCK <= len(ids) - 1 and (adapter, *ids[: length + BLOCK]) in self.blocks:
            length += BLOCK
        return length

    def _fill(self, ids: list[int], adapter: int) -> None:
        for end in range(BLOCK, len(ids) + 1, BLOCK):
            self.blocks.add((adapter, *ids[:end]))


def _entries(rows: list[list[tuple[int, float, int]]], params: SamplingParams) -> Any:
    if params.logprobs is None:
        return None
    if not params.flat_logprobs:
        return [{token: Logprob(logprob, rank) for token, logprob, rank in row} for row in rows]
    flat = FlatLogprobs()
    for index, row in enumerate(rows):
        # vLLM joins what a reader is late for by dictionaries: a token that is among the likeliest is there
        # once, at its first place and with its last rank.
        joined = {token: (token, logprob, rank) for token, logprob, rank in row}
        flat.append(list(joined.values()) if index else row)
    return flat


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class _Platform:
    """What the stand-in says it runs on."""

    def is_cpu(self) -> bool:
        return _library.is_on_cpu


def modules() -> dict[str, ModuleType]:
    """Return the modules of the library, by name."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {
            "__version__": SIGNATURES["version"],
            "AsyncEngineArgs": AsyncEngineArgs,
            "SamplingParams": SamplingParams,
        },
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {"AdapterLogitsProcessor": AdapterLogitsProcessor},
        "vllm.v1.spec_decode": {},
        "vllm.v1.spec_decode.custom_class_proposer": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    found = {}
    for name, content in contents.items():
        found[name] = ModuleType(name)
        found[name].__dict__.update(content)
    return found


def install(monkeypatch: pytest.MonkeyPatch, runner: int = 1) -> FakeVllm:
    """Put the stand-in in the library's place; return what a test can look at."""
    global _library  # noqa: PLW0603
    _library = FakeVllm(runner)
    # Every step takes as long as another one, however many tokens it has.
    monkeypatch.setattr(proposer, "clock", itertools.count().__next__)
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return _library
