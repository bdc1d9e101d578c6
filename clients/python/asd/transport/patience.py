"""How long a service is waited for that was there and is away: it may be starting again. Pure."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from asd.errors import Away, BudgetSpent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asd.errors import AsdError

# For how long a service that was there may stay away until calls stop waiting for it. Chosen: one that loads
# its model from a local disk is back in less.
RESTART_SECONDS = 30.0
# A router that has just started waits so long for stages that it does not know yet: they may be starting as
# well. Chosen: what the start of a small one takes.
NEW_SECONDS = 3.0
# Between two calls: at first, and at most. Chosen: none of a restart's seconds is lost, and a service that
# comes back to many waiting calls is not met by all of their attempts at once.
_SHORTEST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
# Part of the time that the service has been away already. Chosen.
_SHARE_OF_ABSENCE = 0.25
# An absence is over once no call has met it for so long: the service may have been back meanwhile. Chosen:
# longer than a call that waits takes to try again, its connection attempt included.
_SAME_ABSENCE_SECONDS = 10.0
# A call needs more time than this to be worth another attempt; its caller hears the reason instead. Chosen.
_CALL_SECONDS = 0.05


class Patience:
    """What one caller knows of a service's absence, and whether a call waits for its return.

    A service that has answered before is waited for until it has been away for RESTART_SECONDS. One that has
    not is waited for until this object is `new_seconds` old: both may have started together. Any other call
    fails at once.
    clock: monotonic seconds. sleep: waits for so many seconds.
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
        # When a call met it away last.
        self._met_away = 0.0

    def now(self) -> float:
        """Return the clock's time, in seconds."""
        return self._clock()

    def there(self) -> None:
        """The service has answered, whatever it said."""
        self._was_there = True
        self._away_since = None

    def failed(self, error: AsdError) -> None:
        """A call has failed; where the service said so itself, it is there."""
        if not isinstance(error, Away | BudgetSpent):
            self.there()

    async def wait(self, until: float) -> bool:
        """Wait before a service that is away is called again; return False, at once, if it should not be.

        until: the call's deadline by the clock.
        """
        pause_s = self.pause_s(until)
        if pause_s is None:
            return False
        await self._sleep(pause_s)
        return True

    def pause_s(self, until: float) -> float | None:
        """Return for how long to wait before a service that is away is called again; None: do not call."""
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
