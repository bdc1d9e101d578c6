"""Re-synchronisation: what of a draft may still follow, once the target has departed from it. Pure.

A draft that goes wrong at one token is often right again soon after: a wrong digit leaves the words around it
as they are. After a correction the target therefore has parts of the unused draft proposed to it, and keeps
what it would have written anyway. Nothing here decides what is kept, so the answer stays exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Chosen together, by counting passes and scored tokens over 300 answers of the split `train` of the suites:
# larger first chunks and shorter n-grams save passes and score more tokens, and the sum hardly changes.
# An n-gram of fewer tokens occurs by chance too often; longer ones than the most say no more.
_LEAST_GRAM = 2
_MOST_GRAM = 4
# Tokens of one proposal: at first, at least and at most.
_FIRST_CHUNK = 4
_LEAST_CHUNK = 2
_MOST_CHUNK = 32
# Proposals in a row of which nothing was kept, after which only n-grams count, and after which no more are
# made: a draft that is of no use costs this many passes with some tokens more in them.
_MISSES_TO_DOUBT = 3
_MISSES_TO_END = 8


class Resynchroniser:
    """Proposes continuations from the unused part of one draft.

    draft: its ids; the list may grow meanwhile. start: place of the token that the target corrected.
    """

    def __init__(self, draft: Sequence[int], start: int) -> None:
        self._draft = draft
        self._start = start
        # Where the draft would go on if the correction had replaced one token by one.
        self._aligned = start + 1
        self._chunk = _FIRST_CHUNK
        self._misses = 0

    def propose(self, answer: Sequence[int]) -> list[int]:
        """Return the draft tokens that may follow an answer: empty where none is likely to.

        answer: ids so far, the corrected token included. Looks for the answer's last tokens in the unused
        part of the draft, the longest run first and near the expected place; else takes that place itself.
        """
        if self._misses >= _MISSES_TO_END:
            return []
        place = self._find(answer)
        if place is None:
            if self._misses >= _MISSES_TO_DOUBT:
                return []
            place = self._aligned
        self._aligned = place
        return list(self._draft[place : place + self._chunk])

    def judged(self, proposed: int, accepted: int) -> None:
        """Take how the last proposal fared; one more token follows what was accepted."""
        self._aligned += accepted + 1
        if not proposed:
            return
        if accepted == proposed:
            self._chunk = min(self._chunk * 2, _MOST_CHUNK)
        elif not accepted:
            self._chunk = max(self._chunk // 2, _LEAST_CHUNK)
        self._misses = 0 if accepted else self._misses + 1

    def _find(self, answer: Sequence[int]) -> int | None:
        """Return the place after the longest run of the answer's last tokens, the nearest; None: no run."""
        draft = self._draft
        for length in range(min(_MOST_GRAM, len(answer)), _LEAST_GRAM - 1, -1):
            gram = list(answer[-length:])
            places = [
                place
                for place in range(self._start + length, len(draft))
                if draft[place - 1] == gram[-1] and list(draft[place - length : place]) == gram
            ]
            if places:
                return min(places, key=lambda place: abs(place - self._aligned))
        return None
