"""Whether a policy responds to the value of quality: the two checks that the research system fails. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.stats import CONFIDENCE, interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.experiments.grid import Sample

# Means of equal values may differ in their last bits.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Fall:
    """A mean that falls as the value of quality rises.

    is_beyond_chance: the interval of the difference, run by run, lies below zero.
    """

    metric: str
    low_value: float
    high_value: float
    before: float
    after: float
    is_beyond_chance: bool


@dataclass(frozen=True)
class Response:
    """What happens as the value of quality rises.

    falls: means over all runs that fall. runs_that_fall: seeds of runs in which one does. distances: total
    variation distance between the stage mixes of each two values. alike: pairs whose mixes may be the same.
    """

    quality_values: tuple[float, ...]
    falls: tuple[Fall, ...]
    runs_that_fall: tuple[int, ...]
    distances: tuple[tuple[float, float, float], ...]
    alike: tuple[tuple[float, float], ...]

    def is_non_decreasing(self, metric: str) -> bool:
        """Return whether cost, accuracy never fall."""
        return all(fall.metric != metric for fall in self.falls)

    @property
    def is_distinct(self) -> bool:
        """Whether every two values have another stage mix."""
        return not self.alike

    @property
    def smallest_distance(self) -> float:
        """Distance of the two mixes that are closest."""
        return min(distance for _, _, distance in self.distances)


def check_response(quality_values: Sequence[float], samples: Sequence[Sequence[Sample]]) -> Response:
    """Return how cost, accuracy and mix respond. samples: by value, ascending, of the same runs each.

    Two mixes are distinct where the share of some stage differs by more than chance between runs over the
    same prompts: its interval excludes zero, at a confidence that makes up for all pairs and stages
    (Bonferroni).
    """
    values = tuple(quality_values)
    prompts = [each.prompts for each in samples[0]]
    falls = []
    for metric in ("cost", "accuracy"):
        by_value = [np.array([getattr(each, metric) for each in runs]) for runs in samples]
        for place, (before, after) in enumerate(itertools.pairwise(by_value)):
            change = interval((after - before).tolist(), prompts)
            if change.mean < -_ROUNDING:
                mean_before = float(np.average(before, weights=prompts))
                mean_after = mean_before + change.mean
                is_beyond_chance = change.high < 0
                falls.append(
                    Fall(metric, values[place], values[place + 1], mean_before, mean_after, is_beyond_chance)
                )
    pairs = list(itertools.combinations(range(len(values)), 2))
    distances, alike = [], []
    for low, high in pairs:
        mixes = [np.array([each.mix for each in samples[place]]) for place in (low, high)]
        changes = (mixes[1] - mixes[0]).T
        confidence = 1 - (1 - CONFIDENCE) / (len(pairs) * len(changes))
        shifts = [interval(change.tolist(), prompts, confidence) for change in changes]
        distances.append((values[low], values[high], sum(abs(shift.mean) for shift in shifts) / 2))
        if not any(shift.low > 0 or shift.high < 0 for shift in shifts):
            alike.append((values[low], values[high]))
    return Response(values, tuple(falls), _runs_that_fall(samples), tuple(distances), tuple(alike))


def _runs_that_fall(samples: Sequence[Sequence[Sample]]) -> tuple[int, ...]:
    return tuple(
        runs[0].seed
        for runs in zip(*samples, strict=True)
        if any(
            after.cost < before.cost - _ROUNDING or after.accuracy < before.accuracy - _ROUNDING
            for before, after in itertools.pairwise(runs)
        )
    )
