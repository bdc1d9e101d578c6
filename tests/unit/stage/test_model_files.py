"""Files of a model's directory that are not what they should be are named, with what to do about them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from asd.errors import PreconditionFailed
from services.stage.engines.checkpoint import read_config
from services.stage.engines.onnx.llama_config import read_shape
from services.stage.generation.tokenizer import ChatTokenizer
from services.stage.model_files import parse_json, read_json_file

SMALL = Path(__file__).parents[3] / "models" / "small"


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "levels deep"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "levels deep"),
        ('{"a":' * 101 + "{}" + "}" * 101, "levels deep"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("", "is empty"),
        ("{", "is not JSON"),
        ("1" * 5_000, "is not JSON"),
        (b"\xff", "is not JSON"),
        (None, "is a directory"),
    ],
    ids=str,
)
def test_a_damaged_file_is_named(name: str, content: str | bytes | None, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SMALL, folder)
    (folder / name).unlink()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    read = ChatTokenizer if name.startswith("tokenizer") else read_shape
    with pytest.raises(PreconditionFailed, match=rf"{name} .*{says}"):
        read(folder)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match=r"config\.json"):
        read_config(tmp_path / "config.json")


def test_nesting_that_real_files_have_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100 + "]" * 100)
    assert isinstance(read_json_file(tmp_path / "a.json", ""), list)
    assert parse_json(b"3", "a") == 3
