"""Decisions of a small hand-made policy: budgets, availability, reasons."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd.values import DecisionReason, Preference
from policy_service.artifact import load_artifact
from policy_service.calibration import CalibratedView, Calibration
from policy_service.domain import (
    AbandonThreshold,
    Condition,
    CurvePoint,
    Judgement,
    PolicyObjective,
    Spent,
    StageFacts,
    UnmeetableBudget,
)
from policy_service.features import Draft, DraftVerification, FeatureSpace, PromptText
from policy_service.policy import Policy
from policy_service.solver import Move, View, expect, solve_policy

EMBEDDED = Path(__file__).parents[3] / "policy_service" / "policy.zip"
PROMPT = PromptText("What?")
DRAFT = Draft("This.", np.zeros(2, np.float32), np.zeros(2, np.float32), np.ones(2, np.float32), "eos")
VERIFIED = DraftVerification(2, np.zeros(2, np.int64))
BALANCED, NOTHING = PolicyObjective(), Spent()
PLAIN = Calibration(1.0, 0.0, (0.5,), (100, 100))
ONE_BIN = Calibration(1.0, 0.0, (), (200,))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class FixedScores:
    """Gives the scores that a test asks for; an own score first, sure later stages after it."""

    def __init__(self) -> None:
        self.own = 0.5

    def scores(self, view: int, features: np.ndarray) -> list[float]:
        heads = {0: 2, 1: 2, 2: 1, 3: 1}[view]
        return [logit(self.own), *[logit(0.99)] * (heads - 1)]


def view_of(
    stage: int | None, origin: int | None, p_correct: list[float], certified: list[float], *moves: Move
) -> View:
    return View(stage, origin, np.array(p_correct), np.array(certified), moves)


def calibrated(view: View, stages: int) -> CalibratedView:
    heads = {each: PLAIN if len(view.p_correct) == 2 else ONE_BIN for each in range(view.stage or 0, stages)}
    return CalibratedView(view, heads)


def move(stage: int, view: int, rows: list[list[float]], cost: float, latency_ms: float) -> Move:
    bins = len(rows)
    return Move(stage, view, np.array(rows), np.full(bins, cost), np.full(bins, latency_ms))


@pytest.fixture
def scores() -> FixedScores:
    return FixedScores()


def make_policy(scores: FixedScores) -> Policy:
    """Two stages of cost 1 and 4. Stage 1 is right 99 times in 100; verifying costs 3 and takes 50 ms.

    Stage 0's answers are certified to be right 9 times in 10 where they score above 0.5.
    """
    start = view_of(
        None, None, [0.5], [0.4], move(0, 1, [[0.5, 0.5]], 1.0, 10.0), move(1, 2, [[1.0]], 4.0, 100.0)
    )
    first = view_of(0, None, [0.2, 0.8], [0.1, 0.9], move(1, 3, [[1.0], [1.0]], 3.0, 50.0))
    views = (start, first, view_of(1, None, [0.99], [0.98]), view_of(1, 0, [0.99], [0.98]))
    stages = [StageFacts("small", 1.0, 10.0, 0.5, 0.0), StageFacts("large", 4.0, 100.0, 0.99, 0.0)]
    values = {Preference.FASTEST: 0.1, Preference.BALANCED: 10.0, Preference.BEST: 1000.0}
    curve = []
    for quality_value in (0.1, 1.0, 10.0, 100.0):
        mean = expect(views, solve_policy(views, quality_value), np.ones(1))
        curve.append(CurvePoint(quality_value, mean.cost, mean.latency_ms, mean.accuracy))
    known = [calibrated(view, 2) for view in views]
    return Policy("v1", stages, known, values, FeatureSpace(2), scores, curve)


@pytest.fixture
def policy(scores: FixedScores) -> Policy:
    return make_policy(scores)


def decide(
    policy: Policy, objective: PolicyObjective = BALANCED, spent: Spent = NOTHING, **conditions: Condition
) -> Judgement:
    places = {"small": 0, "large": 1}
    told = {places[name]: condition for name, condition in conditions.items()}
    return policy.decide(PROMPT, 0, DRAFT, None, None, objective, spent, told)


@pytest.mark.parametrize(
    ("own", "next_stage", "reason"),
    # Balanced: escalating is worth 10 * 0.99 - 3 = 6.9, so 0.69 is where stopping begins to pay.
    [
        (0.3, 1, DecisionReason.VALUE),
        (0.68, 1, DecisionReason.VALUE),
        (0.70, None, DecisionReason.VALUE),
        (0.99, None, DecisionReason.VALUE),
    ],
)
def test_the_better_value_decides(
    policy: Policy, scores: FixedScores, own: float, next_stage: int | None, reason: DecisionReason
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
        (PolicyObjective(preference=Preference.FASTEST), 0.3, None, DecisionReason.VALUE),
        (PolicyObjective(preference=Preference.BEST), 0.95, 1, DecisionReason.VALUE),
        (PolicyObjective(quality_value=0.0), 0.01, None, DecisionReason.VALUE),
        (PolicyObjective(max_cost=4.9), 0.3, None, DecisionReason.MAX_COST),
        (PolicyObjective(max_cost=5.0), 0.3, 1, DecisionReason.VALUE),
        (PolicyObjective(max_cost=4.9), 0.95, None, DecisionReason.VALUE),
        (PolicyObjective(max_latency_ms=55.0), 0.3, None, DecisionReason.MAX_LATENCY),
        (PolicyObjective(max_latency_ms=65.0), 0.3, 1, DecisionReason.VALUE),
        # What counts is what is certified of answers that score above 0.5, which is 0.9, not the score.
        (PolicyObjective(min_quality=0.9), 0.8, None, DecisionReason.VALUE),
        (PolicyObjective(min_quality=0.901), 0.8, 1, DecisionReason.MIN_QUALITY),
        (PolicyObjective(min_quality=0.901), 0.999, 1, DecisionReason.MIN_QUALITY),
        (PolicyObjective(min_quality=1.0), 0.999, 1, DecisionReason.MIN_QUALITY),
        (PolicyObjective(quality_value=0.0, min_quality=0.1), 0.4, None, DecisionReason.VALUE),
        (PolicyObjective(quality_value=0.0, min_quality=0.2), 0.4, 1, DecisionReason.MIN_QUALITY),
        (PolicyObjective(quality_value=0.0, min_quality=0.2), 0.6, None, DecisionReason.VALUE),
    ],
)
def test_objectives(
    policy: Policy,
    scores: FixedScores,
    objective: PolicyObjective,
    own: float,
    next_stage: int | None,
    reason: DecisionReason,
) -> None:
    scores.own = own
    decision = decide(policy, objective, Spent(cost=1.0, latency_ms=10.0))
    assert (decision.next_stage, decision.reason) == (next_stage, reason)


VALUE, QUALITY, COST, LATENCY = (
    {"quality_value": 100.0},
    {"min_quality": 0.95},
    {"max_cost": 4.9},
    {"max_latency_ms": 55.0},
)
BINDING = (VALUE, QUALITY, COST, LATENCY)


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=4)))
def test_objectives_together(policy: Policy, scores: FixedScores, chosen: tuple[bool, ...]) -> None:
    """Each alone changes the decision on an answer that stands by itself, or nothing; budgets win."""
    scores.own = 0.75
    fields: dict[str, float] = {}
    for is_chosen, each in zip(chosen, BINDING, strict=True):
        fields |= each if is_chosen else {}
    decision = decide(policy, PolicyObjective(**fields), Spent(cost=1.0, latency_ms=10.0))  # type: ignore[arg-type]
    value, quality, cost, latency = chosen
    if not (value or quality):
        expected: tuple[int | None, DecisionReason] = (None, DecisionReason.VALUE)
    elif cost or latency:
        expected = (None, DecisionReason.MAX_COST if cost else DecisionReason.MAX_LATENCY)
    else:
        expected = (1, DecisionReason.VALUE if value else DecisionReason.MIN_QUALITY)
    assert (decision.next_stage, decision.reason) == expected
    if (cost or latency) and decision.next_stage is None:
        assert decision.escalate_value < decision.stop_value


@pytest.mark.parametrize("preference", list(Preference))
@pytest.mark.parametrize("budget", [{}, {"max_cost": 5.0}, {"max_latency_ms": 60.0}, {"min_quality": 0.9}])
def test_budgets_that_do_not_bind_change_no_preference(
    policy: Policy, scores: FixedScores, preference: Preference, budget: dict[str, float]
) -> None:
    for own, preferred in ((0.75, (Preference.BEST,)), (0.6, (Preference.BEST, Preference.BALANCED))):
        scores.own = own
        objective = PolicyObjective(preference=preference, **budget)  # type: ignore[arg-type]
        decision = decide(policy, objective, Spent(cost=1.0, latency_ms=10.0))
        assert (decision.next_stage, decision.reason) == (
            1 if preference in preferred else None,
            DecisionReason.VALUE,
        )


@pytest.mark.parametrize("preference", list(Preference))
def test_a_quality_that_no_budget_pays_for_is_not_waited_for(policy: Policy, preference: Preference) -> None:
    objective = PolicyObjective(preference=preference, min_quality=1.0, max_cost=2.0)
    assert policy.plan(PROMPT, objective, {}).first_stage == 0
    decision = decide(policy, objective, Spent(cost=1.0))
    assert (decision.next_stage, decision.reason) == (None, DecisionReason.MAX_COST)


def test_a_stage_that_is_away_is_not_asked(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.1
    decision = decide(policy, large=Condition(is_available=False))
    assert (decision.next_stage, decision.reason) == (None, DecisionReason.LAST_STAGE)
    assert math.isfinite(decision.escalate_value)
    assert decision.escalate_value < decision.stop_value


def test_a_queue_counts_against_the_latency_budget(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.1
    objective = PolicyObjective(max_latency_ms=100.0)
    assert decide(policy, objective).next_stage == 1
    decision = decide(policy, objective, large=Condition(expected_queue_ms=80.0))
    assert (decision.next_stage, decision.reason) == (None, DecisionReason.MAX_LATENCY)


def test_the_last_stage_stops(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.4
    decision = policy.decide(PROMPT, 1, DRAFT, 0, VERIFIED, PolicyObjective(), Spent(4.0, 60.0), {})
    assert (decision.next_stage, decision.reason) == (None, DecisionReason.LAST_STAGE)
    assert [estimate.stage for estimate in decision.estimates] == [1]


@pytest.mark.parametrize(
    ("objective", "first_stage"),
    [
        # Worth 10: starting small is worth 0.5 * 6.9 + 0.5 * 8 - 1 = 6.45; starting large 5.9.
        (PolicyObjective(), 0),
        # Worth 1000: 990 - 3 - 1 against 990 - 4: equal but for what small's good half loses.
        (PolicyObjective(quality_value=1000.0), 0),
        (PolicyObjective(max_latency_ms=50.0), 0),
        (PolicyObjective(max_cost=1.0), 0),
    ],
)
def test_plans(policy: Policy, objective: PolicyObjective, first_stage: int) -> None:
    assert policy.plan(PROMPT, objective, {}).first_stage == first_stage


def test_a_plan_tells_how_likely_escalation_is(policy: Policy) -> None:
    plan = policy.plan(PROMPT, PolicyObjective(), {})
    # Of small's two bins, the one around 0.2 escalates.
    assert plan.p_escalate == pytest.approx(0.5)
    assert [(e.stage, e.cost, e.latency_ms) for e in plan.estimates] == [(0, 1.0, 10.0), (1, 4.0, 100.0)]


def test_a_plan_avoids_a_stage_that_is_away(policy: Policy) -> None:
    assert policy.plan(PROMPT, PolicyObjective(), {0: Condition(is_available=False)}).first_stage == 1


def test_a_plan_names_what_the_cheapest_stage_costs(policy: Policy) -> None:
    with pytest.raises(UnmeetableBudget, match=r"max_cost 0\.5 .*small: 1\): raise it"):
        policy.plan(PROMPT, PolicyObjective(max_cost=0.5), {})


def test_a_plan_takes_the_fastest_stage_where_none_is_in_time(policy: Policy) -> None:
    assert policy.plan(PROMPT, PolicyObjective(max_latency_ms=5.0), {}).first_stage == 0


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
    plan = policy.plan(PROMPT, PolicyObjective(quality_value=quality_value), {})
    assert (plan.first_stage, plan.likely_next) == (0, likely)
    assert plan.p_escalate == pytest.approx(p_escalate)


def test_drafts_are_given_up_only_where_something_may_come_after_them(
    policy: Policy, scores: FixedScores
) -> None:
    rules = (AbandonThreshold(8, -0.5),)
    views = policy.views
    policy = Policy(
        "v1", policy.stages, views, policy.quality_values, FeatureSpace(2), scores, (), {0: rules}
    )
    plan = policy.plan(PROMPT, PolicyObjective(quality_value=5.0), {})
    assert (plan.abandon, plan.abandon_to) == (rules, 1)
    plan = policy.plan(PROMPT, PolicyObjective(quality_value=3.0), {})
    assert (plan.abandon, plan.abandon_to) == ((), None)


def three_stages(scores: ThreeScores, last_after_middle: float = 0.25) -> Policy:
    """Stages of cost 1, 2 and 4, right half the time, 3 times in 4 and always.

    A verification costs a quarter of an answer and takes half of an answer's 10, 20 and 40 ms.
    last_after_middle: what it costs of an answer where the last stage verifies the middle one's.
    """
    right, costs, times_ms = (0.5, 0.75, 1.0), (1.0, 2.0, 4.0), (10.0, 20.0, 40.0)
    keys = [(None, None), (0, None), (1, None), (1, 0), (2, None), (2, 0), (2, 1)]
    views = []
    for stage, origin in keys:
        moves = []
        for later in range(0 if stage is None else stage + 1, 3):
            share, time = (1.0, 1.0) if stage is None else (0.25, 0.5)
            share = last_after_middle if stage == 1 else share
            target = keys.index((later, stage))
            moves.append(move(later, target, [[1.0]], share * costs[later], time * times_ms[later]))
        p = right[stage or 0]
        views.append(view_of(stage, origin, [p], [p - 0.05], *moves))
    facts = [StageFacts(*each, 0.0) for each in zip("abc", costs, times_ms, right, strict=True)]
    values = dict.fromkeys(Preference, 10.0)
    known = [calibrated(view, 3) for view in views]
    return Policy("v3", facts, known, values, FeatureSpace(3), scores)


class ThreeScores:
    """What the views say on average."""

    def scores(self, view: int, features: np.ndarray) -> list[float]:
        stage = (0, 0, 1, 1, 2, 2, 2)[view]
        return [logit(p) for p in (0.5, 0.75, 0.9999)[stage:]]


@pytest.mark.parametrize(
    ("spent", "objective", "next_stage", "reason"),
    [
        # Worth 10: stopping 5; the last stage 10 - 1 = 9; by way of the middle one 10 - 0.5 - 1 = 8.5.
        (1.0, PolicyObjective(), 2, DecisionReason.VALUE),
        # Stopping with the middle one: 7.5 - 0.5 = 7. It is what 3 pay for, and the last one what 5 do.
        (1.0, PolicyObjective(max_cost=5.0), 2, DecisionReason.VALUE),
        (1.0, PolicyObjective(max_cost=4.9), 1, DecisionReason.VALUE),
        (1.0, PolicyObjective(max_cost=2.9), None, DecisionReason.MAX_COST),
        # What an earlier call left of its dearest is there for later ones.
        (0.5, PolicyObjective(max_cost=4.5), 2, DecisionReason.VALUE),
        # The last stage takes 20 ms more, the middle one 10.
        (1.0, PolicyObjective(max_latency_ms=30.0), 2, DecisionReason.VALUE),
        (1.0, PolicyObjective(max_latency_ms=29.0), 1, DecisionReason.VALUE),
        (1.0, PolicyObjective(max_latency_ms=19.0), None, DecisionReason.MAX_LATENCY),
        # The reason is what keeps out of the best, which is the last stage.
        (1.0, PolicyObjective(max_latency_ms=29.0, max_cost=2.9), None, DecisionReason.MAX_COST),
        (1.0, PolicyObjective(max_latency_ms=19.0, max_cost=4.9), None, DecisionReason.MAX_COST),
        (1.0, PolicyObjective(max_latency_ms=19.0, max_cost=5.0), None, DecisionReason.MAX_LATENCY),
        # Certified: 0.45, 0.7 and 0.95.
        (1.0, PolicyObjective(quality_value=0.0, min_quality=0.6), 1, DecisionReason.MIN_QUALITY),
        (1.0, PolicyObjective(quality_value=0.0, min_quality=0.8), 2, DecisionReason.MIN_QUALITY),
        (
            1.0,
            PolicyObjective(quality_value=0.0, min_quality=0.8, max_cost=4.0),
            1,
            DecisionReason.MIN_QUALITY,
        ),
    ],
)
def test_budgets_leave_the_best_of_what_they_pay_for(
    spent: float, objective: PolicyObjective, next_stage: int | None, reason: DecisionReason
) -> None:
    policy = three_stages(ThreeScores())
    decision = policy.decide(PROMPT, 0, DRAFT, None, None, objective, Spent(spent, 10.0), {})
    assert (decision.next_stage, decision.reason) == (next_stage, reason)


@pytest.mark.parametrize(
    ("budget", "next_stage"),
    # On its way through the middle stage a request of 1 so far may come to cost 7, and take 40 ms.
    [
        (PolicyObjective(), 1),
        (PolicyObjective(max_cost=7.0), 1),
        (PolicyObjective(max_cost=6.9), 2),
        (PolicyObjective(max_latency_ms=40.0), 1),
        (PolicyObjective(max_latency_ms=39.0), 2),
    ],
)
def test_a_way_that_would_be_cut_off_is_not_begun(budget: PolicyObjective, next_stage: int) -> None:
    # Worth 10: by way of the middle stage 10 - 0.5 - 0.2; the last one at once 10 - 1; the middle one 7.
    policy = three_stages(ThreeScores(), last_after_middle=0.05)
    decision = policy.decide(PROMPT, 0, DRAFT, None, None, budget, Spent(1.0, 10.0), {})
    assert (decision.next_stage, decision.reason) == (next_stage, DecisionReason.VALUE)
    assert decision.escalate_value == pytest.approx(9.3 if next_stage == 1 else 9.0, abs=1e-3)


def test_a_plan_does_not_start_what_the_budget_will_not_finish() -> None:
    policy = three_stages(ThreeScores())
    # Worth 20: the first and then the last stage 20 - 1 - 1 = 18; the last alone 16; the middle alone 13.
    free = policy.plan(PROMPT, PolicyObjective(quality_value=20.0), {})
    assert (free.first_stage, free.likely_next, free.p_escalate) == (0, 2, 1.0)
    # 4 pay for the last stage alone; of the first, they would leave 3, for the middle one: 15 - 1.5.
    bound = policy.plan(PROMPT, PolicyObjective(quality_value=20.0, max_cost=4.0), {})
    assert (bound.first_stage, bound.likely_next) == (2, None)
    # 3 pay for the first and the middle one: 15 - 1 - 0.5 beats 15 - 2.
    less = policy.plan(PROMPT, PolicyObjective(quality_value=20.0, max_cost=3.0), {})
    assert (less.first_stage, less.likely_next, less.p_escalate) == (0, 1, 1.0)
    # 30 ms are what the first and the last one take together, with the last one's queue of 5 ms 35.
    soon = PolicyObjective(quality_value=20.0, max_latency_ms=30.0)
    assert policy.plan(PROMPT, soon, {}).likely_next == 2
    assert policy.plan(PROMPT, soon, {2: Condition(expected_queue_ms=4.0)}).likely_next == 1


@pytest.mark.parametrize(
    ("queue_ms", "escalate_value"),
    # Verifying is worth 10 * 0.99 - 3 = 6.9; an answer takes 100 ms and costs 4.
    [(0.0, 6.9), (12.0, 6.9), (12.5, 6.4), (100.0, 2.9), (130.0, 2.9), (150.0, -1.1), (800.0, -25.1)],
)
def test_a_wait_costs_what_the_answers_waited_for_cost(
    policy: Policy, queue_ms: float, escalate_value: float
) -> None:
    decision = decide(policy, large=Condition(expected_queue_ms=queue_ms))
    assert decision.escalate_value == pytest.approx(escalate_value)
    assert decision.next_stage == (1 if escalate_value > 5.0 else None)


@settings(deadline=None)
@given(
    own=st.floats(0.01, 0.99),
    queue_ms=st.floats(0, 1e5),
    longer_ms=st.floats(0, 1e5),
    other_ms=st.floats(0, 1e3),
    min_quality=st.floats(0, 1),
    quality_value=st.floats(0, 100),
)
def test_a_longer_queue_never_makes_a_decision_for_its_stage(
    own: float, queue_ms: float, longer_ms: float, other_ms: float, min_quality: float, quality_value: float
) -> None:
    scores = FixedScores()
    scores.own = own
    policy = make_policy(scores)
    objective = PolicyObjective(quality_value=quality_value, min_quality=min_quality)
    small = Condition(expected_queue_ms=other_ms)
    short, long = (
        {0: small, 1: Condition(expected_queue_ms=wait_ms)} for wait_ms in (queue_ms, queue_ms + longer_ms)
    )
    before, after = (
        policy.decide(PROMPT, 0, DRAFT, None, None, objective, NOTHING, each) for each in (short, long)
    )
    assert after.escalate_value <= before.escalate_value + 1e-9
    assert before.next_stage is not None or after.next_stage is None
    assert policy.plan(PROMPT, objective, short).first_stage == 1 or (
        policy.plan(PROMPT, objective, long).first_stage == 0
    )


def test_a_queue_behind_the_first_stage_counts_in_the_plan() -> None:
    policy = three_stages(ThreeScores())
    plan = policy.plan(PROMPT, PolicyObjective(quality_value=20.0), {2: Condition(expected_queue_ms=160.0)})
    # With four answers waiting the last stage costs 16 more, which leaves 2; the middle one is worth 13.5.
    assert (plan.first_stage, plan.likely_next) == (0, 1)


def test_few_queues_and_budgets_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []

    def count(*given: Any, **named: Any) -> Any:
        solved.append(given)
        return solve_policy(*given, **named)

    monkeypatch.setattr("policy_service.policy.solve_policy", count)
    policy = three_stages(ThreeScores())
    for step in range(400):
        conditions = {2: Condition(expected_queue_ms=40.0 + step / 50)}
        objective = PolicyObjective(max_cost=1.0 + step / 40, min_quality=0.7 + step / 2000)
        policy.decide(PROMPT, 0, DRAFT, None, None, objective, Spent(1.0, 10.0), conditions)
    # Nothing fits, the middle stage, the last one too, the two in turn; times two levels of certified shares.
    assert len(solved) <= 8


@pytest.mark.parametrize(
    ("wanted", "quality_value"),
    # Only small's bad half escalates from 3 / 0.79 = 3.797 on, at a mean cost of 2.5, 35 ms and 0.895 right
    # answers; the good half from 3 / 0.19 = 15.789 on, at 4.
    [
        ({"mean_cost": 2.4}, 3.0 / 0.79),
        ({"mean_cost": 2.5}, 3.0 / 0.19),
        ({"mean_cost": 9.0}, 100.0),
        ({"mean_latency_ms": 35.0}, 3.0 / 0.19),
        ({"min_accuracy": 0.6}, 3.0 / 0.79),
        ({"min_accuracy": 0.9}, 3.0 / 0.19),
        ({"min_accuracy": 0.1}, 0.1),
    ],
)
def test_the_value_of_quality_for_a_mean(
    policy: Policy, wanted: dict[str, float], quality_value: float
) -> None:
    found = policy.quality_value_for(**wanted)
    # It is found by bisection: nearer, no solution differs.
    assert found == pytest.approx(quality_value, rel=1e-3)
    views = tuple(each.view for each in policy.views)
    mean = expect(views, solve_policy(views, found), np.ones(1))
    assert mean.cost <= wanted.get("mean_cost", math.inf)
    assert mean.latency_ms <= wanted.get("mean_latency_ms", math.inf)
    assert mean.accuracy >= wanted.get("min_accuracy", 0.0)


def test_means_that_cannot_be_kept_say_what_can(policy: Policy) -> None:
    with pytest.raises(UnmeetableBudget, match=r" 1 .* 10 ms.* 0\.99"):
        policy.quality_value_for(mean_cost=0.5)
    with pytest.raises(UnmeetableBudget, match=r"0\.99"):
        policy.quality_value_for(min_accuracy=0.995)
    with pytest.raises(ValueError, match="one"):
        policy.quality_value_for(mean_cost=1.0, min_accuracy=0.5)


@pytest.mark.parametrize(
    ("share", "next_stage"),
    # Without waits half of the answers are escalated, and 0.5 * 0.99 + 0.5 * 0.8 = 0.895 of all are right;
    # where all stop, 0.5. Two answers of waiting would add 8 to the 3 that large costs: more than it is
    # worth.
    [(None, None), (0.4, None), (0.5, 1), (0.97, 1), (1.0, 1), (7.0, 1)],
)
def test_waits_count_only_as_far_as_accuracy_keeps_its_floor(
    policy: Policy, scores: FixedScores, share: float | None, next_stage: int | None
) -> None:
    scores.own = 0.2
    objective = PolicyObjective(min_accuracy_share=share)
    decision = decide(policy, objective, large=Condition(expected_queue_ms=200.0))
    assert decision.next_stage == next_stage


def test_waits_that_break_no_floor_count_in_full(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.2
    waiting = Condition(expected_queue_ms=100.0)
    # One answer waited for adds 4 to large's 3, which leaves 10 * 0.99 - 7.
    assert decide(
        policy, PolicyObjective(min_accuracy_share=0.97), large=waiting
    ).escalate_value == pytest.approx(2.9)
    assert decide(
        policy, PolicyObjective(min_accuracy_share=1.0), large=waiting
    ).escalate_value == pytest.approx(6.9)


def test_waits_count_against_a_latency_budget_whatever_the_floor(policy: Policy, scores: FixedScores) -> None:
    scores.own = 0.1
    objective = PolicyObjective(max_latency_ms=100.0, min_accuracy_share=1.0)
    decision = decide(policy, objective, large=Condition(expected_queue_ms=80.0))
    assert (decision.next_stage, decision.reason) == (None, DecisionReason.MAX_LATENCY)


@pytest.fixture(scope="module")
def embedded() -> Policy:
    return load_artifact(EMBEDDED).policy


@settings(deadline=None)
@given(
    share=st.floats(0.0, 0.97),
    quality_value=st.floats(1.0, 100.0),
    answers=st.lists(st.sampled_from([0.0, 0.25, 1.0, 4.0, 64.0]), min_size=3, max_size=3),
    min_quality=st.sampled_from([0.0, 0.9]),
)
def test_no_wait_takes_expected_accuracy_below_its_floor(
    embedded: Policy, share: float, quality_value: float, answers: list[float], min_quality: float
) -> None:
    conditions = {
        index: Condition(expected_queue_ms=count * stage.latency_ms)
        for index, (count, stage) in enumerate(zip(answers, embedded.stages, strict=True))
    }
    objective = PolicyObjective(quality_value, min_quality=min_quality)
    idle, full = embedded.expect(objective, {}), embedded.expect(objective, conditions)
    kept = embedded.expect(replace(objective, min_accuracy_share=share), conditions)
    floor = min(share * embedded.stages[-1].accuracy, idle.accuracy)
    assert kept.accuracy >= floor
    # Nor is more of the waits left out than the floor and its margin need.
    if full.accuracy >= min(floor + 0.02, idle.accuracy):
        assert kept == full
