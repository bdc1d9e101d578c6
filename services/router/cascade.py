"""The cascade: plan, run a stage, decide on its evidence; stop or escalate. No gRPC, no protobuf."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.router.domain import RoutedAnswer, RoutedRequest, StageFailed, Step, Stop, Visibility
from services.router.prefill import PrefillAhead
from services.router.request import RequestState
from services.router.running import StageRunner
from services.router.tool_loop import held, with_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.router.interfaces import Observer, StageClient
    from services.router.planning.planner import Planner
    from services.router.request import Emit


class Cascade:
    """Answers requests with the stages that the planner chooses. clock: monotonic seconds."""

    def __init__(
        self,
        clients: Sequence[StageClient],
        planner: Planner,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._clients = tuple(clients)
        self._planner = planner
        self._runner = StageRunner(clients, planner.load, clock)
        self._observer = observer
        self._clock = clock

    async def answer(
        self, request: RoutedRequest, deadline: float, view: Visibility, emit: Emit
    ) -> RoutedAnswer:
        """Return the outcome of a request, and emit the events that the view shows. deadline: clock seconds.

        Raises NotFound for an unknown fixed stage, BudgetSpent at the deadline and Overloaded if there is no
        capacity. A refusal by the policy is raised as it is. So is the stages' error if none has answered.
        """
        request = held(request, [client.stage.name for client in self._clients])
        state = RequestState(request, deadline, view, self._clock, emit)
        with self._planner.plan_for(state) as plan:
            async with PrefillAhead(request, self._clients, self._planner.load, self._clock) as prefill:
                first = await plan.first_step()
                prefill.start(first)
                step: Step | Stop = first
                while isinstance(step, Step):
                    try:
                        # The stage generates, or verifies the draft so far.
                        report = await self._runner.run(step, state, prefill, plan.look)
                    except StageFailed as failed:
                        step = await plan.after_failure(failed)
                        await state.revert_to_earlier_answer()
                    else:
                        step = await plan.after_answer(report)
                state.prefilled(await prefill.close())
            outcome = with_calls(await state.commit(step), request)
        self._observer.request_answered(outcome, len(self._clients))
        return outcome
