"""Health of services, logged when it changes, and how long plans avoid a stage. Pure."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from asd.errors import AsdError
    from services.router.domain import Stage

logger = logging.getLogger(__name__)

# Plans avoid an unreachable stage for AWAY_SECONDS. While a stage hangs, the time doubles up to the maximum.
# Chosen: an attempt per second costs nothing at a stage that is gone, and half a deadline at one that hangs.
AWAY_SECONDS = 1.0
LONGEST_AWAY_SECONDS = 30.0


class Health:
    """Health of a service, for the log. name: of the service. clock: monotonic seconds.

    A failed service stays unhealthy for a second even if it answers, so that the log has at most two lines a
    second.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        # The time of the last failure; None: the service is healthy.
        self._failed: float | None = None

    def failed(self, error: AsdError, consequence: str) -> None:
        """Count a failed call. consequence: what follows while the service is unhealthy, for the log."""
        if self._failed is None:
            reason = error.message.removeprefix(f"{self._name}: ")
            logger.warning("%s is unhealthy, %s: %s", self._name, consequence, reason)
        self._failed = self._clock()

    def answered(self) -> None:
        """Count an answered call."""
        if self._failed is not None and self._clock() - self._failed >= AWAY_SECONDS:
            self._failed = None
            logger.info("%s is healthy again", self._name)


class StageHealth(Health):
    """Health of a stage, and how long plans avoid it."""

    def __init__(self, stage: Stage, clock: Callable[[], float]) -> None:
        super().__init__(str(stage), clock)
        self._avoided_until = clock()
        self._times_silent = 0
        # Whether it was found to hang, and has sent nothing since.
        self._has_hung = False
        # Total time of silent calls since the stage last sent something, and when the last of them ended.
        self._silent_ms = 0.0
        self._silent_until = -math.inf

    @property
    def is_avoided(self) -> bool:
        """Whether plans avoid the stage."""
        return self._avoided_until > self._clock()

    @property
    def is_hanging(self) -> bool:
        """Whether plans avoid the stage because it is silent, not because it failed."""
        return self._has_hung and self.is_avoided

    def was_silent(self, call_ms: float) -> float:
        """Count a call that ends now and got nothing from the stage. call_ms: its duration.

        Returns for how many milliseconds the stage's calls were silent. Overlapping times count once.
        """
        now = self._clock()
        silent_s = now - max(now - call_ms / 1000.0, self._silent_until)
        self._silent_ms += max(silent_s, 0.0) * 1000.0
        self._silent_until = now
        return self._silent_ms

    def spoke(self) -> None:
        """Note that the stage has sent something."""
        self._silent_ms = 0.0
        self._has_hung = False

    def went_away(self, error: AsdError) -> None:
        """Avoid the stage for a second, since it cannot be called."""
        self.spoke()
        self.failed(error, "and avoided")
        self._avoid(AWAY_SECONDS)

    def hung(self, error: AsdError) -> None:
        """Avoid a silent stage for twice as long as the last time. Simultaneous failures count once."""
        self.failed(error, "and avoided")
        self._has_hung = True
        if self._avoid(min(AWAY_SECONDS * 2.0**self._times_silent, LONGEST_AWAY_SECONDS)):
            self._times_silent += 1

    def failed_a_request(self, error: AsdError) -> None:
        """Count a request that the stage could not answer. It is not avoided: other requests may succeed."""
        self.spoke()
        self.failed(error, "though not avoided")

    def answered(self) -> None:
        """Count a whole answer."""
        super().answered()
        self.spoke()
        self._avoided_until = self._clock()
        self._times_silent = 0

    def _avoid(self, seconds: float) -> bool:
        """Avoid the stage. False if it is avoided already, so that simultaneous failures count once."""
        if self.is_avoided:
            return False
        self._avoided_until = self._clock() + seconds
        return True
