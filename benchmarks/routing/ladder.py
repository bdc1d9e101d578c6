"""Ladders of real models under the project's own policy: the solver chooses when to stop and whom to ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.routing.router import predict_targets, smooth_targets
from policy_service.solver import solve_policy
from policy_service.train.dataset import PREFIXES, Dataset, view_keys
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.fit import choose_quality_values, estimate_views
from policy_service.train.replay import Run, always, oracle, replay, threshold

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from benchmarks.routing.router import CountedWords
    from benchmarks.routing.table import RoutingTable
    from policy_service.train.dataset import ViewKey

    Floats = npt.NDArray[np.float64]
    AnswerKey = tuple[int, int | None]
    Rows = npt.NDArray[np.int64]

# Values of quality beside those of the preferences; a call of the last stage costs 1. Chosen.
_QUALITY_VALUES = (1.0, 2.0, 4.0, 8.0, 16.0)
# Tried by hindsight for the best fixed one.
_THRESHOLDS = np.linspace(0.02, 0.98, 49)


@dataclass(frozen=True)
class Ladder:
    """costs: of one answer of each stage. answers: lengths and parsed answers, [n, stages] each; or None."""

    costs: tuple[float, ...]
    answers: tuple[Floats, npt.NDArray[np.str_]] | None


@dataclass(frozen=True)
class LadderLine:
    """One way of answering; means over all prompts. cost: of every stage asked, the largest alone is 1."""

    name: str
    accuracy: float
    accuracy_ratio: float
    cost: float
    mix: tuple[float, ...]


def ladder_lines(
    table: RoutingTable,
    ladder: Ladder,
    words: CountedWords,
    look: Floats,
    vectors: Floats | None,
    folds: Sequence[tuple[Rows, Rows]],
    seed: int,
) -> list[LadderLine]:
    """Return what the policy does on every fold's test prompts, beside fixed choices and the oracle.

    Of a fold's training prompts half fit P(right) of each stage from the prompt; 15% fit what a stage's
    answer adds to it; 35% calibrate, estimate the solver's views and choose the values of quality.
    """
    count, stages = len(table.prompts), len(table.ladder)
    data = _dataset(table, ladder, np.arange(count))
    scores = {key: np.empty(count) for key in view_keys(stages)}
    runs: dict[str, Run] = {}
    rng = np.random.default_rng(seed)
    for train, test in folds:
        mixed = rng.permutation(train)
        base, fitted, held_out = np.split(mixed, [len(mixed) * 10 // 20, len(mixed) * 13 // 20])
        targets = smooth_targets(table.outcomes[base][:, :stages], table.others[base], seed)
        unseen = np.concatenate([fitted, held_out, test])
        p_right = np.full((count, stages), np.nan)
        p_right[unseen] = predict_targets(words, look, vectors, targets, base, unseen, seed)
        # Before any answer nothing can be returned, so the state need not be a P(right): what the last stage
        # gains over the best earlier one says more of whom to ask than P(right) of the first.
        gain = p_right[:, -1] - p_right[:, :-1].max(axis=1)
        calibrated: dict[ViewKey, Floats] = {(None, None): gain[held_out]}
        scores[None, None][test] = gain[test]
        for key, rows in _features(ladder, p_right).items():
            correct = data.correct[:, key[0]]
            if any(correct[part].all() or not correct[part].any() for part in (fitted, held_out)):
                raise UnfitOutcomes("too few prompts to fit a ladder to: give fewer --folds")
            head = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows[fitted], correct[fitted])
            raw = head.decision_function(rows[np.concatenate([held_out, test])])[:, None]
            # C: weak, as two parameters need no holding back.
            platt = LogisticRegression(C=1e3).fit(raw[: len(held_out)], correct[held_out])
            calibrated[key] = platt.predict_proba(raw[: len(held_out)])[:, 1]
            scores[key][test] = platt.predict_proba(raw[len(held_out) :])[:, 1]
        known, asked = (_dataset(table, ladder, rows) for rows in (held_out, test))
        views = estimate_views(known, calibrated)
        tested = {key: score[test] for key, score in scores.items()}
        wanted = {f"policy, lambda {value:g}": value for value in _QUALITY_VALUES}
        chosen = choose_quality_values(known, views, calibrated)
        wanted |= {f"policy, {name}": value for name, value in chosen.items()}
        for name, value in wanted.items():
            run = replay(asked, views, tested, solve_policy(views, value), value)
            whole = runs.setdefault(name, _empty_run(count))
            for field in ("stage", "correct", "cost", "latency_ms"):
                getattr(whole, field)[test] = getattr(run, field)
    last = float(data.correct[:, -1].mean())
    kept = float(runs["policy, balanced"].correct.mean())
    named = {f"always {name}": always(data, index) for index, name in enumerate(table.ladder)}
    named |= runs
    named["best fixed choice at balanced's accuracy"] = _best_fixed(data, scores, kept)
    named["oracle"] = oracle(data)
    return [_line(name, run, stages, last) for name, run in named.items()]


def _features(ladder: Ladder, p_right: Floats) -> dict[AnswerKey, npt.NDArray[np.float32]]:
    """Return what each view but the first knows: predictions, then lengths and agreement of the answers."""
    features: dict[AnswerKey, npt.NDArray[np.float32]] = {}
    for stage, origin in view_keys(p_right.shape[1]):
        if stage is None:
            continue
        columns = [p_right]
        if ladder.answers is not None:
            lengths, answers = ladder.answers
            for index in (origin, stage):
                if index is not None:
                    columns.extend((np.log1p(lengths[:, [index]]), (answers[:, [index]] == "").astype(float)))
            if origin is not None:
                columns.append((answers[:, [stage]] == answers[:, [origin]]).astype(float))
        features[stage, origin] = np.hstack(columns).astype(np.float32)
    return features


def _dataset(table: RoutingTable, ladder: Ladder, rows: Rows) -> Dataset:
    """Return rows as outcomes of a cascade that drafts nothing: a stage costs the same after any other."""
    stages = len(table.ladder)
    keys = view_keys(stages)
    costs = {key: np.full(len(rows), ladder.costs[key[0] or 0] / ladder.costs[-1]) for key in keys[1:]}
    return Dataset(
        table.ladder,
        {},
        table.outcomes[rows][:, :stages] > 0.5,
        costs,
        # Times are not in these files.
        {key: np.zeros(len(rows)) for key in keys[1:]},
        (table.benchmark,) * len(rows),
        np.zeros(len(rows), np.int64),
        np.full((len(rows), stages, len(PREFIXES)), np.nan),
    )


def _empty_run(count: int) -> Run:
    return Run(np.zeros(count, np.int64), np.zeros(count, np.bool_), np.zeros(count), np.zeros(count))


def _best_fixed(data: Dataset, scores: Mapping[ViewKey, Floats], accuracy: float) -> Run:
    """Return the cheapest stage alone or fixed threshold that is at least as accurate, by hindsight."""
    runs = [threshold(data, scores, float(least)) for least in _THRESHOLDS]
    runs.extend(always(data, stage) for stage in range(data.correct.shape[1]))
    fitting = [run for run in runs if run.correct.mean() >= accuracy]
    # The largest stage alone is always among them, or the policy beats every fixed choice.
    return min(fitting or runs[-1:], key=lambda run: float(run.cost.mean()))


def _line(name: str, run: Run, stages: int, last: float) -> LadderLine:
    accuracy = float(run.correct.mean())
    mix = tuple(float(np.mean(run.stage == stage)) for stage in range(stages))
    return LadderLine(name, accuracy, accuracy / last, float(run.cost.mean()), mix)
