"""A bound on the concurrent calls to a service; further calls wait. No gRPC, no protobuf."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from asd.errors import BudgetSpent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class CallLimit:
    """Lets `places` calls through at a time; further calls wait in order of arrival."""

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)

    @property
    def is_full(self) -> bool:
        """Whether a new call would have to wait."""
        return self._places.locked()

    @asynccontextmanager
    async def place(self, wait_ms: float, peer: str) -> AsyncIterator[None]:
        """Hold a place for the block. Raises BudgetSpent, naming the peer, if none is free in time."""
        if self._places.locked():
            try:
                async with asyncio.timeout(wait_ms / 1000.0):
                    await self._places.acquire()
            except TimeoutError:
                raise BudgetSpent(f"no call to {peer} could begin within {wait_ms:.0f} ms") from None
        else:
            await self._places.acquire()
        try:
            yield
        finally:
            self._places.release()
