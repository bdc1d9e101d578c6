"""Signals of the likeliest tokens against those of all logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.stage.generation.logprobs import Row, make_row, own_rows, row_signals, verify_rows
from services.stage.generation.verification import token_signals
from tests.fakes.letter_grammars import END, letters_matcher

A, B, C = 1, 2, 3


def test_signals_of_few_tokens_bound_those_of_all() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(1, 40)).astype(np.float32) * 2
    wanted = [float(column[0]) for column in token_signals(logits, np.array([7]))]
    logprobs = logits[0] - math.log(np.exp(logits[0].astype(np.float64)).sum())
    order = np.argsort(-logprobs)
    rank = int(np.flatnonzero(order == 7)[0])

    def signals(most: int) -> list[float]:
        entries = {int(t): (float(logprobs[t]), r) for r, t in enumerate(order[:most], start=1)}
        entries[7] = (float(logprobs[7]), rank + 1)
        row = make_row(7, entries, most)
        assert row.rank == rank
        assert row.own.token == int(order[0])
        return [float(column[0]) for column in row_signals([row])]

    assert signals(40) == pytest.approx(wanted, abs=1e-5)
    entropies = [signals(most)[1] for most in (1, 2, 5, 20, 40)]
    assert entropies == sorted(entropies)
    beyond = 1 - float(np.exp(logprobs[order[:5]]).sum())
    assert wanted[1] - entropies[2] <= beyond * math.log(35) + 1e-6
    assert signals(2)[2] == pytest.approx(wanted[2], abs=1e-6)
    assert signals(1)[2] <= wanted[2]


def _row(token: int, *likeliest: int, logprob: float = -5.0) -> Row:
    """Return a row whose likeliest tokens are each half as likely as the one before."""
    logprobs = tuple(-0.7 * (place + 1) for place in range(len(likeliest)))
    if token in likeliest:
        logprob = logprobs[likeliest.index(token)]
    return Row(token, logprob, 0, likeliest, logprobs)


def test_under_a_constraint_the_choice_is_the_likeliest_token_that_it_allows() -> None:
    matcher = letters_matcher("a[bc]b")
    rows = [_row(A, C, A), _row(B, A, C, B), _row(B, A, C), _row(C, B, A)]
    own = own_rows([A, B, B], rows, matcher)
    # Of the third place none of the likeliest is allowed; after it only the end is, which needs no choice.
    assert [each and each.token for each in own] == [A, C, None, C]
    assert (own[0].rank, own[1].logprob) == (1, pytest.approx(-1.4))  # type: ignore[union-attr]
    assert matcher.allowed([A, B, B, END]) == 4
    assert verify_rows([A, B, B], rows[:3], own=own[:3]).accepted == 1


@pytest.mark.parametrize(("threshold", "accepted"), [(0.4, 2), (0.9, 1)])
def test_tolerance_is_relative_to_the_likeliest_token_that_the_constraint_allows(
    threshold: float, accepted: int
) -> None:
    rows = [_row(A, A, B), _row(B, A, C, B), _row(B, A, C), _row(C, B, A)]
    own = own_rows([A, B, B], rows, letters_matcher("a[bc]b"))
    assert verify_rows([A, B, B], rows[:3], threshold, own[:3]).accepted == accepted
