"""Compares kinds of predictors on the same split: fitted to one file of outcomes, judged on another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from policy_service.train.faults import UnfitOutcomes
from policy_service.train.fit import expected_calibration_error
from policy_service.train.predictor import fit_head
from policy_service.train.scores import area_under_roc, r_squared
from policy_service.train.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from policy_service.train.dataset import Dataset, ViewKey

    Floats = npt.NDArray[np.float64]
    Features = npt.NDArray[np.float32]
    Labels = npt.NDArray[np.bool_]

# Keywords of a heuristic router, from the research system that this project continues. They tell prompts that
# ask for one fact from prompts that ask for several steps.
_SIMPLE = re.compile(r"\b(what is|who|when|where|define|name|true or false|capital)\b")
_COMPLEX = re.compile(
    r"\b(explain|analy[sz]e|compare|prove|derive|implement|design|optimi[sz]e|then|twice|each|after|before|if|"
    r"while|for|not|opposite)\b"
)
_LEAST_PER_CELL = 50


class _Model(Protocol):
    def p_correct(self, features: Features, prompts: Sequence[str]) -> Floats:
        """Return P(correct): [n]."""


@dataclass(frozen=True)
class Score:
    """Scores of one kind of predictor in one view, on prompts that it was not fitted to."""

    view: str
    kind: str
    log_loss: float
    brier: float
    r2: float
    auroc: float
    calibration_error: float


class KeywordHeuristic:
    """Share of right answers by the number of words that sound simple or complex, and by length."""

    def __init__(self, prompts: Sequence[str], correct: Labels) -> None:
        self._overall = float(correct.mean())
        counts: dict[tuple[int, int, int], list[int]] = {}
        for prompt, right in zip(prompts, correct, strict=True):
            cell = counts.setdefault(_keyword_cell(prompt), [0, 0])
            cell[0] += 1
            cell[1] += bool(right)
        self._share = {
            cell: right / count for cell, (count, right) in counts.items() if count >= _LEAST_PER_CELL
        }

    def p_correct(self, _features: Features, prompts: Sequence[str]) -> Floats:
        """Return P(correct): [n]."""
        return np.array([self._share.get(_keyword_cell(prompt), self._overall) for prompt in prompts])


class _Trees:
    def __init__(self, features: Features, correct: Labels, seed: int) -> None:
        self._head = fit_head(features, correct, seed)

    def p_correct(self, features: Features, _prompts: Sequence[str]) -> Floats:
        result: Floats = 1.0 / (1.0 + np.exp(-self._head.scores(features)))
        return result


class _Sklearn:
    def __init__(self, model: object, features: Features, correct: Labels) -> None:
        self._model = make_pipeline(StandardScaler(), model).fit(features, correct)

    def p_correct(self, features: Features, _prompts: Sequence[str]) -> Floats:
        result: Floats = self._model.predict_proba(features)[:, 1].astype(float)
        return result


@one_thread()
def compare_predictors(
    train: Dataset, held_out: Dataset, seed: int, progress: Callable[[str], None]
) -> tuple[Score, ...]:
    """Return the scores of every kind in the views of the first stage's answer.

    progress: is called with a line about the current step.
    """
    scores = []
    for name, key, stage in _views(train):
        features, correct = train.features[key], train.correct[:, stage]
        for data in (train, held_out):
            if data.correct[:, stage].all() or not data.correct[:, stage].any():
                raise UnfitOutcomes(
                    f"{data.cascade[stage]} is always right or always wrong in a file: take more prompts"
                )
        for kind, make in _kinds(seed).items():
            progress(f"{name}: {kind}")
            model = make(features, train.prompts, correct)
            p_correct = model.p_correct(held_out.features[key], held_out.prompts)
            scores.append(_score(name, kind, p_correct, held_out.correct[:, stage]))
    return tuple(scores)


def _kinds(seed: int) -> dict[str, Callable[[Features, Sequence[str], Labels], _Model]]:
    return {
        "keyword heuristic": lambda _, prompts, correct: KeywordHeuristic(prompts, correct),
        "logistic regression": lambda features, _, correct: _Sklearn(
            LogisticRegression(C=0.1, max_iter=300), features, correct
        ),
        "neural network": lambda features, _, correct: _Sklearn(
            MLPClassifier(
                (64, 32),
                alpha=1e-3,
                # A batch cannot have more rows than the fit, which sets some aside for early stopping.
                batch_size=min(512, max(len(features) // 2, 1)),
                early_stopping=True,
                max_iter=40,
                random_state=seed,
            ),
            features,
            correct,
        ),
        "gradient boosting": lambda features, _, correct: _Trees(features, correct, seed),
    }


def _views(data: Dataset) -> Iterator[tuple[str, ViewKey, int]]:
    first = data.cascade[0]
    yield f"{first}, from the prompt alone", (None, None), 0
    yield f"{first}, after its draft", (0, None), 0
    for target in range(1, len(data.cascade)):
        yield f"{data.cascade[target]}, verified from {first}", (target, 0), target


def _keyword_cell(prompt: str) -> tuple[int, int, int]:
    text = prompt.lower()
    simple, complex_ = len(_SIMPLE.findall(text)), len(_COMPLEX.findall(text))
    return min(simple, 2), min(complex_, 4), min(len(text) // 80, 4)


def _score(view: str, kind: str, p_correct: Floats, correct: Labels) -> Score:
    return Score(
        view,
        kind,
        float(log_loss(correct, np.clip(p_correct, 1e-6, 1 - 1e-6))),
        float(np.mean((p_correct - correct) ** 2)),
        r_squared(p_correct, correct),
        area_under_roc(p_correct, correct),
        expected_calibration_error(p_correct, correct),
    )
