"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.common.serving import ServerSettings
from services.common.settings import service_config

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PolicySettings(ServerSettings):
    """Settings of the policy service.

    artifact: an artifact, or a store of versions, which is polled every artifact_poll_seconds. cascade: names
    of the stages that its policies must have been made for; empty: any. drift_run_length, drift_tolerance: of
    drift.DriftRule. novelty_threshold: novelty above which a prompt counts as unlike all that a policy was
    fitted to; None: each policy's own, 1: none counts. shadow_artifact: candidate that decides beside the
    live policy.
    """

    model_config = service_config("ASD_POLICY_")

    listen: str = "127.0.0.1:50051"
    artifact: Path
    artifact_poll_seconds: Positive = 10.0
    cascade: tuple[str, ...] = ()
    reports_path: Path | None = None
    drift_run_length: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10_000.0
    drift_tolerance: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    novelty_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    shadow_artifact: Path | None = None
    shadow_path: Path | None = None
    shadow_max_mb: Positive = 256.0
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0

    @model_validator(mode="after")
    def _check_shadow(self) -> Self:
        if self.shadow_path is not None and self.shadow_artifact is None:
            raise ValueError("shadow_path needs shadow_artifact: name the candidate policy as well")
        return self
