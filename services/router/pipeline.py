"""A chain of stages at work at the same time: each verifies what the one before it has written so far."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from services.common.errors import AsdError, BudgetSpent
from services.common.telemetry import Spans, Traced
from services.router import spans
from services.router.domain import Failure, FinishReason, StageAction, StageResult, Tokens
from services.router.stage_run import StageRun

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    from services.router.domain import Answer, Stage, StageEvent
    from services.router.ports import StageClient
    from services.router.progress import Progress

Piece = Tokens | FinishReason


@asynccontextmanager
async def call_stage(
    progress: Progress,
    client: StageClient,
    draft: StageResult | None,
    upstream: Sequence[StageClient],
    timeout_ms: float,
    leave_after_ms: float,
    clock: Callable[[], float],
    watch: Callable[[], float],
) -> AsyncIterator[AsyncIterator[StageEvent]]:
    """Have a stage answer, as a context with its events; its answer is taken as the context ends well.

    It verifies the draft, or what the upstream stages write meanwhile, or writes by itself. What runs for it
    ends with the context. timeout_ms: of the call. leave_after_ms: after so long the request goes on without
    it, as long as it can; BudgetSpent says so. watch: is called while nothing has come, returns after how
    many milliseconds it is to be called again, and raises an error where the call is not to be waited for.
    """
    request = progress.request
    action = StageAction.VERIFY if draft or upstream else StageAction.GENERATE
    with Traced(Spans.STAGE) as span:
        spans.describe_call(span, progress, client.stage, action)
        if upstream:
            pipeline = Pipeline(progress, upstream, timeout_ms, clock)
            try:
                async with aclosing(pipeline.verify(client)) as events:
                    yield events
            finally:
                progress.drafted_upstream(*await pipeline.close())
        else:
            call = (
                client.verify(request, draft, timeout_ms) if draft else client.generate(request, timeout_ms)
            )
            call = _until_left(call, progress, client.stage, leave_after_ms, clock, watch)
            async with aclosing(call) as events:
                yield events
        spans.describe_answer(span, progress.take_answer())


async def _until_left(
    call: AsyncGenerator[StageEvent, None],
    progress: Progress,
    stage: Stage,
    leave_after_ms: float,
    clock: Callable[[], float],
    watch: Callable[[], float],
) -> AsyncGenerator[StageEvent, None]:
    """Yield the events of a call. Raises BudgetSpent where it takes longer than leave_after_ms, and what the
    watch raises before anything has come.

    Where the request cannot go on without them, it may take all the time that its call has: once text is
    committed that only this stage stands for, and where there is no other answer and it is at work.
    """
    until = clock() + leave_after_ms / 1000.0
    async with aclosing(call) as events:
        while True:
            left_s = until - clock() if progress.can_leave() else None
            watching = None if progress.has_heard else _Watching(watch)
            try:
                async with asyncio.timeout(left_s) as limit:
                    with watching.until(limit) if watching else nullcontext():
                        event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if watching is not None and watching.refusal is not None:
                    raise watching.refusal from None
                raise BudgetSpent(f"{stage} did not finish within {leave_after_ms:.0f} ms") from None
            yield event


class _Watching:
    """Calls a watch again and again; what it raises at last is the refusal."""

    def __init__(self, watch: Callable[[], float]) -> None:
        self._watch = watch
        self._timer: asyncio.Handle | None = None
        self.refusal: AsdError | None = None

    @contextmanager
    def until(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Watch during the block. limit: runs out with the refusal."""
        self._timer = asyncio.get_running_loop().call_soon(self._look, limit)
        try:
            yield
        finally:
            self._timer.cancel()

    def _look(self, limit: asyncio.Timeout) -> None:
        if limit.expired():
            return
        loop = asyncio.get_running_loop()
        try:
            self._timer = loop.call_later(self._watch() / 1000.0, self._look, limit)
        except AsdError as refusal:
            self.refusal = refusal
            limit.reschedule(loop.time())


class Pipeline:
    """The earlier stages of a chain, drafting for the last one. Close it when the last one has answered."""

    def __init__(
        self,
        progress: Progress,
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
        self._runs: list[StageRun] = []
        # What each of them writes.
        self._written: list[Draft] = []
        self._tasks: list[asyncio.Task[None]] = []
        for client in clients:
            self._start(client)

    def verify(self, client: StageClient) -> AsyncGenerator[StageEvent, None]:
        """Have the last stage verify what the others write."""
        return client.verify_stream(self._request, self._written[-1], self._timeout_ms)

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
        run = StageRun(client.stage, action, drafter, self._clock, is_pipelined=drafts is not None)
        self._runs.append(run)
        written = Draft(self._clock)
        self._written.append(written)
        self._tasks.append(asyncio.create_task(self._work(client, run, drafts, written)))

    async def _work(
        self,
        client: StageClient,
        run: StageRun,
        drafts: Draft | None,
        written: Draft,
    ) -> None:
        with Traced(Spans.STAGE) as span:
            spans.describe_call(span, self._progress, run.stage, run.action)
            timeout_ms = self._time_of(client.stage)
            if drafts is None:
                call = client.generate(self._drafted, timeout_ms)
            else:
                call = client.verify_stream(self._drafted, drafts, timeout_ms)
            try:
                async with aclosing(call) as events:
                    async for event in events:
                        run.take(event)
                        if isinstance(event, Tokens):
                            written.add(event)
                        elif isinstance(event, StageResult):
                            written.add(event.finish_reason)
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
