"""An answer as it grows: its text, its tokens' signals, and stop sequences. Pure."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Protocol

import numpy as np

from services.stage.domain import TokenChunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from asd.values import TokenDetail

    Signals = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


class GrowingText(Protocol):
    """Text that grows token by token, such as services.stage.generation.text_stream.TextStream.

    lag: characters of the last push's text that belong to earlier tokens.
    """

    lag: int

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that they add."""

    def finish(self) -> str:
        """Return the text that would remain if no more tokens came."""

    def mark(self, token_id: int) -> str:
        """Return the text of a special token, which the answer leaves out; "" for any other token."""


class AnswerBuilder:
    """Collects an answer's tokens and turns them into chunks.

    Without stop sequences, a chunk is sent as it comes. With them, the answer is cut before the first one,
    and tokens that may begin one are held back. A stop sequence may contain the text of special tokens, which
    the answer's text leaves out. Each is therefore searched for in two texts: in the answer's, and in the one
    that includes special tokens, called `whole` here.
    """

    def __init__(self, stream: GrowingText, stop: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self._stops = tuple(_StopSequence(each) for each in stop)
        # The same sequences, searched for in the answer's own text.
        self._shown_stops = tuple(copy(each) for each in self._stops)
        self._text = ""
        self._ids: list[int] = []
        self._signals: list[tuple[float, float, float]] = []
        self._details: list[TokenDetail] = []
        # Length of the whole text, where each token ends in it, and the spans of its special tokens.
        self._whole = 0
        self._ends: list[int] = []
        self._marks: list[tuple[int, int]] = []
        # Special tokens at the end whose surrounding text is not known yet.
        self._open: list[str] = []
        self._sent = 0
        self._sent_text = 0
        self.has_stopped = False
        # Tokens added up to the end of the answer, including those that a stop sequence cut off.
        self.taken = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the answer."""
        return tuple(self._ids)

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._text

    def extend(
        self, ids: Sequence[int], signals: Signals, details: Sequence[TokenDetail] = ()
    ) -> TokenChunk | None:
        """Add tokens with their log-probabilities, entropies and margins, float32 [tokens] each.

        details: of each token, if the request asks for them.
        Returns the chunk that may be sent now, or None. Tokens after a stop sequence are dropped.
        """
        if self.has_stopped:
            return None
        if not self._stops:
            text = self._stream.push(ids)
            self._text += text
            self._ids += ids
            self.taken += len(ids)
            return TokenChunk(tuple(ids), text, *signals, tuple(details))
        for index, token in enumerate(ids):
            self._ids.append(token)
            self.taken += 1
            self._signals.append(
                (float(signals[0][index]), float(signals[1][index]), float(signals[2][index]))
            )
            self._details += details[index : index + 1]
            cut = self._add(token)
            if cut is not None:
                self._cut(cut)
                break
        return self._release()

    def finish(self) -> TokenChunk | None:
        """Return the last chunk, if any: tokens held back, and the rest of an incomplete character.

        A stop sequence may show only here, in text that waited for a later token.
        """
        rest = "" if self.has_stopped else self._stream.finish()
        if self._stops:
            if not self.has_stopped:
                cut = self._settle(rest, "")
                if cut is not None:
                    self._cut(cut)
            return self._release(is_last=True)
        self._text += rest
        if not rest:
            return None
        nothing = np.zeros(0, np.float32)
        return TokenChunk((), rest, nothing, nothing, nothing)

    def _add(self, token: int) -> int | None:
        """Add a token's text. If it completes a stop sequence, return where that begins in the whole text."""
        text, mark = self._stream.push([token]), self._stream.mark(token)
        if text:
            cut = self._settle(text[: self._stream.lag], text[self._stream.lag :])
            self._ends.append(self._whole)
            return cut
        self._open.append(mark)
        if not mark:
            return None
        if all(self._open):
            return self._settle("", "")
        # A later token may yet complete the text before the special token, unless this is the end.
        rest = self._stream.finish()
        text = rest + "".join(self._open)
        fed = [(stop, text) for stop in self._stops] + [(stop, rest) for stop in self._shown_stops]
        if any(copy(stop).feed(each) is not None for stop, each in fed):
            return self._settle(rest, "")
        return None

    def _settle(self, before: str, after: str) -> int | None:
        """Add text to the answer. before, after: the text around the open special tokens.

        Returns as `_add` does.
        """
        start = self._whole
        position = start + len(before)
        for mark in self._open:
            if mark:
                self._marks.append((position, position + len(mark)))
            position += len(mark)
            self._ends.append(position)
        whole = "".join([before, *self._open, after])
        self._open.clear()
        self._whole += len(whole)
        self._text += before + after
        # If this token completes several, the one that begins first counts.
        cuts = []
        for stop in self._stops:
            end = stop.feed(whole)
            if end is not None:
                cuts.append(start + end - len(stop.text))
        for stop in self._shown_stops:
            end = stop.feed(before + after)
            if end is not None:
                cuts.append(self._start_of_last(len(before + after) - end + len(stop.text)))
        return min(cuts, default=None)

    def _start_of_last(self, count: int) -> int:
        """Return where in the whole text the last characters of the answer's text begin."""
        position = self._whole - count
        for start, end in reversed(self._marks):
            if end <= position:
                break
            position -= end - start
        return position

    def _cut(self, end: int) -> None:
        """End the answer at a position of the whole text; tokens that reach beyond it are dropped."""
        self.has_stopped = True
        self._text = self._text[: self._shown(end)]
        self._whole = end
        kept = next((i for i, token_end in enumerate(self._ends) if token_end > end), len(self._ends))
        del self._ids[kept:], self._ends[kept:], self._signals[kept:], self._details[kept:]

    def _shown(self, position: int) -> int:
        """Return the position in the answer's text of a position in the whole text."""
        return position - sum(min(end, position) - start for start, end in self._marks if start < position)

    def _release(self, *, is_last: bool = False) -> TokenChunk | None:
        """Return the chunk of all tokens that no stop sequence can cut off any more."""
        is_last |= self.has_stopped
        certain = self._whole
        if not is_last:
            certain -= max(stop.matched for stop in self._stops)
            certain = min(certain, self._start_of_last(max(stop.matched for stop in self._shown_stops)))
        ready = self._sent
        while ready < len(self._ends) and self._ends[ready] <= certain:
            ready += 1
        text_end = len(self._text)
        if not is_last:
            text_end = self._shown(self._ends[ready - 1]) if ready else 0
        if ready == self._sent and text_end <= self._sent_text:
            return None
        columns = np.array(self._signals[self._sent : ready], np.float32).reshape(-1, 3)
        chunk = TokenChunk(
            tuple(self._ids[self._sent : ready]),
            self._text[self._sent_text : text_end],
            columns[:, 0],
            columns[:, 1],
            columns[:, 2],
            tuple(self._details[self._sent : ready]),
        )
        self._sent, self._sent_text = ready, text_end
        return chunk


class _StopSequence:
    """A stop sequence, looked for in a text that grows.

    matched: length of its longest beginning that the text ends with.
    Source: Knuth, Morris and Pratt 1977; its table grows with what is matched.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # For each beginning of the sequence, the longest shorter one that it ends with.
        self._shorter = [0, 0]

    def feed(self, text: str) -> int | None:
        """Add text; return where in it the stop sequence is complete for the first time, or None."""
        own, shorter, matched = self.text, self._shorter, self.matched
        if not matched and own[0] not in text:
            return None
        for position, letter in enumerate(text, start=1):
            while matched and own[matched] != letter:
                matched = shorter[matched]
            if own[matched] == letter:
                matched += 1
                if matched == len(own):
                    return position
                if matched == len(shorter):
                    known = shorter[matched - 1]
                    while known and own[known] != letter:
                        known = shorter[known]
                    shorter.append(known + (own[known] == letter))
        self.matched = matched
        return None
