"""Measures a policy on held-out outcomes, and compares it with baselines and an oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asd.values import Preference
from policy_service.domain import PolicyObjective
from policy_service.solver import solve_policy
from policy_service.train.dataset import view_keys
from policy_service.train.fit import expected_calibration_error
from policy_service.train.replay import Run, always, oracle, replay, threshold
from policy_service.train.scores import area_under_roc, mean_interval, r_squared
from policy_service.train.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from policy_service.policy import Policy
    from policy_service.predictor import OnnxPredictor
    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]

_THRESHOLDS = 1.0 - np.geomspace(1e-4, 1.0, 200)


@dataclass(frozen=True)
class Line:
    """Means of one strategy over n prompts. mix: share of answers by stage. ratio: to the last stage's."""

    name: str
    accuracy: float
    accuracy_ratio: float
    cost: float
    latency_ms: float
    early_stop_share: float
    mix: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """Quality of the predictions of P(correct) for a stage's answer in a view."""

    view: str
    r2: float
    auroc: float
    calibration_error: float
    brier: float


@dataclass(frozen=True)
class GroupCalibration:
    """Calibration of a view on a part of the prompts: a suite, or a complexity level."""

    view: str
    group: str
    prompts: int
    calibration_error: float
    brier: float


@dataclass(frozen=True)
class Comparison:
    """A policy's value and that of the best fixed threshold in hindsight, in cost units per prompt.

    value: quality_value * right - cost. difference: policy minus threshold; low and high bound its 95%
    interval.
    """

    name: str
    quality_value: float
    value: float
    threshold_value: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Results of a policy on held-out outcomes.

    oracle_share: by line, the share of the oracle's cost saving that is reached; both savings are relative to
    always calling the last stage. unlike_share: share of prompts unlike all that the policy was fitted to;
    None if the policy has no family. The policy's lines send these prompts where serving would. Predictions
    and groups leave them out, as nothing is predicted for them.
    """

    policy_version: str
    prompts: int
    lines: tuple[Line, ...]
    predictions: tuple[Prediction, ...]
    comparisons: tuple[Comparison, ...]
    groups: tuple[GroupCalibration, ...]
    oracle_share: dict[str, float]
    unlike_share: float | None = None


@one_thread()
def evaluate_policy(
    policy: Policy, predictor: OnnxPredictor, data: Dataset, quality_values: Sequence[float]
) -> Evaluation:
    """Return a policy's results at each preference and at further values of quality, with its baselines."""
    p_correct, cells = served_states(policy, predictor, data)
    unlike = unlike_prompts(policy, data)
    views = tuple(each.view for each in policy.views)
    stages = len(data.cascade)
    last = float(data.correct[:, -1].mean())
    runs: dict[str, Run] = {f"always {name}": always(data, s) for s, name in enumerate(data.cascade)}
    wanted = {f"lambda {value:g}": value for value in quality_values}
    for preference in Preference:
        value = policy.quality_values[preference]
        wanted[f"{preference.value} (lambda {value:g})"] = value
    comparisons = []
    thresholds = [threshold(data, p_correct, least) for least in _THRESHOLDS]
    for name, value in wanted.items():
        run = replay(data, views, p_correct, solve_policy(views, value), value, cells)
        runs[name] = with_unlike(run, policy, data, unlike)
        comparisons.append(_compare(name, value, runs[name], thresholds))
    balanced = policy.quality_values[Preference.BALANCED]
    kept = runs[f"{Preference.BALANCED.value} (lambda {balanced:g})"].correct.mean()
    runs["best fixed threshold at balanced's accuracy"] = _best_threshold(thresholds, float(kept))
    runs["oracle"] = oracle(data)
    lines = tuple(_line(name, run, last, stages) for name, run in runs.items())
    dearest, cheapest = lines[stages - 1].cost, lines[-1].cost
    return Evaluation(
        policy.version,
        len(data),
        lines,
        tuple(_predictions(data, p_correct, ~unlike)),
        tuple(comparisons),
        tuple(_groups(data, p_correct, ~unlike)),
        {line.name: (dearest - line.cost) / (dearest - cheapest) for line in lines},
        None if policy.family is None else float(unlike.mean()),
    )


def unlike_prompts(policy: Policy, data: Dataset) -> npt.NDArray[np.bool_]:
    """Return which prompts are unlike all that the policy was fitted to: bool [n]."""
    if policy.family is None:
        return np.zeros(len(data), np.bool_)
    return np.array([policy.is_unlike(prompt) for prompt in data.prompt_texts()], np.bool_)


def with_unlike(run: Run, policy: Policy, data: Dataset, unlike: npt.NDArray[np.bool_]) -> Run:
    """Return a run in which the policy's unlike prompts go where serving would send them. unlike: [n]."""
    rows = np.flatnonzero(unlike)
    if not len(rows):
        return run
    # All of these prompts get the same plan.
    plan = policy.plan(data.prompt_texts()[rows[0]], PolicyObjective(), {})
    calls: list[ViewKey] = [(plan.first_stage, None)]
    if plan.likely_next is not None:
        calls.append((plan.likely_next, plan.first_stage))
    last = plan.first_stage if plan.likely_next is None else plan.likely_next
    stage, correct = run.stage.copy(), run.correct.copy()
    cost, latency_ms = run.cost.copy(), run.latency_ms.copy()
    stage[rows], correct[rows] = last, data.correct[rows, last]
    cost[rows] = np.sum([data.costs[call][rows] for call in calls], axis=0)
    latency_ms[rows] = np.sum([data.latencies_ms[call][rows] for call in calls], axis=0)
    return Run(stage, correct, cost, latency_ms)


def served_states(
    policy: Policy, predictor: OnnxPredictor, data: Dataset
) -> tuple[dict[ViewKey, Floats], dict[ViewKey, npt.NDArray[np.int64]]]:
    """Return P(correct) of every prompt in every view, and the cells of views that have cells: [n] each."""
    p_correct, cells = {}, {}
    for index, key in enumerate(view_keys(len(data.cascade))):
        view = policy.views[index]
        scores = predictor.score_rows(index, data.features[key])
        head = view.heads[key[0] or 0]
        p_correct[key] = np.array([head.p_correct(score) for score in scores[:, 0].tolist()])
        if view.state_cells is not None:
            cells[key] = view.state_cells.cells_of(scores)
    return p_correct, cells


def _best_threshold(runs: Sequence[Run], accuracy: float) -> Run:
    """Return the run of the cheapest fixed threshold, in hindsight, with at least this accuracy."""
    fitting = [run for run in runs if run.correct.mean() >= accuracy] or [runs[0]]
    return min(fitting, key=lambda run: float(run.cost.mean()))


def _compare(name: str, quality_value: float, run: Run, thresholds: Sequence[Run]) -> Comparison:
    values = quality_value * run.correct - run.cost
    best = max(
        (quality_value * other.correct - other.cost for other in thresholds),
        key=lambda each: float(each.mean()),
    )
    return Comparison(
        name, quality_value, float(values.mean()), float(best.mean()), *mean_interval(values - best)
    )


def _groups(
    data: Dataset, p_correct: Mapping[ViewKey, Floats], known: npt.NDArray[np.bool_]
) -> Iterator[GroupCalibration]:
    suites = np.array(data.suites)
    members = {f"suite {suite}": suites == suite for suite in dict.fromkeys(data.suites)}
    members |= {f"level {level}": data.levels == level for level in np.unique(data.levels)}
    members = {group: rows & known for group, rows in members.items() if (rows & known).any()}
    for key, scores in p_correct.items():
        correct = data.correct[:, key[0] or 0]
        for group, rows in members.items():
            yield GroupCalibration(
                _view_name(data.cascade, key),
                group,
                int(rows.sum()),
                expected_calibration_error(scores[rows], correct[rows]),
                float(np.mean((scores[rows] - correct[rows]) ** 2)),
            )


def _view_name(cascade: Sequence[str], key: ViewKey) -> str:
    stage, origin = key
    judged = cascade[stage or 0]
    if stage is None:
        return f"{judged}, from the prompt alone"
    return judged if origin is None else f"{judged}, verified from {cascade[origin]}"


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


def _predictions(
    data: Dataset, p_correct: Mapping[ViewKey, Floats], known: npt.NDArray[np.bool_]
) -> list[Prediction]:
    if not known.any():
        return []
    lines = []
    for key, of_all in p_correct.items():
        scores, correct = of_all[known], data.correct[known, key[0] or 0]
        lines.append(
            Prediction(
                _view_name(data.cascade, key),
                r_squared(scores, correct),
                area_under_roc(scores, correct),
                expected_calibration_error(scores, correct),
                float(np.mean((scores - correct) ** 2)),
            )
        )
    return lines
