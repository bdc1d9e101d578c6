"""The solver against enumeration of every policy, against simulation, and what must hold of any solution."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_service.solver import Move, View, expect, paths_from, solve_policy, unfold

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from policy_service.solver import Path, Solution

BINS = 2
Policy = dict[tuple["Path", int], int | None]
"""Action by stages asked so far and bin of the view that they lead to: a stage, or None to stop."""


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
        p_correct, certified = np.sort(rng.uniform(0, 1, BINS)), np.sort(rng.uniform(0, 1, BINS))
        views.append(View(stage, origin, p_correct, certified, tuple(moves)))
    return tuple(views)


def every_policy(
    views: tuple[View, ...], available: Collection[int], min_quality: float, *, knows_its_way: bool
) -> Iterator[Policy]:
    """Every deterministic policy that min_quality and the available stages allow.

    knows_its_way: whether it may act differently in one view by the stages asked before.
    """
    ways = [((), 0), *((path, moves[-1].view) for path, moves in paths_from(views, 0))]
    groups: dict[object, list[tuple[Path, int]]] = {}
    choices: dict[object, list[int | None]] = {}
    for (path, index), b in itertools.product(ways, range(BINS)):
        group = (path if knows_its_way else index, b)
        groups.setdefault(group, []).append((path, b))
        onward: list[int | None] = [move.stage for move in views[index].moves if move.stage in available]
        may_stop = index > 0 and (views[index].certified[b] >= min_quality or not onward)
        choices[group] = [*([None] if may_stop else []), *onward]
    for actions in itertools.product(*choices.values()):
        yield {
            state: action for group, action in zip(groups, actions, strict=True) for state in groups[group]
        }


def worth(
    views: tuple[View, ...],
    policy: Policy,
    quality_value: float,
    waiting_cost: Mapping[int, float],
    state: tuple[Path, int, int] = ((), 0, 0),
) -> float:
    """Expected value of a policy from a path, the view that it leads to and a bin of it."""
    path, index, b = state
    stage = policy[path, b]
    if stage is None:
        return float(quality_value * views[index].p_correct[b])
    move = next(move for move in views[index].moves if move.stage == stage)
    onward = sum(
        move.transition[b, c]
        * worth(views, policy, quality_value, waiting_cost, ((*path, stage), move.view, c))
        for c in range(BINS)
    )
    return float(onward - move.cost[b] - waiting_cost.get(stage, 0.0))


def ways_of(views: tuple[View, ...], policy: Policy, start: int) -> Iterator[Path]:
    """Every sequence of stages that a policy may ask from a bin of the first view."""
    states = [((), 0, start)]
    for path, index, b in states:
        stage = policy[path, b]
        if stage is not None:
            move = next(move for move in views[index].moves if move.stage == stage)
            yield (*path, stage)
            states.extend(((*path, stage), move.view, c) for c in range(BINS) if move.transition[b, c] > 0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("quality_value", [0.5, 4.0, 30.0])
def test_equals_the_best_of_all_policies(seed: int, quality_value: float) -> None:
    stages = 2 if seed % 3 else 3
    views = random_problem(seed, stages)
    policies = every_policy(views, range(stages), 0.0, knows_its_way=False)
    best = np.max(
        [[worth(views, each, quality_value, {}, ((), 0, b)) for b in range(BINS)] for each in policies],
        axis=0,
    )
    np.testing.assert_allclose(solve_policy(views, quality_value).values[0], best, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("available", "min_quality", "waiting_cost"),
    [
        ({0, 1, 2}, 0.5, {}),
        ({0, 1, 2}, 0.0, {1: 0.7, 2: 0.2}),
        ({0, 2}, 0.3, {2: 1.5}),
        ({1, 2}, 1.0, {0: 9.0}),
    ],
)
def test_equals_the_best_of_all_policies_that_are_allowed(
    seed: int, available: set[int], min_quality: float, waiting_cost: dict[int, float]
) -> None:
    views = random_problem(seed, 3)
    policies = every_policy(views, available, min_quality, knows_its_way=False)
    best = np.max(
        [[worth(views, p, 4.0, waiting_cost, ((), 0, b)) for b in range(BINS)] for p in policies], 0
    )
    solution = solve_policy(
        views, 4.0, available=available, min_quality=min_quality, waiting_cost=waiting_cost
    )
    np.testing.assert_allclose(solution.values[0], best, atol=1e-12)


# At their dearest, the stages cost 1, 2 and 4: each sum is one class of budgets.
WHOLE = (1.0, 2.0, 4.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_quality", [0.0, 0.5])
@pytest.mark.parametrize("cap", [2.5, 3.0, 4.0, 5.0, 6.0, 7.0])
def test_within_a_budget_it_equals_the_best_of_all_policies_that_keep_it(
    seed: int, min_quality: float, cap: float
) -> None:
    views = random_problem(seed, 3)

    def fits(path: Path) -> bool:
        return sum(WHOLE[stage] for stage in path) <= cap

    tree = unfold(views, 0, fits)
    solution = solve_policy(tree, 8.0, min_quality=min_quality)
    best = np.full(BINS, -np.inf)
    # A policy that wants more than the budget leaves has to stop: min_quality asks while a stage fits.
    for policy in every_policy(views, range(3), 0.0, knows_its_way=True):
        for start in range(BINS):
            if all(map(fits, ways_of(views, policy, start))) and is_bold(views, policy, fits, min_quality):
                best[start] = max(best[start], worth(views, policy, 8.0, {}, ((), 0, start)))
    np.testing.assert_allclose(solution.values[0], best, atol=1e-12)


def is_bold(
    views: tuple[View, ...], policy: Policy, fits: Callable[[Path], bool], min_quality: float
) -> bool:
    """Whether a policy never stops below min_quality where a further stage fits."""
    ways = {path: moves[-1].view for path, moves in paths_from(views, 0)}
    return not any(
        action is None
        and views[ways[path]].certified[b] < min_quality
        and any(fits((*path, move.stage)) for move in views[ways[path]].moves)
        for (path, b), action in policy.items()
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), stages=st.integers(1, 4), cap=st.floats(0, 8), more=st.floats(0, 8))
def test_more_budget_is_never_worth_less_and_enough_of_it_is_no_bound(
    seed: int, stages: int, cap: float, more: float
) -> None:
    views = random_problem(seed, stages)

    def value(budget: float) -> np.ndarray:
        tree = unfold(views, 0, lambda path: sum(1.0 + stage for stage in path) <= budget)
        return solve_policy(tree, 5.0).values[0]

    assert (value(cap + more) >= value(cap)).all()
    np.testing.assert_array_equal(value(10.0), solve_policy(views, 5.0).values[0])


def simulate(
    views: tuple[View, ...], solution: Solution, start: np.ndarray, runs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cost, latency and correctness of requests that wander through the views, one by one: [runs] each."""
    rng = np.random.default_rng(0)
    costs, latencies_ms, correct = np.zeros(runs), np.zeros(runs), np.zeros(runs)
    for run in range(runs):
        index, b = 0, int(rng.choice(BINS, p=start))
        while solution.escalates[index][b]:
            onward = solution.continuations[index]
            stage = max(onward, key=lambda each: float(onward[each][b]))
            move = next(move for move in views[index].moves if move.stage == stage)
            costs[run] += move.cost[b]
            latencies_ms[run] += move.latency_ms[b]
            index, b = move.view, int(rng.choice(BINS, p=move.transition[b]))
        correct[run] = rng.random() < views[index].p_correct[b]
    return costs, latencies_ms, correct


@pytest.mark.parametrize(
    ("seed", "min_quality", "cap"), [(0, 0.0, 9.0), (1, 0.0, 9.0), (2, 0.6, 9.0), (3, 0.0, 5.0)]
)
def test_requests_that_wander_through_the_views_are_worth_what_it_says(
    seed: int, min_quality: float, cap: float
) -> None:
    views = unfold(random_problem(seed, 3), 0, lambda path: sum(WHOLE[stage] for stage in path) <= cap)
    solution = solve_policy(views, 8.0, min_quality=min_quality)
    start = np.array([0.3, 0.7])
    costs, latencies_ms, correct = simulate(views, solution, start, 6000)
    expected = expect(views, solution, start)
    worths = 8.0 * correct - costs
    for seen, said in (
        (worths, start @ solution.values[0]),
        (costs, expected.cost),
        (latencies_ms, expected.latency_ms),
        (correct, expected.accuracy),
    ):
        # Four standard errors: one run in 16,000 strays further by chance, and these seeds do not.
        assert seen.mean() == pytest.approx(said, abs=4 * seen.std() / np.sqrt(len(seen)))
    assert worths.std() > 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.floats(0, 50), more=st.floats(0, 50), stages=st.integers(1, 4))
def test_more_value_of_quality_is_never_worth_less_and_never_right_less_often(
    seed: int, low: float, more: float, stages: int
) -> None:
    views = random_problem(seed, stages)
    start = np.full(BINS, 1 / BINS)
    solutions = [solve_policy(views, value) for value in (low, low + more)]
    assert (solutions[1].values[0] >= solutions[0].values[0] - 1e-9).all()
    frugal, lavish = (expect(views, solution, start) for solution in solutions)
    # The Lagrangian's multiplier buys: dearer policies are bought for more right answers only.
    assert lavish.accuracy >= frugal.accuracy - 1e-9
    assert lavish.cost >= frugal.cost - 1e-9


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), away=st.integers(0, 2))
def test_a_stage_less_is_never_worth_more(seed: int, away: int) -> None:
    views = random_problem(seed, stages=3)
    all_stages = solve_policy(views, 5.0)
    fewer = solve_policy(views, 5.0, available={0, 1, 2} - {away})
    assert (fewer.values[0] <= all_stages.values[0] + 1e-9).all()
    assert all(away not in continuations for continuations in fewer.continuations)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    busy=st.integers(0, 2),
    wait=st.floats(0, 5),
    longer=st.floats(0, 5),
    min_quality=st.floats(0, 1),
)
def test_a_longer_queue_never_makes_its_stage_more_attractive(
    seed: int, busy: int, wait: float, longer: float, min_quality: float
) -> None:
    views = random_problem(seed, stages=3)
    short, long = (
        solve_policy(views, 5.0, min_quality=min_quality, waiting_cost={busy: cost, 2 - busy: 0.4})
        for cost in (wait, wait + longer)
    )
    for view, before, after in zip(views, short.continuations, long.continuations, strict=True):
        if busy not in before:
            continue
        others = [(before[stage], after[stage]) for stage in before if stage != busy]
        if view.stage is not None:
            others.append((5.0 * view.p_correct, 5.0 * view.p_correct))
        for other_before, other_after in others:
            lead_before, lead_after = before[busy] - other_before, after[busy] - other_after
            assert (lead_after <= lead_before + 1e-9).all()


def test_a_queue_at_a_later_stage_counts_before_it_is_reached() -> None:
    # Stage 0 alone is right half the time; stage 1 verifies its answer for 1, or writes its own for 1.5.
    end = (
        View(1, None, np.array([1.0]), np.array([1.0]), ()),
        View(1, 0, np.array([1.0]), np.array([1.0]), ()),
    )
    sure = np.array([[1.0]])
    first = View(0, None, np.array([0.5]), np.array([0.5]), (Move(1, 3, sure, np.array([1.0]), np.zeros(1)),))
    start_moves = (
        Move(0, 1, sure, np.array([0.25]), np.zeros(1)),
        Move(1, 2, sure, np.array([1.5]), np.zeros(1)),
    )
    views = (View(None, None, np.array([0.5]), np.array([0.5]), start_moves), first, *end)
    # Worth 4: 0.25 + 1 for being right, or 0.25 for being right half the time: 2.75 and 1.75.
    idle = solve_policy(views, 4.0)
    assert idle.continuations[0] == {0: pytest.approx(2.75), 1: pytest.approx(2.5)}
    assert idle.escalates[1].all()
    # Waiting for 1.5: 4 - 0.25 - 1 - 1.5 = 1.25 is less than stopping, and the start knows.
    busy = solve_policy(views, 4.0, waiting_cost={1: 1.5})
    assert busy.continuations[0] == {0: pytest.approx(1.75), 1: pytest.approx(1.0)}
    assert not busy.escalates[1].any()


def test_what_is_not_certified_goes_on_while_it_can() -> None:
    views = random_problem(1, stages=2)
    free = solve_policy(views, 0.0)
    first = next(i for i, view in enumerate(views) if view.stage == 0)
    last = next(i for i, view in enumerate(views) if view.stage == 1)
    assert not free.escalates[first].any()
    low, high = views[first].certified
    for least, goes_on in ((low, [False, False]), (high, [True, False]), (1.0, [True, True])):
        bound = solve_policy(views, 0.0, min_quality=least)
        assert bound.escalates[first].tolist() == goes_on
        assert not bound.escalates[last].any()


def test_a_hand_worked_cascade() -> None:
    # Stage 0 is right 3 times in 4 where it looks good, never where it looks bad; stage 1 is always right.
    last = View(1, 0, np.array([1.0]), np.array([1.0]), ())
    own_last = View(1, None, np.array([1.0]), np.array([1.0]), ())
    verify = Move(1, 3, np.array([[1.0], [1.0]]), np.array([2.0, 2.0]), np.zeros(2))
    first = View(0, None, np.array([0.0, 0.75]), np.array([0.0, 0.7]), (verify,))
    start = View(
        None,
        None,
        np.array([0.375]),
        np.array([0.3]),
        (
            Move(0, 1, np.array([[0.5, 0.5]]), np.array([1.0]), np.zeros(1)),
            Move(1, 2, np.array([[1.0]]), np.array([4.0]), np.zeros(1)),
        ),
    )
    # Worth 6: looks bad -> 6 - 2 = 4 beats 0; looks good -> 4.5 beats 4. So 0.5 * 4 + 0.5 * 4.5 - 1 = 3.25.
    views = (start, first, own_last, last)
    solution = solve_policy(views, 6.0)
    assert solution.values[0][0] == pytest.approx(3.25)
    assert solution.continuations[0] == {0: pytest.approx(3.25), 1: pytest.approx(2.0)}
    assert solution.escalates[1].tolist() == [True, False]
    # Half of the requests stop at 0.75, half go on for 2: 1 + 0.5 * 2.
    mean = expect(views, solution, np.ones(1))
    assert (mean.cost, mean.accuracy) == (pytest.approx(2.0), pytest.approx(0.875))


def test_a_move_backwards_is_refused() -> None:
    loop = Move(0, 0, np.ones((1, 1)), np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="later"):
        solve_policy((View(None, None, np.ones(1), np.ones(1), (loop,)),), 1.0)
