"""Settings of a stage process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.common.serving import ServerSettings
from services.common.settings import Requests, Section, service_config
from services.stage.engines.settings import (
    MOST_AT_A_TIME,
    AtATime,
    ContextLength,
    Count,
    EngineName,
    TensorrtLlmSettings,
    Threads,
    VllmSettings,
    check_options,
)


class ModelSettings(Section):
    """One model that the stage can serve."""

    name: Annotated[str, Field(min_length=1)]
    path: Path
    engine: EngineName = "onnx"
    # Requests computed at a time. None: 8 for onnx, 64 for the GPU engines.
    max_batch: AtATime | None = None
    # Options of the onnx engine; each other engine has its own section.
    threads: Threads = 1
    max_lanes: AtATime = 4
    cached_sequences: Annotated[int, Field(ge=0, le=MOST_AT_A_TIME)] = 4
    # Tokens of prompt and answer at most. None: the model's.
    max_model_len: ContextLength | None = None
    preload: bool = True
    default_max_new_tokens: Count = 160
    # Propose parts of a draft again after a correction.
    resync: bool = True
    vllm: VllmSettings | None = None
    tensorrt_llm: TensorrtLlmSettings | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Types of task that the model has adapters for."""
        return tuple(self.vllm.lora) if self.vllm else ()

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        check_options(self.engine, self.model_fields_set)
        return self


class StageSettings(ServerSettings):
    """Settings of a stage service."""

    model_config = service_config("ASD_STAGE_")

    listen: str = "127.0.0.1:50061"
    default_model: str = ""
    memory_budget_mb: Annotated[int, Field(ge=0)] = 0
    models: Annotated[tuple[ModelSettings, ...], Field(min_length=1)]
    max_queue: Requests = 256
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [model.name for model in self.models]
        served = [*names, *(f"{model.name}/{task}" for model in self.models for task in model.tasks)]
        if len(set(served)) < len(served):
            raise ValueError("models: two have the same name, adapters counted as MODEL/TASK")
        if self.default_model and self.default_model not in names:
            raise ValueError(f"default_model {self.default_model!r} is not one of {', '.join(names)}")
        return self

    @property
    def default_name(self) -> str:
        """Name of the model that answers requests that name none."""
        return self.default_model or self.models[0].name
