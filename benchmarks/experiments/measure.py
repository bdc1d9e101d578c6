"""Replays the policy, and what it is compared with, over outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asd.values import Preference
from benchmarks.experiments.grid import (
    GROUPS,
    QUALITY_VALUES,
    Experiment,
    ExperimentResult,
    draw_runs,
    fixed_way,
    grid,
    policy_way,
    sample_runs,
)
from benchmarks.experiments.response import check_response
from benchmarks.stats import clopper_pearson
from policy_service.solver import solve_policy
from policy_service.train.evaluate import served_states
from policy_service.train.fit import expected_calibration_error
from policy_service.train.replay import always, oracle, replay, threshold
from policy_service.train.scores import area_under_roc, r_squared
from suites import LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from benchmarks.experiments.response import Response
    from policy_service.policy import Policy
    from policy_service.predictor import OnnxPredictor
    from policy_service.train.dataset import Dataset, ViewKey
    from policy_service.train.replay import Run

    Floats = npt.NDArray[np.float64]

# Values of quality in cost units, as the contract's `lambda` has them: the table, and the curve through it.
RAW_VALUES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_CURVE_VALUES = np.geomspace(0.5, 10_000.0, 241)
# Least P(correct) to stop at: dense towards 1, where the accuracies of interest lie.
_THRESHOLDS = 1.0 - np.geomspace(1e-4, 1.0, 200)
_RELIABILITY_BINS = 15


@dataclass(frozen=True)
class CurveMark:
    """What one way of answering gives over all prompts; means."""

    name: str
    quality_value: float | None
    accuracy: float
    cost: float
    latency_ms: float
    early_stop_share: float
    mix: tuple[float, ...]


@dataclass(frozen=True)
class Bin:
    """Prompts of like prediction. low, high: Clopper-Pearson interval of the share of right answers."""

    prompts: int
    predicted: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class Reliability:
    """How a view's P(correct) compares with what was right, in equally filled bins.

    view: what was known, in words. stage: whose answer is judged.
    """

    view: str
    stage: str
    r2: float
    auroc: float
    calibration_error: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Measured:
    """Everything that the report shows. overall, by_group: by way, of all levels and of each group.

    curve: the policy at values of quality from nothing to all. raw: those of RAW_VALUES. thresholds: fixed
    thresholds that no other one beats in both cost and accuracy.
    """

    policy_version: str
    cascade: tuple[str, ...]
    unit: float
    prompts: int
    suites: tuple[str, ...]
    results: tuple[ExperimentResult, ...]
    overall: dict[str, ExperimentResult]
    by_group: dict[str, dict[str, ExperimentResult]]
    response: Response
    response_by_level: dict[int, Response]
    curve: tuple[CurveMark, ...]
    raw: tuple[CurveMark, ...]
    preferences: tuple[CurveMark, ...]
    fixed: tuple[CurveMark, ...]
    thresholds: tuple[CurveMark, ...]
    oracle: CurveMark
    reliability: tuple[Reliability, ...]

    def at(self, multiple: float) -> ExperimentResult:
        """Return the policy over all levels at a value of the grid."""
        return self.overall[policy_way(multiple)]


def measure(
    policy: Policy, predictor: OnnxPredictor, data: Dataset, progress: Callable[[str], None]
) -> Measured:
    """Return every experiment of the grid and what goes beside it. progress is told what is under way."""
    progress("scoring every prompt in every view")
    p_correct, cells = served_states(policy, predictor, data)
    views = tuple(each.view for each in policy.views)
    stages = len(data.cascade)
    unit = policy.stages[-1].cost

    def run_at(quality_value: float) -> Run:
        solution = solve_policy(views, quality_value)
        return replay(data, views, p_correct, solution, quality_value, cells)

    def point_at(name: str, quality_value: float) -> CurveMark:
        return _point(name, run_at(quality_value), stages, quality_value)

    progress("replaying the grid")
    ways = {policy_way(value): run_at(value * unit) for value in QUALITY_VALUES}
    ways |= {fixed_way(name): always(data, place) for place, name in enumerate(data.cascade)}
    taken_by = draw_runs(data.levels)

    def result_of(experiment: Experiment) -> ExperimentResult:
        rows = np.isin(data.levels, experiment.levels)
        return ExperimentResult(experiment, sample_runs(ways[experiment.way], rows, taken_by, stages))

    def results_on(levels: Iterable[int], name: str) -> dict[str, ExperimentResult]:
        return {way: result_of(Experiment(f"{way}/{name}", way, tuple(levels))) for way in ways}

    def response_on(results: Mapping[str, ExperimentResult]) -> Response:
        samples = [results[policy_way(value)].samples for value in QUALITY_VALUES]
        return check_response(QUALITY_VALUES, samples)

    overall = results_on(LEVELS, "all")
    results = tuple(result_of(experiment) for experiment in grid(data.cascade))
    progress("replaying curves and bounds")
    return Measured(
        policy.version,
        data.cascade,
        unit,
        len(data),
        tuple(sorted(set(data.suites))),
        results,
        overall,
        {group: results_on(levels, group) for group, levels in GROUPS.items()},
        response_on(overall),
        {level: response_on(results_on((level,), f"level-{level:02}")) for level in LEVELS},
        tuple(point_at("policy", value) for value in _CURVE_VALUES.tolist()),
        tuple(point_at(f"lambda {value:g}", value) for value in RAW_VALUES),
        tuple(point_at(each.value, policy.quality_values[each]) for each in Preference),
        tuple(_point(f"always {name}", ways[fixed_way(name)], stages) for name in data.cascade),
        _front([_point(f"threshold {x:.4f}", threshold(data, p_correct, x), stages) for x in _THRESHOLDS]),
        _point("oracle", oracle(data), stages),
        tuple(_reliability(key, scores, data) for key, scores in p_correct.items()),
    )


def _point(name: str, run: Run, stages: int, quality_value: float | None = None) -> CurveMark:
    return CurveMark(
        name,
        quality_value,
        float(run.correct.mean()),
        float(run.cost.mean()),
        float(run.latency_ms.mean()),
        run.early_stop_share(stages),
        tuple((np.bincount(run.stage, minlength=stages) / len(run.stage)).tolist()),
    )


def _front(points: Sequence[CurveMark]) -> tuple[CurveMark, ...]:
    """Return the points that no other one beats in accuracy at their cost or less, by ascending cost."""
    front: list[CurveMark] = []
    for point in sorted(points, key=lambda each: (each.cost, -each.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return tuple(front)


def _reliability(key: ViewKey, scores: Floats, data: Dataset) -> Reliability:
    stage, origin = key
    judged = data.cascade[stage or 0]
    view = f"{judged}, from its own answer"
    if stage is None:
        view = f"{judged}, from the prompt alone"
    elif origin is not None:
        view = f"{judged}, verified from {data.cascade[origin]}"
    correct = data.correct[:, stage or 0]
    parts = np.array_split(np.argsort(scores, kind="stable"), _RELIABILITY_BINS)
    return Reliability(
        view,
        judged,
        r_squared(scores, correct),
        area_under_roc(scores, correct),
        expected_calibration_error(scores, correct),
        tuple(_bin(scores[part], correct[part]) for part in parts if len(part)),
    )


def _bin(scores: Floats, correct: npt.NDArray[np.bool_]) -> Bin:
    count, right = len(correct), int(correct.sum())
    return Bin(count, float(scores.mean()), right / count, *clopper_pearson(right, count))
