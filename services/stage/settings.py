"""Settings of a stage process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from services.common.settings import Section, ServiceSettings, service_config

Count = Annotated[int, Field(ge=1)]


class ModelSettings(Section):
    """One model that the stage can serve."""

    name: Annotated[str, Field(min_length=1)]
    path: Path
    engine: Literal["onnx"] = "onnx"
    threads: Count = 1
    max_batch: Count = 8
    max_lanes: Count = 4
    cached_sequences: Annotated[int, Field(ge=0)] = 4
    preload: bool = True
    default_max_new_tokens: Count = 160
    # Propose parts of a draft again after the target corrected it.
    resync: bool = True


class StageSettings(ServiceSettings):
    """Settings of a stage service."""

    model_config = service_config("ASD_STAGE_")

    listen: str = "127.0.0.1:50061"
    default_model: str = ""
    memory_budget_mb: Annotated[int, Field(ge=0)] = 0
    models: Annotated[tuple[ModelSettings, ...], Field(min_length=1)]
    max_queue: Count = 256
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("models: two have the same name")
        if self.default_model and self.default_model not in names:
            raise ValueError(f"default_model {self.default_model!r} is not one of {', '.join(names)}")
        return self

    @property
    def default_name(self) -> str:
        """Name of the model that answers where a request names none."""
        return self.default_model or self.models[0].name
