"""Measures of scores and probabilities of right answers, and the interval of a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def r_squared(p_correct: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the share of the variance of correctness that a prediction explains. [n] each."""
    variance = float(((correct - correct.mean()) ** 2).sum())
    return 1.0 - float(((correct - p_correct) ** 2).sum()) / variance if variance else 0.0


def area_under_roc(p_correct: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the probability that a right answer scores above a wrong one; ties count half. [n] each."""
    right, wrong = np.sort(p_correct[correct]), p_correct[~correct]
    if not len(right) or not len(wrong):
        return float("nan")
    below = np.searchsorted(right, wrong, side="left")
    not_above = np.searchsorted(right, wrong, side="right")
    return float(np.mean(len(right) - (below + not_above) / 2) / len(right))


def mean_interval(values: Floats) -> tuple[float, float, float]:
    """Return a mean and the bounds of its 95% interval. values: [n], many and independent."""
    mean, margin = float(values.mean()), 1.96 * float(values.std(ddof=1)) / float(np.sqrt(len(values)))
    return mean, mean - margin, mean + margin
