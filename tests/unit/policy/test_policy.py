"""Decisions of a small hand-made policy: budgets, availability, reasons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policy_service.features import Draft, FeatureSpace, PromptText, Verification
from policy_service.policy import (
    AbandonRule,
    CalibratedView,
    Calibration,
    Condition,
    Decision,
    Objective,
    Policy,
    Preference,
    Reason,
    Spent,
    StageFacts,
    UnmeetableBudget,
)
from policy_service.solver import Move, View

PROMPT = PromptText("What?")
DRAFT = Draft("This.", np.zeros(2, np.float32), np.zeros(2, np.float32), np.ones(2, np.float32), "eos")
VERIFIED = Verification(2, np.zeros(2, np.int64))
BALANCED, NOTHING = Objective(), Spent()
PLAIN = Calibration(1.0, 0.0, (0.5,), (100, 100))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class FixedScores:
    """Gives the scores that a test asks for; an own score first, sure later stages after it."""

    def __init__(self) -> None:
        self.own = 0.5

    def scores(self, view: int, features: np.ndarray) -> list[float]:
        heads = {0: 2, 1: 2, 2: 1, 3: 1}[view]
        return [logit(self.own), *[logit(0.99)] * (heads - 1)]


def move(stage: int, view: int, rows: list[list[float]], cost: float, latency_ms: float) -> Move:
    bins = len(rows)
    return Move(stage, view, np.array(rows), np.full(bins, cost), np.full(bins, latency_ms))


@pytest.fixture
def scores() -> FixedScores:
    return FixedScores()


@pytest.fixture
def policy(scores: FixedScores) -> Policy:
    """Two stages of cost 1 and 4. Stage 1 is right 99 times in 100; verifying costs 3 and takes 50 ms."""
    start = View(
        None, None, np.array([0.5]), (move(0, 1, [[0.5, 0.5]], 1.0, 10.0), move(1, 2, [[1.0]], 4.0, 100.0))
    )
    first = View(0, None, np.array([0.2, 0.8]), (move(1, 3, [[1.0], [1.0]], 3.0, 50.0),))
    views = (start, first, View(1, None, np.array([0.99]), ()), View(1, 0, np.array([0.99]), ()))
    calibrated = [CalibratedView(view, dict.fromkeys(range(view.stage or 0, 2), PLAIN)) for view in views]
    stages = [StageFacts("small", 1.0, 10.0, 0.5, 0.0), StageFacts("large", 4.0, 100.0, 0.99, 0.0)]
    values = {Preference.FASTEST: 0.1, Preference.BALANCED: 10.0, Preference.BEST: 1000.0}
    return Policy("v1", stages, calibrated, values, FeatureSpace(2), scores)


def decide(
    policy: Policy, objective: Objective = BALANCED, spent: Spent = NOTHING, **conditions: Condition
) -> Decision:
    places = {"small": 0, "large": 1}
    told = {places[name]: condition for name, condition in conditions.items()}
    return policy.decide(PROMPT, 0, DRAFT, None, None, objective, spent, told)


@pytest.mark.parametrize(
    ("own", "next_stage", "reason"),
    # Balanced: escalating is worth 10 * 0.99 - 3 = 6.9, so 0.69 is where stopping begins to pay.
    [(0.3, 1, Reason.VALUE), (0.68, 1, Reason.VALUE), (0.70, None, Reason.VALUE), (0.99, None, Reason.VALUE)],
)
def test_the_better_value_decides(
    policy: Policy, scores: FixedScores, own: float, next_stage: int | None, reason: Reason
) -> None:
    scores.own = own
    decision = decide(policy)
    assert (decision.next_stage, decision.reason) == (next_stage, reason)
    assert decision.p_correct == pytest.approx(own)
    assert decision.stop_value == pytest.approx(10 * own)
    assert decision.escalate_value == pytest.approx(6.9)


@pytest.mark.parametrize(
    ("objective", "own", "next_stage", "reason"),
    [
        (Objective(preference=Preference.FASTEST), 0.3, None, Reason.VALUE),
        (Objective(preference=Preference.BEST), 0.95, 1, Reason.VALUE),
        (Objective(quality_value=0.0), 0.01, None, Reason.VALUE),
        (Objective(max_cost=4.9), 0.3, None, Reason.MAX_COST),
        (Objective(max_cost=5.0), 0.3, 1, Reason.VALUE),
        (Objective(max_cost=4.9), 0.95, None, Reason.VALUE),
        (Objective(max_latency_ms=55.0), 0.3, None, Reason.MAX_LATENCY),
        (Objective(max_latency_ms=65.0), 0.3, 1, Reason.VALUE),
        (Objective(min_quality=0.9), 0.8, 1, Reason.MIN_QUALITY),
        (Objective(min_quality=0.9), 0.95, None, Reason.VALUE),
        (Objective(min_quality=0.9, max_cost=2.0), 0.8, None, Reason.MAX_COST),
    ],
)
def test_objectives(
    policy: Policy,
    scores: FixedScores,
    objective: Objective,
    own: float,
    next_stage: int | None,
    reason: Reason,
) -> None:
    scores.own = own
    decision = decide(policy, objective, Spent(cost=1.0, latency_ms=10.0))
    assert (decision.next_stage, decision.reason) == (next_stage, reason)


def test_a_stage_that_is_away_is_not_asked(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.1
    decision = decide(policy, large=Condition(is_available=False))
    assert (decision.next_stage, decision.reason) == (None, Reason.LAST_STAGE)
    assert math.isfinite(decision.escalate_value)
    assert decision.escalate_value < decision.stop_value


def test_a_queue_counts_against_the_latency_budget(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.1
    objective = Objective(max_latency_ms=100.0)
    assert decide(policy, objective).next_stage == 1
    decision = decide(policy, objective, large=Condition(expected_queue_ms=80.0))
    assert (decision.next_stage, decision.reason) == (None, Reason.MAX_LATENCY)


def test_the_last_stage_stops(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.4
    decision = policy.decide(PROMPT, 1, DRAFT, 0, VERIFIED, Objective(), Spent(4.0, 60.0), {})
    assert (decision.next_stage, decision.reason) == (None, Reason.LAST_STAGE)
    assert [estimate.stage for estimate in decision.estimates] == [1]


@pytest.mark.parametrize(
    ("objective", "first_stage"),
    [
        # Worth 10: starting small is worth 0.5 * 6.9 + 0.5 * 8 - 1 = 6.45; starting large 5.9.
        (Objective(), 0),
        # Worth 1000: 990 - 3 - 1 against 990 - 4: equal but for what small's good half loses.
        (Objective(quality_value=1000.0), 0),
        (Objective(max_latency_ms=50.0), 0),
        (Objective(max_cost=1.0), 0),
    ],
)
def test_plans(policy: Policy, objective: Objective, first_stage: int) -> None:
    assert policy.plan(PROMPT, objective, {}).first_stage == first_stage


def test_a_plan_tells_how_likely_escalation_is(policy: Policy) -> None:
    plan = policy.plan(PROMPT, Objective(), {})
    # Of small's two bins, the one around 0.2 escalates.
    assert plan.p_escalate == pytest.approx(0.5)
    assert [(e.stage, e.cost, e.latency_ms) for e in plan.estimates] == [(0, 1.0, 10.0), (1, 4.0, 100.0)]


def test_a_plan_avoids_a_stage_that_is_away(policy: Policy) -> None:
    assert policy.plan(PROMPT, Objective(), {0: Condition(is_available=False)}).first_stage == 1


def test_a_plan_names_what_the_cheapest_stage_costs(policy: Policy) -> None:
    with pytest.raises(UnmeetableBudget, match=r"max_cost 0\.5 .*small: 1\): raise it"):
        policy.plan(PROMPT, Objective(max_cost=0.5), {})


def test_a_plan_takes_the_fastest_stage_where_none_is_in_time(policy: Policy) -> None:
    assert policy.plan(PROMPT, Objective(max_latency_ms=5.0), {}).first_stage == 0


def test_stderr_shrinks_with_the_prompts_of_a_bin() -> None:
    few, many = Calibration(1.0, 0.0, (), (10,)), Calibration(1.0, 0.0, (), (1000,))
    assert many.stderr(0.8) < few.stderr(0.8)
    # (0.8 * 1000 + 1) / 1002 = 0.7994; sqrt(0.7994 * 0.2006 / 1002) = 0.01265.
    assert many.stderr(0.8) == pytest.approx(0.01265, abs=1e-5)
    assert few.stderr(1.0) > 0.0


@pytest.mark.parametrize("score", [-1e6, -50.0, 0.0, 50.0, 1e6])
def test_calibration_takes_any_score(score: float) -> None:
    assert 0.0 <= PLAIN.p_correct(score) <= 1.0


@pytest.mark.parametrize(
    ("quality_value", "likely", "p_escalate"),
    # Of the first stage's two bins, at 0.2 and 0.8 and equally likely, the lower one goes on from a value of
    # 3 / 0.79 on, the other one from 3 / 0.19 on; starting with the large stage is never better.
    [(3.0, None, 0.0), (5.0, 1, 0.5), (15.0, 1, 0.5)],
)
def test_the_plan_says_which_stage_comes_next(
    policy: Policy, quality_value: float, likely: int | None, p_escalate: float
) -> None:
    plan = policy.plan(PROMPT, Objective(quality_value=quality_value), {})
    assert (plan.first_stage, plan.likely_next) == (0, likely)
    assert plan.p_escalate == pytest.approx(p_escalate)


def test_drafts_are_given_up_only_where_something_may_come_after_them(
    policy: Policy, scores: FixedScores
) -> None:
    rules = (AbandonRule(8, -0.5),)
    views = policy.views
    policy = Policy("v1", policy.stages, views, policy.quality_values, FeatureSpace(2), scores, {0: rules})
    plan = policy.plan(PROMPT, Objective(quality_value=5.0), {})
    assert (plan.abandon, plan.abandon_to) == (rules, 1)
    plan = policy.plan(PROMPT, Objective(quality_value=3.0), {})
    assert (plan.abandon, plan.abandon_to) == ((), None)
