"""Predicts from a prompt how much a larger model gains over a smaller one.

Three members that err differently, their predictions added: logistic regression on words (the difference of
two probabilities), kernel ridge regression on words, look and sentence vectors, and boosted trees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from scipy.sparse import csr_matrix

    Floats = npt.NDArray[np.float64]
    Rows = npt.NDArray[np.int64]

# Chosen on other pairs of MMLU-Pro and on other seeds' folds of MMLU and GSM8K (docs/routing.md says how far
# that is from blind). Widths of the kernels, per squared distance, and the ridge.
_LOOK_WIDTH = 0.01
_VECTOR_WIDTH = 1.0
_RIDGE = 5.0
# Of the ridge regression from the other models' outcomes to the gain.
_OTHERS_RIDGE = 30.0
# Of kernel ridge regression against the trees: its predictions are nearer to the mean.
_RIDGE_WEIGHT = 2.0
_COMPONENTS = 100
_TREES = {
    "max_iter": 120,
    "learning_rate": 0.05,
    "max_leaf_nodes": 12,
    "min_samples_leaf": 30,
    "l2_regularization": 10.0,
    "max_features": 0.2,
    "early_stopping": False,
}


class CountedWords:
    """Words and pairs of words of all prompts, counted once: to read them takes longer than to weigh them."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._counts = CountVectorizer(ngram_range=(1, 2)).fit_transform(prompts)

    def weigh(self, train: Rows, test: Rows, dtype: type[np.floating[Any]]) -> tuple[csr_matrix, csr_matrix]:
        """Return TF-IDF of training and test prompts: what training prompts alone would make of both.

        Words that fewer than two training prompts have are left out.
        """
        fitted, asked = self._counts[train], self._counts[test]
        known = np.bincount(fitted.indices, minlength=fitted.shape[1]) >= 2
        fitted, asked = (counts[:, known].astype(dtype) for counts in (fitted, asked))
        weights = TfidfTransformer(sublinear_tf=True).fit(fitted)
        return weights.transform(fitted), weights.transform(asked)


def fit_word_scores(words: CountedWords, outcomes: Floats, train: Rows, test: Rows) -> Floats:
    """Return P(right) of each model on test prompts, by TF-IDF and logistic regression: [test, models]."""
    fitted, asked = words.weigh(train, test, np.float64)
    columns = []
    for model in range(outcomes.shape[1]):
        right = outcomes[train, model] > 0.5
        if right.all() or not right.any():
            columns.append(np.full(len(test), right.mean()))
        else:
            fit = LogisticRegression(max_iter=300).fit(fitted, right)
            columns.append(fit.predict_proba(asked)[:, 1])
    return np.stack(columns, axis=1)


def smooth_targets(targets: Floats, others: Floats, seed: int) -> Floats:
    """Return targets with less noise: mostly what the other models' outcomes on the prompts say.

    targets: [n, targets]. others: [n, models]; without any, the targets as they are. A prompt's own target
    has no part in what the others say of it. For training prompts alone: their outcomes are labels.
    """
    if not others.shape[1]:
        return targets
    said = np.empty_like(targets)
    for fitted, rest in KFold(5, shuffle=True, random_state=seed).split(others):
        fit = Ridge(_OTHERS_RIDGE).fit(others[fitted], targets[fitted])
        # One target comes back flat.
        said[rest] = fit.predict(others[rest]).reshape(len(rest), -1)
    smoothed: Floats = (targets + 2 * said) / 3
    return smoothed


def predict_targets(
    words: CountedWords,
    look: Floats,
    vectors: Floats | None,
    targets: Floats,
    train: Rows,
    test: Rows,
    seed: int,
) -> Floats:
    """Return a weighted mean of kernel ridge regression and trees on test prompts: [test, targets].

    look: [n, features], of text.describe_prompts. vectors: [n, size]. targets: [train, targets].
    """
    fitted, asked = words.weigh(train, test, np.float32)
    scaler = StandardScaler().fit(look[train])
    # A feature that is rare in training must not take a test prompt out of range.
    looks = [np.clip(scaler.transform(look[rows]), -4, 4).astype(np.float32) for rows in (train, test)]
    kernels = [(fitted @ fitted.T).toarray(), (asked @ fitted.T).toarray()]
    components = min(_COMPONENTS, *(size - 1 for size in fitted.shape))
    svd = TruncatedSVD(components, n_iter=2, random_state=seed).fit(fitted)
    columns = [[part, svd.transform(rows)] for part, rows in zip(looks, (fitted, asked), strict=True)]
    weight = 2 if vectors is None else 3
    for index, part in enumerate(looks):
        kernels[index] += _gaussian(part, looks[0], _LOOK_WIDTH)
    if vectors is not None:
        parts = [vectors[rows].astype(np.float32) for rows in (train, test)]
        components = min(_COMPONENTS, *parts[0].shape)
        pca = PCA(components, svd_solver="randomized", random_state=seed).fit(parts[0])
        for index, part in enumerate(parts):
            kernels[index] += _gaussian(part, parts[0], _VECTOR_WIDTH)
            columns[index].append(pca.transform(part))
    stacked = [np.hstack(parts).astype(np.float32) for parts in columns]
    mean = targets.mean(axis=0)
    predicted = []
    for index, target in enumerate(targets.T):
        # The kernels are added, not averaged: the ridge grows with their number.
        dual = _solve(kernels[0], target - mean[index], _RIDGE * weight)
        trees = HistGradientBoostingRegressor(random_state=seed, **_TREES).fit(stacked[0], target)
        ridge = kernels[1] @ dual + mean[index]
        predicted.append((_RIDGE_WEIGHT * ridge + trees.predict(stacked[1])) / (_RIDGE_WEIGHT + 1))
    return np.stack(predicted, axis=1)


def _gaussian(
    left: npt.NDArray[np.float32], right: npt.NDArray[np.float32], width: float
) -> npt.NDArray[np.float32]:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2 * left @ right.T
    kernel: npt.NDArray[np.float32] = np.exp(-width * np.maximum(squares, 0))
    return kernel


def _solve(kernel: npt.NDArray[np.float32], target: Floats, ridge: float) -> npt.NDArray[np.float32]:
    """Return the dual weights of kernel ridge regression, by conjugate gradients, not a factorisation."""
    count = len(kernel)
    system = LinearOperator((count, count), lambda x: kernel @ x + ridge * x, dtype=np.float32)
    dual, _ = cg(system, target.astype(np.float32), rtol=1e-4, maxiter=200)
    found: npt.NDArray[np.float32] = dual
    return found
