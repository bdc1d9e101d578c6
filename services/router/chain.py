"""The earlier stages of a chain. Each verifies what the stage before it has written so far."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from asd.errors import AsdError
from asd.values import FinishReason, StageAction
from services.common.telemetry import Spans, Traced
from services.router import spans
from services.router.domain import CallFailure, ScoredTokens
from services.router.stage_call import StageCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from services.router.domain import RoutedRequest, Stage, StageAnswer, StageResult, Verification
    from services.router.interfaces import StageClient, Take

Piece = ScoredTokens | FinishReason


class Chain:
    """The earlier stages of a chain, which draft for the last one. Close it once the last has answered."""

    def __init__(
        self,
        request: RoutedRequest,
        clients: Sequence[StageClient],
        timeout_ms: float,
        clock: Callable[[], float],
    ) -> None:
        self._request = request
        # Drafters get a request that names no stages: the last stage need not wait for a missing drafter.
        self._drafted = replace(request, stage="", chain=())
        self._timeout_ms = timeout_ms
        self._clock = clock
        self._calls: list[StageCall] = []
        # The stream of each drafter, in order.
        self._written: list[DraftStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        for client in clients:
            self._start(client)

    async def verify(self, client: StageClient, emit: Take) -> StageResult:
        """Have the last stage verify the drafts; return its result."""
        return await client.verify_stream(self._request, self._written[-1], self._timeout_ms, emit)

    async def close(self) -> tuple[list[StageAnswer], list[CallFailure], float]:
        """Stop the drafters that are still writing.

        Returns their answers, complete or not, their failures, and how long the last stage waited for its
        draft to begin, in milliseconds.
        """
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        # A stage's wait for its drafter does not count against the stage.
        *waited_ms, last_ms = 0.0, *(written.waited_ms() for written in self._written)
        failures = [
            CallFailure(call.stage, outcome, self._time_of(call.stage) - each_ms, call.has_heard)
            for call, each_ms, outcome in zip(self._calls, waited_ms, outcomes, strict=True)
            if isinstance(outcome, AsdError)
        ]
        return [call.unfinished_answer() for call in self._calls], failures, last_ms

    def _time_of(self, stage: Stage) -> float:
        """Return the timeout of a drafter's call, in milliseconds."""
        return min(self._timeout_ms, stage.timeout_ms)

    def _start(self, client: StageClient) -> None:
        """Start a drafter; all but the first verify the draft of the one before."""
        drafts = self._written[-1] if self._written else None
        action = StageAction.VERIFY if drafts else StageAction.GENERATE
        drafter = self._calls[-1].stage.name if drafts else ""
        call = StageCall(client.stage, action, drafter, self._clock, is_pipelined=drafts is not None)
        self._calls.append(call)
        written = DraftStream(self._clock)
        self._written.append(written)
        self._tasks.append(asyncio.create_task(self._work(client, call, drafts, written)))

    async def _work(
        self, client: StageClient, call: StageCall, drafts: DraftStream | None, written: DraftStream
    ) -> None:
        async def take(event: ScoredTokens | Verification) -> None:
            call.take(event)
            if isinstance(event, ScoredTokens):
                written.add(event)

        with Traced(Spans.STAGE) as span:
            spans.describe_call(span, self._request, call.stage, call.action)
            timeout_ms = self._time_of(call.stage)
            try:
                if drafts is None:
                    result = await client.generate(self._drafted, timeout_ms, take)
                else:
                    result = await client.verify_stream(self._drafted, drafts, timeout_ms, take)
                call.finish(result)
                written.add(result.finish_reason)
            finally:
                if not call.has_ended:
                    # The next stage continues alone after the tokens that it has.
                    written.add(FinishReason.LENGTH)
            spans.describe_answer(span, call.unfinished_answer())


class DraftStream:
    """A draft that may still grow. Every reader gets all of it, from the start to the end.

    clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        # When the first piece came.
        self._begun: float | None = None
        self._pieces: list[Piece] = []
        self._grown = asyncio.Event()

    def add(self, piece: Piece) -> None:
        """Append a piece. A FinishReason is the last one."""
        if self._begun is None:
            self._begun = self._clock()
        self._pieces.append(piece)
        self._grown.set()
        # Readers wait for the next piece on an event of its own.
        self._grown = asyncio.Event()

    def waited_ms(self) -> float:
        """Return how long its readers waited for the first piece, in milliseconds."""
        return ((self._clock() if self._begun is None else self._begun) - self._started) * 1000.0

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces as they come."""
        for index in count():
            if index == len(self._pieces):
                await self._grown.wait()
            piece = self._pieces[index]
            yield piece
            if isinstance(piece, FinishReason):
                return
