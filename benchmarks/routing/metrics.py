"""How well a score sends prompts to the large model: APGR, CPT and their bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Routed:
    """Measures of one score, means over the assignments of prompts to folds.

    interval: 95% of apgr. assignments: between which apgr lies for 95% of the assignments. over_length: what
    apgr is above that of prompt length, and its 95% interval; None for prompt length itself. folds: between
    which 95% of the single folds lie, each of prompts or subjects that its router has not seen; None where
    the folds make one ranking. cpt50, cpt80: share of calls that recovers so much.
    """

    apgr: float
    interval: tuple[float, float]
    assignments: tuple[float, float]
    over_length: tuple[float, float, float] | None
    folds: tuple[float, float] | None
    cpt50: float
    cpt80: float


def recovery_curve(scores: Floats, gains: Floats) -> tuple[Floats, Floats]:
    """Return shares of calls to the large model, and the performance gap recovered (PGR): 0 to 1 each.

    scores: [n], higher goes to the large model first. gains: [n], quality of the large answer less that of
    the small one. Every threshold is a point; prompts of equal score go together. PGR 0 is the small model
    alone, 1 the large one alone. The large model must be the better one: ValueError if not.
    """
    _, index = np.unique(-scores, return_inverse=True)
    recovered = np.concatenate(([0.0], np.cumsum(np.bincount(index, weights=gains))))
    if recovered[-1] <= 0:
        raise ValueError("the large model is not better than the small one: there is no gap to recover")
    shares = np.concatenate(([0.0], np.cumsum(np.bincount(index)))) / len(scores)
    return shares, recovered / recovered[-1]


def average_recovery(scores: Floats, gains: Floats) -> float:
    """Return APGR: the exact area under PGR over the share of calls; 0.5 for a score that knows nothing.

    Between two thresholds a random part of the prompts that tie goes to the large model: straight lines.
    Source: Ong et al. 2024 (RouteLLM), section 2.2, who take ten quantiles in place of every threshold.
    """
    shares, recovered = recovery_curve(scores, gains)
    return float(np.sum((recovered[1:] + recovered[:-1]) / 2 * np.diff(shares)))


def call_share(scores: Floats, gains: Floats, recovery: float) -> float:
    """Return CPT: the least share of calls to the large model that recovers a part (0 to 1) of the gap."""
    shares, recovered = recovery_curve(scores, gains)
    after = int(np.argmax(recovered >= recovery - 1e-12))
    below, above = recovered[after - 1], recovered[after]
    part = min(max((recovery - below) / (above - below), 0.0), 1.0)
    return float(shares[after - 1] + part * (shares[after] - shares[after - 1]))


def measure(
    scores: Floats,
    gains: Floats,
    seed: int,
    groups: npt.NDArray[np.int64] | None = None,
    lengths: Floats | None = None,
    folds: npt.NDArray[np.int64] | None = None,
) -> Routed:
    """Return the measures of a score. The bootstrap resamples prompts, and fits nothing again.

    scores: [assignments, n], or [n] for one assignment of prompts to folds. lengths: as scores, of the
    baseline. groups: [n], number of each prompt's group from 0 on. Whole groups are resampled then, as many
    as there are: the cluster bootstrap, Davison and Hinkley 1997, section 3.8. Each resample takes the next
    assignment, so the interval holds what both vary. folds: [assignments, n], each prompt's fold, where
    every fold is a ranking of its own.
    """
    scores = np.atleast_2d(scores)
    areas = np.array([average_recovery(each, gains) for each in scores])
    over_length = None
    resampled = _resampled_areas(scores, gains, seed, groups)
    if lengths is not None:
        lengths = np.atleast_2d(lengths)
        above = areas.mean() - np.mean([average_recovery(each, gains) for each in lengths])
        # The same resamples for both.
        paired = resampled - _resampled_areas(lengths, gains, seed, groups)
        over_length = (float(above), *_middle(paired))
    return Routed(
        float(areas.mean()),
        _middle(resampled),
        _middle(areas),
        over_length,
        None if folds is None else _middle(_areas_of_folds(scores, gains, np.atleast_2d(folds))),
        float(np.mean([call_share(each, gains, 0.5) for each in scores])),
        float(np.mean([call_share(each, gains, 0.8) for each in scores])),
    )


def _resampled_areas(
    scores: Floats, gains: Floats, seed: int, groups: npt.NDArray[np.int64] | None
) -> Floats:
    rng = np.random.default_rng(seed)
    members = None if groups is None else [np.flatnonzero(groups == each) for each in range(groups.max() + 1)]
    areas = []
    for number in range(_RESAMPLES):
        if members is None:
            rows = rng.integers(0, len(gains), len(gains))
        else:
            rows = np.concatenate([members[each] for each in rng.integers(0, len(members), len(members))])
        # A resample without a gap has no PGR; it takes few prompts or equal models to make one.
        if gains[rows].sum() > 0:
            areas.append(average_recovery(scores[number % len(scores)][rows], gains[rows]))
    return np.array(areas)


def _areas_of_folds(scores: Floats, gains: Floats, folds: npt.NDArray[np.int64]) -> Floats:
    """Return APGR on every fold of every assignment that has a gap to recover."""
    areas = []
    for score, fold in zip(scores, folds, strict=True):
        for each in range(fold.max() + 1):
            rows = fold == each
            if gains[rows].sum() > 0:
                areas.append(average_recovery(score[rows], gains[rows]))
    return np.array(areas)


def _middle(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
