"""How long calls wait for a service that is unavailable: it may be restarting. No gRPC, no protobuf."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from asd.errors import Away, BudgetSpent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asd.errors import AsdError

# How long calls wait for a service that has answered before. Chosen: a service that loads its model from a
# local disk restarts in less.
RESTART_SECONDS = 30.0
# How long a router that has just started waits for stages that have not answered yet: they may be starting
# too. Chosen: the start of a small stage takes this long.
NEW_SECONDS = 3.0
# First and longest pause between two attempts. Chosen: short, so that a restart is noticed at once, and
# growing, so that the waiting calls do not all meet a restarted service at the same moment.
_SHORTEST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
# Length of a pause, as a share of the absence so far. Chosen.
_SHARE_OF_ABSENCE = 0.25
# An absence counts as over after this time without a failed call: the service may have been back meanwhile.
# Chosen: longer than a waiting call takes for its next attempt, including the connection.
_SAME_ABSENCE_SECONDS = 10.0
# With less time left than this, a call is not repeated: its caller gets the reason instead. Chosen.
_CALL_SECONDS = 0.05


class Patience:
    """Decides whether a call waits for an unavailable service, by what one caller knows of it.

    If the service has answered before, calls wait until it has been away for RESTART_SECONDS. If it has not,
    they wait until this object is `new_seconds` old: both may have started together. Otherwise calls fail at
    once. clock: monotonic seconds. sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        *,
        new_seconds: float = 0.0,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._known_by = clock() + new_seconds
        self._was_there = False
        self._away_since: float | None = None
        # Time of the last call that found it unavailable.
        self._met_away = 0.0

    def now(self) -> float:
        """Return the clock's time, in seconds."""
        return self._clock()

    def there(self) -> None:
        """The service has answered, if only with an error."""
        self._was_there = True
        self._away_since = None

    def failed(self, error: AsdError) -> None:
        """A call has failed. If the service itself sent the error, it is up."""
        if not isinstance(error, Away | BudgetSpent):
            self.there()

    async def wait(self, until: float) -> bool:
        """Wait before the next attempt; return False at once if there should be none.

        until: the call's deadline, in clock seconds.
        """
        pause_s = self.pause_s(until)
        if pause_s is None:
            return False
        await self._sleep(pause_s)
        return True

    def pause_s(self, until: float) -> float | None:
        """Return the pause before the next attempt, in seconds; None: make no attempt."""
        now = self._clock()
        if self._away_since is None or now - self._met_away > _SAME_ABSENCE_SECONDS:
            self._away_since = now
        self._met_away = now
        absent_s = now - self._away_since
        may_return = absent_s < RESTART_SECONDS if self._was_there else now < self._known_by
        pause_s = min(max(absent_s * _SHARE_OF_ABSENCE, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)
        if not may_return or now + pause_s + _CALL_SECONDS > until:
            return None
        return pause_s
