"""Optimal stopping over a cascade by backward induction. Pure.

The states of a request are views: nothing answered yet, or an answer of one stage, written by itself or
verified from a draft of an earlier stage. Within a view a state is the bin of the calibrated probability
that the answer is correct. In each the choice is to stop, which is worth `quality_value * p_correct`, or to
move on to a later stage, which costs that stage's cost and leads to a bin of another view with known
probabilities.

Source: finite-horizon dynamic programming, Bertsekas, Dynamic Programming and Optimal Control, vol. 1, ch. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Move:
    """Asking a later stage from a view of `bins` bins.

    stage: place of the stage asked. view: index of the view that it leads to. transition: [bins, bins of that
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

    stage: place of the stage that answered; None before the first. origin: place of the stage whose draft it
    verified; None where it wrote by itself. p_correct: [bins], mean probability that the answer is correct.
    """

    stage: int | None
    origin: int | None
    p_correct: Floats
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


def solve_policy(
    views: tuple[View, ...],
    quality_value: float,
    *,
    available: Collection[int] | None = None,
    min_quality: float = 0.0,
) -> Solution:
    """Return the policy with the highest expected `quality_value * P(correct) - cost`.

    available: stages that may be asked; None: all. min_quality: an answer whose p_correct is below it is not
    returned while a later stage may be asked. Moves must lead to later views of `views`: ValueError if not.
    """
    values: list[Floats] = [np.empty(0)] * len(views)
    continuations: list[dict[int, Floats]] = [{} for _ in views]
    escalates: list[npt.NDArray[np.bool_]] = [np.empty(0, np.bool_)] * len(views)
    for index in reversed(range(len(views))):
        view = views[index]
        for move in view.moves:
            if move.view <= index:
                raise ValueError(f"view {index} moves to view {move.view}, which is not a later one")
            if available is None or move.stage in available:
                continuations[index][move.stage] = move.transition @ values[move.view] - move.cost
        stop = np.full(len(view.p_correct), -np.inf) if view.stage is None else quality_value * view.p_correct
        onward = list(continuations[index].values())
        if onward:
            best = np.max(onward, axis=0)
            goes_on = (best > stop) | (view.p_correct < min_quality)
            values[index] = np.where(goes_on, best, stop)
            escalates[index] = goes_on
        else:
            values[index] = stop
            escalates[index] = np.zeros(len(stop), np.bool_)
    return Solution(tuple(values), tuple(continuations), tuple(escalates))
