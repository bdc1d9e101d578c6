"""Outcome files as arrays: features, correctness, cost and latency of every state and move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from policy_service.features import Draft, DraftVerification, FeatureSpace, PromptText
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.outcome_table import pair_name, pairs
from policy_service.train.outcomes import read_cascade, read_rows
from services.common.cost import generate_cost, verify_cost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from policy_service.train.costs import StageCosts
    from policy_service.train.outcomes import OutcomeRow, StageOutcome

    Floats = npt.NDArray[np.float64]

PREFIXES = (8, 16, 32, 64, 128)
"""Tokens of a draft after which it may be given up."""

ViewKey = tuple[int | None, int | None]
"""Stage that answered and stage whose draft it verified, by index; None as in solver.View."""


@dataclass(frozen=True)
class Dataset:
    """Outcomes of n prompts on a cascade of K stages.

    features: per view, float32 [n, size]. correct: bool [n, K]. costs, latencies_ms: per view but the first,
    [n], of the call that leads to it. prefixes: [n, K, PREFIXES], mean log-probability of the first tokens of
    each stage's answer; NaN if the answer is not longer. prompts: the questions, without their history.
    histories: the earlier messages of each.
    """

    cascade: tuple[str, ...]
    features: dict[ViewKey, npt.NDArray[np.float32]]
    correct: npt.NDArray[np.bool_]
    costs: dict[ViewKey, Floats]
    latencies_ms: dict[ViewKey, Floats]
    suites: tuple[str, ...]
    levels: npt.NDArray[np.int64]
    prefixes: Floats
    prompts: tuple[str, ...] = ()
    histories: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.correct)

    def prompt_texts(self) -> list[PromptText]:
        """Return the prompts with their history."""
        histories = self.histories or ((),) * len(self.prompts)
        return [PromptText(*each) for each in zip(self.prompts, histories, strict=True)]


def view_keys(stages: int) -> list[ViewKey]:
    """Return the views of a cascade, in the solver's order: moves lead to later views."""
    keys: list[ViewKey] = [(None, None)]
    for stage in range(stages):
        keys.append((stage, None))
        keys.extend((stage, origin) for origin in range(stage))
    return keys


def read_dataset(path: Path, costs: Sequence[StageCosts], *, with_history: bool = True) -> Dataset:
    """Return a file's outcomes. Raises UnfitOutcomes, also if the costs are another cascade's.

    with_history: False leaves the history out of the features, to measure its worth.
    """
    cascade = read_cascade(path)
    if [stage.name for stage in costs] != list(cascade):
        raise UnfitOutcomes(
            f"{path}: holds the cascade {', '.join(cascade)}; the costs are for "
            f"{', '.join(stage.name for stage in costs)}"
        )
    space = FeatureSpace(len(cascade))
    keys = view_keys(len(cascade))
    features: dict[ViewKey, list[npt.NDArray[np.float32]]] = {key: [] for key in keys}
    spent: dict[ViewKey, list[tuple[float, float]]] = {key: [] for key in keys[1:]}
    correct, suites, levels, prefixes, prompts, histories = [], [], [], [], [], []
    for row in read_rows(path):
        for key, vector in _vectors(space, row, cascade, with_history):
            features[key].append(vector)
        for key, cost, latency_ms in _calls(row, cascade, costs):
            spent[key].append((cost, latency_ms))
        prefixes.append([_prefixes(row.stages[name]) for name in cascade])
        correct.append([row.stages[name].correct for name in cascade])
        suites.append(row.suite)
        levels.append(row.level)
        prompts.append(row.prompt)
        histories.append(row.history if with_history else ())
    if not correct:
        raise UnfitOutcomes(f"{path}: holds no prompts")
    return Dataset(
        cascade,
        {key: np.stack(vectors) for key, vectors in features.items()},
        np.array(correct),
        {key: np.array([cost for cost, _ in calls]) for key, calls in spent.items()},
        {key: np.array([ms for _, ms in calls]) for key, calls in spent.items()},
        tuple(suites),
        np.array(levels),
        np.array(prefixes),
        tuple(prompts),
        tuple(histories),
    )


def _vectors(
    space: FeatureSpace, row: OutcomeRow, cascade: Sequence[str], with_history: bool
) -> Iterator[tuple[ViewKey, npt.NDArray[np.float32]]]:
    prompt = PromptText(row.prompt, row.history if with_history else ())
    vector = space.prompt(prompt)
    yield (None, None), vector
    drafts = [_draft(row.stages[name]) for name in cascade]
    for stage, draft in enumerate(drafts):
        yield (stage, None), space.answer(vector, prompt, stage, draft)
    for origin, target in pairs(cascade):
        check = row.verifications[pair_name(cascade, origin, target)]
        verification = DraftVerification(check.accepted, np.array(check.ranks, np.int64))
        yield (
            (target, origin),
            space.answer(vector, prompt, target, drafts[target], origin, verification),
        )


def _prefixes(outcome: StageOutcome) -> list[float]:
    logprobs = outcome.logprobs
    return [sum(logprobs[:count]) / count if len(logprobs) > count else float("nan") for count in PREFIXES]


def _draft(outcome: StageOutcome) -> Draft:
    logprobs, entropies, margins = (
        np.array(values, np.float32) for values in (outcome.logprobs, outcome.entropies, outcome.top2_margins)
    )
    return Draft(outcome.text, logprobs, entropies, margins, outcome.finish_reason)


def _calls(
    row: OutcomeRow, cascade: Sequence[str], costs: Sequence[StageCosts]
) -> Iterator[tuple[ViewKey, float, float]]:
    for stage, name in enumerate(cascade):
        yield (stage, None), generate_cost(costs[stage].cost), costs[stage].generate_ms(row.stages[name])
    for origin, target in pairs(cascade):
        check = row.verifications[pair_name(cascade, origin, target)]
        answer_tokens = len(row.stages[cascade[target]].logprobs)
        proposed = check.proposed + check.proposed_again
        cost = verify_cost(costs[target].cost, proposed, check.forward_passes, answer_tokens)
        yield (target, origin), cost, costs[target].verify_ms(check)
