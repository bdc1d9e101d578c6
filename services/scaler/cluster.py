"""Protocols of what the scaler needs of Kubernetes and of stages; tests implement them with fakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Scale:
    """Replicas of a deployment. autoscaler: name of the autoscaler that sets their number, or ""."""

    wanted: int
    ready: int
    autoscaler: str = ""


class Cluster(Protocol):
    """Reads and sets numbers of replicas. Raises AsdError: Unavailable if the API cannot be reached,
    PreconditionFailed if it does not allow the call."""

    async def read(self, deployments: Sequence[str]) -> Mapping[str, Scale]:
        """Return the replicas of deployments by name; one that does not exist is left out."""

    async def scale(self, deployment: str, replicas: int) -> None:
        """Set the number of wanted replicas."""


class StageIdleness(Protocol):
    """Knows how long stages have been idle."""

    async def idle_ms(self, stage: str, replicas: int) -> float | None:
        """Return the time since a stage was last used, in milliseconds.

        None if fewer than `replicas` replicas answer.
        """
