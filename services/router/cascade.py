"""The cascade: ask for a plan, run a stage, decide on its evidence, stop or escalate. Pure."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from services.common.errors import (
    AsdError,
    BudgetSpent,
    InvalidRequest,
    Overloaded,
    ResourceExhausted,
)
from services.common.patience import Patience
from services.router.chain import call_stage
from services.router.domain import Failure, Outcome, Request, StageAction, StageStarted, View
from services.router.prefill import PrefillAhead
from services.router.request import RequestState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.router.interfaces import Observer, StageClient
    from services.router.planning.planner import Planner
    from services.router.request import Emit


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

    async def answer(self, request: Request, deadline: float, view: View, emit: Emit) -> Outcome:
        """Answer a request. emit: is awaited with what the view shows while the answer is made. deadline: by
        the clock.

        Raises NotFound for an unknown fixed stage, BudgetSpent at the deadline, Overloaded where there is no
        room for the request, what the policy refuses it with, and what the stages failed or refused it with
        where none has answered.
        """
        progress = RequestState(request, deadline, view, self._clock)
        try:
            return await self._answer(progress, emit)
        except (BudgetSpent, ResourceExhausted) as error:
            refusal = self._planner.refused(progress, error)
            if refusal is error:
                raise
            raise refusal from error
        finally:
            self._planner.ended(progress)

    async def _answer(self, progress: RequestState, emit: Emit) -> Outcome:
        stage = await self._planner.plan(progress)
        async with PrefillAhead(self._clock, self._planner.calling) as ahead:
            warm = self._planner.stage_to_warm(progress)
            if warm is not None:
                ahead.start(progress.request, self._stages[warm], self._planner.warming_ms(progress, warm))
            while True:
                try:
                    await self._run(progress, self._stages[stage], emit)
                except AsdError as error:
                    self._note_failures(progress, [progress.failure(stage, error)])
                    following = await self._instead_of(progress, stage, error)
                    await progress.revert(emit)
                else:
                    progress.failed |= ahead.refusals()
                    following = (await self._planner.decide(progress)).next_stage
                if following is None:
                    break
                stage = following
                await ahead.settle(stage)
            progress.warmed(await ahead.close())
        await progress.settle(emit)
        outcome = progress.outcome()
        self._observer.request_answered(outcome, len(self._stages))
        return outcome

    async def _run(self, progress: RequestState, client: StageClient, emit: Emit) -> None:
        """Have a stage answer, by verifying an earlier stage's answer where there is one."""
        progress.call_ms, progress.call = 0.0, None
        stage, draft = client.stage, self._planner.draft_for(progress, client.stage)
        upstream = [self._stages[place] for place in progress.upstream]
        await self._planner.until_awake(progress, [each.stage for each in (client, *upstream)])
        action = StageAction.VERIFY if draft or upstream else StageAction.GENERATE
        if progress.view is not View.OUTCOME:
            await emit(StageStarted(stage, action))
        timeout_ms = self._planner.timeout_ms(progress, stage)
        leave_after_ms = progress.call_ms = min(timeout_ms, self._planner.leave_after_ms(progress, stage))
        drafter = upstream[-1].stage.name if upstream else progress.drafter
        progress.start(stage, action, drafter, is_final=self._planner.is_final(progress, stage))
        with ExitStack() as calls:
            under_way = {
                each.stage: calls.enter_context(self._planner.calling(each.stage))
                for each in (client, *upstream)
            }
            watch = self._planner.watch(progress, stage, under_way[stage])
            # Of drafters, also where the call itself fails.
            calls.callback(lambda: self._note_failures(progress, progress.new_failures()))
            await call_stage(
                progress,
                client,
                draft,
                upstream,
                timeout_ms,
                leave_after_ms,
                self._clock,
                watch,
                emit,
                lambda: self._planner.heard(stage),
            )
        for answer in progress.new_answers():
            self._patience.there()
            self._planner.stage_answered(progress, answer, under_way[answer.stage].depth)
            self._observer.stage_answered(answer, progress.request.task, is_adapted=answer.result.is_adapted)

    def _note_failures(self, progress: RequestState, failures: Sequence[Failure]) -> None:
        for failure in failures:
            # Who leaves a line says nothing of the stage.
            if not isinstance(failure.error, InvalidRequest | Overloaded):
                self._observer.stage_failed(self._stages[failure.place].stage, failure.error)
            self._planner.stage_failed(progress, failure)

    async def _instead_of(self, progress: RequestState, stage: int, error: AsdError) -> int | None:
        """Return the stage to ask instead of one that failed; None: the earlier answer stands.

        Raises an error where neither may be.
        """
        progress.failed[stage] = error
        if not progress.has_earlier_answer():
            return await self._planner.plan_again(progress, error, self._patience)
        if isinstance(error, Overloaded) and self._planner.may_be_refused(progress):
            raise error
        following = await self._planner.decide_again(progress)
        if following is None and self._planner.is_refused_for(progress, error):
            raise error
        if following is None:
            progress.keep_earlier_answer(error)
        return following
