"""Prefill-ahead: warming the prefix cache of the stage that a request will likely escalate to."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from services.common.errors import AsdError, ModelRefusal
from services.router.domain import Prefilled

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from services.router.domain import Request, Stage
    from services.router.interfaces import StageClient
    from services.router.planning.load import Call


class PrefillAhead:
    """Prompts that are being put into a later stage's cache while an earlier one drafts, for one request.

    clock: monotonic seconds. calling: counts its block as a call under way at a stage.
    """

    def __init__(
        self, clock: Callable[[], float], calling: Callable[[Stage], AbstractContextManager[Call]]
    ) -> None:
        self._clock = clock
        self._calling = calling
        self._task: asyncio.Task[Prefilled | None] | None = None
        self._stage = -1
        self._refusal: ModelRefusal | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self, request: Request, client: StageClient, timeout_ms: float) -> None:
        """Begin to warm a stage. timeout_ms: an escalation waits for it no longer than that."""
        self._stage = client.stage.index
        # Counted from now on, not from the task's first step: a request that looks in between would warm too.
        counted = ExitStack()
        counted.enter_context(self._calling(client.stage))
        self._task = asyncio.create_task(self._warm(request, client, timeout_ms))
        self._task.add_done_callback(lambda _: counted.close())

    async def settle(self, stage: int) -> None:
        """Wait for the warming of a stage: a verification beside it would process the prompt twice."""
        if self._task is not None and self._stage == stage:
            await asyncio.wait([self._task])

    def refusals(self) -> dict[int, AsdError]:
        """Return the stage, by place, that has said that it cannot take the request, and why."""
        return {} if self._refusal is None else {self._stage: self._refusal}

    async def close(self) -> Prefilled | None:
        """Stop what is under way; return what was warmed, if anything."""
        if self._task is None:
            return None
        self._task.cancel()
        # Gathered, so that a cancellation of ours is told from the task's.
        (outcome,) = await asyncio.gather(self._task, return_exceptions=True)
        return outcome if isinstance(outcome, Prefilled) else None

    async def _warm(self, request: Request, client: StageClient, timeout_ms: float) -> Prefilled | None:
        started = self._clock()
        try:
            tokens = await client.prefill(request, timeout_ms)
        except ModelRefusal as refusal:
            self._refusal = refusal
            return None
        except AsdError:
            # It was a favour; the verification will say what is wrong.
            return None
        return Prefilled(client.stage, tokens, (self._clock() - started) * 1000.0)
