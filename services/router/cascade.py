"""The cascade: ask for a plan, run a stage, decide on its evidence, stop or escalate. Pure."""

from __future__ import annotations

from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING

from services.common.errors import AsdError, Away, BudgetSpent, ResourceExhausted, Unavailable
from services.common.patience import Patience
from services.router.ahead import PrefillAhead
from services.router.domain import Event, PlanSource, Request, StageAction, StageStarted, View
from services.router.pipeline import call_stage
from services.router.progress import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from services.router.planner import Planner
    from services.router.ports import Observer, StageClient


class Cascade:
    """Answers requests with the stages that the planner chooses.

    clock: monotonic seconds. patience: how long requests wait while no stage is there.
    """

    def __init__(
        self,
        stages: Sequence[StageClient],
        planner: Planner,
        observer: Observer,
        clock: Callable[[], float],
        patience: Patience | None = None,
    ) -> None:
        self._patience = patience or Patience(clock)
        self._stages = tuple(stages)
        self._planner = planner
        self._observer = observer
        self._clock = clock

    async def answer(self, request: Request, deadline: float, view: View) -> AsyncGenerator[Event, None]:
        """Yield what the view shows while the answer is made, and last its outcome. deadline: by the clock.

        Raises NotFound for an unknown fixed stage, Unavailable where no stage can be reached, BudgetSpent at
        the deadline, and whatever the first stage or the policy refuses the request with.
        """
        progress = Progress(request, deadline, view, self._clock)
        try:
            async with aclosing(self._answer(progress)) as events:
                async for event in events:
                    yield event
        finally:
            self._planner.ended(progress)

    async def _answer(self, progress: Progress) -> AsyncGenerator[Event, None]:
        stage = await self._planner.plan(progress)
        async with PrefillAhead(self._clock, self._planner.calling) as ahead:
            warm = self._planner.stage_to_warm(progress)
            if warm is not None:
                ahead.start(progress.request, self._stages[warm], self._planner.warming_ms(progress, warm))
            while True:
                try:
                    async with aclosing(self._run(progress, self._stages[stage])) as events:
                        async for event in events:
                            yield event
                except (Unavailable, ResourceExhausted, BudgetSpent) as error:
                    self._note_failure(progress, stage, error)
                    following = await self._instead_of(progress, stage, error)
                    for event in progress.go_back():
                        yield event
                else:
                    following = (await self._planner.decide(progress)).next_stage
                if following is None:
                    break
                stage = following
                await ahead.settle(stage)
            progress.warmed(await ahead.close())
        for event in progress.settle():
            yield event
        outcome = progress.outcome()
        self._observer.request_answered(outcome, len(self._stages))
        yield outcome

    async def _run(self, progress: Progress, client: StageClient) -> AsyncGenerator[Event, None]:
        """Have a stage answer, by verifying an earlier stage's answer where there is one."""
        stage, draft = client.stage, self._planner.draft_for(progress, client.stage)
        upstream = [self._stages[place] for place in progress.upstream]
        await self._planner.until_awake(progress, [each.stage for each in (client, *upstream)])
        action = StageAction.VERIFY if draft or upstream else StageAction.GENERATE
        if progress.view is not View.OUTCOME:
            yield StageStarted(stage, action)
        timeout_ms = progress.call_ms = self._planner.timeout_ms(progress, stage)
        drafter = upstream[-1].stage.name if upstream else progress.drafter
        progress.start(stage, action, drafter, is_final=self._planner.is_final(progress, stage))
        call = call_stage(progress, client, draft, upstream, timeout_ms, self._clock)
        with ExitStack() as calls:
            depths = {
                each.stage: calls.enter_context(self._planner.calling(each.stage))
                for each in (client, *upstream)
            }
            async with call as events:
                async for event in events:
                    for shown in progress.take(event):
                        yield shown
                    if progress.is_hopeless():
                        break
        for place, error in progress.new_failures():
            self._note_failure(progress, place, error)
        for answer in progress.new_answers():
            self._patience.there()
            self._planner.stage_answered(progress, answer, depths[answer.stage])
            self._observer.stage_answered(answer, progress.request.task, is_adapted=answer.result.is_adapted)

    def _note_failure(self, progress: Progress, stage: int, error: AsdError) -> None:
        failed = self._stages[stage].stage
        self._observer.stage_failed(failed, error)
        self._planner.stage_failed(progress, failed, error)

    async def _instead_of(self, progress: Progress, stage: int, error: AsdError) -> int | None:
        """Return the stage to ask instead of one that failed; None: the earlier answer stands.

        Raises the error where neither may be.
        """
        if progress.has_earlier_answer():
            progress.failed[stage] = error
            following = await self._planner.decide_again(progress)
            if following is None:
                progress.keep_earlier_answer(error)
            return following
        is_fixed = progress.plan_source is PlanSource.FIXED
        if is_fixed or progress.has_committed or not self._planner.may_be_replaced(progress, error):
            raise error
        progress.failed[stage] = error
        return await self._plan_again(progress)

    async def _plan_again(self, progress: Progress) -> int:
        """Return the stage to ask after others failed; where none is left, one that may be back by now."""
        try:
            return await self._planner.plan(progress)
        except Unavailable:
            away = [place for place, error in progress.failed.items() if isinstance(error, Away)]
            until = self._clock() + progress.left_ms() / 1000.0
            if not away or not await self._patience.wait(until):
                raise
            for place in away:
                del progress.failed[place]
            return await self._planner.plan(progress)
