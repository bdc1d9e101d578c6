"""A GPU that batches, as far as the router's rules depend on it: steps over tokens, in simulated time."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Tokens of one step, as vLLM's chunked prefill has it.
_BUDGET = 2048


class Clock:
    """Simulated milliseconds."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, ms: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_ms + ms, self._count, event))

    def run(self, until_ms: float) -> None:
        while self._events and self.now_ms < until_ms:
            self.now_ms, _, event = heapq.heappop(self._events)
            event()


@dataclass(eq=False)
class _Work:
    prefill: int
    decode: int
    ended: Callable[[], None]


class BatchingStage:
    """Steps take the time of reading the weights, or of computing their tokens if that is longer.

    pass_ms: of the weights. token_ms: of a computed token. sequence_ms: of a sequence that writes a token, in
    a step that is bound by memory.
    """

    def __init__(self, clock: Clock, *, pass_ms: float, token_ms: float, sequence_ms: float) -> None:
        self._clock = clock
        self._pass_ms = pass_ms
        self._token_ms = token_ms
        self._sequence_ms = sequence_ms
        self._works: list[_Work] = []
        self._is_stepping = False

    @property
    def under_way(self) -> int:
        return len(self._works)

    def submit(self, prefill: int, decode: int, ended: Callable[[], None]) -> Callable[[], None]:
        """Compute some tokens and write others after them: the first comes with the last computed one.

        Return what cancels that.
        """
        work = _Work(prefill, decode, ended)
        self._works.append(work)
        self._step()

        def cancel() -> None:
            if work in self._works:
                self._works.remove(work)

        return cancel

    def _step(self) -> None:
        if self._is_stepping or not self._works:
            return
        writing = [work for work in self._works if work.prefill == 0]
        left, reading = _BUDGET - len(writing), []
        for work in self._works:
            if work.prefill and left:
                tokens = min(work.prefill, left)
                left -= tokens
                reading.append((work, tokens))
        bound_ms = (_BUDGET - left) * self._token_ms
        self._is_stepping = True
        self._clock.after(
            max(self._pass_ms + len(writing) * self._sequence_ms, bound_ms),
            lambda: self._end_step(writing, reading),
        )

    def _end_step(self, writing: list[_Work], reading: list[tuple[_Work, int]]) -> None:
        for work, tokens in reading:
            work.prefill -= tokens
            if work.prefill == 0:
                writing.append(work)
        for work in writing:
            work.decode -= 1
            if work.decode <= 0 and work in self._works:
                self._works.remove(work)
                work.ended()
        self._is_stepping = False
        self._step()
