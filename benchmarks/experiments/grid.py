"""Which experiments there are, which prompts each of their runs takes, and what a run measures. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.stats import Interval, interval
from suites import LEVELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from policy_service.train.replay import Run

# The research system's values of quality. They had no unit: here a right answer is worth that many answers of
# the largest stage.
QUALITY_VALUES = (0.5, 1.0, 2.0, 5.0)
GROUPS = {"simple": (1, 2, 3, 4, 5), "medium": (6, 7, 8, 9, 10), "complex": (11, 12, 13, 14, 15)}
SEEDS = (0, 1, 2, 3, 4)


class TooFewPrompts(Exception):  # noqa: N818 - an error is named by its cause
    """A run would have nothing to measure; the message says of which level."""


@dataclass(frozen=True)
class Experiment:
    """One cell of the grid. way: who answers (see policy_way, fixed_way). levels: of its prompts."""

    name: str
    way: str
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What one run of an experiment gave; means over its prompts. mix: share of answers by stage."""

    seed: int
    prompts: int
    accuracy: float
    cost: float
    latency_ms: float
    early_stop_share: float
    mix: tuple[float, ...]


@dataclass(frozen=True)
class ExperimentSummary:
    """What the runs of an experiment gave together. mix: by stage."""

    accuracy: Interval
    cost: Interval
    latency_ms: Interval
    early_stop_share: Interval
    mix: tuple[Interval, ...]


@dataclass(frozen=True)
class ExperimentResult:
    """An experiment with its runs."""

    experiment: Experiment
    samples: tuple[Sample, ...]

    @property
    def summary(self) -> ExperimentSummary:
        """Means over the runs, with intervals."""
        return summarise(self.samples)


def policy_way(multiple: float) -> str:
    """Return the name of the policy at a value of quality, in answers of the largest stage."""
    return f"lambda-{multiple:g}"


def fixed_way(stage: str) -> str:
    """Return the name of asking one stage alone."""
    return f"always-{stage}"


def grid(cascade: Sequence[str]) -> tuple[Experiment, ...]:
    """Return the experiments: every value of quality on every level, every stage on every group of levels."""
    learned = [
        Experiment(f"{policy_way(value)}/level-{level:02}", policy_way(value), (level,))
        for value in QUALITY_VALUES
        for level in LEVELS
    ]
    fixed = [
        Experiment(f"{fixed_way(stage)}/{group}", fixed_way(stage), levels)
        for stage in cascade
        for group, levels in GROUPS.items()
    ]
    return (*learned, *fixed)


def draw_runs(levels: npt.NDArray[np.int64], seeds: Sequence[int] = SEEDS) -> npt.NDArray[np.int64]:
    """Return the seed of the run that takes each prompt. levels: [n], of the prompts.

    In each level every seed in turn draws its share from the prompts that the seeds before it left: runs have
    no prompt in common, so that they are independent, and together they take all. Raises TooFewPrompts.
    """
    taken_by = np.empty(len(levels), np.int64)
    for level in LEVELS:
        left = np.flatnonzero(levels == level)
        if len(left) < len(seeds):
            raise TooFewPrompts(f"level {level} has {len(left)} prompts, too few for {len(seeds)} runs")
        for place, seed in enumerate(seeds):
            drawn = np.random.default_rng([seed, level]).permutation(left)[
                : len(left) // (len(seeds) - place)
            ]
            taken_by[drawn] = seed
            left = np.setdiff1d(left, drawn, assume_unique=True)
    return taken_by


def sample_runs(
    run: Run,
    rows: npt.NDArray[np.bool_],
    taken_by: npt.NDArray[np.int64],
    stages: int,
    seeds: Sequence[int] = SEEDS,
) -> tuple[Sample, ...]:
    """Return what the runs of an experiment give. rows: bool [n], the prompts of its levels."""
    samples = []
    for seed in seeds:
        own = np.flatnonzero(rows & (taken_by == seed))
        if not len(own):
            raise ValueError(
                f"the run of seed {seed} has no prompts: {len(seeds)} runs need more of each level"
            )
        mix = np.bincount(run.stage[own], minlength=stages) / len(own)
        samples.append(
            Sample(
                seed,
                len(own),
                float(run.correct[own].mean()),
                float(run.cost[own].mean()),
                float(run.latency_ms[own].mean()),
                float(mix[:-1].sum()),
                tuple(mix.tolist()),
            )
        )
    return tuple(samples)


def summarise(samples: Sequence[Sample]) -> ExperimentSummary:
    """Return means over the runs' prompts with intervals; those of shares end at 0 and 1."""
    prompts = [each.prompts for each in samples]

    def share(values: Sequence[float]) -> Interval:
        found = interval(values, prompts)
        return Interval(found.mean, max(found.low, 0.0), min(found.high, 1.0))

    return ExperimentSummary(
        share([each.accuracy for each in samples]),
        interval([each.cost for each in samples], prompts),
        interval([each.latency_ms for each in samples], prompts),
        share([each.early_stop_share for each in samples]),
        tuple(share(shares) for shares in zip(*(each.mix for each in samples), strict=True)),
    )
