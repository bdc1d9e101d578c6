"""How busy the stages are, as far as this router knows. Pure."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Weight of the newest wait in the mean. Chosen: some ten calls carry nine tenths of it.
_NEWEST = 0.2
# Time in which an old mean halves. Chosen: a stage that plans avoid for its queue would otherwise never be
# asked again, and so never be seen to be idle.
_HALF_LIFE_S = 5.0


class Load:
    """Calls under way at each stage, and the wait to be expected there. clock: monotonic seconds."""

    def __init__(self, stage_count: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._under_way = [0] * stage_count
        self._mean_ms = [0.0] * stage_count
        self._measured = [0.0] * stage_count

    @contextmanager
    def calling(self, stage: int) -> Iterator[None]:
        """Count the block as a call under way at a stage."""
        self._under_way[stage] += 1
        try:
            yield
        finally:
            self._under_way[stage] -= 1

    def waited(self, stage: int, queue_ms: float) -> None:
        """A call waited this long in a stage's queue, by the stage's clock."""
        old = self.expected_queue_ms(stage)
        self._mean_ms[stage] = old + _NEWEST * (queue_ms - old)
        self._measured[stage] = self._clock()

    def queue_depth(self, stage: int) -> int:
        """Return the number of this router's calls under way at a stage."""
        return self._under_way[stage]

    def expected_queue_ms(self, stage: int) -> float:
        """Return the exponentially weighted mean of the waits, fading while none is measured."""
        mean_ms = self._mean_ms[stage]
        if mean_ms <= 0.0:
            return 0.0
        return float(mean_ms * 0.5 ** ((self._clock() - self._measured[stage]) / _HALF_LIFE_S))
