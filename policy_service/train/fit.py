"""Makes an artifact from outcomes: fits, calibrates, estimates the transitions, chooses the preferences."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta, norm
from sklearn.linear_model import LogisticRegression

from asd.values import FinishReason
from asd.visible import one_line
from policy_service.artifact import Artifact
from policy_service.document import (
    MOST_NAME,
    AbandonEntry,
    CellsEntry,
    CurveEntry,
    HeadEntry,
    MoveEntry,
    PolicyDocument,
    QualityValues,
    Source,
    StageEntry,
    ViewEntry,
)
from policy_service.features import FEATURES_VERSION, FeatureSpace
from policy_service.predictor import OnnxPredictor
from policy_service.solver import Move, View, expect, solve_policy
from policy_service.store import write_artifact
from policy_service.train.dataset import PREFIXES, view_keys
from policy_service.train.family import fit_family
from policy_service.train.outcomes import file_digest
from policy_service.train.predictor import export_heads, fit_head
from policy_service.train.replay import replay
from policy_service.train.state_cells import fit_state_cells
from policy_service.train.threads import one_thread, run_side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from policy_service.state_cells import StateCells
    from policy_service.train.costs import StageCosts
    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]

# Share of the largest stage's accuracy that each preference must keep on the calibration prompts, with 95%
# confidence, at the lowest cost. Chosen.
KEPT_ACCURACY = {"fastest": 0.93, "balanced": 0.99, "best": 0.998}
# Fewest prompts of a kind: fewer say too little about their accuracy.
_LEAST_PER_PART = 1000
# One in this many calibration prompts is used to cut the cells.
_CUTTING = 3
# Fewest prompts of a bin: with fewer, its share of right answers is uncertain.
_LEAST_PER_BIN = 100
_MOST_BINS = 32
_ECE_BINS = 15
# Largest share of right answers among abandoned drafts. Chosen.
HOPELESS = 0.05
# Probability of a false certificate, for each of: a value of min_quality, the abandon rules of a stage, the
# accuracy of a preference.
DOUBT = 0.05
# Bins that are certified together, in addition to each alone. Chosen: with 10,000 prompts, 4 bins of 312
# certify shares of 0.99, which 312 prompts cannot; single bins locate the end of a lower share exactly.
_BINS_TOGETHER = 4
# Number of thresholds that a rule is chosen from; and shares of right drafts, relative to HOPELESS, with
# which rules are proposed, the strictest first. Chosen.
_RULES_TRIED = 500
_STRICTNESS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_QUALITY_VALUES = np.geomspace(0.5, 10_000.0, 120)
# Share of a stage's training answers with a finish reason that the trees need to learn it. Chosen: 200 of
# 20,000 prompts.
_LEAST_FINISH_SHARE = 0.01


@dataclass(frozen=True)
class InputFile:
    """A file of outcomes and its content."""

    path: Path
    data: Dataset


@dataclass(frozen=True)
class CalibratedHead:
    """One head on the calibration prompts. p_correct: [n]."""

    slope: float
    offset: float
    p_correct: Floats


@one_thread()
def fit_policy(
    train: InputFile,
    calibration: InputFile,
    costs: Sequence[StageCosts],
    output: Path,
    seed: int,
    progress: Callable[[str], None],
) -> PolicyDocument:
    """Write an artifact, as `store.write_artifact` does; return its document.

    progress: is called with a line about the current step.
    """
    keys = view_keys(len(costs))
    names = [stage.name for stage in costs]
    size = FeatureSpace(len(names)).size
    wanted = [(key, stage) for key in keys for stage in range(key[0] or 0, len(names))]
    progress(f"fitting {len(wanted)} heads")
    fitted = run_side_by_side(
        [
            functools.partial(fit_head, train.data.features[key], train.data.correct[:, stage], seed)
            for key, stage in wanted
        ],
        lambda done: progress(f"fitted {done} of {len(wanted)} heads"),
    )
    heads = dict(zip(wanted, fitted, strict=True))
    models = [
        export_heads([heads[key, stage] for stage in range(key[0] or 0, len(names))], size) for key in keys
    ]
    progress("calibrating")
    predictor = OnnxPredictor(models)
    scores = {
        key: predictor.score_rows(index, calibration.data.features[key]) for index, key in enumerate(keys)
    }
    calibrated = {key: _calibrate(scores[key], key, calibration.data) for key in keys}
    p_correct = {key: own(key, heads) for key, heads in calibrated.items()}
    progress("solving")
    order = np.random.default_rng(seed).permutation(len(calibration.data))
    # Cells must be certified by other prompts than those that cut them.
    cutting, certifying = np.split(order, [len(order) // _CUTTING])
    state_cells = fit_state_cells(calibration.data, cutting, scores, p_correct, costs[-1].cost)
    cells = {key: each.cells_of(scores[key]) for key, each in state_cells.items() if each is not None}
    views = estimate_views(calibration.data, p_correct, cells, certifying)
    entries = []
    for index, (key, view) in enumerate(zip(keys, views, strict=True)):
        entries.append(_view_entry(key, view, state_cells[key], calibrated[key], models[index], names))
    prompt_bins = cells.get(keys[0], _bins(p_correct[keys[0]]))
    curve = tabulate(views, np.bincount(prompt_bins) / len(prompt_bins))
    turns = calibration.data.features[keys[0]][:, FeatureSpace(len(names)).names.index("turns")]
    parts = [certifying[turns[certifying] == 0], certifying[turns[certifying] > 0]]
    values = choose_quality_values(calibration.data, views, p_correct, cells, parts)
    sources = [
        Source(
            file=one_line(each.path.name, MOST_NAME),
            sha256=file_digest(each.path),
            prompts=len(each.data),
        )
        for each in (train, calibration)
    ]
    stages = tuple(
        StageEntry(
            name=stage.name,
            cost=stage.cost,
            latency_ms=round(float(calibration.data.latencies_ms[number, None].mean()), 3),
            accuracy=round(float(calibration.data.correct[:, number].mean()), 5),
            calibration_error=round(_held_out_error(predictor, keys, number, calibration.data, seed), 5),
            abandon=abandon_rules(train.data, calibration.data, number),
            finish_reasons=known_finish_reasons(train.data, number),
        )
        for number, stage in enumerate(costs)
    )
    progress("learning what prompts look like")
    family = fit_family(train.data.prompt_texts(), calibration.data.prompt_texts())
    # The version names the content: the same inputs make the same version.
    content = "".join(
        [
            repr(entries),
            repr(stages),
            repr(values),
            repr(curve),
            family.model_dump_json(),
            *(source.sha256 for source in sources),
            str(seed),
            str(costs),
        ]
    )
    document = PolicyDocument(
        schema="asd.policy",
        schema_version=2,
        policy_version=hashlib.sha256(content.encode()).hexdigest()[:12],
        features_version=FEATURES_VERSION,
        features=size,
        seed=seed,
        stages=stages,
        quality_values=QualityValues(**values),
        curve=curve,
        train=sources[0],
        calibration=sources[1],
        views=tuple(entries),
        family=family,
    )
    files = {model_name(key): model for key, model in zip(keys, models, strict=True)}
    write_artifact(Artifact(document, files), output)
    return document


def model_name(key: ViewKey) -> str:
    """Return the name of a view's model: prompt.onnx, stage-1.onnx, stage-1-from-0.onnx."""
    stage, origin = key
    if stage is None:
        return "prompt.onnx"
    return f"stage-{stage}.onnx" if origin is None else f"stage-{stage}-from-{origin}.onnx"


def own(key: ViewKey, heads: Mapping[int, CalibratedHead]) -> Floats:
    """Return the score that cuts a view's bins: P(correct) of the judged stage, or of the first stage."""
    return heads[key[0] or 0].p_correct


def estimate_views(
    data: Dataset,
    p_correct: Mapping[ViewKey, Floats],
    cells: Mapping[ViewKey, npt.NDArray[np.int64]] | None = None,
    certifying: npt.NDArray[np.int64] | None = None,
) -> tuple[View, ...]:
    """Return the solver's views of outcomes: their bins, and the transitions between them.

    p_correct: per view, [n]. cells: per view that has cells, [n]; other views are cut by p_correct.
    certifying: rows of the prompts that certify cells; they did not cut them.
    """
    keys = view_keys(len(data.cascade))
    cells = cells or {}
    bins = {key: cells[key] if key in cells else _bins(p_correct[key]) for key in keys}
    counts = {key: int(bins[key].max()) + 1 for key in keys}
    # The views that allow an early stop share the doubt, so that they are certified together.
    early = sum(stage is not None and stage < len(data.cascade) - 1 for stage, _ in keys)
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
        rows = certifying if key in cells and certifying is not None else np.arange(len(data))
        correct = data.correct[rows, stage or 0]
        certified = certify(bins[key][rows], correct, DOUBT / max(early, 1), counts[key])
        views.append(View(stage, key[1], _means(bins[key], p_correct[key]), certified, tuple(moves)))
    return tuple(views)


def certify(
    bins: npt.NDArray[np.int64], correct: npt.NDArray[np.bool_], doubt: float, count: int = 0
) -> Floats:
    """Return for each bin a share of right answers to compare min_quality with. [n] each.

    count: number of bins, including bins without any of these prompts.

    For any one value of min_quality, this holds with probability 1 - doubt over the drawn calibration
    prompts: every bin whose certified share is at least that value lies in a run of bins (alone or with
    neighbours) whose answers are right at least that often. It then also holds for the answers returned from
    such bins, in any proportion, as far as the bins of a run are alike.

    Each run has a one-sided bound on its share (Clopper and Pearson 1934). Runs are tested from the highest
    scores downwards, and none counts below one that fails. This corrects for the many tests: fixed sequence
    testing, Angelopoulos et al. 2021, Learn then Test, section 3.2. Two such sequences, of single bins and of
    _BINS_TOGETHER, share the doubt. Unlike there, a run is not the set of all higher scores: that would let
    easy prompts, which already stop earlier, raise the share of the hard ones.
    """
    right, all_of_them = np.bincount(bins, correct, count), np.bincount(bins, minlength=count)
    from_the_top = len(right) - 1 - np.arange(len(right))
    bounds = []
    for together in (1, _BINS_TOGETHER):
        runs = from_the_top // together
        run_right, run_count = np.bincount(runs, weights=right), np.bincount(runs, weights=all_of_them)
        lower = _lower_bound(run_right, run_count, doubt / 2)
        bounds.append(np.minimum.accumulate(lower)[runs])
    # Rounding down keeps the certificate.
    certified: Floats = np.floor(np.maximum(*bounds) * 1e5) / 1e5
    return certified


def tabulate(views: tuple[View, ...], prompt_shares: Floats) -> tuple[CurveEntry, ...]:
    """Return the mean results of the optimal policy for each value of quality, by the views.

    prompt_shares: [bins of views[0]], share of the prompts in each.
    """
    points = []
    for value in np.round(_QUALITY_VALUES, 4):
        mean = expect(views, solve_policy(views, value), prompt_shares)
        points.append(
            CurveEntry(
                quality_value=value,
                cost=round(mean.cost, 5),
                latency_ms=round(mean.latency_ms, 3),
                # The sum over bins may exceed 1 by rounding.
                accuracy=min(round(mean.accuracy, 5), 1.0),
            )
        )
    return tuple(points)


def choose_quality_values(
    data: Dataset,
    views: Sequence[View],
    p_correct: Mapping[ViewKey, Floats],
    cells: Mapping[ViewKey, npt.NDArray[np.int64]] | None = None,
    parts: Sequence[npt.NDArray[np.int64]] = (),
) -> dict[str, float]:
    """Return for each preference the value of quality that keeps its accuracy at the lowest mean cost.

    Values are tested from the highest down, and the last one before the first failure is taken: fixed
    sequence testing corrects for the many tests.

    parts: rows of each kind of prompts. Every kind must keep the accuracy, so that none makes up for another.
    Kinds of fewer than _LEAST_PER_PART prompts are not tested. Empty: all prompts together. The views are
    estimated from the same prompts, so the confidence is a little less than stated.
    """
    largest = data.correct[:, -1].astype(float)
    asked = [rows for rows in parts if len(rows) >= _LEAST_PER_PART] or [np.arange(len(data))]
    kept = []
    for value in _QUALITY_VALUES[::-1]:
        solution = solve_policy(tuple(views), float(value))
        lost = largest - replay(data, views, p_correct, solution, float(value), cells).correct
        # One-sided 95% bound of the accuracy lost, over that of the largest stage.
        kept.append(
            min(
                1.0
                - (lost[rows].mean() + norm.ppf(1 - DOUBT) * lost[rows].std(ddof=1) / np.sqrt(len(rows)))
                / largest[rows].mean()
                for rows in asked
            )
        )
    chosen = {}
    for name, least in KEPT_ACCURACY.items():
        passing = next((index for index, share in enumerate(kept) if share < least), len(kept))
        # If no value keeps the accuracy, the highest one comes closest.
        chosen[name] = round(float(_QUALITY_VALUES[::-1][max(passing - 1, 0)]), 3)
    return chosen


def abandon_rules(train: Dataset, calibration: Dataset, stage: int) -> tuple[AbandonEntry, ...]:
    """Return the rules that abandon a stage's draft by the mean log-probability of its first tokens.

    The last stage has none. At most a share HOPELESS of the abandoned drafts are right, with 95% confidence.
    The training prompts propose sets of rules, from the strictest to the laxest. The calibration prompts test
    them in this order, and the last one before the first failure is taken. The bound holds although the rules
    were chosen: split fixed sequence testing, Angelopoulos et al. 2021, Learn then Test, section 3.2, with
    the bound of Clopper and Pearson 1934.
    """
    taken: tuple[AbandonEntry, ...] = ()
    if stage == len(calibration.cascade) - 1:
        return taken
    sets = [_propose_rules(train, stage, strictness * HOPELESS) for strictness in _STRICTNESS]
    # Start at the set that is most likely to pass. Stricter ones abandon too few drafts to pass a test, and
    # would end the sequence.
    scale = len(calibration) / len(train)
    counts = scale * np.array([_count_given_up(train, stage, rules) for rules in sets])
    start = int(np.argmin(_upper_bound(counts[:, 1], counts[:, 0], DOUBT)))
    for rules in sets[start:]:
        count, right = _count_given_up(calibration, stage, rules)
        if _upper_bound(right, count, DOUBT) > HOPELESS:
            break
        taken = rules
    return taken


def known_finish_reasons(data: Dataset, stage: int) -> tuple[FinishReason, ...]:
    """Return the finish reasons of a stage's answers that are common enough to learn from."""
    names = FeatureSpace(len(data.cascade)).names
    answers = data.features[stage, None]
    is_eos, is_length = (answers[:, names.index(f"draft_is_{reason}")] > 0 for reason in ("eos", "length"))
    ended: dict[FinishReason, npt.NDArray[np.bool_]] = {
        FinishReason.EOS: is_eos,
        FinishReason.LENGTH: is_length,
        FinishReason.STOP: ~(is_eos | is_length),
    }
    return tuple(reason for reason, rows in ended.items() if rows.mean() >= _LEAST_FINISH_SHARE)


def _propose_rules(data: Dataset, stage: int, share: float) -> tuple[AbandonEntry, ...]:
    """Return rules that each abandon as many drafts as possible while at most `share` of them are right.

    A rule applies to the drafts that the rules for fewer tokens left.
    """
    prefixes, correct = data.prefixes[:, stage], data.correct[:, stage]
    rules: list[AbandonEntry] = []
    for index, tokens in enumerate(PREFIXES):
        left = np.flatnonzero(np.isfinite(prefixes[:, index]) & ~_given_up(prefixes, rules))
        if not len(left):
            continue
        order = left[np.argsort(prefixes[left, index], kind="stable")]
        counts = np.unique(np.geomspace(1, len(order), _RULES_TRIED).astype(int))
        right = np.cumsum(correct[order])[counts - 1]
        fitting = np.flatnonzero(_upper_bound(right, counts, DOUBT) <= share)
        if len(fitting):
            least = round(float(prefixes[order[counts[fitting[-1]] - 1], index]), 5)
            rules.append(AbandonEntry(tokens=tokens, mean_logprob=least))
    return tuple(rules)


def _count_given_up(data: Dataset, stage: int, rules: Sequence[AbandonEntry]) -> tuple[int, int]:
    """Return how many of a stage's drafts the rules abandon, and how many of these are right."""
    given_up = _given_up(data.prefixes[:, stage], rules)
    return int(given_up.sum()), int(data.correct[given_up, stage].sum())


def _given_up(prefixes: Floats, rules: Sequence[AbandonEntry]) -> npt.NDArray[np.bool_]:
    """Return which drafts any rule abandons: [n]. prefixes: [n, PREFIXES], NaN if a draft is not longer."""
    given_up = np.zeros(len(prefixes), np.bool_)
    for rule in rules:
        given_up |= prefixes[:, PREFIXES.index(rule.tokens)] < rule.mean_logprob
    return given_up


def _lower_bound(right: npt.ArrayLike, count: npt.ArrayLike, doubt: float) -> Floats:
    """Return a share's one-sided lower bound with confidence 1 - doubt. Source: Clopper and Pearson 1934."""
    right, count = np.asarray(right, float), np.asarray(count, float)
    bound: Floats = np.where(right > 0, beta.ppf(doubt, np.maximum(right, 1e-9), count - right + 1), 0.0)
    return bound


def _upper_bound(right: npt.ArrayLike, count: npt.ArrayLike, doubt: float) -> Floats:
    """Return a share's one-sided upper bound with confidence 1 - doubt; 1 without observations."""
    bound: Floats = 1.0 - _lower_bound(np.subtract(count, right), count, doubt)
    return bound


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
    # A large C regularises weakly: two parameters need no more.
    fitted = LogisticRegression(C=1e3).fit(scores[:, None], correct)
    # A negative slope means that the score is useless; the smallest slope keeps the order of scores.
    return max(round(float(fitted.coef_[0, 0]), 6), 1e-6), round(float(fitted.intercept_[0]), 6)


def _held_out_error(
    predictor: OnnxPredictor, keys: Sequence[ViewKey], stage: int, data: Dataset, seed: int
) -> float:
    """Return the calibration error of a stage's generated answers, each half calibrated on the other."""
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
    """Return the bin of each score. Bins are equally filled; equal scores may leave fewer bins."""
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
    state_cells: StateCells | None,
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
        certified=tuple(view.certified.tolist()),
        cells=None if state_cells is None else CellsEntry(**dataclasses.asdict(state_cells)),
        heads=tuple(_head_entry(names[index], head) for index, head in heads.items()),
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
