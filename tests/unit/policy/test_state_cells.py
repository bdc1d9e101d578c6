"""Cells: a tree that serving and fitting read alike, cut where moves are worth different things."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError

from policy_service.artifact import build_policy, read_document
from policy_service.document import CellsEntry
from policy_service.domain import PolicyObjective, Spent
from policy_service.features import Draft, PromptText
from policy_service.solver import solve_policy
from policy_service.state_cells import StateCells
from policy_service.train.dataset import Dataset, view_keys
from policy_service.train.fit import estimate_views
from policy_service.train.replay import replay
from policy_service.train.state_cells import fit_state_cells

if TYPE_CHECKING:
    import numpy.typing as npt

ARTIFACT = Path(__file__).parents[3] / "policy_service" / "policy.zip"
# Head 0 at 0.5; on the right, head 1 at -1.
TREE = StateCells(
    (0, 0, 1, 0, 0), (0.5, 0, -1.0, 0, 0), (1, 0, 3, 0, 0), (2, 0, 4, 0, 0), (-1, 0, -1, 2, 1), (1, 1, 1)
)


def test_a_tree_is_walked_to_its_end() -> None:
    assert [TREE.cell_of(scores) for scores in ([0.5, 9], [0.6, -1.0], [0.6, -0.9])] == [0, 2, 1]


def test_many_states_find_the_cells_that_each_finds_alone() -> None:
    document = read_document(ARTIFACT)
    rng = np.random.default_rng(0)
    with_cells = [view for view in document.views if view.cells is not None]
    assert with_cells
    for view in with_cells:
        assert view.cells is not None
        state_cells = StateCells(**view.cells.model_dump())
        scores = rng.normal(0, 4, (500, len(view.heads))).astype(np.float32)
        alone = [state_cells.cell_of(row) for row in scores.tolist()]
        assert state_cells.cells_of(scores).tolist() == alone
        assert len(set(alone)) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": (1, 0, 0, 0, 0)}, "node 2 must lead to later nodes"),
        ({"right": (5, 0, 4, 0, 0)}, "node 0 must lead to later nodes"),
        ({"cells": (-1, 0, -1, 2, 2)}, "every cell once"),
        ({"counts": (1, 1)}, "every cell once"),
        ({"thresholds": (0.5,)}, "one entry per node"),
    ],
)
def test_a_tree_that_could_not_be_walked_is_refused(change: dict[str, object], message: str) -> None:
    fields = {name: getattr(TREE, name) for name in TREE.__dataclass_fields__}
    CellsEntry(**fields)
    with pytest.raises(ValidationError, match=message):
        CellsEntry(**{**fields, **change})


class Scripted:
    """A predictor that says what it is told to."""

    def __init__(self) -> None:
        self.said: list[float] = []

    def scores(self, view: int, features: npt.NDArray[np.float32]) -> list[float]:
        return self.said


def test_decisions_are_those_of_the_cell() -> None:
    predictor = Scripted()
    # Whether the prompt is like those that the policy knows is not what is tested.
    document = read_document(ARTIFACT).model_copy(update={"family": None})
    policy = build_policy(document, predictor)
    views = tuple(each.view for each in policy.views)
    solution = solve_policy(views, 12.0)
    rng = np.random.default_rng(1)
    draft = Draft("x", *(np.zeros(1, np.float32) for _ in range(3)), "eos")
    view = policy.views[1]
    assert (view.view.stage, view.view.origin) == (0, None)
    assert view.state_cells is not None
    taken = set()
    for scores in rng.normal(0, 3, (300, 3)).tolist():
        predictor.said = scores
        decision = policy.decide(
            PromptText("x"), 0, draft, None, None, PolicyObjective(quality_value=12.0), Spent(), {}
        )
        cell = view.state_cells.cell_of(scores)
        onward = {stage: values[cell] for stage, values in solution.continuations[1].items()}
        best = max(onward, key=onward.__getitem__)
        stop = 12.0 * view.heads[0].p_correct(scores[0])
        assert decision.next_stage == (best if onward[best] > stop else None)
        taken.add(decision.next_stage)
    assert taken == {None, 1, 2}


def tell_apart(count: int) -> tuple[Dataset, dict, dict]:
    """Prompts of which the first stage's score says nothing, and the second head all: whom large helps."""
    rng = np.random.default_rng(2)
    helps = rng.random(count) < 0.5
    correct = np.stack([rng.random(count) < 0.4, helps], axis=1)
    keys = view_keys(2)
    features = {key: np.zeros((count, 1), np.float32) for key in keys}
    costs = {(0, None): np.full(count, 1.0), (1, None): np.full(count, 5.0), (1, 0): np.full(count, 3.0)}
    data = Dataset(
        ("small", "large"),
        features,
        correct,
        costs,
        costs,
        ("s",) * count,
        np.ones(count),
        np.zeros((count, 2, 5)),
    )
    own = rng.normal(0, 0.01, count)
    later = np.where(helps, 6.0, -6.0) + rng.normal(0, 0.5, count)
    two = np.stack([own, later], axis=1).astype(np.float32)
    scores = {(None, None): two, (0, None): two, (1, None): two[:, 1:], (1, 0): two[:, 1:]}
    p_correct = {key: 1 / (1 + np.exp(-each[:, 0].astype(float))) for key, each in scores.items()}
    return data, scores, p_correct


def test_cells_see_whom_a_later_stage_helps() -> None:
    data, scores, p_correct = tell_apart(12_000)
    state_cells = fit_state_cells(data, np.arange(4000), scores, p_correct, 5.0)
    assert state_cells[1, None] is None
    cells = {key: each.cells_of(scores[key]) for key, each in state_cells.items() if each is not None}
    worth = {}
    for name, cut in (("cells", cells), ("own score", {})):
        views = estimate_views(data, p_correct, cut)
        run = replay(data, views, p_correct, solve_policy(views, 8.0), 8.0, cut)
        worth[name] = float(np.mean(8.0 * run.correct - run.cost))
    assert worth["cells"] > worth["own score"] + 0.5


def test_few_prompts_cut_no_cells() -> None:
    data, scores, p_correct = tell_apart(2000)
    assert set(fit_state_cells(data, np.arange(2000), scores, p_correct, 5.0).values()) == {None}
