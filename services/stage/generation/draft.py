"""A draft as a stage receives it: whole, or piece by piece while it is being written. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class DraftFeed:
    """Ids of a draft in the target's vocabulary; they only grow until it is complete.

    One thread adds to it while another one reads. most_tokens: ids beyond are dropped, as the answer cannot
    hold them. ids_used: whether they came as ids, not as text that was encoded anew.
    """

    def __init__(self, most_tokens: int) -> None:
        self.ids: list[int] = []
        self.ids_used = False
        self.is_complete = False
        self._most_tokens = most_tokens

    def add(self, ids: Sequence[int]) -> None:
        """Add ids at the end."""
        self.ids += ids[: self._most_tokens - len(self.ids)]

    @property
    def room(self) -> int:
        """Ids that it still takes."""
        return self._most_tokens - len(self.ids)

    @property
    def is_full(self) -> bool:
        """Whether further ids would be dropped."""
        return len(self.ids) >= self._most_tokens

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
        if end_id is not None and len(self.ids) < self._most_tokens:
            self.ids.append(end_id)
        self.is_complete = True
