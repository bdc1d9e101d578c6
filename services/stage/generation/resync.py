"""Re-synchronisation: proposes parts of a draft again after the target has corrected it. Pure.

A draft that goes wrong at one token is often right again soon after: a wrong digit leaves the words around it
as they are. After a correction, parts of the unused draft are therefore proposed to the target, which keeps
what it would have written anyway. Nothing here decides what is kept, so the answer stays exact.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Shorter n-grams occur by chance too often; longer ones add nothing. Chosen together with PASS_PER_TOKEN.
_LEAST_GRAM = 2
_MOST_GRAM = 4


@dataclass(frozen=True, slots=True)
class ResyncRule:
    """How much to propose, and when to stop, for a given cost of a pass.

    first_chunk, least_chunk, most_chunk: tokens of the first proposal, and bounds after misses and hits.
    least_proposal: fewest tokens that make a pass worthwhile. least_hit: accepted tokens that make it a hit.
    misses_to_doubt: misses in a row after which only n-grams count. misses_to_end: misses in a row after
    which nothing more is proposed. seeks_ngrams: whether the answer's last tokens are looked for in the
    draft.
    """

    first_chunk: int
    least_chunk: int
    most_chunk: int
    least_proposal: int
    least_hit: int
    misses_to_doubt: int
    misses_to_end: int
    seeks_ngrams: bool


# For engines whose pass over a few tokens takes about as long as one that decodes a token. Chosen by counting
# passes and scored tokens over 300 answers of the split `train` of the suites: larger first chunks and
# shorter n-grams save passes and score more tokens, and the sum hardly changes. A useless draft costs eight
# slower passes.
PASS_PER_TOKEN = ResyncRule(
    first_chunk=4,
    least_chunk=2,
    most_chunk=32,
    least_proposal=1,
    least_hit=1,
    misses_to_doubt=3,
    misses_to_end=8,
    seeks_ngrams=True,
)
# For engines whose pass takes as long as 4 decoded tokens, as on a GPU (46 to 83 ms against 10.6 to 34.3):
# all that is left is proposed at once, and plain decoding takes over at the first miss. Chosen. N-grams would
# cost 1% more there, counted over 360 pairs of different answers of the embedded models.
PASS_PER_DRAFT = ResyncRule(
    first_chunk=sys.maxsize,
    least_chunk=sys.maxsize,
    most_chunk=sys.maxsize,
    least_proposal=16,
    least_hit=6,
    misses_to_doubt=1,
    misses_to_end=1,
    seeks_ngrams=False,
)

# Tokens that a first pass after a correction must keep on average to be worth its time: that of 4 tokens.
_LEAST_MEAN_KEPT = 4.0
# Calls in the library from which its arithmetic is the bottleneck, and the share of scored tokens that must
# be kept then. In a full batch, scoring a token takes about a third of the time of writing one: a 70B on an
# H200 scores one in 0.22 ms and writes 64 in 40 ms.
_BUSY = 8
_LEAST_MEAN_SHARE = 0.4
# Weight of the newest pass in these means; how many passes they need before they count; and one answer in how
# many tries a pass although they advise against it. Chosen.
_NEWEST = 0.1
_LEAST_TRIED = 8
_TRY_EVERY = 16


class Resynchroniser:
    """Proposes continuations from the unused part of one draft.

    draft: its ids; the list may grow meanwhile. start: position of the token that the target corrected.
    """

    def __init__(self, draft: Sequence[int], start: int, rule: ResyncRule = PASS_PER_TOKEN) -> None:
        self._draft = draft
        self._start = start
        self._rule = rule
        # Position at which the draft continues if the correction replaced one token by one.
        self._aligned = start + 1
        self._chunk = rule.first_chunk
        self._misses = 0

    def propose(self, answer: Sequence[int], room: int) -> list[int]:
        """Return the draft tokens that may follow an answer, up to room; empty if none is likely to.

        answer: ids so far, including the corrected token. Looks for the answer's last tokens in the unused
        part of the draft, the longest run first and near the expected position; else takes that position.
        """
        if self._misses >= self._rule.misses_to_end:
            return []
        position = (
            longest_run(self._draft, answer, self._start, self._aligned) if self._rule.seeks_ngrams else None
        )
        if position is None:
            if self._misses >= self._rule.misses_to_doubt:
                return []
            position = self._aligned
        self._aligned = position
        proposal = list(self._draft[position : position + min(self._chunk, room)])
        return proposal if len(proposal) >= self._rule.least_proposal else []

    def judged(self, proposed: int, accepted: int) -> None:
        """Take the verdict on the last proposal; one more token follows the accepted ones."""
        self._aligned += accepted + 1
        if not proposed:
            return
        if accepted == proposed:
            self._chunk = min(self._chunk * 2, self._rule.most_chunk)
        elif not accepted:
            self._chunk = max(self._chunk // 2, self._rule.least_chunk)
        self._misses = 0 if accepted >= self._rule.least_hit else self._misses + 1


def longest_run(draft: Sequence[int], answer: Sequence[int], start: int, near: int) -> int | None:
    """Return the position in a draft after the longest run of an answer's last tokens, if there is one.

    start: position from which on runs count. near: of runs of equal length, the one that ends nearest to it.
    """
    for length in range(min(_MOST_GRAM, len(answer)), _LEAST_GRAM - 1, -1):
        gram = list(answer[-length:])
        positions = [
            position
            for position in range(start + length, len(draft))
            if draft[position - 1] == gram[-1] and list(draft[position - length : position]) == gram
        ]
        if positions:
            return min(positions, key=lambda position: abs(position - near))
    return None


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many of the first ids are the same."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


class ResyncPayoff:
    """Whether passes after a correction save time on a model: means over each answer's first such pass."""

    def __init__(self) -> None:
        self._kept = self._share = 0.0
        self._tried = self._left_out = 0

    def is_worth(self, running: int) -> bool:
        """Return whether to make such a pass now. running: calls in the library."""
        is_enough = self._share >= _LEAST_MEAN_SHARE if running >= _BUSY else self._kept >= _LEAST_MEAN_KEPT
        if is_enough or self._tried < _LEAST_TRIED:
            return True
        self._left_out = (self._left_out + 1) % _TRY_EVERY
        return self._left_out == 0

    def learn(self, proposed: int, kept: int) -> None:
        """Learn from the first pass after a correction."""
        self._tried += 1
        weight = max(_NEWEST, 1.0 / self._tried)
        self._kept += weight * (kept - self._kept)
        self._share += weight * (kept / proposed - self._share)
