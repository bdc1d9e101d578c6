"""Settings of the manager."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from services.common.serving import ServerSettings
from services.common.settings import Section, Target, service_config
from services.common.tls import ClientTls

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ManagedStageSettings(Section):
    """A stage that may be scaled to zero, and when; as in services.scaler.idle_scaler.Rule.

    target: all of its replicas, as in the router's settings. deployment: the deployment to scale.
    """

    name: str = Field(min_length=1)
    deployment: str = Field(min_length=1)
    target: Target
    tls: ClientTls | None = None
    idle_seconds: Positive = 300.0
    min_awake_seconds: Seconds = 60.0
    give_up_seconds: Positive = 900.0
    wake_replicas: int = Field(default=1, ge=1)
    min_replicas: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas > self.wake_replicas:
            raise ValueError("min_replicas is above wake_replicas")
        return self


class ScalerSettings(ServerSettings):
    """Settings of the asd manager.

    namespace: of the deployments; empty: the manager's own. poll_seconds: between two updates. timeout_ms: of
    each call to a stage or to the Kubernetes API.
    """

    model_config = service_config("ASD_MANAGER_")

    listen: str = "127.0.0.1:50053"
    namespace: str = ""
    stages: Annotated[tuple[ManagedStageSettings, ...], Field(min_length=1)]
    poll_seconds: Positive = 2.0
    timeout_ms: Positive = 5_000.0
    drain_seconds: Seconds = 10.0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for key in ("name", "deployment"):
            values = [getattr(stage, key) for stage in self.stages]
            if len(set(values)) < len(values):
                raise ValueError(f"stages: two have the same {key}")
        return self
