"""A circuit breaker: after repeated failures, spare callers the wait for another. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Breaker:
    """Opens after `failures` failures in a row; lets one call through every `interval_s` seconds until one
    succeeds.

    clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float], *, failures: int = 3, interval_s: float = 1.0) -> None:
        self._clock = clock
        self._limit = failures
        self._interval_s = interval_s
        self._failures = 0
        self._next_probe = 0.0

    def allows(self) -> bool:
        """Return whether to make a call now. True while open makes the caller the probe."""
        if self._failures < self._limit:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._interval_s
        return True

    def succeeded(self) -> None:
        """Close."""
        self._failures = 0

    def failed(self) -> None:
        """Count a failure."""
        self._failures += 1
        if self._failures >= self._limit:
            self._next_probe = self._clock() + self._interval_s
