"""What a request is given, costs and leaves behind while stages draft, verify and fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import InvalidRequest, Overloaded, Unavailable
from asd.values import DecisionAction, DecisionReason, Objective, Preference
from services.common.cost import is_above
from services.router.domain import (
    AbandonRule,
    Decision,
    DraftPart,
    FinalPart,
    PolicyChoice,
    ScoredTokens,
    Verification,
    Visibility,
)
from tests.unit.router.simulated_time import run
from tests.unit.router.small_cascade import FakeStage, Policy, SmallCascade, answered, called, shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from services.router.interfaces import Take

AWAY = Unavailable("gone")
CHAIN = ("small", "large")


class Undecided(Policy):
    """Plans, and is unavailable for every decision."""

    async def decide(self, *arguments: Any, **options: Any) -> Decision:
        await super().decide(*arguments, **options)
        raise Unavailable("no policy")


class Abandoning(Policy):
    """Has no draft finished: the largest stage goes on from its first token."""

    async def plan(self, *arguments: Any, **options: Any) -> PolicyChoice:
        plan = await super().plan(*arguments, **options)
        # The stages write with a logprob of -0.1.
        return replace(plan, abandon=(AbandonRule(1, -0.05),), abandon_to=2)


class Slow(Policy):
    """Expects every escalation to take 20 seconds."""

    async def decide(self, *arguments: Any, **options: Any) -> Decision:
        return replace(await super().decide(*arguments, **options), expected_ms=20_000.0)


def before(stage: FakeStage, method: str, then: Callable[..., Awaitable[None]]) -> None:
    """Have something happen with a call's arguments before a stage does what it is called for."""
    own = getattr(stage, method)

    async def call(*arguments: Any) -> Any:
        await then(*arguments)
        return await own(*arguments)

    setattr(stage, method, call)


async def hang(*_: Any) -> None:
    await asyncio.Event().wait()


def finish(work: Coroutine[Any, Any, Any], cascade: SmallCascade) -> Any:
    """Return what a request returns, by simulated time. It must leave no call under way behind."""

    async def ask() -> Any:
        seen = await work
        await asyncio.sleep(0)
        return seen

    seen = run(ask())
    assert [cascade.load.own_calls(index) for index in range(3)] == [0, 0, 0]
    return seen


# What the caller is shown.


@pytest.mark.parametrize("view", [Visibility.COMMITTED, Visibility.DRAFTS])
async def test_once_final_tokens_were_sent_no_other_stage_is_asked(view: Visibility) -> None:
    cascade = SmallCascade(static_plan=(2,), large={"text": "xyz", "fail_after": 1, "failure": AWAY})
    with pytest.raises(Unavailable):
        await cascade.events(view)
    assert called(cascade) == ["large"]


async def test_who_asked_for_final_tokens_sees_no_draft() -> None:
    cascade = SmallCascade(Policy({0: (2,)}), large={"text": "xyz"})
    events = await cascade.events(Visibility.COMMITTED)
    assert not [event for event in events if isinstance(event, DraftPart)]
    assert shown(events) == "xyz"


async def test_exactly_the_accepted_tokens_stand() -> None:
    cascade = SmallCascade(static_plan=(0, 2), large={"text": "abx"})
    events = await cascade.events(Visibility.DRAFTS)
    assert next(event.count for event in events if isinstance(event, FinalPart)) == 2
    assert shown(events) == "abx"


async def test_tokens_that_were_encoded_anew_are_not_those_that_the_caller_holds() -> None:
    cascade = SmallCascade(static_plan=(0, 2), large={"text": "xyz"})
    large = cascade.stages["large"]

    async def verify(request: Any, draft: Any, timeout_ms: float, emit: Take) -> Any:
        await emit(Verification(3, 3, ids_used=False))
        return await large.generate(request, timeout_ms, emit)

    large.verify = verify  # type: ignore[method-assign]
    assert shown(await cascade.events(Visibility.DRAFTS)) == "xyz"


@pytest.mark.parametrize("view", [Visibility.COMMITTED, Visibility.DRAFTS])
async def test_no_earlier_answer_stands_in_for_final_tokens_that_differ_from_it(view: Visibility) -> None:
    cascade = SmallCascade(large={"text": "xyz", "fail_after": 1, "failure": AWAY})
    with pytest.raises(Unavailable):
        await cascade.events(view)


async def test_what_a_failed_stage_wrote_is_taken_back() -> None:
    cascade = SmallCascade(
        Policy({0: (1,), 1: (2,)}), medium={"text": "xyz", "fail_after": 2, "failure": AWAY}
    )
    assert shown(await cascade.events(Visibility.DRAFTS)) == "abc"


async def test_text_that_begins_inside_a_character_is_a_stages_fault() -> None:
    """It accepted a token of one byte, and its own text begins with a character of two."""
    cascade = SmallCascade(static_plan=(0, 2))
    large = cascade.stages["large"]

    async def verify(request: Any, draft: Any, timeout_ms: float, emit: Take) -> None:
        await emit(Verification(3, 1))
        await emit(ScoredTokens((1, 2), "é"))

    large.verify = verify  # type: ignore[assignment]
    assert shown(await cascade.events(Visibility.DRAFTS)) == "abc"
    assert cascade.observer.failures == [("large", "AsdError")]


async def test_a_chains_draft_is_not_final() -> None:
    cascade = SmallCascade(pipelined=False, large={"text": "xyz"})
    events = await cascade.events(Visibility.DRAFTS, chain=CHAIN)
    assert shown(events) == "xyz"
    first = next(event for event in events if isinstance(event, FinalPart | DraftPart))
    assert isinstance(first, DraftPart)


# Time.


@pytest.mark.parametrize(
    ("seconds", "least_ms", "most_ms"), [(10.0, 9_000.0, 10_000.0), (100.0, 60_000.0, 60_000.0)]
)
async def test_a_call_has_what_is_left_of_the_deadline_and_no_more_than_its_stage(
    seconds: float, least_ms: float, most_ms: float
) -> None:
    cascade = SmallCascade(static_plan=(2,), timeout_ms=60_000.0)
    given: list[float] = []

    async def keep(request: Any, timeout_ms: float, emit: Take) -> None:
        given.append(timeout_ms)

    before(cascade.stages["large"], "generate", keep)
    await cascade.ask(stage="large", seconds=seconds)
    assert least_ms <= given[0] <= most_ms


async def test_an_escalation_that_would_end_too_late_is_not_begun() -> None:
    cascade = SmallCascade(Slow({0: (2,)}))
    outcome = await cascade.ask(seconds=10.0)
    assert called(cascade) == ["small"]
    assert outcome.records[-1].decision.reason is DecisionReason.DEADLINE
    assert answered(await cascade.ask(seconds=30.0)) == ["small", "large"]


# What is under way.


def test_a_prefill_ends_with_its_request() -> None:
    cascade = SmallCascade(Policy(likely_next=2))
    before(cascade.stages["large"], "prefill", hang)
    outcome = finish(cascade.ask(), cascade)
    assert answered(outcome) == ["small"]


def test_a_stage_is_not_asked_to_verify_while_it_fills_its_cache() -> None:
    cascade = SmallCascade(Policy({0: (2,)}, likely_next=2))
    large = cascade.stages["large"]

    async def take_long(*_: Any) -> None:
        await asyncio.sleep(1.0)
        large.calls.append("filled")

    before(large, "prefill", take_long)
    finish(cascade.ask(), cascade)
    assert large.calls == ["filled", "prefill", "verify"]


async def test_no_cache_is_filled_ahead_at_a_stage_that_is_at_work() -> None:
    cascade = SmallCascade(Policy(likely_next=2))
    with cascade.load.calling(2):
        await cascade.ask()
    assert called(cascade) == ["small"]
    await cascade.ask()
    assert called(cascade) == ["small", "large"]


@pytest.mark.parametrize(("max_cost", "stages"), [(None, ["small", "large"]), (100.0, ["small"])])
async def test_no_cache_is_filled_ahead_within_a_budget(max_cost: float | None, stages: list[str]) -> None:
    cascade = SmallCascade(Policy(likely_next=2))
    await cascade.ask(objective=Objective(max_cost=max_cost))
    assert called(cascade) == stages


def test_requests_that_come_together_fill_a_cache_once() -> None:
    cascade = SmallCascade(Policy(likely_next=2))
    before(cascade.stages["large"], "prefill", lambda *_: asyncio.sleep(1.0))

    async def ask_both() -> None:
        await asyncio.gather(cascade.ask(), cascade.ask())

    before(cascade.stages["small"], "generate", lambda *_: asyncio.sleep(2.0))
    finish(ask_both(), cascade)
    assert cascade.stages["large"].calls == ["prefill"]


def test_drafters_end_with_the_last_stage() -> None:
    cascade = SmallCascade(small={"fail_after": 1})
    large = cascade.stages["large"]

    async def verify_stream(request: Any, drafts: Any, timeout_ms: float, emit: Take) -> Any:
        return await large.generate(request, timeout_ms, emit)

    large.verify_stream = verify_stream  # type: ignore[method-assign]
    outcome = finish(cascade.ask(chain=CHAIN), cascade)
    assert outcome.answer.stage.name == "large"


def test_the_last_stage_goes_on_without_a_drafter_that_died() -> None:
    cascade = SmallCascade(small={"fail_after": 1, "failure": AWAY})
    outcome = finish(cascade.ask(chain=CHAIN), cascade)
    assert (answered(outcome)[-1], outcome.answer.result.text) == ("large", "abc")


@pytest.mark.parametrize(("pipelined", "call"), [(True, "verify_stream"), (False, "verify")])
async def test_the_last_stage_of_a_chain_works_once(pipelined: bool, call: str) -> None:
    cascade = SmallCascade(pipelined=pipelined)
    outcome = await cascade.ask(chain=CHAIN)
    assert answered(outcome) == ["small", "large"]
    assert (cascade.stages["small"].calls, cascade.stages["large"].calls) == (["generate"], [call])


# Decisions.


async def test_the_static_plan_stays_within_max_cost() -> None:
    """Stages cost 1, 2 and 4; a verification costs no more than an answer."""
    cascade = SmallCascade(static_plan=(0, 1, 2))
    outcome = await cascade.ask(objective=Objective(max_cost=4.5))
    assert answered(outcome) == ["small", "medium"]
    assert outcome.records[-1].decision.reason is DecisionReason.MAX_COST
    assert answered(await cascade.ask(objective=Objective(max_cost=7.0))) == ["small", "medium", "large"]


@pytest.mark.parametrize(
    ("max_cost", "stages"), [(5.0, ["small", "large"]), (4.999, ["small"]), (1.0, ["small"])]
)
async def test_the_static_plan_spends_max_cost_to_the_last(max_cost: float, stages: list[str]) -> None:
    outcome = await SmallCascade(static_plan=(0, 2)).ask(objective=Objective(max_cost=max_cost))
    assert answered(outcome) == stages


def test_a_budget_is_not_exceeded_by_rounding() -> None:
    assert 1.6 + 4.2 > 5.8
    assert not is_above(1.6 + 4.2, 5.8)
    assert is_above(1.6 + 4.2, 5.799)


async def test_an_abandoned_draft_is_no_answer() -> None:
    """Where the stage that was to go on from it fails, the request begins anew."""
    cascade = SmallCascade(Abandoning(), large={"fail_after": 0, "failure": AWAY})
    outcome = await cascade.ask()
    assert called(cascade) == ["small", "large"]
    assert (answered(outcome)[-1], outcome.answer.result.text) == ("small", "abc")


async def test_who_asks_for_quality_gets_no_lesser_stage_for_one_without_room() -> None:
    busy = Overloaded("busy", retry_after_s=1.0)
    cascade = SmallCascade(Policy({0: (2, 1)}), large={"fail_after": 0, "failure": busy})
    with pytest.raises(Overloaded):
        await cascade.ask(objective=Objective(preference=Preference.BEST))
    assert called(cascade) == ["small", "large"]
    outcome = await cascade.ask(objective=Objective(preference=Preference.BALANCED))
    assert answered(outcome) == ["small", "medium"]


@pytest.mark.parametrize("objective", [Objective(max_cost=100.0), Objective(max_latency_ms=50_000.0)])
async def test_no_draft_is_abandoned_within_a_budget(objective: Objective) -> None:
    outcome = await SmallCascade(Abandoning()).ask(objective=objective)
    assert (answered(outcome), outcome.answer.result.text) == (["small"], "abc")


async def test_decisions_on_other_answers_stay() -> None:
    cascade = SmallCascade(Policy({0: (1,), 1: (2,)}), large={"fail_after": 0, "failure": AWAY})
    outcome = await cascade.ask()
    decided = [(record.answer.stage.name, record.decision.action) for record in outcome.records]
    assert decided == [("small", DecisionAction.ESCALATE), ("medium", DecisionAction.STOP)]


@pytest.mark.parametrize("chain", [("large", "small"), ("small", "small"), ("small",)])
async def test_a_chain_names_stages_in_the_order_of_the_cascade(chain: tuple[str, ...]) -> None:
    cascade = SmallCascade()
    with pytest.raises(InvalidRequest):
        await cascade.ask(chain=chain)
    assert called(cascade) == []


async def test_a_decision_takes_the_place_of_an_earlier_one_on_the_same_answer() -> None:
    cascade = SmallCascade(Policy({0: (2, 1)}), large={"fail_after": 0, "failure": AWAY})
    outcome = await cascade.ask()
    assert answered(outcome) == ["small", "medium"]


async def test_a_request_asks_a_policy_once_that_is_away() -> None:
    policy = Undecided()
    cascade = SmallCascade(policy, static_plan=(0, 1, 2))
    outcome = await cascade.ask(objective=Objective(preference=Preference.FASTEST))
    assert answered(outcome) == ["small", "medium", "large"]
    assert len(policy.decisions) == 1


@pytest.mark.parametrize(("decided", "named"), [("v2", "v2"), ("", "v1")])
async def test_the_policys_version_is_that_of_the_last_decision_which_has_one(
    decided: str, named: str
) -> None:
    class Replaced(Policy):
        async def decide(self, *arguments: Any, **options: Any) -> Decision:
            return replace(await super().decide(*arguments, **options), policy_version=decided)

    assert (await SmallCascade(Replaced()).ask()).policy_version == named
