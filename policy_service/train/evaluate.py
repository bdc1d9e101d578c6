"""Measures a policy on outcomes that it was not made from, beside its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from policy_service.policy import Preference
from policy_service.solver import solve_policy
from policy_service.train.dataset import view_keys
from policy_service.train.fit import expected_calibration_error
from policy_service.train.replay import Run, always, oracle, replay, threshold

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from policy_service.policy import Policy
    from policy_service.predictor import OnnxPredictor
    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One way of answering n prompts; means. mix: share of answers by stage. ratio: to the last stage's."""

    name: str
    accuracy: float
    accuracy_ratio: float
    cost: float
    latency_ms: float
    early_stop_share: float
    mix: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """How well P(correct) of a stage's answer is predicted in a view."""

    view: str
    r2: float
    auroc: float
    calibration_error: float
    brier: float


@dataclass(frozen=True)
class Evaluation:
    """What a policy does on held-out outcomes."""

    policy_version: str
    prompts: int
    lines: tuple[Line, ...]
    predictions: tuple[Prediction, ...]


def evaluate_policy(
    policy: Policy, predictor: OnnxPredictor, data: Dataset, quality_values: Sequence[float]
) -> Evaluation:
    """Return what a policy does: at each preference, at further values of quality, beside bounds."""
    p_correct = served_scores(policy, predictor, data)
    views = tuple(each.view for each in policy.views)
    stages = len(data.cascade)
    last = float(data.correct[:, -1].mean())
    runs: dict[str, Run] = {f"always {name}": always(data, s) for s, name in enumerate(data.cascade)}
    wanted = {f"lambda {value:g}": value for value in quality_values}
    for preference in Preference:
        value = policy.quality_values[preference]
        wanted[f"{preference.value} (lambda {value:g})"] = value
    for name, value in wanted.items():
        runs[name] = replay(data, views, p_correct, solve_policy(views, value), value)
    balanced = policy.quality_values[Preference.BALANCED]
    kept = runs[f"{Preference.BALANCED.value} (lambda {balanced:g})"].correct.mean()
    runs["best fixed threshold at balanced's accuracy"] = _best_threshold(data, p_correct, float(kept))
    runs["oracle"] = oracle(data)
    lines = tuple(_line(name, run, last, stages) for name, run in runs.items())
    return Evaluation(policy.version, len(data), lines, tuple(_predictions(data, p_correct)))


def served_scores(policy: Policy, predictor: OnnxPredictor, data: Dataset) -> dict[ViewKey, Floats]:
    """Return a policy's score of every prompt in every view, as it would be served: [n] each."""
    scores = {}
    for index, key in enumerate(view_keys(len(data.cascade))):
        head = policy.views[index].heads[key[0] or 0]
        raw = predictor.score_rows(index, data.features[key])[:, 0]
        scores[key] = np.array([head.p_correct(float(score)) for score in raw])
    return scores


def r_squared(p_correct: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the share of the variance of correctness that a prediction explains. [n] each."""
    variance = float(((correct - correct.mean()) ** 2).sum())
    return 1.0 - float(((correct - p_correct) ** 2).sum()) / variance if variance else 0.0


def area_under_roc(p_correct: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the probability that a right answer scores above a wrong one, ties half. [n] each."""
    right, wrong = np.sort(p_correct[correct]), p_correct[~correct]
    if not len(right) or not len(wrong):
        return float("nan")
    below = np.searchsorted(right, wrong, side="left")
    not_above = np.searchsorted(right, wrong, side="right")
    return float(np.mean(len(right) - (below + not_above) / 2) / len(right))


def _best_threshold(data: Dataset, p_correct: Mapping[ViewKey, Floats], accuracy: float) -> Run:
    """Return the cheapest fixed threshold that is at least as accurate, chosen with hindsight."""
    runs = [threshold(data, p_correct, least) for least in 1.0 - np.geomspace(1e-4, 1.0, 200)]
    fitting = [run for run in runs if run.correct.mean() >= accuracy] or [runs[0]]
    return min(fitting, key=lambda run: float(run.cost.mean()))


def _line(name: str, run: Run, last: float, stages: int) -> Line:
    accuracy = float(run.correct.mean())
    return Line(
        name,
        accuracy,
        accuracy / last if last else 0.0,
        float(run.cost.mean()),
        float(run.latency_ms.mean()),
        run.early_stop_share(stages),
        tuple(float(np.mean(run.stage == stage)) for stage in range(stages)),
    )


def _predictions(data: Dataset, p_correct: Mapping[ViewKey, Floats]) -> list[Prediction]:
    lines = []
    for key, scores in p_correct.items():
        stage, origin = key
        judged = data.cascade[stage or 0]
        name = f"{judged}, from the prompt alone" if stage is None else judged
        if origin is not None:
            name = f"{judged}, verified from {data.cascade[origin]}"
        correct = data.correct[:, stage or 0]
        lines.append(
            Prediction(
                name,
                r_squared(scores, correct),
                area_under_roc(scores, correct),
                expected_calibration_error(scores, correct),
                float(np.mean((scores - correct) ** 2)),
            )
        )
    return lines
