"""Every engine against the conformance suite; the GPU libraries by their stand-ins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asd.values import Sampling
from services.stage.domain import TokenChunk, VerificationResult
from services.stage.engines import conformance
from services.stage.engines.conformance import CHECKS, NotConforming, Suite
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.engines.tensorrt_llm import engine as tensorrt_llm_engine
from services.stage.engines.tensorrt_llm.engine import TensorrtLlmOptions
from services.stage.engines.vllm import engine as vllm_engine
from services.stage.engines.vllm.engine import VllmOptions
from tests.fakes import fake_tensorrt_llm, fake_vllm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.stage.engines.conformance import Check
    from tests.integration.stage.conftest import Reference

SMALL = Path(__file__).parents[4] / "models" / "small"


def _vllm(monkeypatch: pytest.MonkeyPatch, runner: int, **options: Any) -> Any:
    fake_vllm.install(monkeypatch, runner)
    return vllm_engine.make_engine("small", SMALL, VllmOptions(**options))


def _tensorrt_llm(monkeypatch: pytest.MonkeyPatch, line: str, **options: Any) -> Any:
    fake_tensorrt_llm.install(monkeypatch, line)
    return tensorrt_llm_engine.make_engine("small", SMALL, TensorrtLlmOptions(**options))


ENGINES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "onnx": lambda _: OnnxEngine("small", SMALL, OnnxOptions()),
    "vllm": lambda m: _vllm(m, 1),
    "vllm-whole-vocabulary": lambda m: _vllm(m, 1, top_logprobs=512),
    "vllm-no-prefix-caching": lambda m: _vllm(m, 1, prefix_caching=False, resync=False),
    "vllm-runner-2": lambda m: _vllm(m, 2),
    "vllm-fresh-scoring": lambda m: _vllm(m, 1, cached_scoring=False),
    "vllm-fresh-scoring-runner-2": lambda m: _vllm(m, 2, cached_scoring=False),
    "vllm-sleep-1": lambda m: _vllm(m, 1, sleep_level=1, max_batch=2),
    "vllm-sleep-2": lambda m: _vllm(m, 1, sleep_level=2, max_batch=1),
    "vllm-inside": lambda m: _vllm(m, 1, verify_inside=True),
    "vllm-inside-two-tokens": lambda m: _vllm(m, 1, verify_inside=True, proposed_tokens=2, top_logprobs=2),
    "vllm-inside-sleep-1": lambda m: _vllm(m, 1, verify_inside=True, sleep_level=1, max_batch=2),
    "tensorrt_llm-1.2": lambda m: _tensorrt_llm(m, "1.2"),
    "tensorrt_llm-1.3": lambda m: _tensorrt_llm(m, "1.3", max_batch=2),
    "tensorrt_llm-reuse": lambda m: _tensorrt_llm(m, "1.3", prefix_caching=True),
    "tensorrt_llm-top-1": lambda m: _tensorrt_llm(m, "1.3", top_logprobs=1),
}


@pytest.fixture(params=list(ENGINES))
async def suite(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> AsyncIterator[Suite]:
    """A loaded engine, held against transformers' answers as well."""
    engine = ENGINES[request.param](monkeypatch)
    await engine.load()
    rows = range(0, 500, 71)
    references = [reference.outputs["small"][row] for row in rows]
    yield Suite(engine, [reference.prompts[row] for row in rows], references)
    await engine.unload()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(suite: Suite, check: Check) -> None:
    await check(suite)
    # The stand-ins compute in float32 as the reference does: nothing is close enough to turn.
    assert suite.near_ties == 0


async def test_signals_are_the_onnx_engines_where_the_whole_vocabulary_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx = OnnxEngine("small", SMALL, OnnxOptions())
    whole, few = _vllm(monkeypatch, 1, top_logprobs=512), _vllm(monkeypatch, 1, top_logprobs=2)
    for engine in (onnx, whole, few):
        await engine.load()
    for prompt in conformance.PROMPTS:
        wanted, exact, bound = [await Suite(engine).plain(prompt) for engine in (onnx, whole, few)]
        for name in ("logprobs", "entropies", "margins"):
            np.testing.assert_allclose(getattr(exact, name), getattr(wanted, name), atol=2e-3)
        np.testing.assert_allclose(bound.margins, wanted.margins, atol=2e-3)
        assert (bound.entropies <= wanted.entropies + 1e-4).all()
    await onnx.unload()


class _Broken:
    """An engine with a fault: everything else is the engine's."""

    def __init__(self, engine: Any, **faults: Any) -> None:
        self._engine = engine
        self.__dict__.update(faults)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


async def test_the_suite_notices_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _vllm(monkeypatch, 1)
    await engine.load()

    async def without_draft(turns: Any, sampling: Any, draft: Any, threshold: Any) -> Any:
        async for event in engine.verify(turns, Sampling(max_new_tokens=7), draft, threshold):
            yield event

    broken = Suite(_Broken(engine, verify=without_draft))  # type: ignore[arg-type]
    with pytest.raises(NotConforming, match="verified"):
        await conformance.own_answers_are_accepted_whole(broken)


async def test_the_suite_notices_an_engine_that_forgets_the_constraint() -> None:
    engine = OnnxEngine("small", SMALL, OnnxOptions())
    await engine.load()

    async def write(turns: Any, sampling: Any) -> Any:
        async for event in engine.generate(turns, replace(sampling, constraint=None)):
            yield event

    async def verify(turns: Any, sampling: Any, draft: Any, threshold: Any) -> Any:
        unmarked = replace(draft, is_prediction=False)
        async for event in engine.verify(turns, sampling, unmarked, threshold):
            yield replace(event, allowed=None) if isinstance(event, VerificationResult) else event

    with pytest.raises(NotConforming, match="constraint"):
        await conformance.constraints_are_kept(Suite(_Broken(engine, generate=write)))  # type: ignore[arg-type]
    forgetful = Suite(_Broken(engine, verify=verify))  # type: ignore[arg-type]
    with pytest.raises(NotConforming, match="draft"):
        await conformance.drafts_do_not_break_a_constraint(forgetful)
    with pytest.raises(NotConforming, match="prediction"):
        await conformance.predictions_that_break_a_constraint_are_refused(forgetful)
    await engine.unload()


async def test_the_suite_notices_details_of_another_token() -> None:
    engine = OnnxEngine("small", SMALL, OnnxOptions())
    await engine.load()

    async def write(turns: Any, sampling: Any) -> Any:
        async for event in engine.generate(turns, sampling):
            is_chunk = isinstance(event, TokenChunk) and event.details
            yield replace(event, details=event.details[::-1]) if is_chunk else event

    with pytest.raises(NotConforming, match=r"bytes|two"):
        await conformance.log_probabilities_come_with_the_likeliest_tokens(
            Suite(_Broken(engine, generate=write))  # type: ignore[arg-type]
        )
    await engine.unload()


async def test_the_suite_notices_an_engine_that_says_that_it_resamples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _vllm(monkeypatch, 1)
    await engine.load()
    status = replace(engine.status(), resamples=True)
    with pytest.raises(NotConforming, match="resampled"):
        await conformance.draws_with_a_draft_follow_the_model(
            Suite(_Broken(engine, status=lambda: status))  # type: ignore[arg-type]
        )
