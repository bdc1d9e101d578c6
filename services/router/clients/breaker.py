"""A circuit breaker: after repeated failures, calls fail at once. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Breaker:
    """Opens after `failures` failures in a row. Then one call per `interval_s` is let through until one
    succeeds.

    Calls that overlap and fail count as one failure: otherwise a single pause of the machine, which makes all
    of them late, would open the breaker. clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float], *, failures: int = 3, interval_s: float = 1.0) -> None:
        self._clock = clock
        self._limit = failures
        self._interval_s = interval_s
        self._failures = 0
        self._failed_at = -math.inf
        self._next_probe = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, except for probes."""
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Return whether to make a call now. If it is open, True makes this call the probe."""
        if not self.is_open:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._interval_s
        return True

    def succeeded(self) -> None:
        """Close."""
        self._failures = 0

    def failed(self, began: float) -> None:
        """Count a call's failure, unless it overlaps an earlier one. began: clock seconds at its start."""
        if began < self._failed_at:
            return
        self._failed_at = self._clock()
        self._failures += 1
        if self._failures >= self._limit:
            self._next_probe = self._clock() + self._interval_s
