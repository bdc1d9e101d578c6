"""Optimal stopping over a cascade by backward induction. No gRPC, no protobuf.

The states of a request are views: nothing answered yet, or an answer of one stage, written by itself or
verified from a draft of an earlier stage. Within a view a state is the bin of the calibrated probability
that the answer is correct. In each the choice is to stop, which is worth `quality_value * p_correct`, or to
move on to a later stage, which costs that stage's cost and the wait for it, and leads to a bin of another
view with known probabilities.

A budget makes the state larger by what is left of it. As budgets are spent by whole calls, what is left is
known from the stages asked so far: `unfold` turns the views into the tree of the paths that fit, and the same
induction solves it.

Source: finite-horizon dynamic programming, Bertsekas, Dynamic Programming and Optimal Control, vol. 1, ch. 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

Path = tuple[int, ...]
"""Stages asked one after the other, by index, ascending."""


@dataclass(frozen=True)
class Move:
    """Asking a later stage from a view of `bins` bins.

    stage: index of the stage asked. view: index of the view that it leads to. transition: [bins, bins of that
    view], rows sum to 1. cost, latency_ms: [bins], expected of this call alone.
    """

    stage: int
    view: int
    transition: Floats
    cost: Floats
    latency_ms: Floats


@dataclass(frozen=True)
class View:
    """What is known at one point of a request.

    stage: index of the stage that answered; None before the first. origin: index of the stage whose draft it
    verified; None where it wrote by itself. p_correct: [bins], mean probability that the answer is correct.
    certified: [bins], what that share is at least, with confidence; it does not decrease.
    """

    stage: int | None
    origin: int | None
    p_correct: Floats
    certified: Floats
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Solution:
    """The optimal policy of one problem.

    values: per view, [bins]: expected value of going on optimally. continuations: per view, by stage: [bins],
    expected value of asking that stage next. escalates: per view, [bins]: whether going on beats stopping.
    """

    values: tuple[Floats, ...]
    continuations: tuple[dict[int, Floats], ...]
    escalates: tuple[npt.NDArray[np.bool_], ...]


@dataclass(frozen=True)
class Expectation:
    """What a policy does on average. accuracy: share of right answers. Waits are not part of latency_ms."""

    cost: float
    latency_ms: float
    accuracy: float


def solve_policy(
    views: tuple[View, ...],
    quality_value: float,
    *,
    available: Collection[int] | None = None,
    min_quality: float = 0.0,
    waiting_cost: Mapping[int, float] | None = None,
) -> Solution:
    """Return the policy with the highest expected `quality_value * P(correct) - cost - waiting cost`.

    available: stages that may be asked; None: all. min_quality: an answer whose certified share is below it
    is not returned while a later stage may be asked. waiting_cost: by stage, cost units that the wait for it
    adds to its cost, 0 or more. Moves must lead to later views of `views`: ValueError if not.
    """
    waiting_cost = waiting_cost or {}
    values: list[Floats] = [np.empty(0)] * len(views)
    continuations: list[dict[int, Floats]] = [{} for _ in views]
    escalates: list[npt.NDArray[np.bool_]] = [np.empty(0, np.bool_)] * len(views)
    for index in reversed(range(len(views))):
        view = views[index]
        for move in view.moves:
            if move.view <= index:
                raise ValueError(f"view {index} moves to view {move.view}, which is not a later one")
            if available is None or move.stage in available:
                cost = move.cost + waiting_cost.get(move.stage, 0.0)
                continuations[index][move.stage] = move.transition @ values[move.view] - cost
        stop = np.full(len(view.p_correct), -np.inf) if view.stage is None else quality_value * view.p_correct
        onward = list(continuations[index].values())
        if onward:
            best = np.max(onward, axis=0)
            goes_on = (best > stop) | (view.certified < min_quality)
            values[index] = np.where(goes_on, best, stop)
            escalates[index] = goes_on
        else:
            values[index] = stop
            escalates[index] = np.zeros(len(stop), np.bool_)
    return Solution(tuple(values), tuple(continuations), tuple(escalates))


def paths_from(views: tuple[View, ...], root: int) -> list[tuple[Path, tuple[Move, ...]]]:
    """Return every way on from a view, with its moves: each follows those that it goes on from."""
    found: list[tuple[Path, tuple[Move, ...]]] = [((), ())]
    # The list grows while it is read: breadth first.
    for path, moves in found:
        view = moves[-1].view if moves else root
        found.extend(((*path, move.stage), (*moves, move)) for move in views[view].moves)
    return found[1:]


def unfold(views: tuple[View, ...], root: int, fits: Callable[[Path], bool]) -> tuple[View, ...]:
    """Return the tree of the paths from a view that fit: one view per path, the root's first.

    The best policy of the tree is the best one that keeps to these paths. fits: of a path, whether its last
    call may be made after the others; asked only where they fit.
    """
    nodes: list[tuple[Path, int]] = [((), root)]
    moves: list[list[Move]] = []
    for path, index in nodes:
        children = [move for move in views[index].moves if fits((*path, move.stage))]
        moves.append([replace(move, view=len(nodes) + child) for child, move in enumerate(children)])
        nodes.extend(((*path, move.stage), move.view) for move in children)
    return tuple(
        replace(views[index], moves=tuple(own)) for (_, index), own in zip(nodes, moves, strict=True)
    )


def expect(views: tuple[View, ...], solution: Solution, start: Floats) -> Expectation:
    """Return what a policy does on average, by the chain that the views define.

    start: [bins of views[0]], share of requests that start in each; sums to 1. Ties go to the earliest move.
    """
    shares = [np.zeros(len(view.p_correct)) for view in views]
    shares[0] = start
    cost = latency_ms = accuracy = 0.0
    for index, view in enumerate(views):
        continuations = solution.continuations[index]
        goes_on = solution.escalates[index]
        accuracy += float(np.where(goes_on, 0.0, shares[index]) @ view.p_correct)
        if not continuations:
            continue
        best = np.argmax(np.stack(list(continuations.values())), axis=0)
        asked = {stage: goes_on & (best == option) for option, stage in enumerate(continuations)}
        for move in view.moves:
            if move.stage in asked:
                moving = np.where(asked[move.stage], shares[index], 0.0)
                cost += float(moving @ move.cost)
                latency_ms += float(moving @ move.latency_ms)
                shares[move.view] = shares[move.view] + moving @ move.transition
    return Expectation(cost, latency_ms, accuracy)
