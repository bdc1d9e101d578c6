"""Kinds of predictors on the same prompts: what each may see, and what it is judged on."""

import numpy as np
import pytest

from policy_service.train.compare import KeywordHeuristic, compare_predictors
from policy_service.train.dataset import Dataset, view_keys
from policy_service.train.faults import UnfitOutcomes

KINDS = ("keyword heuristic", "logistic regression", "neural network", "gradient boosting")


def dataset(seed: int, count: int = 400) -> Dataset:
    """Prompts whose one feature says what becomes of them, whose words say nothing."""
    rng = np.random.default_rng(seed)
    easy = rng.uniform(-1.0, 1.0, count)
    correct = np.stack([easy > 0.2, easy > -0.5], axis=1)
    keys = view_keys(2)
    features = np.stack([easy, rng.normal(size=count)], axis=1).astype(np.float32)
    amounts = {key: np.ones(count) for key in keys[1:]}
    return Dataset(
        ("small", "large"),
        dict.fromkeys(keys, features),
        correct,
        amounts,
        amounts,
        ("made up",) * count,
        np.zeros(count, np.int64),
        np.zeros((count, 2, 5)),
        ("Say it.",) * count,
    )


def test_every_kind_is_judged_in_every_view_of_the_first_draft():
    told = []
    scores = compare_predictors(dataset(0), dataset(1), 0, told.append)
    views = ("small, from the prompt alone", "small, after its draft", "large, verified from small")
    assert [(score.view, score.kind) for score in scores] == [
        (view, kind) for view in views for kind in KINDS
    ]
    assert told == [f"{score.view}: {score.kind}" for score in scores]
    for score in scores:
        if score.kind == "keyword heuristic":
            # All prompts have the same words: it can but say how often a stage is right.
            assert score.auroc == 0.5
            assert abs(score.r2) < 0.05
        else:
            assert score.auroc > 0.97
            assert score.r2 > 0.1


def test_scores_are_of_the_held_out_prompts_of_the_stage_judged():
    held_out = dataset(1)
    scores = compare_predictors(dataset(0), held_out, 0, lambda _: None)
    # Swapped labels turn a good prediction of the first stage into a bad one, and leave the other's.
    swapped = compare_predictors(
        dataset(0),
        Dataset(
            **{
                **vars(held_out),
                "correct": np.stack([~held_out.correct[:, 0], held_out.correct[:, 1]], axis=1),
            }
        ),
        0,
        lambda _: None,
    )
    for before, after in zip(scores, swapped, strict=True):
        if before.view.startswith("large"):
            assert before == after
        elif before.kind != "keyword heuristic":
            assert after.auroc == pytest.approx(1.0 - before.auroc)


@pytest.mark.parametrize(("stage", "name"), [(0, "small"), (1, "large")])
@pytest.mark.parametrize("right", [True, False])
def test_a_stage_that_is_always_right_or_wrong_is_named(stage, name, right):
    held_out = dataset(1)
    held_out.correct[:, stage] = right
    with pytest.raises(UnfitOutcomes, match=name):
        compare_predictors(dataset(0, 120), held_out, 0, lambda _: None)


def test_the_heuristic_counts_words_and_trusts_no_small_cell():
    simple, complex_, rare = "What is iron?", "Compare iron and tin, then explain.", "Prove it."
    prompts = [simple] * 100 + [complex_] * 100 + [rare] * 10
    correct = np.array([True] * 90 + [False] * 10 + [True] * 20 + [False] * 80 + [True] * 10)
    heuristic = KeywordHeuristic(prompts, correct)
    features = np.zeros((3, 1), np.float32)
    found = heuristic.p_correct(features, ["WHAT IS tin?", complex_, rare])
    assert found.tolist() == [0.9, 0.2, pytest.approx(120 / 210)]
