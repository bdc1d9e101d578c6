"""Signals of the likeliest tokens against those of all logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.stage.generation.logprobs import make_row, row_signals
from services.stage.generation.verification import token_signals


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
