"""A model that cannot be read, among several of a process."""

import logging

import pytest

from services.common.errors import PreconditionFailed
from services.stage.engines import make_all
from services.stage.settings import ModelSettings
from tests.fakes import tiny_llama


def _models(tmp_path):
    tiny_llama.write(tmp_path / "sound")
    tiny_llama.write(tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"hidden_size": NaN}')
    return [ModelSettings(name=name, path=tmp_path / name) for name in ("damaged", "sound")]


def test_a_damaged_model_leaves_the_others_serving_with_one_line_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        assert list(make_all(_models(tmp_path), "sound", 8)) == ["sound"]
    (record,) = caplog.records
    assert "model damaged is not served" in record.getMessage()
    assert "config.json" in record.getMessage()


def test_a_damaged_default_model_ends_the_process(tmp_path):
    with pytest.raises(PreconditionFailed, match="NaN"):
        make_all(_models(tmp_path), "damaged", 8)
