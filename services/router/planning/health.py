"""Whether services answer: a line in the log where that changes, and how long a stage is avoided. Pure."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from asd.errors import AsdError
    from services.router.domain import Stage

logger = logging.getLogger(__name__)

# For how long plans avoid a stage that was away: at first, and at most, doubling while it hangs. Chosen: one
# attempt per second costs nothing where the stage is gone, and half a deadline where it hangs.
AWAY_SECONDS = 1.0
LONGEST_AWAY_SECONDS = 30.0


class Health:
    """Of a service, as the log tells it. name: of the service. clock: monotonic seconds.

    A service that fails now and answers a moment later is unhealthy all the while, so that the log has two
    lines a second at most, whatever comes in between.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        # When it failed last; None: it is healthy.
        self._failed: float | None = None

    def failed(self, error: AsdError, consequence: str) -> None:
        """A call failed. consequence: what follows while it is so, for the log."""
        if self._failed is None:
            reason = error.message.removeprefix(f"{self._name}: ")
            logger.warning("%s is unhealthy, %s: %s", self._name, consequence, reason)
        self._failed = self._clock()

    def answered(self) -> None:
        """A call was answered."""
        if self._failed is not None and self._clock() - self._failed >= AWAY_SECONDS:
            self._failed = None
            logger.info("%s is healthy again", self._name)


class StageHealth(Health):
    """Of a stage, with how long plans avoid it."""

    def __init__(self, stage: Stage, clock: Callable[[], float]) -> None:
        super().__init__(str(stage), clock)
        self._avoided_until = clock()
        self._times_silent = 0
        # Whether it was found to hang, and nothing has come from it since.
        self._has_hung = False
        # Milliseconds of calls from which nothing came, since something did last, and when they ended.
        self._silent_ms = 0.0
        self._silent_until = -math.inf

    @property
    def is_avoided(self) -> bool:
        """Whether plans leave it out."""
        return self._avoided_until > self._clock()

    @property
    def is_hanging(self) -> bool:
        """Whether plans leave it out because it is silent, and not because it failed."""
        return self._has_hung and self.is_avoided

    def was_silent(self, call_ms: float) -> float:
        """A call of so many milliseconds ends now, and nothing came from it.

        Returns for how many milliseconds nothing has come from the stage's calls; what overlaps counts once.
        """
        now = self._clock()
        silent_s = now - max(now - call_ms / 1000.0, self._silent_until)
        self._silent_ms += max(silent_s, 0.0) * 1000.0
        self._silent_until = now
        return self._silent_ms

    def spoke(self) -> None:
        """Something came from it."""
        self._silent_ms = 0.0
        self._has_hung = False

    def went_away(self, error: AsdError) -> None:
        """It cannot be called: avoid it for a second."""
        self.spoke()
        self.failed(error, "and avoided")
        self._avoid(AWAY_SECONDS)

    def hung(self, error: AsdError) -> None:
        """It is silent: avoid it, for twice as long as the last time. Calls that fail together are one
        time."""
        self.failed(error, "and avoided")
        self._has_hung = True
        if self._avoid(min(AWAY_SECONDS * 2.0**self._times_silent, LONGEST_AWAY_SECONDS)):
            self._times_silent += 1

    def failed_a_request(self, error: AsdError) -> None:
        """It could not answer one request, which says nothing of others."""
        self.spoke()
        self.failed(error, "though not avoided")

    def answered(self) -> None:
        """It gave a whole answer."""
        super().answered()
        self.spoke()
        self._avoided_until = self._clock()
        self._times_silent = 0

    def _avoid(self, seconds: float) -> bool:
        """Avoid it; return whether it was not avoided already."""
        if self.is_avoided:
            return False
        self._avoided_until = self._clock() + seconds
        return True
