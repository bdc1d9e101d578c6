"""A call of a stage, and a chain of stages at work together: each verifies what the one before it writes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from services.common.errors import AsdError, BudgetSpent
from services.common.telemetry import Spans, Traced
from services.router import spans
from services.router.domain import Failure, FinishReason, StageAction, Tokens
from services.router.request import DraftAbandoned
from services.router.stage_call import StageCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from services.router.domain import Answer, Event, Stage, StageResult, Verification
    from services.router.interfaces import StageClient, Take
    from services.router.request import RequestState

    Emit = Callable[[Event], Awaitable[None]]

Piece = Tokens | FinishReason


async def call_stage(
    progress: RequestState,
    client: StageClient,
    draft: StageResult | None,
    upstream: Sequence[StageClient],
    timeout_ms: float,
    leave_after_ms: float,
    clock: Callable[[], float],
    watch: Callable[[], float],
    emit: Emit,
    heard: Callable[[], None],
) -> None:
    """Have a stage answer; the progress takes what it sends, and its answer at last.

    It verifies the draft, or what the upstream stages write meanwhile, or writes by itself. timeout_ms: of
    the call. leave_after_ms: after so long the request goes on without it, as long as it can; BudgetSpent
    says so. watch: is called while nothing has come, returns after how many milliseconds it is to be called
    again, and raises an error where the call is not to be waited for. emit: is told what that changes for the
    caller. heard: is called where the stage has sent something.
    """
    request = progress.request
    action = StageAction.VERIFY if draft or upstream else StageAction.GENERATE
    with Traced(Spans.STAGE) as span:
        spans.describe_call(span, progress, client.stage, action)
        if upstream:
            pipeline = Chain(progress, upstream, timeout_ms, clock)
            try:
                result = await pipeline.verify(client, lambda event: progress.take(event, emit))
                progress.finish(result)
            finally:
                progress.drafted_upstream(*await pipeline.close())
        else:
            limit = _Limit(progress, client.stage, leave_after_ms, clock, watch, emit, heard)
            call = (
                client.verify(request, draft, timeout_ms, limit.take)
                if draft
                else client.generate(request, timeout_ms, limit.take)
            )
            # What there is of an abandoned draft counts as its answer.
            with suppress(DraftAbandoned):
                progress.finish(await limit.result_of(call))
        spans.describe_answer(span, progress.take_answer())


class _Limit:
    """Ends a call that its request had better go on without.

    Where the request cannot go on without it, the call may take all the time that it has: once text is
    committed that only this stage stands for, and where there is no other answer and the stage is at work.
    Arguments: as of call_stage.
    """

    def __init__(
        self,
        progress: RequestState,
        stage: Stage,
        leave_after_ms: float,
        clock: Callable[[], float],
        watch: Callable[[], float],
        emit: Emit,
        heard: Callable[[], None],
    ) -> None:
        self._progress = progress
        self._stage = stage
        self._leave_after_ms = leave_after_ms
        self._clock = clock
        self._watch = watch
        self._emit = emit
        self._heard = heard
        self._until = clock() + leave_after_ms / 1000.0
        self._timeout = asyncio.timeout(None)
        self._watching: asyncio.Handle | None = None
        self._is_taking = False
        self._refusal: AsdError | None = None

    async def result_of(self, call: Awaitable[StageResult]) -> StageResult:
        """Return what the call returns. Raises BudgetSpent where it takes too long, and what the watch
        raises before anything has come."""
        loop = asyncio.get_running_loop()
        leaving = loop.call_later(max(self._until - self._clock(), 0.0), self._leave)
        try:
            async with self._timeout:
                self._watching = loop.call_soon(self._look)
                return await call
        except TimeoutError:
            if self._refusal is None:
                raise
            raise self._refusal from None
        finally:
            leaving.cancel()
            self._stop_watching()

    async def take(self, event: Tokens | Verification) -> None:
        """Take what the stage sends. The time that its reader takes is no reason to leave in the midst."""
        self._stop_watching()
        self._heard()
        self._is_taking = True
        try:
            await self._progress.take(event, self._emit)
        finally:
            self._is_taking = False
        if self._clock() >= self._until:
            self._leave()

    def _leave(self) -> None:
        """End the call, unless the request needs it."""
        if not self._is_taking and self._progress.can_leave():
            self._end(BudgetSpent(f"{self._stage} did not finish within {self._leave_after_ms:.0f} ms"))

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._watching = loop.call_later(self._watch() / 1000.0, self._look)
        except AsdError as refusal:
            self._end(refusal)

    def _end(self, refusal: AsdError) -> None:
        if self._refusal is None:
            self._refusal = refusal
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()


class Chain:
    """The earlier stages of a chain, drafting for the last one. Close it when the last one has answered."""

    def __init__(
        self,
        progress: RequestState,
        clients: Sequence[StageClient],
        timeout_ms: float,
        clock: Callable[[], float],
    ) -> None:
        self._progress = progress
        self._request = progress.request
        # Not as one that names its stages: the last one need not wait for a drafter that is away.
        self._drafted = replace(progress.request, stage="", chain=())
        self._timeout_ms = timeout_ms
        self._clock = clock
        self._runs: list[StageCall] = []
        # What each of them writes.
        self._written: list[Draft] = []
        self._tasks: list[asyncio.Task[None]] = []
        for client in clients:
            self._start(client)

    async def verify(self, client: StageClient, emit: Take) -> StageResult:
        """Have the last stage verify what the others write; return its result."""
        return await client.verify_stream(self._request, self._written[-1], self._timeout_ms, emit)

    async def close(self) -> tuple[list[Answer], list[Failure], float]:
        """Stop what is still being written; return the answers, whole or not, and the failures.

        And for how many milliseconds the last stage waited for a draft to begin.
        """
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        # What is waited for comes from elsewhere: it says nothing of the stage.
        *waited_ms, last_ms = 0.0, *(written.waited_ms() for written in self._written)
        failures = [
            Failure(run.stage.index, outcome, self._time_of(run.stage) - each_ms, run.has_heard)
            for run, each_ms, outcome in zip(self._runs, waited_ms, outcomes, strict=True)
            if isinstance(outcome, AsdError)
        ]
        return [run.unfinished_answer() for run in self._runs], failures, last_ms

    def _time_of(self, stage: Stage) -> float:
        """Return how long a drafter's call may take, in milliseconds."""
        return min(self._timeout_ms, stage.timeout_ms)

    def _start(self, client: StageClient) -> None:
        """Have a stage work on the drafts of the one before it."""
        drafts = self._written[-1] if self._written else None
        action = StageAction.VERIFY if drafts else StageAction.GENERATE
        drafter = self._runs[-1].stage.name if drafts else ""
        run = StageCall(client.stage, action, drafter, self._clock, is_pipelined=drafts is not None)
        self._runs.append(run)
        written = Draft(self._clock)
        self._written.append(written)
        self._tasks.append(asyncio.create_task(self._work(client, run, drafts, written)))

    async def _work(
        self,
        client: StageClient,
        run: StageCall,
        drafts: Draft | None,
        written: Draft,
    ) -> None:
        with Traced(Spans.STAGE) as span:
            spans.describe_call(span, self._progress, run.stage, run.action)
            timeout_ms = self._time_of(client.stage)

            async def take(event: Tokens | Verification) -> None:
                run.take(event)
                if isinstance(event, Tokens):
                    written.add(event)

            try:
                if drafts is None:
                    result = await client.generate(self._drafted, timeout_ms, take)
                else:
                    result = await client.verify_stream(self._drafted, drafts, timeout_ms, take)
                run.finish(result)
                written.add(result.finish_reason)
            finally:
                if not run.has_ended:
                    # The next stage goes on alone from what has come.
                    written.add(FinishReason.LENGTH)
            spans.describe_answer(span, run.unfinished_answer())


class Draft:
    """What a stage has written and still writes. Each reader has it from its beginning, until it ends.

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
        """Go on with a piece; a FinishReason is the last one."""
        if self._begun is None:
            self._begun = self._clock()
        self._pieces.append(piece)
        self._grown.set()
        # Who waits for more waits for the next one.
        self._grown = asyncio.Event()

    def waited_ms(self) -> float:
        """Return how long its readers waited for the first piece, in milliseconds."""
        return ((self._clock() if self._begun is None else self._begun) - self._started) * 1000.0

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces as they come."""
        for place in count():
            if place == len(self._pieces):
                await self._grown.wait()
            piece = self._pieces[place]
            yield piece
            if isinstance(piece, FinishReason):
                return
