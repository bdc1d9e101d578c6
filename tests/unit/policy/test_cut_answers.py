"""Answers that ended as none did that the predictor was fitted to are judged by their prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asd.values import DecisionReason, FinishReason, Preference
from policy_service.artifact import load_artifact, pack, read_artifact
from policy_service.calibration import CalibratedView, Calibration
from policy_service.domain import Judgement, PolicyObjective, Spent, StageFacts
from policy_service.features import Draft, DraftVerification, FeatureSpace, PromptText
from policy_service.policy import Policy
from policy_service.solver import Move, View
from policy_service.state_cells import StateCells
from suites import split

ARTIFACT = Path(__file__).parents[3] / "policy_service" / "policy.zip"
PROMPT = PromptText("What?")
VERIFIED = DraftVerification(3, np.zeros(3, np.int64))
ONE_BIN = Calibration(1.0, 0.0, (), (200,))
# Of the answers' view: a score of -0.5 stands for 0.5.
STEEP = Calibration(2.0, 1.0, (0.5,), (100, 100))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class Scores:
    """A prompt foretells `small` and 0.9; whatever is answered looks certain, and later stages do not."""

    def __init__(self, small: float) -> None:
        self.small = small

    def scores(self, view: int, features: np.ndarray) -> list[float]:
        return ([logit(self.small), logit(0.9)], [5.0, -0.2], [5.0], [5.0])[view]


def make_policy(small: float, *finish_reasons: FinishReason) -> Policy:
    """Two stages. Escalating costs 3 from small's lower cell and 1 from the upper one; large is always right.

    All of small's answers are certified to be right 9 times in 10.
    """

    def move(stage: int, view: int, *costs: float) -> Move:
        bins = len(costs)
        return Move(stage, view, np.ones((bins, 1)), np.array(costs), np.full(bins, 10.0))

    def view_of(stage: int | None, origin: int | None, p_correct: list[float], *moves: Move) -> View:
        return View(stage, origin, np.array(p_correct), np.full(len(p_correct), 0.9), moves)

    start = view_of(None, None, [0.5], move(0, 1, 1.0), move(1, 2, 4.0))
    start = replace(start, moves=(Move(0, 1, np.array([[0.5, 0.5]]), np.ones(1), np.ones(1)), start.moves[1]))
    cells = StateCells((0, 0, 0), (-0.5, 0.0, 0.0), (1, 0, 0), (2, 0, 0), (-1, 0, 1), (100, 100))
    views = [
        CalibratedView(start, {0: ONE_BIN, 1: ONE_BIN}),
        CalibratedView(view_of(0, None, [0.2, 0.8], move(1, 3, 3.0, 1.0)), {0: STEEP, 1: ONE_BIN}, cells),
        CalibratedView(view_of(1, None, [1.0]), {1: ONE_BIN}),
        CalibratedView(view_of(1, 0, [1.0]), {1: ONE_BIN}),
    ]
    stages = [
        StageFacts("small", 1.0, 10.0, 0.5, 0.0, finish_reasons),
        StageFacts("large", 4.0, 9.0, 1.0, 0.0),
    ]
    values = dict.fromkeys(Preference, 10.0)
    return Policy("v", stages, views, values, FeatureSpace(2), Scores(small))


def draft(finish_reason: FinishReason, tokens: int = 3) -> Draft:
    sure = np.full(tokens, -0.001, np.float32)
    return Draft("Max has 9", sure, -sure, np.ones(tokens, np.float32), finish_reason)


def decide(policy: Policy, finish_reason: FinishReason, min_quality: float = 0.0) -> Judgement:
    objective = PolicyObjective(min_quality=min_quality)
    return policy.decide(PROMPT, 0, draft(finish_reason), None, None, objective, Spent(), {})


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
def test_a_cut_answer_is_as_good_as_its_prompt_foretells(finish_reason: FinishReason) -> None:
    decision = decide(make_policy(0.45, "eos"), finish_reason)
    assert decision.p_correct == pytest.approx(0.45)
    # (0.45 * 200 + 1) / 202 = 0.4505; sqrt(0.4505 * 0.5495 / 202) = 0.03501.
    assert decision.stderr == pytest.approx(0.03501, abs=1e-5)
    assert decision.stop_value == pytest.approx(4.5)
    assert [each.p_correct for each in decision.estimates] == pytest.approx([0.45, 0.9])
    # Log-odds of -0.2 are a score of -0.6 in the answers' view, in the lower cell: 10 - 3.
    assert decision.escalate_value == pytest.approx(7.0)
    assert decision.estimates[1].cost == 3.0
    assert (decision.next_stage, decision.reason) == (1, DecisionReason.VALUE)


@pytest.mark.parametrize(
    ("known", "finish_reason"), [(("eos",), "eos"), (("eos", "length"), "length"), (("stop",), "stop")]
)
def test_an_answer_that_ended_as_others_did_is_judged_by_itself(
    known: tuple[FinishReason, ...], finish_reason: FinishReason
) -> None:
    decision = decide(make_policy(0.45, *known), finish_reason)
    # 1 / (1 + exp(-11)), and 1 / (1 + exp(0.2)).
    assert [each.p_correct for each in decision.estimates] == pytest.approx([0.99998, 0.45017], abs=1e-5)
    assert (decision.next_stage, decision.escalate_value) == (None, pytest.approx(9.0))


@pytest.mark.parametrize(
    ("finish_reason", "min_quality", "next_stage", "reason"),
    [
        ("length", 0.0, None, DecisionReason.VALUE),
        ("length", 0.01, 1, DecisionReason.MIN_QUALITY),
        ("length", 0.9, 1, DecisionReason.MIN_QUALITY),
        ("eos", 0.9, None, DecisionReason.VALUE),
    ],
)
def test_a_cut_answer_keeps_no_min_quality(
    finish_reason: FinishReason, min_quality: float, next_stage: int | None, reason: DecisionReason
) -> None:
    # Stopping is worth 9.5, and escalating 9.
    decision = decide(make_policy(0.95, "eos"), finish_reason, min_quality)
    assert (decision.next_stage, decision.reason) == (next_stage, reason)


def test_the_last_stage_stops_with_a_cut_answer() -> None:
    policy = make_policy(0.45, "eos")
    objective = PolicyObjective(min_quality=0.99)
    decision = policy.decide(PROMPT, 1, draft("length"), 0, VERIFIED, objective, Spent(), {})
    assert (decision.next_stage, decision.reason) == (None, DecisionReason.LAST_STAGE)
    assert decision.p_correct == pytest.approx(0.9)


def test_the_shipped_policy_expects_of_a_cut_answer_what_it_planned_with() -> None:
    policy = load_artifact(ARTIFACT).policy
    tasks = [task for task in split("demo", 120) if task.suite == "arithmetic"]
    easy, hard = tasks[0], max(tasks, key=lambda task: task.level)
    decisions = {}
    for task in (easy, hard):
        prompt = PromptText(task.prompt)
        planned = policy.plan(prompt, PolicyObjective(), {}).estimates
        for stage, origin in ((0, None), (1, None), (1, 0), (2, 0)):
            check = None if origin is None else VERIFIED
            cut = policy.decide(prompt, stage, draft("length"), origin, check, PolicyObjective(), Spent(), {})
            assert [(each.stage, each.p_correct, each.stderr) for each in cut.estimates] == [
                (each.stage, each.p_correct, each.stderr) for each in planned[stage:]
            ]
            decisions[task, stage] = cut
        whole = policy.decide(prompt, 0, draft("eos", 12), None, None, PolicyObjective(), Spent(), {})
        # Were it whole, few and sure tokens would speak for it, whatever was asked.
        assert whole.p_correct > 0.85
    assert decisions[easy, 0].next_stage is None
    assert decisions[easy, 0].p_correct > 0.9
    assert decisions[hard, 0].next_stage is not None
    assert decisions[hard, 0].p_correct < 0.5


def test_an_artifact_without_finish_reasons_is_of_answers_that_ended_by_themselves() -> None:
    artifact = read_artifact(ARTIFACT)
    assert {stage.finish_reasons for stage in artifact.document.stages} == {("eos",)}
    assert pack(artifact) == ARTIFACT.read_bytes()
    assert load_artifact(ARTIFACT).policy.stages[0].finish_reasons == ("eos",)
