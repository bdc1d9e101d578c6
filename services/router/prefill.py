"""Prefill-ahead: fills the prefix cache of the stage that a request will likely escalate to."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from asd.errors import AsdError, ModelRefusal
from services.router.domain import Prefilled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.router.domain import RoutedRequest, Stage, Step
    from services.router.interfaces import StageClient
    from services.router.planning.load import Load


class PrefillAhead:
    """Fills a later stage's prefix cache while an earlier stage drafts. clock: monotonic seconds."""

    def __init__(
        self, request: RoutedRequest, clients: Sequence[StageClient], load: Load, clock: Callable[[], float]
    ) -> None:
        self._request = request
        self._clients = clients
        self._load = load
        self._clock = clock
        self._task: asyncio.Task[Prefilled | None] | None = None
        self._stage = -1
        self._refusal: ModelRefusal | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self, step: Step) -> None:
        """Begin to fill the cache of a step's likely successor, if it has one."""
        if step.prefill is None:
            return
        self._stage = step.prefill.index
        # Count it now, not at the task's first step: another request in between would start a prefill too.
        counted = ExitStack()
        counted.enter_context(self._load.calling(self._stage))
        self._task = asyncio.create_task(self._fill(self._clients[self._stage], step.prefill_ms))
        self._task.add_done_callback(lambda _: counted.close())

    async def wait_for(self, stage: Stage) -> None:
        """Wait until a stage has processed the prompt: a concurrent verification would process it again."""
        if self._task is not None and self._stage == stage.index:
            await asyncio.wait([self._task])

    def refusals(self) -> dict[int, AsdError]:
        """Return the error of the stage that refused the request, by its index; empty if none did."""
        return {} if self._refusal is None else {self._stage: self._refusal}

    async def close(self) -> Prefilled | None:
        """Cancel a prefill that is in flight; return what was prefilled, if anything."""
        if self._task is None:
            return None
        self._task.cancel()
        # gather tells our own cancellation from the task's.
        (outcome,) = await asyncio.gather(self._task, return_exceptions=True)
        return outcome if isinstance(outcome, Prefilled) else None

    async def _fill(self, client: StageClient, timeout_ms: float) -> Prefilled | None:
        started = self._clock()
        try:
            tokens = await client.prefill(self._request, timeout_ms)
        except ModelRefusal as refusal:
            self._refusal = refusal
            return None
        except AsdError:
            # A prefill is optional. The verification will report the error.
            return None
        return Prefilled(client.stage, tokens, (self._clock() - started) * 1000.0)
