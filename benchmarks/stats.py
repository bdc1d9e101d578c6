"""Intervals of measured shares and means. `services.common.stats` has the percentile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest, t

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over runs and the confidence interval around it."""

    mean: float
    low: float
    high: float


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share, 0 to 1 where nothing was counted. Source: Wilson 1927."""
    return _of_share(right, count, "wilson") if count else (0.0, 1.0)


def clopper_pearson(right: int, count: int) -> tuple[float, float]:
    """Return the exact 95% interval of a share. Source: Clopper and Pearson 1934."""
    return _of_share(right, count, "exact")


def _of_share(right: int, count: int, method: str) -> tuple[float, float]:
    found = binomtest(right, count).proportion_ci(CONFIDENCE, method=method)
    return float(found.low), float(found.high)


def interval(values: Sequence[float], prompts: Sequence[int], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of independent runs, weighted by their prompts, and its interval by Student's t.

    The interval takes the runs to be equally large. Within a level they differ by one prompt.
    """
    mean = float(np.average(values, weights=prompts))
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1) * error)
    return Interval(mean, mean - half, mean + half)
