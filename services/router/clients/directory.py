"""Describes the services of a cascade."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asd.v1 import cascade_pb2
from services.common.version import VERSION

if TYPE_CHECKING:
    from collections.abc import (
        Sequence,
    )

    from services.router.clients.policy import GrpcPolicy
    from services.router.clients.stage import GrpcStage
    from services.router.interfaces import Activator


class Directory:
    """Describes the cascade by asking each of its services."""

    def __init__(
        self,
        stages: Sequence[GrpcStage],
        policy: GrpcPolicy | None,
        static_plan: Sequence[str],
        activator: Activator,
    ) -> None:
        self._activator = activator
        self._stages = tuple(stages)
        self._policy = policy
        self._static_plan = tuple(static_plan)

    async def describe(self) -> cascade_pb2.DescribeResponse:
        """Return the cascade's description."""
        stages, policy = await asyncio.gather(
            asyncio.gather(*(self._describe(stage) for stage in self._stages)),
            self._policy.describe() if self._policy else _nothing(),
        )
        return cascade_pb2.DescribeResponse(
            stages=stages, policy=policy, static_plan=self._static_plan, version=VERSION
        )

    async def _describe(self, stage: GrpcStage) -> cascade_pb2.StageDescription:
        if stage.stage.index in self._activator.scaled_to_zero:
            description = stage.describe_away()
            description.asleep = True
            return description
        return await stage.describe()


async def _nothing() -> None:
    return None
