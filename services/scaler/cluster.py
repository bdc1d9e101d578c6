"""What the manager needs of Kubernetes: protocols that others meet, and tests with fakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Scale:
    """Replicas of a deployment. autoscaler: name of what else sets their number, or ""."""

    wanted: int
    ready: int
    autoscaler: str = ""


class Cluster(Protocol):
    """Reads and sets numbers of replicas. Raises AsdError: Unavailable where the API cannot be reached,
    PreconditionFailed where it does not allow it."""

    async def read(self, deployments: Sequence[str]) -> Mapping[str, Scale]:
        """Return the replicas of deployments by name; one that does not exist is left out."""

    async def scale(self, deployment: str, replicas: int) -> None:
        """Set the number of replicas that are wanted."""


class StageIdleness(Protocol):
    """Knows how long stages have been idle."""

    async def idle_ms(self, stage: str, replicas: int) -> float | None:
        """Return the time since a stage was last used, in milliseconds; None where not all of so many
        replicas say."""
