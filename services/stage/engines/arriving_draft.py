"""A draft that may still be on its way to an engine over a GPU library."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.resync import PASS_PER_DRAFT

if TYPE_CHECKING:
    from asd.errors import AsdError
    from services.stage.generation.constraint import Matcher


class ArrivingDraft(ReceivedDraft):
    """A draft that may still be on its way."""

    def __init__(self, most_tokens: int, matcher: Matcher | None = None) -> None:
        super().__init__(most_tokens, matcher)
        self._changed = asyncio.Event()
        self._error: AsdError | None = None

    def notify(self, error: AsdError | None = None) -> None:
        """Wake `wait`: ids have come, or an error ends the draft."""
        self._error = self._error or error
        self._changed.set()

    @property
    def is_due(self) -> bool:
        """Whether enough has come for a pass."""
        fresh = len(self.ids) - self.accepted
        is_enough = fresh >= PASS_PER_DRAFT.least_proposal or (self.is_full and fresh > 0)
        return self.is_complete or is_enough

    async def wait(self, *, is_whole: bool = False) -> None:
        """Wait until a pass is due, or the draft is complete. Raises the error of an unreadable draft."""
        while True:
            if self._error is not None:
                raise self._error
            if self.is_complete if is_whole else self.is_due:
                return
            self._changed.clear()
            await self._changed.wait()

    async def more(self, known: int) -> None:
        """Wait until there are more ids than are known, or the draft is complete. Raises as `wait` does."""
        while len(self.ids) <= known and not self.is_complete:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
