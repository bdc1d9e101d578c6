"""Cells of a view: a small tree over the scores of all its heads groups states. No gRPC, no protobuf.

The score of the stage that answered decides whether to stop. Which stage to call instead also depends on the
predictions for later stages, which are the scores of their heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


@dataclass(frozen=True)
class StateCells:
    """A binary tree, node 0 first: a state goes left if the score of `heads` is at most `thresholds`.

    left, right: the next node. cells: the cell of a leaf; -1 for other nodes. Cells are numbered by ascending
    P(correct). counts: [cells], calibration prompts in each.
    """

    heads: tuple[int, ...]
    thresholds: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    cells: tuple[int, ...]
    counts: tuple[int, ...]

    def cell_of(self, scores: Sequence[float]) -> int:
        """Return the cell of a state. scores: of the view's heads, before calibration."""
        node = 0
        while self.cells[node] < 0:
            below = scores[self.heads[node]] <= self.thresholds[node]
            node = self.left[node] if below else self.right[node]
        return self.cells[node]

    def cells_of(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return the cells of many states: [n]. scores: [n, heads]."""
        heads, thresholds = np.array(self.heads), np.array(self.thresholds)
        left, right, cells = np.array(self.left), np.array(self.right), np.array(self.cells)
        nodes = np.zeros(len(scores), np.int64)
        rows = np.flatnonzero(cells[nodes] < 0)
        while len(rows):
            at = nodes[rows]
            below = scores[rows, heads[at]].astype(float) <= thresholds[at]
            nodes[rows] = np.where(below, left[at], right[at])
            rows = rows[cells[nodes[rows]] < 0]
        found: npt.NDArray[np.int64] = cells[nodes].astype(np.int64)
        return found
