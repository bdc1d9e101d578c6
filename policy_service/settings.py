"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.common.settings import ServiceSettings, service_config


class PolicySettings(ServiceSettings):
    """Settings of the policy service."""

    model_config = service_config("ASD_POLICY_")

    listen: str = "127.0.0.1:50051"
    artifact: Path
    reports_path: Path | None = None
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
