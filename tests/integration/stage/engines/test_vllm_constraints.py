"""Constraints in vLLM, on its stand-in: what the conformance suite does not show."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asd.errors import ModelRefusal
from asd.values import Constraint, FinishReason, Message, Sampling
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.conformance import Suite, collect
from services.stage.engines.vllm import engine as vllm_engine
from services.stage.engines.vllm.engine import VllmOptions
from services.stage.engines.vllm.proposer import GRAMMAR, WRITTEN
from services.stage.generation.tokenizer import ChatTokenizer
from tests.fakes import fake_vllm

SMALL = Path(__file__).parents[4] / "models" / "small"
TURNS = (Message("user", "Tell me of Ardia."),)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.FakeVllm:
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def processor() -> Any:
    module = importlib.import_module("services.stage.engines.vllm.constraint")
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(SMALL)))
    return module.ConstraintProcessor(config, "cpu", is_pin_memory=False)


def _params(grammar: str, written: list[int], temperature: float = 1.0) -> fake_vllm.SamplingParams:
    extra = {GRAMMAR: grammar, WRITTEN: written}
    return fake_vllm.SamplingParams(extra_args=extra, temperature=temperature)


async def test_what_follows_a_correction_is_proposed_as_far_as_the_constraint_allows() -> None:
    engine = vllm_engine.make_engine("small", SMALL, VllmOptions())
    await engine.load()
    texts = ("A lamp is made of glass and iron, it is sold in Statnor.", "Grain grows wherever it rains, so")
    sampling = Sampling(max_new_tokens=80, constraint=Constraint(choice=texts))
    wanted = await collect(engine.generate(TURNS, sampling))
    other = next(text for text in texts if text != wanted.result.text)
    draft = Suite(engine).draft(ChatTokenizer(SMALL).encode_text(other), FinishReason.EOS)
    found = await collect(engine.verify(TURNS, sampling, draft, None), "first")
    assert found.verification is not None
    assert (found.verification.accepted, found.verification.allowed) == (0, None)
    assert found.result.ids == wanted.result.ids


async def test_a_request_without_a_constraint_carries_none(library: fake_vllm.FakeVllm) -> None:
    engine = vllm_engine.make_engine("small", SMALL, VllmOptions())
    await engine.load()
    fake_vllm.forget_probe()
    await collect(engine.generate(TURNS, Sampling(max_new_tokens=2)))
    assert [each.extra_args for each in library.engines[0].asked] == [None]


def test_an_answer_goes_on_from_where_its_prompt_ends(processor: Any) -> None:
    yes, no = (ChatTokenizer(SMALL).encode_text(text) for text in ("yes", "no"))
    start, later = (
        processor.new_req_logits_processor(_params('start: "yes" | "no"', written))
        for written in ([], yes[:1])
    )
    logits = np.zeros(512, np.float32)
    assert np.isfinite(start([], logits.copy())[[yes[0], no[0]]]).all()
    found = later([], logits.copy())
    assert (np.isfinite(found[yes[1]]), np.isfinite(found[no[0]])) == (True, False)


def test_after_an_answers_end_its_logits_stay_as_they_are(processor: Any) -> None:
    """vLLM steps a request once more before it hears of the end."""
    yes = ChatTokenizer(SMALL).encode_text("yes")
    keep = processor.new_req_logits_processor(_params('start: "yes"', []))
    assert np.isinf(keep([], np.zeros(512, np.float32))).any()
    for written in (yes, [*yes, yes[0]]):
        assert not keep(written, np.zeros(512, np.float32)).any()


def test_a_token_that_a_grammar_does_not_allow_does_not_end_the_engine(processor: Any) -> None:
    """The stage's own matcher fails the request; others go on."""
    keep = processor.new_req_logits_processor(_params('start: "yes"', []))
    assert not keep(ChatTokenizer(SMALL).encode_text("no"), np.zeros(512, np.float32)).any()


async def test_without_constraints_the_runner_is_vllms_choice_and_the_stage_refuses() -> None:
    options = VllmOptions(constraints=False)
    engine = vllm_engine.make_engine("small", SMALL, options)
    backend = vllm_engine.VllmBackend("small", SMALL, read_checkpoint(SMALL), options)
    assert "logits_processors" not in backend.arguments()
    await engine.load()
    assert not engine.status().constrains
    with pytest.raises(ModelRefusal) as refused:
        await collect(engine.generate(TURNS, Sampling(constraint=Constraint(choice=("a",)))))
    assert refused.value.field == "sampling.constraint"


def test_a_grammar_that_a_worker_cannot_compile_does_not_end_its_engine(processor: Any) -> None:
    assert processor.new_req_logits_processor(_params("start: /(/", [])) is None
