"""Runs a planned step: calls its stage, and ends the call if the request does better without it."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

from asd.errors import AsdError, BudgetSpent
from services.common.telemetry import Spans, Traced
from services.router import spans
from services.router.chain import Chain
from services.router.domain import (
    CallFailure,
    OpenCall,
    Report,
    ScoredTokens,
    StageAnswer,
    StageFailed,
    Verification,
)
from services.router.request import DraftAbandoned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.router.domain import Stage, StageResult, Step
    from services.router.interfaces import StageClient
    from services.router.planning.load import Load
    from services.router.prefill import PrefillAhead
    from services.router.request import RequestState

    # Checks a call to a stage that has sent nothing yet. Returns the milliseconds until the next check, or
    # raises the error that ends the call.
    Look = Callable[[Stage, OpenCall], float]


class StageRunner:
    """Calls stages. load: counts the calls in flight. clock: monotonic seconds."""

    def __init__(self, clients: Sequence[StageClient], load: Load, clock: Callable[[], float]) -> None:
        self._clients = tuple(clients)
        self._load = load
        self._clock = clock

    async def run(self, step: Step, state: RequestState, prefill: PrefillAhead, look: Look) -> Report:
        """Have a step's stage answer, and return the report. Raises StageFailed."""
        waiting = self._clock()
        await prefill.wait_for(step.stage)
        run = _Run(self._clients, self._load, self._clock, step, (self._clock() - waiting) * 1000.0)
        await state.begin(step)
        return await run.answer(state, prefill, look)


class _Run:
    """One step's calls. waited_ms: how much of the step's time passed before them."""

    def __init__(
        self,
        clients: Sequence[StageClient],
        load: Load,
        clock: Callable[[], float],
        step: Step,
        waited_ms: float,
    ) -> None:
        self._client = clients[step.stage.index]
        self._drafters = [clients[drafter.index] for drafter in step.drafters]
        self._load = load
        self._clock = clock
        self._step = step
        self._timeout_ms = step.timeout_ms - waited_ms
        self._leave_after_ms = min(step.leave_after_ms - waited_ms, self._timeout_ms)
        # Time that the stage waited for its drafters. It does not count against the stage.
        self._wait_ms = 0.0
        self._drafted: list[StageAnswer] = []
        self._failures: tuple[CallFailure, ...] = ()

    async def answer(self, state: RequestState, prefill: PrefillAhead, look: Look) -> Report:
        step, stage = self._step, self._step.stage
        with ExitStack() as under_way:
            calls = {
                each.index: under_way.enter_context(self._load.calling(each.index))
                for each in (stage, *step.drafters)
            }
            call = calls[stage.index]
            limit = _Limit(
                state, stage, self._leave_after_ms, lambda: look(stage, call), self._heard, self._clock
            )
            try:
                with Traced(Spans.STAGE) as span:
                    spans.describe_call(span, state.request, stage, step.action, step.skip_reason)
                    result = await (
                        self._verify_drafters(state) if step.drafters else self._call(state, limit)
                    )
                    answer = state.finish(result)
                    spans.describe_answer(span, answer)
            except AsdError as error:
                call_ms = self._leave_after_ms - self._wait_ms
                if limit.was_looked_at:
                    # The check ended the call early, so only the time that passed counts against the stage.
                    call_ms = min(call_ms, (self._clock() - call.began) * 1000.0)
                failure = CallFailure(stage, error, call_ms, state.has_heard, call)
                raise StageFailed(failure, self._failures) from error
        answers = ((each, calls[each.stage.index].depth) for each in (*self._drafted, answer))
        return Report(tuple(answers), self._failures, prefill.refusals(), is_abandoned=result is None)

    async def _call(self, state: RequestState, limit: _Limit) -> StageResult | None:
        """Return the stage's result; None if its draft was not worth finishing."""
        request, draft = state.request, self._step.draft
        if draft is None:
            call = self._client.generate(request, self._timeout_ms, limit.take)
        else:
            call = self._client.verify(request, draft, self._timeout_ms, limit.take)
        try:
            return await limit.result_of(call)
        except DraftAbandoned:
            return None

    async def _verify_drafters(self, state: RequestState) -> StageResult:
        """Have the stage verify drafts while they are written; return its result."""
        chain = Chain(state.request, self._drafters, self._timeout_ms, self._clock)
        try:
            return await chain.verify(self._client, state.take)
        finally:
            answers, failures, self._wait_ms = await chain.close()
            self._drafted, self._failures = state.drafted(answers), tuple(failures)

    def _heard(self) -> None:
        self._load.heard_from(self._step.stage.index)


class _Limit:
    """Ends a call if its request does better without it.

    Two calls keep all of their time: one whose stage has committed text of its own, and one that has begun
    to answer while there is no earlier answer. leave_after_ms: as in Step. look: is called until the first
    message; it returns the milliseconds until its next call, or raises the error that ends the call. heard:
    is called with each message.
    """

    def __init__(
        self,
        state: RequestState,
        stage: Stage,
        leave_after_ms: float,
        look: Callable[[], float],
        heard: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._stage = stage
        self._leave_after_ms = leave_after_ms
        self._look = look
        self._heard = heard
        self._clock = clock
        self._until = clock() + leave_after_ms / 1000.0
        self._timeout = asyncio.timeout(None)
        self._looking: asyncio.Handle | None = None
        self._is_taking = False
        self._refusal: AsdError | None = None
        self.was_looked_at = False

    async def result_of(self, call: Awaitable[StageResult]) -> StageResult:
        """Return the call's result. Raises BudgetSpent if it takes too long, and any error of look."""
        loop = asyncio.get_running_loop()
        leaving = loop.call_later(max(self._until - self._clock(), 0.0), self._leave)
        try:
            async with self._timeout:
                self._looking = loop.call_soon(self._look_again)
                return await call
        except TimeoutError:
            if self._refusal is None:
                raise
            raise self._refusal from None
        finally:
            leaving.cancel()
            self._stop_looking()

    async def take(self, event: ScoredTokens | Verification) -> None:
        """Take an event of the stage. The call is not ended while a slow caller takes it."""
        self._stop_looking()
        self._heard()
        self._is_taking = True
        try:
            await self._state.take(event)
        finally:
            self._is_taking = False
        if self._clock() >= self._until:
            self._leave()

    def _leave(self) -> None:
        """End the call, unless the request needs it."""
        if not self._is_taking and self._state.can_leave():
            self._end(BudgetSpent(f"{self._stage} did not finish within {self._leave_after_ms:.0f} ms"))

    def _look_again(self) -> None:
        try:
            after_ms = self._look()
        except AsdError as refusal:
            self.was_looked_at = True
            self._end(refusal)
        else:
            self._looking = asyncio.get_running_loop().call_later(after_ms / 1000.0, self._look_again)

    def _end(self, refusal: AsdError) -> None:
        if self._refusal is None:
            self._refusal = refusal
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
