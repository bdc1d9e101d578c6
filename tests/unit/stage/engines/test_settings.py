"""Options of an engine, refused beside another one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from services.common.errors import PreconditionFailed
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.generation.logprobs import make_row, row_signals
from services.stage.generation.verification import token_signals
from services.stage.settings import ModelSettings
from tests.limits import PROCESS_S

SMALL = Path(__file__).parents[4] / "models" / "small"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"vllm": {}}, "section vllm is for engine vllm, and this model's is onnx: remove it"),
        (
            {"engine": "vllm", "tensorrt_llm": {"tensor_parallel": 2}},
            "section tensorrt_llm is for engine tensorrt_llm, and this model's is vllm",
        ),
        (
            {"engine": "vllm", "threads": 2},
            "threads is an option of engine onnx, and this model's is vllm: remove it, and set what",
        ),
        ({"engine": "tensorrt_llm", "cached_sequences": 0}, "cached_sequences is an option of engine onnx"),
        ({"engine": "vllm", "max_model_len": 64}, "max_model_len is an option of engine onnx"),
        ({"max_model_len": 1}, "greater than or equal to 2"),
        ({"max_batch": 4097}, "max_batch\n  Input should be less than or equal to 4096"),
        ({"engine": "vllm", "max_batch": 10**9}, "max_batch\n  Input should be less than or equal to 4096"),
        ({"max_lanes": 4097}, "max_lanes\n  Input should be less than or equal to 4096"),
        ({"cached_sequences": 4097}, "cached_sequences\n  Input should be less than or equal to 4096"),
        ({"engine": "vllm", "vllm": {"tensor_paralel": 2}}, "Extra inputs are not permitted"),
        ({"engine": "vllm", "vllm": {"gpu_memory_utilization": 1.5}}, "less than or equal to 1"),
        ({"engine": "vllm", "vllm": {"lora": {"Maths Tasks": "x"}}}, "match pattern"),
        ({"engine": "torch"}, "'onnx', 'vllm' or 'tensorrt_llm'"),
    ],
)
def test_options_of_another_engine_are_refused_with_a_sentence(entry: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelSettings(name="m", path=SMALL, **entry)
    assert sentence in str(caught.value)


def test_an_engines_own_options_are_taken() -> None:
    vllm = {"tensor_parallel": 4, "load_format": "dummy", "sleep_level": 1, "lora": {"math": "/l"}}
    model = ModelSettings(name="m", path=SMALL, engine="vllm", max_batch=32, vllm=vllm)  # type: ignore[arg-type]
    assert model.vllm is not None
    assert (model.vllm.tensor_parallel, model.vllm.lora) == (4, {"math": Path("/l")})


def test_a_stage_imports_no_engine_before_it_is_used() -> None:
    code = (
        "import services.stage.__main__, services.stage.engines.check, sys;"
        "print([m for m in sys.modules if m.partition('.')[0] in {'onnx', 'onnxruntime_genai', 'vllm', "
        "'tensorrt_llm'} or m.endswith(('onnx_engine', 'vllm_engine', 'scoring_engine'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PROCESS_S
    )
    assert done.stdout == "[]\n"


def test_signals_of_few_tokens_bound_those_of_all() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(1, 40)).astype(np.float32) * 2
    wanted = [float(column[0]) for column in token_signals(logits, np.array([7]))]
    logprobs = logits[0] - math.log(np.exp(logits[0].astype(np.float64)).sum())
    order = np.argsort(-logprobs)
    place = int(np.flatnonzero(order == 7)[0])

    def signals(most: int) -> list[float]:
        entries = {int(t): (float(logprobs[t]), r) for r, t in enumerate(order[:most], start=1)}
        entries[7] = (float(logprobs[7]), place + 1)
        row = make_row(7, entries, most)
        assert row.rank == place
        assert row.own.token == int(order[0])
        return [float(column[0]) for column in row_signals([row])]

    assert signals(40) == pytest.approx(wanted, abs=1e-5)
    entropies = [signals(most)[1] for most in (1, 2, 5, 20, 40)]
    assert entropies == sorted(entropies)
    beyond = 1 - float(np.exp(logprobs[order[:5]]).sum())
    assert wanted[1] - entropies[2] <= beyond * math.log(35) + 1e-6
    assert signals(2)[2] == pytest.approx(wanted[2], abs=1e-6)
    assert signals(1)[2] <= wanted[2]


def _config(tmp_path: Path, **changes: Any) -> Path:
    config = json.loads((SMALL / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_checkpoint_is_what_its_files_say(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    llama_70b = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": None,
        "intermediate_size": 28672,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    found = read_checkpoint(_config(tmp_path, **llama_70b))
    # Llama 2 70B's published number of parameters; 320 KiB of bfloat16 keys and values a token.
    assert found.parameters == 68_976_648_192
    assert 2 * found.kv_values_per_token == 320 * 1024
    assert found.eos_ids == (2, 77)
    assert found.weight_bytes == 2 * found.parameters


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not one of"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_a_checkpoint_that_no_engine_runs_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PreconditionFailed, match=sentence):
        read_checkpoint(_config(tmp_path, **changes))
