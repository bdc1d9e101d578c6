"""Replays policies over outcomes: their answers, costs and latencies. Vectorised."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from policy_service.solver import Solution, View
    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]
    Cells = npt.NDArray[np.int64]


# Larger than the cost of any path.
_WRONG = 1e9


@dataclass(frozen=True)
class Run:
    """Results of n prompts. stage: int [n], that answered. cost, latency_ms: [n], of all stages called."""

    stage: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    cost: Floats
    latency_ms: Floats

    def early_stop_share(self, stages: int) -> float:
        """Return the share of answers that came from a stage before the last."""
        return float(np.mean(self.stage < stages - 1))


def replay(
    data: Dataset,
    views: Sequence[View],
    p_correct: Mapping[ViewKey, Floats],
    solution: Solution,
    quality_value: float,
    cells: Mapping[ViewKey, Cells] | None = None,
) -> Run:
    """Return the run of a solution's policy on every prompt, as policy.Policy decides without budgets.

    p_correct: per view, [n], of the stage that answered. cells: per view that has cells, [n]; the bins of
    other views are cut by p_correct.
    """
    cells = cells or {}
    count = len(data)
    at = np.zeros(count, np.int64)
    cost, latency_ms = np.zeros(count), np.zeros(count)
    answered = np.zeros(count, np.int64)
    indexes: dict[ViewKey, int] = {(view.stage, view.origin): index for index, view in enumerate(views)}
    for index, view in enumerate(views):
        rows = np.flatnonzero(at == index)
        key: ViewKey = (view.stage, view.origin)
        if view.stage is not None:
            answered[rows] = view.stage
        continuations = solution.continuations[index]
        if not len(rows) or not continuations:
            continue
        score = p_correct[key][rows]
        stages = np.array(list(continuations))
        if key in cells:
            onward = np.stack([v[cells[key][rows]] for v in continuations.values()])
        else:
            onward = np.stack([np.interp(score, view.p_correct, v) for v in continuations.values()])
        best = np.argmax(onward, axis=0)
        goes_on = np.ones(len(rows), np.bool_)
        if view.stage is not None:
            goes_on = onward[best, np.arange(len(rows))] > quality_value * score
        for stage in stages:
            target: ViewKey = (int(stage), view.stage)
            moving = rows[goes_on & (stages[best] == stage)]
            at[moving] = indexes[target]
            cost[moving] += data.costs[target][moving]
            latency_ms[moving] += data.latencies_ms[target][moving]
    return Run(answered, data.correct[np.arange(count), answered], cost, latency_ms)


def always(data: Dataset, stage: int) -> Run:
    """Return the run that calls one stage alone on every prompt."""
    count = len(data)
    return Run(
        np.full(count, stage),
        data.correct[:, stage],
        data.costs[stage, None],
        data.latencies_ms[stage, None],
    )


def threshold(data: Dataset, p_correct: Mapping[ViewKey, Floats], least: float) -> Run:
    """Return the run of a fixed threshold: start at the first stage, and escalate while below it."""
    count, stages = data.correct.shape
    cost, latency_ms = np.zeros(count), np.zeros(count)
    answered = np.zeros(count, np.int64)
    rows = np.arange(count)
    for stage in range(stages):
        key: ViewKey = (stage, stage - 1 if stage else None)
        cost[rows] += data.costs[key][rows]
        latency_ms[rows] += data.latencies_ms[key][rows]
        answered[rows] = stage
        rows = rows[p_correct[key][rows] < least]
    return Run(answered, data.correct[np.arange(count), answered], cost, latency_ms)


def oracle(data: Dataset) -> Run:
    """Return the run of a policy that knows the outcomes: the cheapest path to a right answer.

    A path calls some stages in order, each verifying the one before. If no stage is right, the cheapest path
    is taken.
    """
    count, stages = data.correct.shape
    best = Run(np.zeros(count, np.int64), np.zeros(count, np.bool_), np.zeros(count), np.zeros(count))
    least = np.full(count, np.inf)
    for last, keys in _ways(stages):
        cost = np.sum([data.costs[key] for key in keys], axis=0)
        latency_ms = np.sum([data.latencies_ms[key] for key in keys], axis=0)
        # A right answer at any cost is better than a wrong one.
        order = cost + np.where(data.correct[:, last], 0.0, _WRONG)
        better = order < least
        least[better] = order[better]
        best.stage[better] = last
        best.correct[better] = data.correct[better, last]
        best.cost[better], best.latency_ms[better] = cost[better], latency_ms[better]
    return best


def least_spent(correct: npt.NDArray[np.bool_], amounts: Mapping[ViewKey, Floats], right: int) -> float:
    """Return the least mean amount at which `right` of n prompts are right, with known outcomes.

    correct: [n, K]. amounts: costs or latencies, as in Dataset. Each prompt takes its cheapest path to any
    answer, except for the prompts with the smallest extra cost of a right one, which take that. If fewer than
    `right` can be right, as many as possible are.
    """
    count, stages = correct.shape
    answered, answered_right = np.full(count, np.inf), np.full(count, np.inf)
    for last, keys in _ways(stages):
        amount = np.sum([amounts[key] for key in keys], axis=0)
        answered = np.minimum(answered, amount)
        answered_right = np.where(correct[:, last], np.minimum(answered_right, amount), answered_right)
    more = np.sort((answered_right - answered)[np.isfinite(answered_right)])
    return float((answered.sum() + more[:right].sum()) / count)


def _ways(stages: int) -> Iterator[tuple[int, list[ViewKey]]]:
    """Yield the last stage and the calls of every path: stages in order, each verifying the one before."""
    for size in range(1, stages + 1):
        for way in itertools.combinations(range(stages), size):
            yield way[-1], list(zip(way, (None, *way), strict=False))
