"""Trains routers on folds of a table and tests them on the rest, beside baselines and what was published."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata
from sklearn.model_selection import GroupKFold, StratifiedKFold

from benchmarks.routing.embeddings import cached_vectors
from benchmarks.routing.ladder import Ladder, LadderLine, ladder_lines
from benchmarks.routing.metrics import Routed, measure
from benchmarks.routing.router import CountedWords, fit_word_scores, predict_targets, smooth_targets
from benchmarks.routing.table import UnfitOptions, read_answers, read_sizes, read_table
from benchmarks.routing.text import describe_prompts
from policy_service.train.threads import one_thread, run_side_by_side, usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from benchmarks.routing.table import RoutingTable

    Floats = npt.NDArray[np.float64]
    Rows = npt.NDArray[np.int64]

ROUTELLM = "Ong et al. 2024, arXiv 2406.18665"
# Assignments of subjects to folds. Chosen: the mean over so many moves by a quarter of what one does.
SUBJECT_REPEATS = 20
# Each holds two kernels: 0.3 GB for ten thousand prompts.
_FOLDS_AT_ONCE = 4
# Of the two members that predict the gain, against the difference of probabilities from words alone.
_GAIN_WEIGHT = 3.0
_ROUTELLM_LADDER = ("mixtral_8x7b_instruct_v0_1", "gpt_4_1106_preview")


@dataclass(frozen=True)
class Published:
    """A figure of another work, on other prompts than ours. cpt50, cpt80: shares of calls."""

    name: str
    source: str
    apgr: float
    cpt50: float
    cpt80: float


# The best by APGR of each benchmark: tables 2 and 3.
_PUBLISHED = {
    "mmlu": Published("RouteLLM, SW ranking, not trained in-domain", ROUTELLM, 0.603, 0.3540, 0.7155),
    "gsm8k": Published("RouteLLM, causal LLM, not trained in-domain", ROUTELLM, 0.622, 0.3364, 0.6326),
}


@dataclass(frozen=True)
class RoutingOptions:
    """How to test. by_subject: no subject is in training and test. folds: parts; each is tested once.

    repeats: assignments to folds that are drawn, each of which trains and tests anew.
    """

    by_subject: bool = False
    folds: int = 5
    seed: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class RoutingEvaluation:
    """What routers do on prompts that they were not trained on. accuracy: of each model alone."""

    benchmark: str
    ladder: tuple[str, ...]
    prompts: int
    dropped: int
    other_models: int
    folds: str
    accuracy: tuple[float, ...]
    routers: dict[str, Routed]
    published: Published | None
    ladder_lines: tuple[LadderLine, ...]


def evaluate_file(
    path: Path,
    ladder: Sequence[str],
    options: RoutingOptions,
    also: Sequence[Path],
    model: Path | None,
    progress: Callable[[str], None],
) -> RoutingEvaluation:
    """Return what routers do on a file of published outcomes; its ladder is replayed where sizes are known.

    also: files of further models on the same prompts. model: the encoder of embeddings.embed_prompts.
    Raises UnfitOutcomes.
    """
    progress(f"reading {path}")
    table = read_table(path, ladder, also)
    vectors = None if model is None else cached_vectors(table.prompts, model, progress)
    sizes = read_sizes(path, ladder)
    if sizes is None:
        return evaluate_routing(table, options, vectors, None, progress)
    answers = read_answers(path, table)
    return evaluate_routing(table, options, vectors, Ladder(sizes, answers), progress)


@one_thread()
def evaluate_routing(
    table: RoutingTable,
    options: RoutingOptions,
    vectors: Floats | None,
    ladder: Ladder | None,
    progress: Callable[[str], None],
) -> RoutingEvaluation:
    """Return what routers do on a table, by cross-validation.

    vectors: [n, size], of embeddings.embed_prompts. ladder: costs and answers, to replay the stages too.
    Raises UnfitOutcomes.
    """
    stages = len(table.ladder)
    look, words = describe_prompts(table.prompts), CountedWords(table.prompts)
    gains = table.gains
    lengths = np.array([float(len(prompt)) for prompt in table.prompts])
    scores = {
        name: np.empty((options.repeats, len(gains)))
        for name in ("prompt length", "TF-IDF, logistic regression", "ours")
    }
    tested_in = np.zeros((options.repeats, len(gains)), np.int64)
    lines: list[LadderLine] = []

    def score_fold(train: Rows, test: Rows, seed: int) -> tuple[Floats, ...]:
        p_right = fit_word_scores(words, table.outcomes[:, [0, stages - 1]], train, test)
        gap = p_right[:, 1] - p_right[:, 0]
        targets = smooth_targets(gains[train, None], table.others[train], seed)
        gain = predict_targets(words, look, vectors, targets, train, test, seed)[:, 0]
        return lengths[test], gap, gap + _GAIN_WEIGHT * gain

    for repeat, seed in enumerate(assignment_seeds(options)):
        folds = split_folds(table, options, seed)
        which = f"assignment {repeat + 1} of {options.repeats}: " if options.repeats > 1 else ""
        found = run_side_by_side(
            [functools.partial(score_fold, train, test, seed) for train, test in folds],
            functools.partial(_tell_folds, progress, which, len(folds)),
            min(usable_cores(), _FOLDS_AT_ONCE),
        )
        for number, (_, test) in enumerate(folds):
            for name, score in zip(scores, found[number], strict=True):
                # Subjects that are drawn at random leave each fold another share of gains to train on. Its
                # router's scores say nothing beside another's: each fold ranks its own prompts.
                scores[name][repeat, test] = rankdata(score) / len(test) if options.by_subject else score
            tested_in[repeat, test] = number
        if ladder is not None and repeat == 0:
            progress("replaying the ladder")
            lines = ladder_lines(table, ladder, words, look, vectors, folds, seed)
    # What is unseen is resampled: prompts of a subject are right and wrong together.
    groups = np.unique(table.subjects, return_inverse=True)[1] if options.by_subject else None
    drawn = f", {options.repeats} random assignments" if options.repeats > 1 else ""
    by = "subject" if options.by_subject else "question"
    return RoutingEvaluation(
        table.benchmark,
        table.ladder,
        len(gains),
        table.dropped,
        table.others.shape[1],
        f"{options.folds} folds by {by}{drawn}, seed {options.seed}",
        tuple(float(mean) for mean in table.outcomes[:, :stages].mean(axis=0)),
        {
            name: measure(
                score,
                gains,
                options.seed,
                groups,
                None if name == "prompt length" else scores["prompt length"],
                tested_in if options.by_subject else None,
            )
            for name, score in scores.items()
        },
        _PUBLISHED.get(table.benchmark) if table.ladder == _ROUTELLM_LADDER else None,
        tuple(lines),
    )


def _tell_folds(progress: Callable[[str], None], which: str, folds: int, done: int) -> None:
    progress(f"{which}{done} of {folds} folds")


def assignment_seeds(options: RoutingOptions) -> list[int]:
    """Return the seed of each assignment to folds; the first is the seed itself."""
    further = np.random.SeedSequence(options.seed).generate_state(options.repeats)[1:]
    return [options.seed, *further.tolist()]


def split_folds(table: RoutingTable, options: RoutingOptions, seed: int) -> list[tuple[Rows, Rows]]:
    """Return (training, test) rows of each fold: by the seed, of prompts or of subjects.

    Prompts are stratified, since the scores of all folds make one ranking: an intercept that follows the
    share of gains in training, which runs against that in test, would cost every learned router APGR.
    Subjects are not: balanced by their outcomes, they would all but always make the same folds, and the
    outcomes of unseen subjects are not known.
    """
    if not options.by_subject:
        outcomes = table.outcomes[:, [0, len(table.ladder) - 1]] > 0.5
        kinds = outcomes @ np.array([2, 1])
        return list(StratifiedKFold(options.folds, shuffle=True, random_state=seed).split(kinds, kinds))
    subjects = len(set(table.subjects))
    if subjects < options.folds:
        raise UnfitOptions(f"{subjects} subjects make no {options.folds} folds: fewer --folds, or no --group")
    splitter = GroupKFold(options.folds, shuffle=True, random_state=seed)
    return list(splitter.split(table.subjects, groups=table.subjects))
