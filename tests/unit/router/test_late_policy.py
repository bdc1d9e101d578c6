"""What is answered while the policy service is late: FASTEST by the static plan, anything better by the last
stage."""

from __future__ import annotations

from typing import Any

import pytest

from asd.errors import AsdError, BudgetSpent, Unavailable
from asd.values import DecisionReason, Objective, PlanSource, Preference
from tests.unit.router.small_cascade import Policy, SmallCascade, answered

FASTEST = Objective(preference=Preference.FASTEST)
BETTER = {
    "no wish": Objective(),
    "balanced": Objective(preference=Preference.BALANCED),
    "lambda": Objective(quality_value=3.0),
    # The value of an answer is given: the preference says nothing beside it.
    "lambda and fastest": Objective(quality_value=3.0, preference=Preference.FASTEST),
}
BEST = {
    "best": Objective(preference=Preference.BEST),
    "min_quality": Objective(min_quality=0.9),
    "min_quality and fastest": Objective(min_quality=0.9, preference=Preference.FASTEST),
}


class Late(Policy):
    """A policy that is late from a step on. at: "plan" or "decide"."""

    def __init__(self, at: str, error: AsdError) -> None:
        super().__init__()
        self._at, self._error = at, error

    async def plan(self, *arguments: Any, **options: Any) -> Any:
        if self._at == "plan":
            raise self._error
        return await super().plan(*arguments, **options)

    async def decide(self, *arguments: Any, **options: Any) -> Any:
        raise self._error


def late(at: str) -> Policy:
    return Late(at, BudgetSpent("late"))


@pytest.mark.parametrize("error", [BudgetSpent("late"), Unavailable("away")])
@pytest.mark.parametrize("objective", BETTER.values(), ids=BETTER)
async def test_who_did_not_ask_for_the_fastest_is_answered_by_the_last_stage(objective, error):
    cascade = SmallCascade(Late("plan", error), static_plan=(1,))
    outcome = await cascade.ask(objective=objective)
    assert outcome.plan_source is PlanSource.STATIC
    # The plan's stage drafts, and the last stage verifies.
    assert answered(outcome) == ["medium", "large"]
    assert cascade.stages["large"].calls == ["verify"]
    assert outcome.records[0].decision.reason is DecisionReason.STATIC_PLAN


@pytest.mark.parametrize("objective", BEST.values(), ids=BEST)
async def test_who_wants_the_best_is_answered_by_the_last_stage_alone(objective):
    outcome = await SmallCascade(late("plan"), static_plan=(1,)).ask(objective=objective)
    assert answered(outcome) == ["large"]


@pytest.mark.parametrize(
    ("plan", "stages"), [((1,), ["medium"]), ((0, 1), ["small", "medium"]), ((2,), ["large"])]
)
async def test_the_fastest_is_the_static_plan_as_it_is_written(plan, stages):
    outcome = await SmallCascade(late("plan"), static_plan=plan).ask(objective=FASTEST)
    assert answered(outcome) == stages


@pytest.mark.parametrize("objective", [*BETTER.values(), *BEST.values()], ids=[*BETTER, *BEST])
async def test_an_answer_that_the_policy_was_too_late_to_judge_is_verified_by_the_last_stage(objective):
    # Not by way of the plan's stage: there is a draft.
    cascade = SmallCascade(late("decide"), static_plan=(1,))
    outcome = await cascade.ask(objective=objective)
    assert answered(outcome) == ["small", "large"]
    assert cascade.stages["large"].calls == ["verify"]


async def test_where_the_fastest_is_wanted_an_answer_stands_that_nobody_judged_in_time():
    outcome = await SmallCascade(late("decide"), static_plan=(0,)).ask(objective=FASTEST)
    assert answered(outcome) == ["small"]


@pytest.mark.parametrize(
    ("max_cost", "stages"),
    [
        # The stages cost 1, 2 and 4.
        (6.0, ["medium", "large"]),
        (5.9, ["large"]),
        (3.9, ["medium"]),
    ],
)
async def test_a_budget_that_has_no_room_for_drafts_buys_the_last_stages_answer(max_cost, stages):
    cascade = SmallCascade(late("plan"), static_plan=(1,))
    assert answered(await cascade.ask(objective=Objective(max_cost=max_cost))) == stages


async def test_where_the_last_stage_is_away_its_draft_stands():
    away = {"fail_after": 0, "failure": Unavailable("gone")}
    cascade = SmallCascade(late("plan"), static_plan=(1,), large=away)
    outcome = await cascade.ask()
    assert answered(outcome) == ["medium"]
    assert outcome.records[0].decision.reason is DecisionReason.STAGE_UNAVAILABLE


@pytest.mark.parametrize("objective", BETTER.values(), ids=BETTER)
async def test_without_a_policy_service_the_static_plan_is_followed_as_it_is_written(objective):
    outcome = await SmallCascade(None, static_plan=(0, 1)).ask(objective=objective)
    assert answered(outcome) == ["small", "medium"]


@pytest.mark.parametrize("objective", BEST.values(), ids=BEST)
async def test_without_a_policy_service_who_wants_the_best_is_answered_by_the_last_stage(objective):
    assert answered(await SmallCascade(None, static_plan=(0, 1)).ask(objective=objective)) == ["large"]


@pytest.mark.parametrize("preference", ["fastest", "best"])
async def test_a_preference_is_the_same_as_its_value(preference):
    plans = [
        answered(await SmallCascade(late("plan"), static_plan=(1,)).ask(objective=Objective(preference=each)))
        for each in (preference, Preference(preference))
    ]
    assert plans[0] == plans[1] == (["medium"] if preference == "fastest" else ["large"])
