"""How long a stage may take that does not answer, what is kept meanwhile, and who avoids it afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from asd.errors import AsdError, BudgetSpent, QueueFull, Unavailable
from asd.values import DecisionReason
from services.router.domain import CallFailure, Report, Step, Visibility
from services.router.planning.knowledge import USUAL_TIMES
from services.router.planning.time_budget import MARGIN_MS, RETURN_MS, SHARE_OF_TIME
from services.router.running import StageRunner
from tests.unit.router.small_cascade import FakeStage, Policy, SmallCascade, answered, called, shown

# Short, as what hangs is waited for: half of it, by the clock on the wall.
HURRY_S = 0.2
LEFT_MS = 60_000.0 - MARGIN_MS
SHARE_MS = LEFT_MS * SHARE_OF_TIME


def late(cascade: SmallCascade, name: str, *, after: int = 0, seconds: float = 60.0) -> FakeStage:
    """Have a stage's calls run out of time, so long after they began."""
    stage = cascade.stages[name]
    stage.fail_after, stage.failure = after, BudgetSpent("late")

    def pass_time() -> None:
        cascade.clock.now += seconds

    stage.on_call = pass_time
    return stage


def keep_limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets after how long the planner would leave each call, in milliseconds."""
    seen: list[float] = []
    run = StageRunner.run

    async def keep(runner: StageRunner, step: Step, *arguments: Any) -> Report:
        seen.append(step.leave_after_ms)
        return await run(runner, step, *arguments)

    monkeypatch.setattr(StageRunner, "run", keep)
    return seen


@pytest.mark.parametrize("has_policy", [True, False])
@pytest.mark.parametrize("view", Visibility)
@pytest.mark.parametrize("hangs", [0, 2], ids=["silent", "after the draft's first tokens"])
async def test_an_answer_is_not_lost_to_a_last_stage_that_hangs(
    view: Visibility, hangs: int, has_policy: bool
) -> None:
    policy = Policy({0: (2,)}) if has_policy else None
    cascade = SmallCascade(policy, large={"fail_after": hangs})
    events = await cascade.events(view, seconds=HURRY_S)
    outcome: Any = events[-1]
    assert (answered(outcome), outcome.answer.result.text) == (["small"], "abc")
    assert outcome.records[0].decision.reason is DecisionReason.DEADLINE
    if view is not Visibility.OUTCOME:
        assert shown(events) == "abc"


async def test_a_last_stage_that_others_wait_for_has_a_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what the planner says: the router's clock stands still while the call is waited for."""
    cascade = SmallCascade(Policy({0: (2,)}))
    seen = keep_limits(monkeypatch)
    await cascade.ask()
    assert seen == [pytest.approx(SHARE_MS)] * 2
    seen.clear()
    # Nothing stands in for the stages that a caller names.
    await cascade.ask(chain=("small", "large"))
    await cascade.ask(stage="large")
    assert seen == [LEFT_MS] * 2


@pytest.mark.parametrize(
    ("total_ms", "share_ms"),
    [
        (1_000.0, SHARE_MS),
        # Several times what its answers take.
        (0.8 * LEFT_MS / USUAL_TIMES, 0.8 * LEFT_MS),
        # But for the time that the earlier answer needs on its way.
        (50_000.0, LEFT_MS - RETURN_MS),
    ],
)
async def test_a_stage_that_always_takes_long_has_more_than_its_share(
    total_ms: float, share_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = SmallCascade(Policy({0: (2,)}), large={"total_ms": total_ms})
    await cascade.ask()
    seen = keep_limits(monkeypatch)
    await cascade.ask()
    assert seen[-1] == pytest.approx(share_ms)


@pytest.mark.parametrize("view", [Visibility.COMMITTED, Visibility.DRAFTS])
async def test_a_last_stage_whose_own_tokens_are_shown_has_all_the_time(view: Visibility) -> None:
    """What it has committed cannot be taken back, so that no earlier answer waits for the time."""
    cascade = SmallCascade(Policy({0: (2,)}), large={"text": "axyz"})
    large = cascade.stages["large"]

    def be_slow(count: int) -> None:
        # Past the half as its second token, which the draft does not have, has been shown.
        cascade.clock.now += 40.0 * (count == 2)

    large.on_token = be_slow
    events = await cascade.events(view)
    assert shown(events) == "axyz"
    outcome: Any = events[-1]
    assert outcome.answer.stage.name == "large"


@pytest.mark.parametrize("seconds", [30.0, 60.0, 61.0], ids=["half", "all", "more"])
@pytest.mark.parametrize("fields", [{}, {"stage": "large"}], ids=["escalation", "fixed"])
async def test_a_stage_that_hangs_is_avoided_whatever_time_is_left(
    seconds: float, fields: dict[str, str]
) -> None:
    policy = Policy({0: (2,)})
    cascade = SmallCascade(policy)
    late(cascade, "large", seconds=seconds)
    if fields:
        with pytest.raises(BudgetSpent):
            await cascade.ask(**fields)
    else:
        assert answered(await cascade.ask()) == ["small"]
    policy.plans.clear()
    cascade.forget_calls()
    assert answered(await cascade.ask()) == ["small"]
    assert policy.plans == [{"large"}]
    assert called(cascade) == ["small"]


@pytest.mark.parametrize(
    ("total_ms", "call_ms", "after", "is_avoided"),
    [
        # Of a stage that has answered nobody yet, a moment says nothing.
        (0.0, 500.0, 0, False),
        (0.0, 2_000.0, 0, True),
        # Nothing came in the time of a whole answer.
        (2_000.0, 1_900.0, 0, False),
        (2_000.0, 2_100.0, 0, True),
        # It was at work, and some answers are longer than others.
        (2_000.0, 1_900.0 * USUAL_TIMES, 2, False),
        (2_000.0, 2_100.0 * USUAL_TIMES, 2, True),
    ],
)
async def test_a_caller_in_a_hurry_says_nothing_of_a_stage(
    total_ms: float, call_ms: float, after: int, is_avoided: bool
) -> None:
    policy = Policy()
    cascade = SmallCascade(policy, small={"total_ms": total_ms})
    if total_ms:
        await cascade.ask()
    late(cascade, "small", after=after, seconds=0.0)
    # Another stage could answer, so that its call has a share of the time.
    deadline_s = (call_ms / SHARE_OF_TIME + MARGIN_MS) / 1000.0
    assert answered(await cascade.ask(seconds=deadline_s)) == ["medium"]
    policy.plans.clear()
    await cascade.ask()
    assert policy.plans[0] == ({"small"} if is_avoided else set())


async def avoided(cascade: SmallCascade) -> set[str]:
    """Return the stages that the next request avoids."""
    assert cascade.policy is not None
    cascade.policy.plans.clear()
    for stage in cascade.stages.values():
        stage.fail_after = None
    await cascade.ask()
    return cascade.policy.plans[0]


@pytest.mark.parametrize(
    ("total_ms", "deadline_s", "requests"),
    [
        # Of one that has answered nobody, a second of silence says enough.
        (0.0, 0.4, 10),
        (0.0, 1.5, 4),
        # Of one that has, a few times what its answers take.
        (2_000.0, 1.0, 25),
        (2_000.0, 2.0, 15),
    ],
)
async def test_a_stage_that_hangs_is_avoided_though_every_caller_is_in_a_hurry(
    total_ms: float, deadline_s: float, requests: int
) -> None:
    policy = Policy({0: (2,)})
    cascade = SmallCascade(policy, large={"total_ms": total_ms})
    if total_ms:
        await cascade.ask()
    large = late(cascade, "large", seconds=deadline_s / 2)
    large.calls.clear()
    for _ in range(requests):
        assert answered(await cascade.ask(seconds=deadline_s)) == ["small"]
    assert 1 < len(large.calls) < requests


@pytest.mark.parametrize("error", [None, AsdError("it failed"), QueueFull("the queue is full")], ids=str)
async def test_a_stage_that_says_anything_in_between_is_not_avoided(error: AsdError | None) -> None:
    policy = Policy()
    cascade = SmallCascade(policy)
    small = late(cascade, "small", seconds=0.7)
    for _ in range(5):
        small.fail_after, small.failure = 0, BudgetSpent("late")
        await cascade.ask(seconds=1.4)
        # It writes, though it does not finish, or tells what is wrong.
        small.fail_after, small.failure = (0, error) if error else (2, BudgetSpent("late"))
        await cascade.ask(seconds=1.4)
    assert policy.plans[::2] == [set()] * 10


async def test_calls_that_are_silent_at_the_same_time_are_one_silence() -> None:
    policy = Policy()
    cascade = SmallCascade(policy)
    late(cascade, "small", seconds=0.0)
    for _ in range(10):
        await cascade.ask(seconds=1.4)
    assert policy.plans[::2] == [set()] * 10


async def test_a_drafter_is_judged_by_what_it_sent_itself() -> None:
    """It is silent for longer than its answers take, while the stage that verifies goes on alone."""
    cascade = SmallCascade(Policy(), small={"total_ms": 2_000.0})
    await cascade.ask()
    late(cascade, "small", seconds=0.0)
    assert answered(await cascade.ask(chain=("small", "large"), seconds=4.5)) == ["large"]
    assert await avoided(cascade) == {"small"}


@pytest.mark.parametrize("chain", [("small", "large"), ("small", "medium", "large")], ids="-".join)
async def test_a_stage_that_waits_for_a_drafter_that_hangs_is_not_blamed(chain: tuple[str, ...]) -> None:
    cascade = SmallCascade(Policy())
    late(cascade, "small")
    for name in chain[1:]:
        late(cascade, name, seconds=0.0)
    with pytest.raises(BudgetSpent):
        await cascade.ask(chain=chain)
    assert await avoided(cascade) == {"small"}


async def test_a_drafter_that_hangs_is_found_though_others_are_answered_by_its_target() -> None:
    cascade = SmallCascade(Policy())
    small = cascade.stages["small"].stage
    cascade.clock.now += 1.0
    await cascade.ask(stage="large")
    drafter = CallFailure(small, BudgetSpent("late"), 59_000.0, has_heard=False)
    cascade.planner.knowledge.learn_failure(drafter)
    assert await avoided(cascade) == {"small"}


async def test_a_stage_that_hangs_on_a_draft_is_blamed_though_its_drafter_has_answered() -> None:
    cascade = SmallCascade(Policy())
    late(cascade, "large", seconds=0.0)
    with pytest.raises(BudgetSpent):
        await cascade.ask(chain=("small", "large"))
    assert await avoided(cascade) == {"large"}


@pytest.mark.parametrize("view", Visibility)
async def test_a_last_stage_that_is_asked_first_and_hangs_is_replaced(view: Visibility) -> None:
    policy = Policy(first=2)
    cascade = SmallCascade(policy, large={"fail_after": 0})
    assert answered((await cascade.events(view, seconds=HURRY_S))[-1]) == ["small"]  # type: ignore[arg-type]
    assert called(cascade) == ["small", "large"]


async def test_a_last_stage_that_is_asked_first_and_is_at_work_has_all_the_time() -> None:
    """No answer would be lost with it, and what another stage would give is another answer."""
    cascade = SmallCascade(Policy(first=2))

    def be_slow(count: int) -> None:
        cascade.clock.now += 40.0 * (count == 1)

    cascade.stages["large"].on_token = be_slow
    assert answered(await cascade.ask()) == ["large"]


async def test_the_policy_has_a_share_of_the_time_for_a_question_about_an_answer() -> None:
    policy = Policy()
    await SmallCascade(policy).ask()
    assert policy.left_ms == [pytest.approx(SHARE_MS)]


async def test_a_stage_that_is_away_is_avoided_even_at_the_deadline() -> None:
    policy = Policy({0: (2,)})
    cascade = SmallCascade(policy)
    late(cascade, "large").failure = Unavailable("gone")
    assert answered(await cascade.ask()) == ["small"]
    await cascade.ask()
    assert policy.plans[-1] == {"large"}
