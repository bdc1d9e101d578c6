"""Outcomes to an artifact: fit, calibrate, estimate the transitions, choose the preferences."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression

from policy_service.artifact import (
    AbandonEntry,
    HeadEntry,
    MoveEntry,
    PolicyDocument,
    QualityValues,
    Source,
    StageEntry,
    ViewEntry,
    write_document,
)
from policy_service.features import FEATURES_VERSION, FeatureSpace
from policy_service.predictor import OnnxPredictor
from policy_service.solver import Move, View, solve_policy
from policy_service.train.dataset import PREFIXES, view_keys
from policy_service.train.outcomes import file_digest
from policy_service.train.predictor import export_heads, fit_head
from policy_service.train.replay import replay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from policy_service.train.costs import StageCosts
    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]

# Share of the largest stage's accuracy that each preference must keep on the calibration prompts, with 95%
# confidence, at the lowest cost. Chosen.
KEPT_ACCURACY = {"fastest": 0.93, "balanced": 0.99, "best": 0.998}
# Prompts of a bin, at least: below, a bin's share of right answers says little.
_LEAST_PER_BIN = 100
_MOST_BINS = 32
_ECE_BINS = 15
# Share of right answers, at most, among drafts that are given up before their end. Chosen.
HOPELESS = 0.05
_QUALITY_VALUES = np.geomspace(0.5, 10_000.0, 120)


@dataclass(frozen=True)
class InputFile:
    """A file of outcomes and what it holds."""

    path: Path
    data: Dataset


@dataclass(frozen=True)
class CalibratedHead:
    """One head on the calibration prompts. p_correct: [n]."""

    slope: float
    offset: float
    p_correct: Floats


def fit_policy(
    train: InputFile,
    calibration: InputFile,
    costs: Sequence[StageCosts],
    directory: Path,
    seed: int,
    progress: Callable[[str], None],
) -> PolicyDocument:
    """Write an artifact to a directory and return its document. progress is told what is under way."""
    keys = view_keys(len(costs))
    names = [stage.name for stage in costs]
    size = FeatureSpace(len(names)).size
    directory.mkdir(parents=True, exist_ok=True)
    models = []
    for key in keys:
        progress(f"fitting {model_name(key)}")
        first = key[0] or 0
        heads = [
            fit_head(train.data.features[key], train.data.correct[:, stage], seed)
            for stage in range(first, len(names))
        ]
        models.append(export_heads(heads, size))
    progress("calibrating")
    predictor = OnnxPredictor(models)
    calibrated = {
        key: _calibrate(predictor.score_rows(index, calibration.data.features[key]), key, calibration.data)
        for index, key in enumerate(keys)
    }
    progress("solving")
    views = estimate_views(calibration.data, {key: own(key, heads) for key, heads in calibrated.items()})
    entries = []
    for index, (key, view) in enumerate(zip(keys, views, strict=True)):
        file = model_name(key)
        partial = directory / f"{file}.partial"
        partial.write_bytes(models[index])
        partial.replace(directory / file)
        entries.append(_view_entry(key, view, views, calibrated[key], models[index], names))
    values = choose_quality_values(calibration.data, views, {k: own(k, h) for k, h in calibrated.items()})
    sources = [
        Source(file=each.path.name, sha256=file_digest(each.path), prompts=len(each.data))
        for each in (train, calibration)
    ]
    stages = tuple(
        StageEntry(
            name=stage.name,
            cost=stage.cost,
            latency_ms=round(float(calibration.data.latencies_ms[place, None].mean()), 3),
            accuracy=round(float(calibration.data.correct[:, place].mean()), 5),
            calibration_error=round(_held_out_error(predictor, keys, place, calibration.data, seed), 5),
            abandon=abandon_rules(calibration.data, place),
        )
        for place, stage in enumerate(costs)
    )
    # The version names the content: the same inputs make the same version.
    content = "".join(
        [
            repr(entries),
            repr(stages),
            repr(values),
            *(source.sha256 for source in sources),
            str(seed),
            str(costs),
        ]
    )
    document = PolicyDocument(
        schema="asd.policy",
        policy_version=hashlib.sha256(content.encode()).hexdigest()[:12],
        features_version=FEATURES_VERSION,
        features=size,
        seed=seed,
        stages=stages,
        quality_values=QualityValues(**values),
        train=sources[0],
        calibration=sources[1],
        views=tuple(entries),
    )
    write_document(document, directory)
    return document


def model_name(key: ViewKey) -> str:
    """Return the file of a view's model: prompt.onnx, stage-1.onnx, stage-1-from-0.onnx."""
    stage, origin = key
    if stage is None:
        return "prompt.onnx"
    return f"stage-{stage}.onnx" if origin is None else f"stage-{stage}-from-{origin}.onnx"


def own(key: ViewKey, heads: Mapping[int, CalibratedHead]) -> Floats:
    """Return the score that cuts a view's bins: P(correct) of the stage judged, or of the first stage."""
    return heads[key[0] or 0].p_correct


def estimate_views(data: Dataset, p_correct: Mapping[ViewKey, Floats]) -> tuple[View, ...]:
    """Return the solver's views of outcomes: bins of the score, and how prompts move between them."""
    keys = view_keys(len(data.cascade))
    bins = {key: _bins(p_correct[key]) for key in keys}
    counts = {key: int(bins[key].max()) + 1 for key in keys}
    views = []
    for key in keys:
        stage = key[0]
        moves = []
        for later in range(0 if stage is None else stage + 1, len(data.cascade)):
            target: ViewKey = (later, stage)
            joint = np.zeros((counts[key], counts[target]))
            np.add.at(joint, (bins[key], bins[target]), 1.0)
            moves.append(
                Move(
                    later,
                    keys.index(target),
                    joint / joint.sum(axis=1, keepdims=True),
                    _means(bins[key], data.costs[target]),
                    _means(bins[key], data.latencies_ms[target]),
                )
            )
        views.append(View(stage, key[1], _means(bins[key], p_correct[key]), tuple(moves)))
    return tuple(views)


def choose_quality_values(
    data: Dataset, views: Sequence[View], p_correct: Mapping[ViewKey, Floats]
) -> dict[str, float]:
    """Return for each preference the value of quality that keeps its accuracy at the lowest mean cost."""
    largest = data.correct[:, -1].astype(float)
    candidates = []
    for value in _QUALITY_VALUES:
        solution = solve_policy(tuple(views), float(value))
        run = replay(data, views, p_correct, solution, float(value))
        lost = largest - run.correct
        # One-sided 95% bound of the accuracy lost, over that of the largest stage.
        bound = lost.mean() + 1.645 * lost.std(ddof=1) / np.sqrt(len(lost))
        candidates.append((float(run.cost.mean()), float(value), 1.0 - bound / largest.mean()))
    chosen = {}
    for name, kept in KEPT_ACCURACY.items():
        fitting = [candidate for candidate in candidates if candidate[2] >= kept]
        # Nothing keeps it: the highest value of quality comes closest.
        chosen[name] = round(min(fitting)[1] if fitting else candidates[-1][1], 3)
    return chosen


def abandon_rules(data: Dataset, stage: int) -> tuple[AbandonEntry, ...]:
    """Return when a stage's draft is hopeless, by its first tokens' mean log-probability; none for the last.

    A rule gives up as many drafts as it can while the 95% bound of their share of right ones is HOPELESS at
    most. The bound is not corrected for having chosen the rule by it. Source: Clopper and Pearson 1934.
    """
    rules = []
    for place, tokens in enumerate(PREFIXES if stage < len(data.cascade) - 1 else ()):
        means = data.prefixes[:, stage, place]
        order = np.argsort(means)[: int(np.isfinite(means).sum())]
        right = np.cumsum(data.correct[order, stage])
        counts = np.arange(1, len(order) + 1)
        bounds = beta.ppf(0.95, right + 1, counts - right)
        fitting = np.flatnonzero(bounds <= HOPELESS)
        if len(fitting):
            rules.append(AbandonEntry(tokens=tokens, mean_logprob=round(float(means[order[fitting[-1]]]), 5)))
    return tuple(rules)


def expected_calibration_error(p_correct: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error over 15 equally filled bins. p_correct: [n]. correct: [n].

    Source: Naeini et al. 2015, with bins of equal mass instead of equal width.
    """
    order = np.argsort(p_correct, kind="stable")
    parts = np.array_split(order, _ECE_BINS)
    gaps = [abs(p_correct[part].mean() - correct[part].mean()) * len(part) for part in parts if len(part)]
    return float(sum(gaps) / len(p_correct))


def _calibrate(scores: npt.NDArray[np.float32], key: ViewKey, data: Dataset) -> dict[int, CalibratedHead]:
    first = key[0] or 0
    return {
        stage: _calibrate_head(scores[:, stage - first].astype(float), data.correct[:, stage])
        for stage in range(first, len(data.cascade))
    }


def _calibrate_head(scores: Floats, correct: npt.NDArray[np.bool_]) -> CalibratedHead:
    slope, offset = _platt(scores, correct)
    return CalibratedHead(slope, offset, _sigmoid(slope * scores + offset))


def _platt(scores: Floats, correct: npt.NDArray[np.bool_]) -> tuple[float, float]:
    if correct.all() or not correct.any() or np.ptp(scores) == 0:
        return 1.0, 0.0
    # C: weak, as two parameters need no holding back.
    fitted = LogisticRegression(C=1e3).fit(scores[:, None], correct)
    # A score that points the wrong way carries nothing: the smallest slope keeps order and says so.
    return max(round(float(fitted.coef_[0, 0]), 6), 1e-6), round(float(fitted.intercept_[0]), 6)


def _held_out_error(
    predictor: OnnxPredictor, keys: Sequence[ViewKey], stage: int, data: Dataset, seed: int
) -> float:
    """Return the calibration error of a stage's own answers, each half calibrated on the other."""
    key: ViewKey = (stage, None)
    scores = predictor.score_rows(keys.index(key), data.features[key])[:, 0].astype(float)
    correct = data.correct[:, stage]
    halves = np.array_split(np.random.default_rng(seed).permutation(len(data)), 2)
    p_correct = np.empty(len(data))
    for fitted, held_out in itertools.permutations(halves):
        slope, offset = _platt(scores[fitted], correct[fitted])
        p_correct[held_out] = _sigmoid(slope * scores[held_out] + offset)
    return expected_calibration_error(p_correct, correct)


def _sigmoid(logits: Floats) -> Floats:
    result: Floats = 1.0 / (1.0 + np.exp(-np.clip(logits, -700, 700)))
    return result


def _bins(p_correct: Floats) -> npt.NDArray[np.int64]:
    """Return the bin of each score: equally filled, fewer where scores are equal."""
    count = int(np.clip(len(p_correct) // _LEAST_PER_BIN, 1, _MOST_BINS))
    edges = np.unique(np.quantile(p_correct, np.arange(1, count) / count))
    bins = np.searchsorted(edges, p_correct, side="left")
    # Equal scores at an edge may leave a bin empty.
    return np.unique(bins, return_inverse=True)[1].astype(np.int64)


def _means(bins: npt.NDArray[np.int64], values: Floats) -> Floats:
    means: Floats = np.bincount(bins, weights=values) / np.bincount(bins)
    return means


def _view_entry(
    key: ViewKey,
    view: View,
    views: Sequence[View],
    heads: Mapping[int, CalibratedHead],
    model: bytes,
    names: Sequence[str],
) -> ViewEntry:
    stage, origin = key
    return ViewEntry(
        stage=None if stage is None else names[stage],
        origin=None if origin is None else names[origin],
        model=model_name(key),
        sha256=hashlib.sha256(model).hexdigest(),
        p_correct=tuple(view.p_correct.tolist()),
        heads=tuple(_head_entry(names[place], head) for place, head in heads.items()),
        moves=tuple(
            MoveEntry(
                to=names[move.stage],
                transition=tuple(tuple(np.round(row, 6).tolist()) for row in move.transition),
                cost=tuple(np.round(move.cost, 5).tolist()),
                latency_ms=tuple(np.round(move.latency_ms, 3).tolist()),
            )
            for move in view.moves
        ),
    )


def _head_entry(stage: str, head: CalibratedHead) -> HeadEntry:
    bins = _bins(head.p_correct)
    highest = [float(head.p_correct[bins == each].max()) for each in range(int(bins.max()))]
    return HeadEntry(
        stage=stage,
        slope=head.slope,
        offset=head.offset,
        edges=tuple(highest),
        counts=tuple(np.bincount(bins).tolist()),
    )
