"""More requests than the stages compute in time: who waits, who is refused, and when. In simulated time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, Away, BudgetSpent, Overloaded, PreconditionFailed
from asd.values import DecisionReason, FinishReason, Objective, Preference
from services.router.cascade import Cascade
from services.router.domain import (
    Overload,
    Refusal,
    RoutedAnswer,
    RoutedRequest,
    ScoredTokens,
    Stage,
    StageResult,
    Timing,
    TokenUsage,
    Verification,
    Visibility,
)
from services.router.planning.admission import MOST_RETRY_S
from services.router.planning.draft_selection import SpeculationOptions
from services.router.planning.static_plan import StaticPlan
from services.router.planning.time_budget import MOST_KEPT_MS
from tests.unit.router import simulated_time
from tests.unit.router.small_cascade import NAMES, Observer, Policy, make_planner, show_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Collection

    from services.router.interfaces import Take

CAPACITY = 8
SERVICE_S = 1.0
# Requests that a router sees before a test begins, and how many of them come one after the other.
WARM, ALONE = 44, 20


@dataclass
class BusyStage:
    """Computes 8 calls at a time, in the order in which they come. service_s: draws how long one takes.

    failures: what calls for a prompt fail with, after half a second; None: they hang.
    """

    stage: Stage
    service_s: Callable[[], float]
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CAPACITY))
    failures: dict[object, AsdError | None] = field(default_factory=dict)
    called: int = 0
    answered: int = 0

    async def generate(self, request: RoutedRequest, timeout_ms: float, emit: Take) -> StageResult:
        clock = asyncio.get_running_loop().time
        came, service_s = clock(), self.service_s()
        self.called += 1
        if request.input in self.failures:
            failure = self.failures[request.input]
            await asyncio.sleep(timeout_ms / 1000.0 if failure is None else 0.5)
            raise failure or BudgetSpent(f"{self.stage} did not finish within {timeout_ms:.0f} ms")
        try:
            async with asyncio.timeout(timeout_ms / 1000.0), self.places:
                queue_ms = (clock() - came) * 1000.0
                await asyncio.sleep(service_s / 4.0)
                await emit(ScoredTokens((1,), "a", (-0.1,), (0.1,), (0.9,)))
                await asyncio.sleep(service_s * 3.0 / 4.0)
        except TimeoutError:
            raise BudgetSpent(f"{self.stage} did not finish within {timeout_ms:.0f} ms") from None
        self.answered += 1
        timing = Timing(queue_ms, total_ms=queue_ms + service_s * 1000.0)
        return StageResult("a", (1,), "a" * 64, FinishReason.EOS, TokenUsage(4, completion_tokens=1), timing)

    async def verify(
        self, request: RoutedRequest, draft: StageResult, timeout_ms: float, emit: Take
    ) -> StageResult:
        async def verified(event: ScoredTokens | Verification) -> None:
            await emit(Verification(1, 1))
            await emit(event)

        return await self.generate(request, timeout_ms, verified)

    async def verify_stream(
        self,
        request: RoutedRequest,
        drafts: AsyncIterable[ScoredTokens | FinishReason],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        raise NotImplementedError

    async def prefill(self, request: RoutedRequest, timeout_ms: float) -> int:
        return 4


@dataclass
class Told:
    """How one request ended, and how long after it came. error: None for an answer."""

    error: AsdError | None
    outcome: RoutedAnswer | None
    after_s: float


class Busy:
    """A router before stages that compute 8 calls at a time."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        overload: Overload = Overload.QUEUE,
        service_s: Callable[[], float] = lambda: SERVICE_S,
        static_plan: tuple[int, ...] = (0,),
        capacity: int = CAPACITY,
    ) -> None:
        self.clock = asyncio.get_running_loop().time
        stages = [Stage(name, place, 1.0 + place, 60_000.0) for place, name in enumerate(NAMES)]
        self.stages = {each.name: BusyStage(each, service_s, asyncio.Semaphore(capacity)) for each in stages}
        self.observer = Observer()
        observer: Any = self.observer
        options = SpeculationOptions(prefill_ahead=False, adaptive=False)
        plan = StaticPlan(static_plan, len(NAMES))
        planner = make_planner(stages, policy, plan, observer, self.clock, options, overload=overload)
        self._cascade = Cascade(tuple(self.stages.values()), planner, observer, self.clock)

    async def ask(self, seconds: float, **fields: Any) -> Told:
        """Return how a request ends whose caller waits so long."""
        came = self.clock()
        request = RoutedRequest(**{"input": "hi", "id": "id", **fields})
        error = outcome = None
        try:
            outcome = await self._cascade.answer(request, came + seconds, Visibility.OUTCOME, show_nothing)
        except AsdError as failure:
            error = failure
        return Told(error, outcome, self.clock() - came)

    async def burst(self, count: int, seconds: float, **fields: Any) -> list[Told]:
        """Return how requests end that come in the same instant."""
        return await asyncio.gather(*(self.ask(seconds, **fields) for _ in range(count)))

    async def warm(self, **fields: Any) -> None:
        """Have the router see some answers, and then calls that wait for others."""
        for _ in range(ALONE):
            assert (await self.ask(600.0, **fields)).error is None
        asked = []
        for _ in range(WARM - ALONE):
            asked.append(asyncio.create_task(self.ask(600.0, **fields)))
            await asyncio.sleep(SERVICE_S / (2 * CAPACITY))
        assert kinds(await asyncio.gather(*asked)) == {"answer": WARM - ALONE}


def kinds(told: Collection[Told]) -> Counter[str]:
    return Counter("answer" if each.error is None else type(each.error).__name__ for each in told)


def varied(seed: int) -> Callable[[], float]:
    """Return what draws how long answers take: a second on average, half of it or twice as much at times."""
    draw = random.Random(seed)
    return lambda: draw.triangular(0.5, 2.0, 0.5)


FIXED: dict[str, Any] = {"stage": "large"}
PLANNED: dict[str, Any] = {"objective": Objective(preference=Preference.BALANCED)}


@pytest.mark.parametrize("is_warm", [True, False])
@pytest.mark.parametrize("fields", [FIXED, PLANNED], ids=["fixed", "planned"])
@pytest.mark.parametrize("varies", [False, True])
def test_a_burst_with_short_deadlines_is_answered_or_refused_and_never_late(
    is_warm: bool, fields: dict[str, Any], varies: bool
) -> None:
    async def work() -> list[Told]:
        busy = Busy(Policy(), service_s=varied(1) if varies else lambda: SERVICE_S)
        if is_warm:
            await busy.warm(**fields)
        told = await busy.burst(400, 6.0 * SERVICE_S, **fields)
        refused = [each for each in told if each.error is not None]
        assert busy.observer.refusals == [Refusal.DEADLINE] * len(refused)
        if is_warm:
            # Who is refused at once is not sent to a stage.
            assert sum(each.called for each in busy.stages.values()) <= WARM + 60
        # Nothing is computed in vain.
        assert sum(each.answered for each in busy.stages.values()) - WARM * is_warm == 400 - len(refused)
        return told

    told = simulated_time.run(work())
    assert set(kinds(told)) == {"answer", "Overloaded"}
    # A refusal has time for its way.
    kept_s = MOST_KEPT_MS / 1000.0
    assert all(each.after_s <= 6.0 * SERVICE_S - kept_s * (each.error is not None) for each in told)
    # 8 at a time for 6 seconds are 48 answers; what may take longer than the mean is kept.
    assert kinds(told)["answer"] >= (16 if varies else 32)
    refused = [each for each in told if each.error is not None]
    assert all(0.0 < each.error.retry_after_s <= MOST_RETRY_S for each in refused)  # type: ignore[union-attr, operator]
    if is_warm:
        # What is known at once is said at once.
        assert sum(each.after_s == 0.0 for each in refused) >= 340


@pytest.mark.parametrize("fields", [FIXED, PLANNED], ids=["fixed", "planned"])
def test_twice_as_much_as_can_be_computed_is_answered_at_the_stages_rate(fields: dict[str, Any]) -> None:
    count, seconds = 1200, 8.0

    async def work() -> list[Told]:
        busy = Busy(Policy(), service_s=varied(2))
        await busy.warm(**fields)
        draw = random.Random(3)
        asked = []
        for _ in range(count):
            # 16 a second, of which 8 can be computed.
            await asyncio.sleep(draw.expovariate(16.0))
            asked.append(asyncio.create_task(busy.ask(seconds, **fields)))
        return await asyncio.gather(*asked)

    told = simulated_time.run(work())
    assert set(kinds(told)) == {"answer", "Overloaded"}
    # The stage is never idle: of 75 seconds, and of those that the last ones waited.
    assert kinds(told)["answer"] >= 0.9 * count / 2


def test_who_waits_longer_than_was_expected_is_refused_before_the_deadline() -> None:
    async def work() -> list[Told]:
        slow = SERVICE_S

        busy = Busy(service_s=lambda: slow)
        await busy.warm(**FIXED)
        # From now on answers take three times as long, which nobody knows.
        slow = 3.0 * SERVICE_S
        return await busy.burst(32, 6.0 * SERVICE_S, **FIXED)

    told = simulated_time.run(work())
    assert kinds(told) == {"answer": 8, "Overloaded": 24}
    # Their place in the line tells, or the first answers after three seconds. Some begin then, with a little
    # less time than they need.
    refused = [each.after_s for each in told if each.error is not None]
    assert sum(0.0 < after_s < 4.0 for after_s in refused) >= 12
    assert max(refused) < 6.0


def test_who_ran_out_of_time_beside_others_is_refused_without_a_further_call() -> None:
    async def work() -> tuple[list[Told], list[int]]:
        slow = SERVICE_S
        busy = Busy(Policy(), service_s=lambda: slow)
        await busy.warm(**PLANNED)
        before = [each.called for each in busy.stages.values()]
        # Long, but not so long that the stage is taken to hang.
        slow = 3.0 * SERVICE_S
        told = await busy.burst(CAPACITY, 3.0 * SERVICE_S, **PLANNED)
        return told, [each.called - calls for each, calls in zip(busy.stages.values(), before, strict=True)]

    told, called = simulated_time.run(work())
    assert kinds(told) == {"Overloaded": CAPACITY}
    # What is kept for the way back is not spent on another stage.
    assert called == [CAPACITY, 0, 0]


@pytest.mark.parametrize(
    ("budget_s", "stages", "reason"),
    [
        (9.0, ["small", "large"], DecisionReason.STATIC_PLAN),
        (3.0, ["small"], DecisionReason.MAX_LATENCY),
        # None fits: the quickest one comes closest.
        (0.5, ["small"], DecisionReason.MAX_LATENCY),
    ],
)
def test_the_static_plan_goes_on_within_max_latency_only(
    budget_s: float, stages: list[str], reason: DecisionReason
) -> None:
    async def work() -> RoutedAnswer | None:
        busy = Busy(static_plan=(0, 2))
        for name in NAMES:
            await busy.warm(stage=name)
        waiting = asyncio.create_task(busy.burst(3 * CAPACITY, 60.0, **FIXED))
        await asyncio.sleep(0.1)
        told = await busy.ask(60.0, objective=Objective(max_latency_ms=budget_s * 1000.0))
        await waiting
        return told.outcome

    outcome = simulated_time.run(work())
    assert outcome is not None
    assert [each.answer.stage.name for each in outcome.records] == stages
    assert outcome.records[-1].decision.reason is reason


def test_the_static_plan_begins_where_max_latency_has_time() -> None:
    async def work() -> RoutedAnswer | None:
        busy = Busy(static_plan=(2,))
        await busy.warm(**FIXED)
        waiting = asyncio.create_task(busy.burst(3 * CAPACITY, 60.0, **FIXED))
        await asyncio.sleep(0.1)
        told = await busy.ask(60.0, objective=Objective(max_latency_ms=1500.0))
        await waiting
        return told.outcome

    outcome = simulated_time.run(work())
    assert outcome is not None
    assert [each.answer.stage.name for each in outcome.records] == ["medium"]


def test_a_short_wait_is_no_reason_to_refuse() -> None:
    async def work() -> Told:
        # Answers take a second or ten: few take longer than some twenty.
        draw = random.Random(4)
        busy = Busy(service_s=lambda: draw.choice([SERVICE_S, 10.0 * SERVICE_S]))
        await busy.warm(**FIXED)
        waiting = asyncio.create_task(busy.burst(CAPACITY, 600.0, **FIXED))
        await asyncio.sleep(0.1)
        told = await busy.ask(12.0 * SERVICE_S, **FIXED)
        await waiting
        return told

    told = simulated_time.run(work())
    # It is let in, and may run out of time there.
    assert told.error is None or told.after_s > 10.0 * SERVICE_S


def test_those_who_are_refused_together_are_told_to_come_one_after_the_other() -> None:
    async def work() -> list[float]:
        busy = Busy()
        await busy.warm(**FIXED)
        told = await busy.burst(200, 3.0 * SERVICE_S, **FIXED)
        return [each.error.retry_after_s or 0.0 for each in told if each.error is not None]

    delays = sorted(simulated_time.run(work()))
    # The stage computes eight in a second: of those that are told to come within one, as many or so.
    for begin in range(int(delays[0]) + 1, int(delays[-1]) - 1):
        assert sum(begin <= delay < begin + 1 for delay in delays) <= CAPACITY + 2
    assert delays[-1] > 10.0


@pytest.mark.parametrize("objective", [Objective(preference=Preference.BEST), Objective(min_quality=0.9)])
def test_who_asks_for_quality_is_refused_where_the_better_answer_ran_out_of_time(
    objective: Objective,
) -> None:
    async def work() -> list[Told]:
        busy = Busy(Policy(script={0: (2,)}))
        await busy.warm()
        await busy.warm(**FIXED)
        # Of the three seconds the first stage leaves two.
        busy.stages["large"].service_s = lambda: 2.5 * SERVICE_S
        return await busy.burst(CAPACITY, 3.0 * SERVICE_S, objective=objective)

    assert kinds(simulated_time.run(work())) == {"Overloaded": CAPACITY}


def test_a_stage_that_writes_for_another_request_does_not_hang() -> None:
    async def work() -> set[str]:
        slow = SERVICE_S
        policy = Policy()
        busy = Busy(policy, overload=Overload.DEGRADE, service_s=lambda: slow, capacity=1)
        await busy.ask(60.0)
        # It writes its first token after a quarter of that, while the next request waits and hears nothing.
        slow = 48.0 * SERVICE_S
        first = asyncio.create_task(busy.ask(600.0))
        await asyncio.sleep(1.0)
        assert isinstance((await busy.ask(20.0, stage="small")).error, BudgetSpent)
        slow = SERVICE_S
        await busy.ask(600.0)
        await first
        return policy.plans[-1]

    assert simulated_time.run(work()) == set()


FOR_QUALITY = [Objective(preference=Preference.BEST), Objective(min_quality=0.9)]
NOT_FOR_QUALITY = [Objective(), Objective(preference=Preference.FASTEST), Objective(quality_value=3.0)]


@pytest.mark.parametrize("objective", NOT_FOR_QUALITY)
def test_an_answer_stands_where_the_line_at_the_next_stage_leaves_no_time(objective: Objective) -> None:
    async def work() -> tuple[list[Told], Told]:
        busy = Busy(Policy(script={0: (2,)}))
        await busy.warm()
        await busy.warm(**FIXED)
        waiting = asyncio.create_task(busy.burst(24, 60.0, stage="large"))
        await asyncio.sleep(0.5)
        told = await busy.ask(3.0, objective=objective)
        # It is not begun in vain.
        assert busy.stages["large"].called == 24 + 2 * WARM
        return await waiting, told

    waiting, told = simulated_time.run(work())
    assert kinds(waiting) == {"answer": 24}
    assert told.outcome is not None
    (record,) = told.outcome.records
    assert (record.answer.stage.name, record.decision.reason) == ("small", DecisionReason.DEADLINE)
    assert told.after_s == pytest.approx(SERVICE_S)


@pytest.mark.parametrize("objective", FOR_QUALITY)
@pytest.mark.parametrize("is_slower", [False, True], ids=["at once", "in the line"])
def test_who_asks_for_quality_is_refused_and_not_given_less(objective: Objective, is_slower: bool) -> None:
    async def work() -> tuple[Told, list[Refusal]]:
        seconds = SERVICE_S
        busy = Busy(Policy(script={0: (2,)}), service_s=lambda: seconds)
        await busy.warm()
        await busy.warm(**FIXED)
        called = busy.stages["large"].called
        # Slower than was known, or not.
        seconds = 3.0 * SERVICE_S if is_slower else SERVICE_S
        line = asyncio.create_task(busy.burst(24, 60.0, stage="large"))
        await asyncio.sleep(0.1)
        seconds = SERVICE_S
        asked = asyncio.create_task(busy.ask(5.0 if is_slower else 3.0, objective=objective))
        assert kinds(await line) == {"answer": 24}
        assert busy.stages["large"].called == called + 24 + is_slower
        return await asked, busy.observer.refusals

    told, counted = simulated_time.run(work())
    assert isinstance(told.error, Overloaded)
    assert told.error.retry_after_s is not None
    assert counted == [Refusal.DEADLINE]


@pytest.mark.parametrize(
    ("overload", "waits", "refusals"),
    [(Overload.QUEUE, True, []), (Overload.DEGRADE, True, []), (Overload.SHED, False, [Refusal.LINE])],
)
@pytest.mark.parametrize("script", [{0: (2,)}, {}], ids=["as it goes on", "as it begins"])
def test_who_sheds_does_not_wait_for_more_than_an_answer(
    overload: Overload, waits: bool, refusals: list[Refusal], script: dict[int, tuple[int, ...]]
) -> None:
    async def work() -> tuple[Told, list[Refusal]]:
        busy = Busy(Policy(script, first=0 if script else 2), overload=overload)
        await busy.warm(**FIXED)
        best: dict[str, Any] = {"objective": FOR_QUALITY[0]}
        asked = asyncio.create_task(busy.ask(60.0, **best)) if script else None
        other = asyncio.create_task(busy.ask(60.0)) if script else None
        await asyncio.sleep(0.5)
        # Eight are computed, and eight wait for as long as an answer takes.
        line = asyncio.create_task(busy.burst(16, 60.0, stage="large"))
        await asyncio.sleep(0.1)
        told = await (asked or busy.ask(60.0))
        if other is not None:
            # Who did not ask for quality keeps the answer that there is.
            outcome = (await other).outcome
            assert outcome is not None
            reasons = [record.decision.reason for record in outcome.records]
            assert (reasons == [DecisionReason.DEADLINE]) is (overload is Overload.SHED)
        assert kinds(await line) == {"answer": 16}
        return told, busy.observer.refusals

    told, counted = simulated_time.run(work())
    assert (told.error is None) == waits
    assert counted == refusals
    if not waits:
        assert isinstance(told.error, Overloaded)
        # The line is (17 - 8) / 8 answers long, an eighth too long.
        assert told.error.retry_after_s == pytest.approx(0.125, abs=0.05)


def test_a_stage_that_others_make_slow_is_not_taken_to_hang() -> None:
    async def work() -> list[Told]:
        slow = 0.02

        busy = Busy(Policy(), service_s=lambda: slow)
        await busy.warm()
        # Of eight at a time, no first token comes before the deadline.
        slow = 100.0
        return await busy.burst(8, 3.0)

    assert kinds(simulated_time.run(work())) == {"Overloaded": 8}


def test_a_request_that_is_alone_with_too_short_a_deadline_is_late() -> None:
    async def work() -> Told:
        busy = Busy()
        await busy.warm(**FIXED)
        return await busy.ask(0.5 * SERVICE_S, **FIXED)

    # More room would not help it.
    assert isinstance(simulated_time.run(work()).error, BudgetSpent)


def test_a_router_that_only_heard_of_a_line_sends_a_request_to_see() -> None:
    async def work() -> list[Told]:
        busy = Busy()
        await busy.warm(**FIXED)
        # Another router's calls hold every place.
        places = busy.stages["large"].places
        for _ in range(CAPACITY):
            await places.acquire()
        first = asyncio.create_task(busy.ask(600.0, **FIXED))
        await asyncio.sleep(50.0)
        for _ in range(CAPACITY):
            places.release()
        # It waited for 50 seconds, of which a fifth counts.
        assert (await first).error is None
        return await busy.burst(2, 10.0, **FIXED)

    probe, other = simulated_time.run(work())
    assert probe.error is None
    assert isinstance(other.error, Overloaded)


@pytest.mark.parametrize("failure", [PreconditionFailed("no such model"), Away("it drains")], ids=str)
@pytest.mark.parametrize("fields", [FIXED, {}], ids=["fixed", "planned"])
def test_a_request_that_fails_takes_nobody_elses_place(fields: dict[str, Any], failure: AsdError) -> None:
    async def work() -> list[Told]:
        busy = Busy(Policy(first=2))
        busy.stages["large"].failures["bad"] = failure
        await busy.warm(**FIXED)
        line = asyncio.create_task(busy.burst(24, 60.0, **fields))
        await asyncio.sleep(0.1)
        assert (await busy.ask(60.0, input="bad", **FIXED)).error is not None
        return await line

    told = simulated_time.run(work())
    assert kinds(told) == {"answer": 24}
    assert {each.outcome.answer.stage.name for each in told if each.outcome} == {"large"}


def test_who_can_go_elsewhere_leaves_a_stage_that_hangs() -> None:
    async def work() -> tuple[list[Told], list[Told]]:
        busy = Busy(Policy(first=2))
        large = busy.stages["large"]
        large.failures |= {"planned": None, "fixed": None}
        await busy.warm(**FIXED)
        fixed = asyncio.create_task(busy.burst(3, 60.0, input="fixed", **FIXED))
        planned = asyncio.create_task(busy.burst(3, 60.0, input="planned"))
        await asyncio.sleep(0.1)
        # Its callers give it ten times as long as answers take.
        await busy.ask(10.0, input="fixed", **FIXED)
        return await planned, await fixed

    planned, fixed = simulated_time.run(work())
    assert kinds(planned) == {"answer": 3}
    assert max(each.after_s for each in planned) < 12.0
    # Those that asked for the stage wait for it. It is no overload that they waited in vain.
    assert kinds(fixed) == {"BudgetSpent": 3}
    assert min(each.after_s for each in fixed) > 59.0


@pytest.mark.parametrize("capacity", [64, 3 * CAPACITY], ids=["64 at a time", "three replicas"])
@pytest.mark.parametrize("overload", [Overload.QUEUE, Overload.SHED])
@pytest.mark.parametrize("fields", [FIXED, {}], ids=["fixed", "planned"])
def test_nobody_is_refused_at_a_stage_that_computes_more_at_a_time_than_it_has_shown(
    fields: dict[str, Any], overload: Overload, capacity: int
) -> None:
    async def work() -> list[Told]:
        busy = Busy(Policy(first=2), overload=overload, service_s=lambda: 20.0, capacity=capacity)
        for _ in range(10):
            await busy.burst(2, 600.0, **fields)
        return await busy.burst(capacity, 60.0, **fields)

    told = simulated_time.run(work())
    assert kinds(told) == {"answer": capacity}
    assert {each.outcome.answer.stage.name for each in told if each.outcome} == {"large"}


def test_beside_one_other_a_short_answer_is_not_refused_for_what_answers_take() -> None:
    async def work() -> Told:
        seconds = SERVICE_S
        busy = Busy(service_s=lambda: seconds)
        await busy.warm(**FIXED)
        other = asyncio.create_task(busy.ask(60.0, **FIXED))
        await asyncio.sleep(0.1)
        # It is asked for a few tokens.
        seconds = SERVICE_S / 4
        told = await busy.ask(SERVICE_S / 2, **FIXED)
        await other
        return told

    assert simulated_time.run(work()).error is None


def test_a_call_that_nothing_was_heard_of_says_nothing_of_how_long_answers_take() -> None:
    async def work() -> list[Told]:
        busy = Busy()
        await busy.warm(**FIXED)
        # Another router's calls hold every place for a minute, once a call of this one has been answered.
        places = busy.stages["large"].places
        for _ in range(CAPACITY - 1):
            await places.acquire()
        last = asyncio.create_task(busy.ask(60.0, **FIXED))
        await asyncio.sleep(0.1)
        others = asyncio.create_task(places.acquire())
        await asyncio.sleep(0.1)
        assert (await busy.ask(60.0, **FIXED)).error is not None
        assert await others
        assert (await last).error is None
        for _ in range(CAPACITY):
            places.release()
        return await busy.burst(2 * CAPACITY, 6.0 * SERVICE_S, **FIXED)

    assert kinds(simulated_time.run(work())) == {"answer": 2 * CAPACITY}
