"""Where requests go while stages are busy, away or without a replica, and drafts are not worth it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import QueueFull, Unavailable
from asd.values import Acceptance, AcceptanceMode, DecisionAction, DecisionReason, PlanSource
from services.router.domain import (
    AbandonRule,
    Decision,
    PolicyChoice,
    StageKnowledge,
    Visibility,
)
from services.router.planning.draft_selection import DraftSelection, SpeculationOptions
from tests.unit.router.small_cascade import NAMES, Policy, SmallCascade, answered, called, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from services.router.domain import Stage

AWAY = Unavailable("gone")
CHAIN = ("small", "large")


class Recording(Policy):
    """Keeps the conditions of each question."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.told: list[list[StageKnowledge]] = []

    async def plan(
        self, request: Any, conditions: Sequence[StageKnowledge], *arguments: Any, **options: Any
    ) -> PolicyChoice:
        self.told.append(list(conditions))
        return await super().plan(request, conditions, *arguments, **options)


class Insisting(Policy):
    """Decides the same whatever it is told."""

    def __init__(self, decision: Decision, first: int = 0) -> None:
        super().__init__(first=first)
        self.decision = decision

    async def decide(self, *arguments: Any, **options: Any) -> Decision:
        await super().decide(*arguments, **options)
        return self.decision


class Abandoning(Policy):
    """Has no draft finished. to: the stage that goes on from it."""

    to = 2

    async def plan(self, *arguments: Any, **options: Any) -> PolicyChoice:
        plan = await super().plan(*arguments, **options)
        # The stages write with a log-probability of -0.1.
        return replace(plan, abandon=(AbandonRule(1, -0.05),), abandon_to=self.to)


def failing(after: int = 0) -> dict[str, Any]:
    return {"fail_after": after, "failure": AWAY}


def options_of(name: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {name: options}


# After a failure.


async def test_an_escalation_past_a_failed_stage_goes_on_from_the_answer_before_it() -> None:
    cascade = SmallCascade(
        Policy({0: (1, 2)}), medium={"text": "axy", **failing(after=2)}, large={"text": "abd"}
    )
    large, drafts = cascade.stages["large"], []
    verify = large.verify

    async def keep(request: Any, draft: Any, *arguments: Any) -> Any:
        drafts.append(draft.text)
        return await verify(request, draft, *arguments)

    large.verify = keep  # type: ignore[method-assign]
    assert shown(await cascade.events(Visibility.DRAFTS)) == "abd"
    assert drafts == ["abc"]


async def test_a_policy_that_refuses_after_a_failure_leaves_the_earlier_answer() -> None:
    class Refusing(Policy):
        async def decide(self, *arguments: Any, **options: Any) -> Decision:
            if self.decisions:
                raise QueueFull("the queue is full")
            return await super().decide(*arguments, **options)

    outcome = await SmallCascade(Refusing({0: (1, 2)}), medium=failing()).ask()
    assert answered(outcome) == ["small"]
    assert outcome.records[0].decision.reason is DecisionReason.STAGE_UNAVAILABLE


@pytest.mark.parametrize(
    ("first", "reason"), [(0, DecisionReason.STAGE_UNAVAILABLE), (2, DecisionReason.LAST_STAGE)]
)
async def test_a_stage_that_no_available_one_follows_is_not_called_the_last(
    first: int, reason: DecisionReason
) -> None:
    policy = Insisting(Decision(DecisionAction.STOP, DecisionReason.LAST_STAGE), first)
    outcome = await SmallCascade(policy).ask()
    assert outcome.records[0].decision.reason is reason


async def test_a_stage_that_has_answered_is_avoided_no_longer() -> None:
    cascade = SmallCascade(Policy({0: (1, 2)}), medium=failing())
    assert (await cascade.ask()).answer.stage.name == "large"
    cascade.stages["medium"].fail_after = None
    assert (await cascade.ask()).answer.stage.name == "large"
    await cascade.ask(stage="medium")
    assert (await cascade.ask()).answer.stage.name == "medium"


# Chains.


@pytest.mark.parametrize(("pipelined", "verify"), [(True, "verify_stream"), (False, "verify")])
async def test_every_stage_of_a_chain_verifies_the_one_before_it(pipelined: bool, verify: str) -> None:
    cascade = SmallCascade(pipelined=pipelined)
    assert answered(await cascade.ask(chain=NAMES)) == [*NAMES]
    assert [stage.calls for stage in cascade.stages.values()] == [["generate"], [verify], [verify]]


# A wait of ten seconds, and more calls of other routers than a stage computes at a time.
LINE, PEERS = {"queue_ms": 50_000.0, "total_ms": 50_001.0}, {"peers": 50}


@pytest.mark.parametrize("load", [LINE, PEERS], ids=["line", "peers"])
@pytest.mark.parametrize(("busy", "is_pipelined"), [("small", True), ("medium", False), ("large", False)])
async def test_stages_that_verify_do_not_work_ahead_where_calls_queue(
    load: dict[str, Any], busy: str, is_pipelined: bool
) -> None:
    cascade = SmallCascade(timeout_ms=600_000.0, **options_of(busy, **load))
    await cascade.ask(stage=busy)
    cascade.forget_calls()
    assert answered(await cascade.ask(chain=NAMES)) == [*NAMES]
    assert (cascade.stages["large"].calls == ["verify_stream"]) is is_pipelined


async def test_times_of_stages_that_wait_for_their_drafter_are_not_learned() -> None:
    cascade = SmallCascade(small={"total_ms": 3.0}, medium={"total_ms": 3.0}, large={"total_ms": 3.0})
    await cascade.ask(chain=NAMES)
    assert [cascade.load.service_ms(index) for index in range(3)] == [3.0, 0.0, 0.0]


async def test_a_draft_that_was_cut_off_teaches_no_time() -> None:
    cascade = SmallCascade(Abandoning())

    def pass_time(_: int) -> None:
        cascade.clock.now += 1.0

    cascade.stages["small"].on_token = pass_time
    assert answered(await cascade.ask()) == ["small", "large"]
    assert cascade.load.service_ms(0) == 0.0


# Caches that are filled ahead.


@pytest.mark.parametrize(
    ("policy", "speculation", "load", "is_filled"),
    [
        ({}, {}, {}, True),
        ({"p_escalate": 0.2}, {}, {}, False),
        ({}, {"prefill_ahead": False}, {}, False),
        ({}, {}, LINE, False),
        ({}, {}, PEERS, False),
    ],
    ids=["likely", "unlikely", "unwanted", "line", "peers"],
)
async def test_a_cache_is_filled_ahead_where_that_is_likely_of_use_and_nobody_waits(
    policy: dict[str, Any], speculation: dict[str, Any], load: dict[str, Any], is_filled: bool
) -> None:
    cascade = SmallCascade(
        Policy({0: (2,)}, likely_next=2, **policy),
        speculation=SpeculationOptions(**speculation),
        timeout_ms=600_000.0,
        large=load,
    )
    await cascade.ask(stage="large")
    cascade.forget_calls()
    outcome = await cascade.ask(seconds=600.0)
    assert ("prefill" in cascade.stages["large"].calls) is is_filled
    assert answered(outcome) == ["small", "large"]
    # One pass of the four that an answer of three tokens takes.
    filled = [outcome.prefilled.cost] if outcome.prefilled else []
    assert filled == ([4.0 / 4] if is_filled else [])
    assert outcome.cost == pytest.approx(sum([*filled, *(each.answer.cost for each in outcome.records)]))


async def test_a_cache_that_is_filled_ahead_leaves_the_escalation_most_of_the_time() -> None:
    cascade = SmallCascade(Policy({0: (2,)}, likely_next=2))
    given: list[float] = []

    async def prefill(request: Any, timeout_ms: float) -> int:
        given.append(timeout_ms)
        raise AWAY

    cascade.stages["large"].prefill = prefill  # type: ignore[method-assign]
    assert answered(await cascade.ask(seconds=40.0)) == ["small", "large"]
    assert 0.0 < given[0] < 20_000.0


# Drafts that are not finished.


async def test_rules_for_one_stages_drafts_are_not_applied_to_another() -> None:
    policy = Abandoning(plan_failure=AWAY)
    policy.to = 1
    outcome = await SmallCascade(policy, static_plan=(1, 2), small=failing()).ask()
    assert [(each.answer.stage.name, each.answer.is_whole) for each in outcome.records] == [
        ("medium", True),
        ("large", True),
    ]


async def test_drafts_are_finished_where_abandoning_them_is_not_wanted() -> None:
    outcome = await SmallCascade(Abandoning(), speculation=SpeculationOptions(early_abandon=False)).ask()
    assert (answered(outcome), outcome.answer.result.text) == (["small"], "abc")


# Drafts that are not worth verifying.


async def stages_used(cascade: SmallCascade, times: int, **fields: Any) -> list[list[str]]:
    return [answered(await cascade.ask(chain=CHAIN, **fields)) for _ in range(times)]


@pytest.mark.parametrize("pipelined", [False, True])
async def test_worthless_drafts_are_left_out_until_they_are_worth_something(pipelined: bool) -> None:
    cascade = SmallCascade(pipelined=pipelined, small={"text": "xyz"})
    used = await stages_used(cascade, 100)
    assert used[0] == [*CHAIN]
    assert used[-50:].count(["large"]) > 40
    # They are tried again from time to time.
    assert [*CHAIN] in used[-50:]
    # What a tolerant stage answers depends on the draft: it is never left out.
    tolerant = Acceptance(AcceptanceMode.TOLERANT, 0.5)
    assert await stages_used(cascade, 8, acceptance=tolerant) == [[*CHAIN]] * 8
    if not pipelined:
        cascade.stages["small"].text = "abc"
        assert (await stages_used(cascade, 400))[-1] == [*CHAIN]


async def test_where_it_is_not_wanted_every_draft_is_verified() -> None:
    options = SpeculationOptions(pipelined=False, adaptive=False)
    cascade = SmallCascade(speculation=options, small={"text": "xyz"})
    assert await stages_used(cascade, 50) == [[*CHAIN]] * 50


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_request_without_an_answer_ends_what_was_chosen_for_it(
    is_cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    monkeypatch.setattr(DraftSelection, "ended", lambda _, choice: ended.append(choice))
    large: dict[str, Any] = {"fail_after": 0} if is_cancelled else failing()
    cascade = SmallCascade(pipelined=False, large=large)
    called_last = asyncio.Event()
    cascade.stages["large"].on_call = called_last.set
    asking = asyncio.create_task(cascade.ask(chain=CHAIN))
    await called_last.wait()
    if is_cancelled:
        asking.cancel()
    with pytest.raises(asyncio.CancelledError if is_cancelled else Unavailable):
        await asking
    assert [choice.counts for choice in ended] == [True]


# What the policy is told.


async def test_plans_are_told_of_calls_under_way_and_of_waits() -> None:
    policy = Recording()
    cascade = SmallCascade(policy, medium=LINE)
    await cascade.ask(stage="medium", seconds=600.0)
    with cascade.load.calling(2):
        await cascade.ask()
    medium, large = policy.told[-1]
    assert (medium.stage, medium.available, medium.queue_depth) == ("medium", True, 0)
    assert medium.expected_queue_ms > 1000.0
    assert (large.stage, large.available, large.queue_depth, large.expected_queue_ms) == (
        "large",
        True,
        1,
        0.0,
    )


async def test_calls_of_other_routers_are_known_of_a_stage_that_has_answered() -> None:
    cascade = SmallCascade(large=PEERS)
    await cascade.ask(stage="large")
    assert cascade.load.calls(2) == 50


# Stages without a replica.


class Asleep:
    """Stages that have no replica; keeps which were to be activated."""

    def __init__(self, *stages: int) -> None:
        self.scaled_to_zero = frozenset(stages)
        self.woken: list[str] = []

    def activate(self, stage: Stage) -> None:
        self.woken.append(stage.name)

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        raise AssertionError(f"{stage} was waited for")


async def test_a_plan_that_begins_with_a_stage_without_a_replica_is_made_again() -> None:
    policy, asleep = Policy(), Asleep(0)
    outcome = await SmallCascade(policy, activator=asleep).ask()
    assert (answered(outcome), outcome.plan_source) == (["medium"], PlanSource.POLICY)
    assert policy.plans == [set(), {"small"}]
    assert asleep.woken == ["small"]


async def test_a_stage_that_nobody_wants_is_not_activated() -> None:
    policy, asleep = Policy(), Asleep(2)
    assert answered(await SmallCascade(policy, activator=asleep).ask()) == ["small"]
    assert (len(policy.plans), asleep.woken) == (1, [])


async def test_a_decision_for_a_stage_without_a_replica_is_made_again() -> None:
    policy, asleep = Policy({0: (2, 1)}), Asleep(2)
    assert answered(await SmallCascade(policy, activator=asleep).ask()) == ["small", "medium"]
    assert policy.decisions[:2] == [set(), {"large"}]
    assert asleep.woken == ["large"]


async def test_an_answer_does_not_wait_for_a_stage_that_the_policy_insists_on() -> None:
    policy, asleep = Insisting(Decision(DecisionAction.ESCALATE, DecisionReason.VALUE, 2)), Asleep(2)
    outcome = await SmallCascade(policy, activator=asleep).ask()
    assert answered(outcome) == ["small"]
    assert outcome.records[0].decision.reason is DecisionReason.STAGE_UNAVAILABLE
    assert set(asleep.woken) == {"large"}


async def test_no_cache_is_filled_ahead_at_a_stage_without_a_replica() -> None:
    asleep = Asleep(2)
    cascade = SmallCascade(Policy(likely_next=2), activator=asleep)
    await cascade.ask()
    assert called(cascade) == ["small"]
    assert asleep.woken == ["large"]


@pytest.mark.parametrize(
    ("plan", "asleep", "answers"),
    [
        ((0, 2), 0, ["large"]),
        ((0, 2), 2, ["small"]),
        ((0, 1, 2), 1, ["small", "large"]),
        # None of the plan's is there.
        ((0,), 0, ["large"]),
    ],
)
async def test_the_static_plan_goes_on_without_stages_that_have_no_replica(
    plan: Collection[int], asleep: int, answers: list[str]
) -> None:
    activator = Asleep(asleep)
    cascade = SmallCascade(static_plan=tuple(plan), activator=activator)
    assert answered(await cascade.ask()) == answers
    assert set(activator.woken) == {NAMES[asleep]}
