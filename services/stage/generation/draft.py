"""A draft as a stage receives it, whole or piece by piece, and its verdict so far. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from services.stage.domain import VerificationResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.stage.generation.constraint import Matcher
    from services.stage.generation.verification import Verdict


class ReceivedDraft:
    """A draft's ids in the target's vocabulary, and their verdict so far. Ids are only ever appended.

    One thread appends ids while another reads and judges them. most_tokens: further ids are dropped, as the
    answer cannot hold them. matcher: of the answer's constraint, at its beginning; the draft ends before the
    first id that it does not allow. ids_used: whether they came as ids, not as text that was encoded anew.
    accepted: how many of the first ids the target has accepted. allowed: how many the constraint allows, if
    it ended the draft.
    """

    def __init__(self, most_tokens: int, matcher: Matcher | None = None) -> None:
        self.ids: list[int] = []
        self.ids_used = False
        self.is_complete = False
        self.accepted = 0
        self.allowed: int | None = None
        self._matcher = matcher.copy() if matcher is not None else None
        self._most_tokens = most_tokens
        self._ranks = [np.zeros(0, np.int64)]
        self._logprobs = [np.zeros(0, np.float32)]

    def add(self, ids: Sequence[int]) -> None:
        """Add ids at the end, up to the first that the constraint does not allow."""
        ids = ids[: self.room]
        kept = self._matcher.take(ids) if self._matcher is not None else len(ids)
        self.ids += ids[:kept]
        if kept < len(ids):
            self.allowed = len(self.ids)
            self.is_complete = True

    @property
    def room(self) -> int:
        """How many more ids it takes."""
        return self._most_tokens - len(self.ids) if self.allowed is None else 0

    @property
    def is_full(self) -> bool:
        """Whether further ids would be dropped."""
        return self.room <= 0

    def reach(self, ids: Sequence[int]) -> bool:
        """Extend it to the ids of a longer text, and return True. If they begin differently, return False.

        Text that comes in pieces is encoded from its start each time, and the tokens at a seam can change.
        """
        known = len(self.ids)
        begins_alike = list(ids[:known]) == self.ids
        if begins_alike:
            self.add(ids[known:])
        return begins_alike

    def finish(self, end_id: int | None) -> None:
        """Mark the draft as complete. end_id: proposed last, if the drafter ended its answer; else None."""
        if end_id is not None:
            self.add([end_id])
        self.is_complete = True

    def judge(self, verdict: Verdict) -> None:
        """Add a pass's verdict on the next ids."""
        self.accepted += verdict.accepted
        self._ranks.append(verdict.ranks)
        self._logprobs.append(verdict.logprobs)

    def evidence(self) -> VerificationResult:
        """Return the verdict on the draft, as the contract reports it."""
        ranks = np.concatenate(self._ranks)
        return VerificationResult(
            len(ranks),
            self.accepted,
            ranks,
            np.concatenate(self._logprobs),
            self.ids_used,
            allowed=self.allowed,
        )
