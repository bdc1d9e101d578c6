"""Maps a predictor's scores to calibrated probabilities, and to the bins of the solver's views."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from policy_service.solver import View
    from policy_service.state_cells import StateCells


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of one head: p_correct = sigmoid(slope * score + offset). Platt 1999.

    edges: [bins - 1], upper edges of equally filled bins of p_correct. counts: [bins], calibration prompts.
    """

    slope: float
    offset: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def p_correct(self, score: float) -> float:
        """Return the calibrated probability for a predictor's score."""
        logit = self.log_odds(score)
        if logit >= 0:
            return 1.0 / (1.0 + math.exp(-logit))
        odds = math.exp(max(logit, -700.0))
        return odds / (1.0 + odds)

    def log_odds(self, score: float) -> float:
        """Return the log-odds for a predictor's score."""
        return self.slope * score + self.offset

    def score_for(self, log_odds: float) -> float:
        """Return the score for these log-odds: the inverse of `log_odds`."""
        return (log_odds - self.offset) / self.slope

    def bin_of(self, p_correct: float) -> int:
        """Return the bin of a probability."""
        return bisect.bisect_left(self.edges, p_correct)

    def stderr(self, p_correct: float) -> float:
        """Return the standard error of a probability: a binomial share's over the prompts of its bin."""
        count = self.counts[self.bin_of(p_correct)]
        # Add one success and one failure: a bin without a failure is not certain (Agresti and Coull 1998).
        share = (p_correct * count + 1) / (count + 2)
        return math.sqrt(share * (1 - share) / (count + 2))


@dataclass(frozen=True)
class CalibratedView:
    """A solver's view with the mapping from a predictor's scores to its bins.

    heads: calibration of each stage's head in this view, by stage. The view's bins are those of the head of
    the stage that answered, or of the first stage in the prompt's view, unless state_cells cuts it into
    cells.
    """

    view: View
    heads: Mapping[int, Calibration]
    state_cells: StateCells | None = None

    def locate(self, scores: Sequence[float], p_correct: float) -> Point:
        """Return a state's position among the bins. scores: of the heads. p_correct: of the first head."""
        if self.state_cells is not None:
            cell = self.state_cells.cell_of(scores)
            return Point(cell, 0.0, cell)
        return _locate(self.centres, p_correct, next(iter(self.heads.values())).bin_of(p_correct))

    @cached_property
    def centres(self) -> tuple[float, ...]:
        """Mean p_correct of each bin."""
        return tuple(self.view.p_correct.tolist())

    @cached_property
    def prompt_shares(self) -> npt.NDArray[np.float64]:
        """Share of the calibration prompts in each bin of the prompt's view, which the first head cuts."""
        counts = np.array(self.state_cells.counts if self.state_cells else self.heads[0].counts, float)
        shares: npt.NDArray[np.float64] = counts / counts.sum()
        return shares

    @cached_property
    def certified(self) -> tuple[float, ...]:
        """Certified share of right answers of each bin."""
        return tuple(self.view.certified.tolist())

    @cached_property
    def expected(self) -> dict[int, tuple[list[float], list[float]]]:
        """Cost and latency of calling each later stage, per bin."""
        return {move.stage: (move.cost.tolist(), move.latency_ms.tolist()) for move in self.view.moves}


@dataclass(frozen=True, slots=True)
class Point:
    """A position between the centres of bins `low` and `low + 1`, at `share` of their distance; in `bin`."""

    low: int
    share: float
    bin: int

    def of(self, values: Sequence[float]) -> float:
        """Return a quantity's value here, interpolated linearly between the centres."""
        if self.share == 0.0:
            return values[self.low]
        return values[self.low] * (1.0 - self.share) + values[self.low + 1] * self.share


def _locate(centres: Sequence[float], at: float, within: int) -> Point:
    """Return a value's position between ascending centres; beyond them, the nearest one."""
    above = bisect.bisect_left(centres, at)
    if above == 0:
        return Point(0, 0.0, within)
    if above == len(centres):
        return Point(above - 1, 0.0, within)
    low, high = centres[above - 1], centres[above]
    return Point(above - 1, (at - low) / (high - low), within)
