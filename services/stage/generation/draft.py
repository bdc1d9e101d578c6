"""A draft as a stage receives it, whole or piece by piece, and how it fares. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from services.stage.domain import VerificationResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.stage.generation.verification import Verdict


class ReceivedDraft:
    """Ids of a draft in the target's vocabulary, which only grow until it is complete, and how they fare.

    One thread adds ids while another one reads and judges them. most_tokens: ids beyond are dropped, as the
    answer cannot hold them. ids_used: whether they came as ids, not as text that was encoded anew.
    accepted: how many of the first ids the target has accepted.
    """

    def __init__(self, most_tokens: int) -> None:
        self.ids: list[int] = []
        self.ids_used = False
        self.is_complete = False
        self.accepted = 0
        self._most_tokens = most_tokens
        self._ranks = [np.zeros(0, np.int64)]
        self._logprobs = [np.zeros(0, np.float32)]

    def add(self, ids: Sequence[int]) -> None:
        """Add ids at the end."""
        self.ids += ids[: self.room]

    @property
    def room(self) -> int:
        """Ids that it still takes."""
        return self._most_tokens - len(self.ids)

    @property
    def is_full(self) -> bool:
        """Whether further ids would be dropped."""
        return self.room <= 0

    def reach(self, ids: Sequence[int]) -> bool:
        """Grow to the ids of a longer text, and return True; where they begin otherwise, stay, and False.

        Text that comes in pieces is encoded from its start each time, and the tokens at a seam can change.
        """
        known = len(self.ids)
        begins_alike = list(ids[:known]) == self.ids
        if begins_alike:
            self.add(ids[known:])
        return begins_alike

    def finish(self, end_id: int | None) -> None:
        """Nothing more will come. end_id: proposed last, where the draft ended by itself."""
        if end_id is not None and not self.is_full:
            self.ids.append(end_id)
        self.is_complete = True

    def judge(self, verdict: Verdict) -> None:
        """Keep what a pass shows of the ids that were not judged yet."""
        self.accepted += verdict.accepted
        self._ranks.append(verdict.ranks)
        self._logprobs.append(verdict.logprobs)

    def evidence(self) -> VerificationResult:
        """Return how the draft fared."""
        ranks = np.concatenate(self._ranks)
        return VerificationResult(
            len(ranks), self.accepted, ranks, np.concatenate(self._logprobs), self.ids_used
        )
