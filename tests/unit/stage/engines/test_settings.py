"""Options of an engine, refused beside another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

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
        ({"engine": "vllm", "vllm": {"verify_inside": "yes"}}, "valid boolean"),
        (
            {"engine": "vllm", "vllm": {"verify_inside": True, "max_model_len": 120, "proposed_tokens": 128}},
            "max_model_len (120) must exceed proposed_tokens (128)",
        ),
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
        "'tensorrt_llm'} or m.endswith(('.engines.scoring', 'onnx.engine', 'llm.engine'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PROCESS_S
    )
    assert done.stdout == "[]\n"
