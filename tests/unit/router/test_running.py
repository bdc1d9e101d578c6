"""A step's call: what it reports, when it is left, and what its failure says of the stage."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import BudgetSpent, Overloaded, Unavailable
from asd.values import DecisionAction, DecisionReason, PlanSource
from services.router.domain import (
    AbandonRule,
    Decision,
    Provenance,
    RoutedRequest,
    Stage,
    StageFailed,
    Step,
    Visibility,
)
from services.router.planning.load import Load
from services.router.prefill import PrefillAhead
from services.router.request import RequestState
from services.router.running import StageRunner
from tests.unit.router import simulated_time
from tests.unit.router.small_cascade import FakeStage

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.domain import Event, OpenCall, Report

STAGES = [Stage(name, index, 1.0, 60_000.0) for index, name in enumerate(("small", "medium", "large"))]


class Slow(FakeStage):
    """Waits so many seconds before each letter, and before its end."""

    def __init__(self, stage: Stage, seconds: float = 0.0, **options: Any) -> None:
        super().__init__(stage, **options)
        self.seconds = seconds
        self.was_left = False

    async def _may_fail(self, count: int) -> None:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.was_left = True
            raise
        await super()._may_fail(count)


class Running:
    """Runs steps for one request, in simulated time."""

    def __init__(self, *seconds: float, view: Visibility = Visibility.OUTCOME) -> None:
        self.clock = asyncio.get_running_loop().time
        self.clients = [
            Slow(stage, each) for stage, each in zip(STAGES, (*seconds, 0.0, 0.0, 0.0), strict=False)
        ]
        self.load = Load(len(STAGES), self.clock)
        self.runner = StageRunner(self.clients, self.load, self.clock)
        self.seen: list[Event] = []
        request = RoutedRequest("hi", id="id")
        self.state = RequestState(request, self.clock() + 100.0, view, self.clock, self._show)
        self.prefill = PrefillAhead(request, self.clients, self.load, self.clock)
        self.looked: list[OpenCall] = []

    async def _show(self, event: Event) -> None:
        self.seen.append(event)

    async def run(self, stage: int, look: Callable[[], float] = lambda: 1000.0, **fields: Any) -> Report:
        def look_at(_: Stage, call: OpenCall) -> float:
            self.looked.append(call)
            return look()

        step = Step(
            STAGES[stage],
            fields.pop("provenance", Provenance(PlanSource.POLICY)),
            timeout_ms=fields.pop("timeout_ms", 50_000.0),
            leave_after_ms=fields.pop("leave_after_ms", 50_000.0),
            is_final=fields.pop("is_final", False),
            **fields,
        )
        return await self.runner.run(step, self.state, self.prefill, look_at)

    async def failure(self, stage: int, **fields: Any) -> StageFailed:
        with pytest.raises(StageFailed) as caught:
            await self.run(stage, **fields)
        return caught.value


def test_an_answer_is_reported_with_the_calls_beside_it() -> None:
    async def work() -> None:
        running = Running()
        with running.load.calling(0), running.load.calling(0):
            report = await running.run(0)
        ((answer, depth),) = report.answers
        assert (answer.result.text, depth) == ("abc", 3)
        assert running.state.answer is answer
        assert running.load.own_calls(0) == 0

    simulated_time.run(work())


def test_a_silent_stage_is_left_after_its_time() -> None:
    async def work() -> None:
        running = Running(30.0)
        failed = await running.failure(0, leave_after_ms=20_000.0)
        assert isinstance(failed.failure.error, BudgetSpent)
        assert (failed.failure.call_ms, failed.failure.has_heard) == (20_000.0, False)
        assert running.clock() == pytest.approx(20.0)
        assert running.clients[0].was_left
        assert running.load.own_calls(0) == 0

    simulated_time.run(work())


def test_a_stage_at_work_is_not_left_where_there_is_no_other_answer() -> None:
    async def work() -> None:
        running = Running(15.0)
        report = await running.run(0, leave_after_ms=20_000.0)
        assert report.answers[0][0].result.text == "abc"

    simulated_time.run(work())


def test_a_stage_at_work_is_left_where_an_earlier_answer_can_be_given() -> None:
    async def work() -> None:
        running = Running(0.0, 15.0)
        await running.run(0)
        decision = Decision(DecisionAction.ESCALATE, DecisionReason.VALUE, 1)
        failed = await running.failure(1, leave_after_ms=20_000.0, decision=decision)
        assert isinstance(failed.failure.error, BudgetSpent)
        assert failed.failure.has_heard

    simulated_time.run(work())


def test_what_a_look_says_ends_the_call_and_is_told() -> None:
    async def work() -> None:
        running, looks = Running(30.0), iter([2000.0, 3000.0])

        def look() -> float:
            after_ms = next(looks, None)
            if after_ms is None:
                raise Overloaded("no room", retry_after_s=1.0)
            return after_ms

        failed = await running.failure(0, look=look)
        assert isinstance(failed.failure.error, Overloaded)
        assert running.clock() == pytest.approx(5.0)
        # What the request still had says nothing of the stage.
        assert failed.failure.call_ms == pytest.approx(5000.0)
        assert failed.failure.call == running.looked[-1]

    simulated_time.run(work())


def test_nobody_looks_at_a_call_from_which_something_has_come() -> None:
    async def work() -> None:
        running = Running(10.0)
        await running.run(0, leave_after_ms=45_000.0)
        # At once, and each second until the first letter after ten.
        assert 10 <= len(running.looked) <= 11

    simulated_time.run(work())


def test_a_slow_caller_takes_what_it_is_shown_before_its_stage_is_left() -> None:
    async def work() -> None:
        running, begun, taken = Running(0.0, 1.0), [], []

        async def show(event: Event) -> None:
            begun.append(event)
            await asyncio.sleep(30.0)
            taken.append(event)

        request = RoutedRequest("hi", id="id")
        running.state = RequestState(request, running.clock() + 500.0, Visibility.DRAFTS, running.clock, show)
        await running.run(0, leave_after_ms=20_000.0)
        decision = Decision(DecisionAction.ESCALATE, DecisionReason.VALUE, 1)
        await running.failure(1, leave_after_ms=20_000.0, decision=decision)
        assert begun == taken

    simulated_time.run(work())


def test_a_draft_that_is_not_worth_finishing_is_reported_as_it_stands() -> None:
    async def work() -> None:
        running = Running(1.0)
        # The letters have a log-probability of -0.1.
        report = await running.run(0, abandon=(AbandonRule(1, -0.05),))
        assert report.is_abandoned
        ((answer, _),) = report.answers
        assert (answer.result.text, answer.is_whole) == ("ab", False)
        assert not running.state.has_earlier_answer()

    simulated_time.run(work())


@pytest.mark.parametrize(("rule", "is_final"), [(AbandonRule(1, -0.2), False), (AbandonRule(1, -0.05), True)])
def test_a_draft_that_will_do_is_finished(rule: AbandonRule, is_final: bool) -> None:
    async def work() -> None:
        report = await Running().run(0, abandon=(rule,), is_final=is_final)
        assert not report.is_abandoned

    simulated_time.run(work())


def test_a_failed_drafter_is_told_beside_the_answer() -> None:
    async def work() -> None:
        running = Running()
        running.clients[0].fail_after, running.clients[0].failure = 1, Unavailable("gone")
        report = await running.run(2, drafters=(STAGES[0],), provenance=Provenance(PlanSource.FIXED))
        assert [(each.stage.name, type(each.error)) for each in report.failures] == [("small", Unavailable)]
        assert [answer.stage.name for answer, _ in report.answers] == ["small", "large"]
        assert running.state.spent_cost > 1.0

    simulated_time.run(work())


def test_a_stage_that_waited_for_its_drafter_has_that_time_taken_off() -> None:
    async def work() -> None:
        running = Running(10.0)
        running.clients[2].fail_after, running.clients[2].failure = 0, BudgetSpent("late")
        fields = {"drafters": (STAGES[0],), "provenance": Provenance(PlanSource.FIXED)}
        failed = await running.failure(2, leave_after_ms=40_000.0, **fields)
        assert failed.failure.call_ms == pytest.approx(30_000.0)

    simulated_time.run(work())
