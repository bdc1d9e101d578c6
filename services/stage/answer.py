"""An answer as it grows: its text, its tokens' signals, and stop sequences. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from services.stage.engine import TokenChunk
from services.stage.verification import token_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Signals = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


class GrowingText(Protocol):
    """Text of tokens, as services.stage.tokenizer.TextStream makes it."""

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that they add."""

    def finish(self) -> str:
        """Return what is left at the end."""


class AnswerBuilder:
    """Collects an answer's tokens and turns them into chunks.

    Without stop sequences a chunk goes out as it comes. With them, tokens that may be the beginning of one
    are held back, and the answer is cut before the first that appears.
    """

    def __init__(self, stream: GrowingText, stop: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self._stop = stop
        self._held_back = max((len(s) for s in stop), default=1) - 1
        self._text = ""
        self._ids: list[int] = []
        self._ends: list[int] = []
        self._signals: list[tuple[float, float, float]] = []
        self._sent = 0
        self._sent_text = 0
        self.has_stopped = False
        # Tokens added, those that a stop sequence cut off included, up to the one that completed it.
        self.taken = 0

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the answer."""
        return tuple(self._ids)

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._text

    def extend(self, ids: list[int], logits: npt.NDArray[np.float32]) -> TokenChunk | None:
        """Add tokens with the logits that they were chosen from, float32 [tokens, V].

        Returns the chunk that may go out now, or None. After a stop sequence further tokens are dropped.
        """
        if self.has_stopped:
            return None
        return self.extend_known(ids, token_signals(logits, np.array(ids, np.int64)))

    def extend_known(self, ids: list[int], signals: Signals) -> TokenChunk | None:
        """Add tokens whose log-probabilities, entropies and margins are known, float32 [tokens] each.

        Returns as `extend` does.
        """
        if self.has_stopped:
            return None
        if not self._stop:
            text = self._stream.push(ids)
            self._text += text
            self._ids += ids
            self.taken += len(ids)
            return TokenChunk(tuple(ids), text, *signals)
        for place, token in enumerate(ids):
            start = max(0, len(self._text) - self._held_back)
            self._text += self._stream.push([token])
            self._ids.append(token)
            self.taken += 1
            self._ends.append(len(self._text))
            self._signals.append(
                (float(signals[0][place]), float(signals[1][place]), float(signals[2][place]))
            )
            cuts = [cut for cut in (self._text.find(s, start) for s in self._stop) if cut >= 0]
            if cuts:
                self._cut(min(cuts))
                return self._release(len(self._text))
        return self._release(len(self._text) - self._held_back)

    def finish(self) -> TokenChunk | None:
        """Return the last chunk, or None: what was held back, and the rest of an incomplete character."""
        rest = "" if self.has_stopped else self._stream.finish()
        self._text += rest
        if self._stop:
            if self._ends and not self.has_stopped:
                self._ends[-1] = len(self._text)
            return self._release(len(self._text))
        if not rest:
            return None
        nothing = np.zeros(0, np.float32)
        return TokenChunk((), rest, nothing, nothing, nothing)

    def _cut(self, end: int) -> None:
        """End the answer at a place of its text; tokens that reach beyond it are dropped."""
        self.has_stopped = True
        self._text = self._text[:end]
        kept = next((i for i, token_end in enumerate(self._ends) if token_end > end), len(self._ends))
        del self._ids[kept:], self._ends[kept:], self._signals[kept:]

    def _release(self, end: int) -> TokenChunk | None:
        """Return the chunk of all tokens whose text ends at or before a place."""
        ready = self._sent
        while ready < len(self._ends) and self._ends[ready] <= end:
            ready += 1
        text_end = end if self.has_stopped else (self._ends[ready - 1] if ready else 0)
        if ready == self._sent and text_end <= self._sent_text:
            return None
        columns = np.array(self._signals[self._sent : ready], np.float32).reshape(-1, 3)
        chunk = TokenChunk(
            tuple(self._ids[self._sent : ready]),
            self._text[self._sent_text : text_end],
            columns[:, 0],
            columns[:, 1],
            columns[:, 2],
        )
        self._sent, self._sent_text = ready, text_end
        return chunk
