"""Fits the cells of each view to the observed worth of the moves from its states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.tree import DecisionTreeRegressor

from policy_service.state_cells import StateCells
from policy_service.train.dataset import view_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]
    Rows = npt.NDArray[np.int64]
    Scores = Mapping[ViewKey, npt.NDArray[np.float32]]

# Most cells of a view, and fewest prompts in each. Chosen on the calibration prompts.
_MOST_CELLS = 32
_LEAST_PER_CELL = 100
# With fewer prompts, a view is cut by its own score alone.
_LEAST_PROMPTS = 3000
# Values of quality to fit the cells for, in costs of the last stage. Chosen: about those of the preferences;
# larger or smaller values use the same cells.
_QUALITY_VALUES = (0.6, 1.2, 3.0)


def fit_state_cells(
    data: Dataset, rows: Rows, scores: Scores, p_correct: Mapping[ViewKey, Floats], largest_cost: float
) -> dict[ViewKey, StateCells | None]:
    """Return the cells of each view, fitted to some of the prompts; None if its own score cuts it.

    rows: of those prompts. scores: per view, [n, heads], before calibration. p_correct: per view, [n], of the
    stage that answered.

    From the last stage backwards, a tree groups states by the worth of each move over stopping. After a move,
    the best move by cells is taken, on the same prompts: least-squares Monte Carlo (Longstaff and Schwartz
    2001), with trees for the regression.
    """
    keys = view_keys(len(data.cascade))
    fitted: dict[ViewKey, StateCells | None] = {}
    worth: dict[ViewKey, list[Floats]] = {}
    enough = len(rows) >= _LEAST_PROMPTS
    for key in reversed(keys):
        stage = key[0]
        right = data.correct[rows, stage or 0].astype(float)
        later = range(0 if stage is None else stage + 1, len(data.cascade))
        fitted[key] = None
        if not later or not enough:
            worth[key] = [value * largest_cost * right for value in _QUALITY_VALUES]
            continue
        own = p_correct[key][rows]
        stopping = [
            value * largest_cost * own if stage is not None else np.full(len(rows), -np.inf)
            for value in _QUALITY_VALUES
        ]
        moves = [
            np.stack([worth[target, stage][index] - data.costs[target, stage][rows] for target in later])
            for index in range(len(_QUALITY_VALUES))
        ]
        gains = [
            (each - (stop if stage is not None else 0.0)) / np.sqrt(value)
            for each, stop, value in zip(moves, stopping, _QUALITY_VALUES, strict=True)
        ]
        tree = DecisionTreeRegressor(
            max_leaf_nodes=_MOST_CELLS, min_samples_leaf=_LEAST_PER_CELL, random_state=0
        ).fit(scores[key][rows], np.concatenate(gains).T)
        state_cells = _from_tree(tree, scores[key], rows, p_correct[key])
        fitted[key] = state_cells
        cells = state_cells.cells_of(scores[key][rows])
        worth[key] = []
        for each, stop, value in zip(moves, stopping, _QUALITY_VALUES, strict=True):
            expected = np.stack([_means(cells, move) for move in each])[:, cells]
            best = each[np.argmax(expected, axis=0), np.arange(len(rows))]
            worth[key].append(np.where(expected.max(axis=0) > stop, best, value * largest_cost * right))
    return fitted


def _from_tree(
    tree: DecisionTreeRegressor, scores: npt.NDArray[np.float32], rows: Rows, p_correct: Floats
) -> StateCells:
    """Return a fitted tree as cells, numbered by the mean P(correct) of all prompts in each."""
    nodes = tree.tree_
    is_end = nodes.children_left < 0
    numbered = StateCells(
        tuple(np.maximum(nodes.feature, 0).tolist()),
        tuple(np.where(is_end, 0.0, nodes.threshold).tolist()),
        tuple(np.maximum(nodes.children_left, 0).tolist()),
        tuple(np.maximum(nodes.children_right, 0).tolist()),
        tuple(np.where(is_end, np.cumsum(is_end) - 1, -1).tolist()),
        (),
    )
    cells = numbered.cells_of(scores)
    order = np.argsort(_means(cells, p_correct))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ranked = tuple(int(rank[cell]) if cell >= 0 else -1 for cell in numbered.cells)
    counts = np.bincount(rank[cells], minlength=len(order))
    return StateCells(
        numbered.heads, numbered.thresholds, numbered.left, numbered.right, ranked, tuple(counts.tolist())
    )


def _means(cells: npt.NDArray[np.int64], values: Floats) -> Floats:
    count = int(cells.max()) + 1
    means: Floats = np.bincount(cells, values, count) / np.bincount(cells, minlength=count)
    return means
