"""What a checkpoint's files say of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd.errors import PreconditionFailed
from services.stage.engines.checkpoint import read_checkpoint

SMALL = Path(__file__).parents[4] / "models" / "small"


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
