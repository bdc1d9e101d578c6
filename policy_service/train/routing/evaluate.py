"""Trains routers on folds of a table and tests them on the rest, beside baselines and what was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from policy_service.train.routing.embeddings import cached_vectors
from policy_service.train.routing.ladder import Ladder, LadderLine, ladder_lines
from policy_service.train.routing.metrics import Routed, measure
from policy_service.train.routing.router import fit_word_scores, predict_targets, smooth_targets
from policy_service.train.routing.table import UnfitOptions, read_answers, read_sizes, read_table
from policy_service.train.routing.text import describe_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from policy_service.train.routing.table import RoutingTable

    Floats = npt.NDArray[np.float64]
    Rows = npt.NDArray[np.int64]

ROUTELLM = "Ong et al. 2024, arXiv 2406.18665"
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
    """How to test. by_subject: no subject is in training and test. folds: parts; each is tested once."""

    by_subject: bool = False
    folds: int = 5
    seed: int = 0


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
    folds = split_folds(table, options)
    stages = len(table.ladder)
    look = describe_prompts(table.prompts)
    gains = table.gains
    words, ours = np.empty(len(gains)), np.empty(len(gains))
    for number, (train, test) in enumerate(folds, 1):
        progress(f"fold {number} of {len(folds)}")
        p_right = fit_word_scores(table.prompts, table.outcomes[:, [0, stages - 1]], train, test)
        words[test] = p_right[:, 1] - p_right[:, 0]
        targets = smooth_targets(gains[train, None], table.others[train], options.seed)
        gain = predict_targets(table.prompts, look, vectors, targets, train, test, options.seed)[:, 0]
        ours[test] = words[test] + _GAIN_WEIGHT * gain
    lines = []
    if ladder is not None:
        progress("replaying the ladder")
        lines = ladder_lines(table, ladder, look, vectors, folds, options.seed)
    # What is unseen is resampled: prompts of a subject are right and wrong together.
    groups = np.unique(table.subjects, return_inverse=True)[1] if options.by_subject else None
    lengths = np.array([float(len(prompt)) for prompt in table.prompts])
    scores = {"prompt length": lengths, "TF-IDF, logistic regression": words, "ours": ours}
    return RoutingEvaluation(
        table.benchmark,
        table.ladder,
        len(gains),
        table.dropped,
        table.others.shape[1],
        f"{options.folds} folds by {'subject' if options.by_subject else 'question'}, seed {options.seed}",
        tuple(float(mean) for mean in table.outcomes[:, :stages].mean(axis=0)),
        {name: measure(score, gains, options.seed, groups) for name, score in scores.items()},
        _PUBLISHED.get(table.benchmark) if table.ladder == _ROUTELLM_LADDER else None,
        tuple(lines),
    )


def split_folds(table: RoutingTable, options: RoutingOptions) -> list[tuple[Rows, Rows]]:
    """Return (training, test) rows of each fold, each with its share of gains and losses.

    Stratified, since the scores of all folds make one ranking: an intercept that follows the share of gains
    in training, which runs against that in test, would cost every learned router APGR.
    """
    outcomes = table.outcomes[:, [0, len(table.ladder) - 1]] > 0.5
    kinds = outcomes @ np.array([2, 1])
    if not options.by_subject:
        splitter = StratifiedKFold(options.folds, shuffle=True, random_state=options.seed)
        return list(splitter.split(kinds, kinds))
    subjects = len(set(table.subjects))
    if subjects < options.folds:
        raise UnfitOptions(f"{subjects} subjects make no {options.folds} folds: fewer --folds, or no --group")
    splitter = StratifiedGroupKFold(options.folds, shuffle=True, random_state=options.seed)
    return list(splitter.split(kinds, kinds, groups=table.subjects))
