"""Makes engines from the settings of models. Each engine's module is imported only when it is used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from asd.errors import AsdError, PreconditionFailed
from services.common.extras import missing_of
from services.stage.engines.settings import TensorrtLlmSettings, VllmSettings, most_at_a_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.stage.engines.engine import Engine
    from services.stage.settings import ModelSettings


logger = logging.getLogger(__name__)


def make_all(
    models: Sequence[ModelSettings], default: str, max_queue: int
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Return a process's engines by name, and why a model has none, by name.

    A model that cannot be read is left out with an error in the log. Raises PreconditionFailed if that is the
    default model.
    """
    engines: dict[str, Engine] = {}
    damaged: dict[str, str] = {}
    for model in models:
        try:
            engines |= make_engines(model, max_queue)
        except AsdError as error:
            if model.name == default:
                raise
            logger.error("model %s is not served: %s", model.name, error)
            damaged |= dict.fromkeys(
                (model.name, *(f"{model.name}/{task}" for task in model.tasks)), str(error)
            )
    return engines, damaged


def make_engines(model: ModelSettings, max_queue: int) -> dict[str, Engine]:
    """Return a model's engine by its name, and after it one for each of its adapters, as model/task.

    Raises PreconditionFailed if the model cannot be read, or a package that its engine needs is missing.
    """
    try:
        if model.engine == "vllm":
            return _vllm(model, max_queue)
        if model.engine == "tensorrt_llm":
            return {model.name: _tensorrt_llm(model, max_queue)}
        # Some packages are imported only when the model is loaded.
        for name in missing_of("stage"):
            raise ModuleNotFoundError(name=name)
        return {model.name: _onnx(model, max_queue)}
    except ModuleNotFoundError as error:
        extra = {"onnx": "stage", "vllm": "vllm", "tensorrt_llm": "tensorrt-llm"}[model.engine]
        raise PreconditionFailed(
            f"{error.name} is not installed, which engine {model.engine} needs: use the image of target "
            f"stage-{model.engine.replace('_', '-')}, or pip install '.[{extra}]' in asd's directory"
        ) from error


def _onnx(model: ModelSettings, max_queue: int) -> Engine:
    from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions

    options = OnnxOptions(
        threads=model.threads,
        max_batch=most_at_a_time(model.engine, model.max_batch),
        max_lanes=model.max_lanes,
        cached_sequences=model.cached_sequences,
        max_model_len=model.max_model_len,
        max_queue=max_queue,
        default_max_new_tokens=model.default_max_new_tokens,
        resync=model.resync,
    )
    return OnnxEngine(model.name, model.path, options)


def _vllm(model: ModelSettings, max_queue: int) -> dict[str, Engine]:
    from services.stage.engines.scoring import AdapterEngine
    from services.stage.engines.vllm.engine import VllmOptions, make_engine

    section = model.vllm or VllmSettings()
    options = VllmOptions(
        max_batch=most_at_a_time(model.engine, model.max_batch),
        max_queue=max_queue,
        default_max_new_tokens=model.default_max_new_tokens,
        resync=model.resync,
        **dict(section),
    )
    engine = make_engine(model.name, model.path, options)
    adapters = {f"{model.name}/{task}": AdapterEngine(engine, task) for task in section.lora}
    return {model.name: engine, **adapters}


def _tensorrt_llm(model: ModelSettings, max_queue: int) -> Engine:
    from services.stage.engines.tensorrt_llm.engine import TensorrtLlmOptions, make_engine

    section = model.tensorrt_llm or TensorrtLlmSettings()
    options = TensorrtLlmOptions(
        max_batch=most_at_a_time(model.engine, model.max_batch),
        max_queue=max_queue,
        default_max_new_tokens=model.default_max_new_tokens,
        resync=model.resync,
        **dict(section),
    )
    return make_engine(model.name, model.path, options)
