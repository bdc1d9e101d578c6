"""A stand-in for TensorRT-LLM's LLM API with the signatures of tests/data/tensorrt_llm_signatures.json.

Behaves as its sources and documentation say where our engine could go wrong: rows offset by one, rows lost to
block reuse without a word, a SamplingParams that its call writes to, no request of no tokens, outputs that
the next step changes, an abort that is followed by a last step.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fakes.reference_model import ReferenceModel, draw, likeliest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

    import pytest

SIGNATURES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "tensorrt_llm_signatures.json").read_text()
)
BLOCK = 32


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class FakeTensorrtLlm:
    """The library as a test sees it."""

    line: str
    engines: list[LLM] = field(default_factory=list)


_library = FakeTensorrtLlm("1.3")


def forget_probe() -> None:
    """Forget what the newest engine was asked while it was loaded."""
    _library.engines[-1].requests.clear()


def _check(name: str, given: dict[str, Any], error: type[Exception]) -> None:
    for key in given:
        if key not in SIGNATURES[_library.line][name]["fields"]:
            raise error(f"{name} of line {_library.line} has no {key!r}")


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        _check("SamplingParams", given, TypeError)
        self.__dict__.update(
            {
                "end_id": None,
                "max_tokens": 32,
                "temperature": None,
                "top_p": None,
                "seed": None,
                "stop_token_ids": None,
                "logprobs": None,
                "prompt_logprobs": None,
                "ignore_eos": False,
                "detokenize": True,
                "pad_id": None,
            }
            | given
        )
        if self.top_p == 0:
            raise ValueError("top_p 0 is not allowed")


class KvCacheConfig:
    def __init__(self, **given: Any) -> None:
        _check("KvCacheConfig", given, ValueError)
        self.enable_block_reuse = given.get("enable_block_reuse", True)


class CompletionOutput:
    """What was written so far; `..._diff`: since the step before."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.prompt_logprobs: list[dict[int, Logprob]] | None = None
        self.finish_reason: str | None = None
        self.last = 0

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self.last :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        return self.logprobs[self.last :]


class RequestOutput:
    """A request, which can be awaited or iterated; the same object at each step."""

    def __init__(self, engine: LLM, steps: Generator[None, None, None], completion: CompletionOutput) -> None:
        self._engine = engine
        self._steps = steps
        self._is_aborted = False
        self.outputs = [completion]
        self.finished = False
        engine.running.add(self)

    def abort(self) -> None:
        self._is_aborted = True
        self._engine.aborted += 1

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        completion = self.outputs[0]
        if self._is_aborted:
            completion.finish_reason = "cancelled"
        else:
            completion.last = len(completion.token_ids)
            next(self._steps)
        self.finished = completion.finish_reason is not None
        if self.finished:
            self._engine.running.discard(self)
        return self

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._result().__await__()

    async def _result(self) -> RequestOutput:
        async for _ in self:
            pass
        return self


class LLM:
    def __init__(self, model: str, **given: Any) -> None:
        _check("LLM", given, ValueError)
        self.given = given
        self.model = ReferenceModel(model)
        self.context = given.get("max_seq_len") or self.model.context
        self.reuses = given.get("kv_cache_config", KvCacheConfig()).enable_block_reuse
        self.blocks: set[tuple[Any, ...]] = set()
        self.running: set[RequestOutput] = set()
        self.aborted = 0
        self.is_shut = False
        self.requests: list[dict[str, Any]] = []
        _library.engines.append(self)

    def shutdown(self) -> None:
        self.is_shut = True

    def generate_async(self, *positional: Any, **given: Any) -> RequestOutput:
        assert not positional, "the order of the arguments differs between the lines: name them"
        known = SIGNATURES[_library.line]["LLM"]["methods"]["generate_async"]
        for key in given:
            if key not in known:
                raise TypeError(f"generate_async of line {_library.line} has no {key!r}")
        if self.is_shut:
            raise RuntimeError("LLM is shutting down")
        params, ids = given["sampling_params"], given["inputs"]["prompt_token_ids"]
        assert not getattr(params, "is_prepared", False), "a SamplingParams that a call has written to"
        if params.end_id is None:
            raise ValueError("end_id must be given where there is no tokenizer")
        params.is_prepared, params.pad_id = True, params.end_id
        if params.max_tokens <= 0:
            raise ValueError(f"maxNewTokens must be > 0, got {params.max_tokens}")
        if len(ids) > self.given.get("max_num_tokens", 8192):
            raise ValueError(f"prompt length {len(ids)} is beyond max_num_tokens")
        if len(ids) + 1 > self.context:
            raise ValueError(f"prompt length {len(ids)} leaves no room in {self.context}")
        self.requests.append(given)
        completion = CompletionOutput()
        steps = self._run(list(ids), params, given, completion)
        return RequestOutput(self, steps, completion)

    def _run(
        self, ids: list[int], params: SamplingParams, given: dict[str, Any], completion: CompletionOutput
    ) -> Generator[None, None, None]:
        sequence = self.model.sequence()
        rows = sequence.append(ids)
        salt = given.get("cache_salt")
        cached = self._reused(ids, salt)
        rng = np.random.default_rng(params.seed)
        row = rows[-1]
        # A step without tokens comes first, as the documentation does not rule it out.
        if given.get("streaming"):
            yield
        ends = {params.end_id, *(params.stop_token_ids or ())} if not params.ignore_eos else set()
        while completion.finish_reason is None:
            token = draw(row, params.temperature or 0.0, params.top_p or 1.0, rng)
            completion.token_ids.append(token)
            completion.logprobs.append(_entry(row, token, params.logprobs))
            if completion.prompt_logprobs is None and params.prompt_logprobs is not None:
                # Of what was computed alone, and paired with the prompt from its start.
                following = [*ids[1:], token]
                completion.prompt_logprobs = [
                    _entry(each, following[place], params.prompt_logprobs)
                    for place, each in enumerate(rows[cached:])
                ]
            if token in ends:
                completion.finish_reason = "stop"
            elif (
                len(completion.token_ids) >= params.max_tokens
                or len(ids) + len(completion.token_ids) >= self.context
            ):
                completion.finish_reason = "length"
            if completion.finish_reason:
                whole = [*ids, *completion.token_ids[:-1]]
                self.blocks |= {(salt, *whole[:end]) for end in range(BLOCK, len(whole) + 1, BLOCK)}
            # Two tokens may come in one step.
            if completion.finish_reason or len(completion.token_ids) % 3 or not given.get("streaming"):
                yield
            if completion.finish_reason is None:
                row = sequence.append([token])[0]

    def _reused(self, ids: list[int], salt: str | None) -> int:
        length = 0
        while (
            self.reuses and length + BLOCK <= len(ids) - 1 and (salt, *ids[: length + BLOCK]) in self.blocks
        ):
            length += BLOCK
        return length


def _entry(row: Any, token: int, most: int | None) -> dict[int, Logprob]:
    return {each: Logprob(logprob, rank) for each, logprob, rank in likeliest(row, token, most or 1)}


def install(monkeypatch: pytest.MonkeyPatch, line: str = "1.3") -> FakeTensorrtLlm:
    """Put the stand-in in the library's place; return what a test can look at."""
    global _library  # noqa: PLW0603
    _library = FakeTensorrtLlm(line)
    library, api = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm.llmapi")
    library.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, __version__=f"{line}.0")
    api.__dict__.update(KvCacheConfig=KvCacheConfig)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", library)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", api)
    return _library
