"""A model that cannot be read or loaded, among several of a process."""

import logging

import pytest

from asd.errors import NotFound, PreconditionFailed, ResourceExhausted
from services.stage.__main__ import build, preload
from services.stage.engines.factory import make_all
from services.stage.model_pool import ModelPool
from services.stage.settings import ModelSettings, StageSettings
from tests.fakes import tiny_llama
from tests.fakes.quick_stage import QuickEngine


def _models(tmp_path):
    tiny_llama.write(tmp_path / "sound")
    tiny_llama.write(tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"hidden_size": NaN}')
    return [ModelSettings(name=name, path=tmp_path / name) for name in ("damaged", "sound")]


def test_a_damaged_model_leaves_the_others_serving_with_one_line_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        engines, damaged = make_all(_models(tmp_path), "sound", 8)
    assert list(engines) == ["sound"]
    assert list(damaged) == ["damaged"]
    (record,) = caplog.records
    assert record.getMessage().index("damaged") < record.getMessage().index("config.json")


def test_a_damaged_default_model_ends_the_process(tmp_path):
    with pytest.raises(PreconditionFailed, match="NaN"):
        make_all(_models(tmp_path), "damaged", 8)


async def test_a_request_for_a_damaged_model_is_told_the_file_and_the_place(tmp_path):
    settings = StageSettings(default_model="sound", models=_models(tmp_path))
    pool, _ = build(settings)
    with pytest.raises(PreconditionFailed, match=r"damaged.*config\.json.*NaN"):
        async with pool.use("damaged"):
            pass
    for call in (pool.load, pool.unload):
        with pytest.raises(PreconditionFailed, match="NaN"):
            await call("damaged")
        with pytest.raises(NotFound):
            await call("other")


def test_the_adapters_of_a_damaged_model_are_damaged_with_it(tmp_path):
    models = _models(tmp_path)
    models[0] = ModelSettings(
        name="damaged",
        path=tmp_path / "damaged",
        engine="vllm",
        vllm={"lora": {"code": tmp_path}},
    )
    _, damaged = make_all(models, "sound", 8)
    assert list(damaged) == ["damaged", "damaged/code"]


class _Unloadable(QuickEngine):
    """Fails each load with an error."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    async def load(self):
        raise self._error


def _of_two(error, default):
    """Return a pool of two models, the first of which fails its loads, and its settings."""
    settings = StageSettings(
        default_model=default, models=[ModelSettings(name=name, path="/x") for name in ("bad", "good")]
    )
    return ModelPool({"bad": _Unloadable(error), "good": QuickEngine()}, default), settings


@pytest.mark.parametrize("kind", [PreconditionFailed, ResourceExhausted])
async def test_what_cannot_be_loaded_at_the_start_leaves_the_others_serving(kind, caplog):
    pool, settings = _of_two(kind("weights are cut short"), "good")
    with caplog.at_level(logging.ERROR):
        await preload(pool, settings)
    (record,) = caplog.records
    assert record.getMessage().index("bad") < record.getMessage().index("cut short")
    async with pool.use("good"):
        pass
    with pytest.raises(kind, match="cut short"):
        await pool.load("bad")


@pytest.mark.parametrize("kind", [PreconditionFailed, ResourceExhausted])
async def test_a_default_model_that_cannot_be_loaded_ends_the_process(kind):
    pool, settings = _of_two(kind("weights are cut short"), "bad")
    with pytest.raises(kind, match="cut short"):
        await preload(pool, settings)
