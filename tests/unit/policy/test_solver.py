"""The solver against enumeration of every policy, and what must hold of any solution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_service.solver import Move, View, solve_policy

BINS = 2


def random_problem(seed: int, stages: int) -> tuple[View, ...]:
    """A cascade with two bins per view, every skip and a free start."""
    rng = np.random.default_rng(seed)
    keys: list[tuple[int | None, int | None]] = [(None, None)]
    for stage in range(stages):
        keys += [(stage, None), *((stage, origin) for origin in range(stage))]
    views = []
    for stage, origin in keys:
        moves = []
        for later in range(0 if stage is None else stage + 1, stages):
            transition = rng.dirichlet(np.ones(BINS), size=BINS)
            cost = rng.uniform(0.1, 3.0, BINS)
            moves.append(Move(later, keys.index((later, stage)), transition, cost, cost * 10))
        views.append(View(stage, origin, np.sort(rng.uniform(0, 1, BINS)), tuple(moves)))
    return tuple(views)


def best_by_enumeration(views: tuple[View, ...], quality_value: float) -> np.ndarray:
    """The best expected value from each bin of the first view over every deterministic policy."""
    places = [(view, b) for view in range(len(views)) for b in range(BINS)]
    choices = [
        ([] if views[view].stage is None else [None]) + [move.stage for move in views[view].moves]
        for view, _ in places
    ]
    best = np.full(BINS, -np.inf)
    for actions in itertools.product(*choices):
        action = dict(zip(places, actions, strict=True))

        def worth(view: int, b: int, action: dict = action) -> float:
            stage = action[view, b]
            if stage is None:
                return quality_value * views[view].p_correct[b]
            move = next(move for move in views[view].moves if move.stage == stage)
            onward = sum(move.transition[b, c] * worth(move.view, c) for c in range(BINS))
            return onward - move.cost[b]

        best = np.maximum(best, [worth(0, b) for b in range(BINS)])
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("quality_value", [0.5, 4.0, 30.0])
def test_equals_the_best_of_all_policies(seed: int, quality_value: float) -> None:
    views = random_problem(seed, stages=2 if seed % 3 else 3)
    solution = solve_policy(views, quality_value)
    np.testing.assert_allclose(solution.values[0], best_by_enumeration(views, quality_value), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.floats(0, 50), more=st.floats(0, 50), stages=st.integers(1, 4))
def test_more_value_of_quality_is_never_worth_less(seed: int, low: float, more: float, stages: int) -> None:
    views = random_problem(seed, stages)
    low_values = solve_policy(views, low).values[0]
    assert (solve_policy(views, low + more).values[0] >= low_values - 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), away=st.integers(0, 2))
def test_a_stage_less_is_never_worth_more(seed: int, away: int) -> None:
    views = random_problem(seed, stages=3)
    all_stages = solve_policy(views, 5.0)
    fewer = solve_policy(views, 5.0, available={0, 1, 2} - {away})
    assert (fewer.values[0] <= all_stages.values[0] + 1e-9).all()
    assert all(away not in continuations for continuations in fewer.continuations)


def test_below_the_least_quality_the_cascade_goes_on_while_it_can() -> None:
    views = random_problem(1, stages=2)
    free = solve_policy(views, 0.0)
    bound = solve_policy(views, 0.0, min_quality=1.0)
    first = next(i for i, view in enumerate(views) if view.stage == 0)
    last = next(i for i, view in enumerate(views) if view.stage == 1)
    assert not free.escalates[first].any()
    assert bound.escalates[first].all()
    assert not bound.escalates[last].any()


def test_a_hand_worked_cascade() -> None:
    # Stage 0 is right 3 times in 4 where it looks good, never where it looks bad; stage 1 is always right.
    last = View(1, 0, np.array([1.0]), ())
    own_last = View(1, None, np.array([1.0]), ())
    verify = Move(1, 3, np.array([[1.0], [1.0]]), np.array([2.0, 2.0]), np.zeros(2))
    first = View(0, None, np.array([0.0, 0.75]), (verify,))
    start = View(
        None,
        None,
        np.array([0.375]),
        (
            Move(0, 1, np.array([[0.5, 0.5]]), np.array([1.0]), np.zeros(1)),
            Move(1, 2, np.array([[1.0]]), np.array([4.0]), np.zeros(1)),
        ),
    )
    # Worth 6: looks bad -> 6 - 2 = 4 beats 0; looks good -> 4.5 beats 4. So 0.5 * 4 + 0.5 * 4.5 - 1 = 3.25.
    solution = solve_policy((start, first, own_last, last), 6.0)
    assert solution.values[0][0] == pytest.approx(3.25)
    assert solution.continuations[0] == {0: pytest.approx(3.25), 1: pytest.approx(2.0)}
    assert solution.escalates[1].tolist() == [True, False]


def test_a_move_backwards_is_refused() -> None:
    loop = Move(0, 0, np.ones((1, 1)), np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="not a later one"):
        solve_policy((View(None, None, np.ones(1), (loop,)),), 1.0)
