"""The acceptance rule against a token-by-token loop, and signals against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.stage.verification import ShapeMismatch, choose_token, token_signals, verify_draft

_LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.integers(2, 5)),
    # Few values, so that ties happen.
    elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]),
)


def _softmax(row: np.ndarray) -> np.ndarray:
    powers = np.array([math.exp(x) for x in row])
    return powers / powers.sum()


@given(_LOGITS, st.data())
def test_exact_acceptance_equals_decoding_token_by_token(logits: np.ndarray, data: st.DataObject) -> None:
    draft = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits], np.int64)
    accepted = 0
    for row, token in zip(logits, draft, strict=True):
        if int(np.argmax(row)) != token:
            break
        accepted += 1
    verdict = verify_draft(draft, logits)
    assert verdict.accepted == accepted
    for place, (row, token) in enumerate(zip(logits, draft, strict=True)):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        assert verdict.ranks[place] == order.index(int(token))
        assert verdict.logprobs[place] == pytest.approx(math.log(_softmax(row)[token]), abs=1e-5)


@given(_LOGITS, st.floats(0.05, 1.0), st.data())
def test_tolerant_acceptance_compares_probabilities(
    logits: np.ndarray, threshold: float, data: st.DataObject
) -> None:
    draft = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits], np.int64)
    accepted = 0
    for row, token in zip(logits, draft, strict=True):
        probs = _softmax(row)
        # Values sit on a coarse grid, so no ratio is within rounding of a threshold but 1 itself.
        if probs[token] < threshold * probs.max() * (1 - 1e-6):
            break
        accepted += 1
    assert verify_draft(draft, logits, threshold).accepted == accepted


def test_a_threshold_of_one_accepts_what_exact_does_without_ties() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 7)).astype(np.float32)
    draft = np.where(rng.random(50) < 0.9, logits.argmax(1), 0)
    assert verify_draft(draft, logits, 1.0).accepted == verify_draft(draft, logits).accepted


@pytest.mark.parametrize(("draft", "shape"), [([0, 1], (1, 4)), ([4], (1, 4)), ([-1], (1, 4)), ([0], (4,))])
def test_ids_and_logits_that_do_not_fit_are_refused(draft: list[int], shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch):
        verify_draft(np.array(draft, np.int64), np.zeros(shape, np.float32))


def test_signals_follow_their_definitions() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]], np.float32))
    logprobs, entropies, margins = token_signals(logits, np.array([1, 0]))
    assert logprobs == pytest.approx([math.log(0.3), math.log(0.98)], abs=1e-6)
    assert entropies == pytest.approx(
        [-(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)), 0.1119], abs=1e-4
    )
    assert margins == pytest.approx([0.2, 0.97], abs=1e-6)


def test_sampling_follows_the_nucleus_of_the_tempered_distribution() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05; nucleus 0.75 keeps the first two at 0.625 and 0.375.
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(1)
    counts = np.bincount([choose_token(logits, 1.0, 0.75, rng) for _ in range(4000)], minlength=4)
    assert counts[2:].sum() == 0
    # Chi-square with one degree of freedom; 10.83 is its 0.999 quantile.
    expected = np.array([2500.0, 1500.0])
    assert ((counts[:2] - expected) ** 2 / expected).sum() < 10.83


def test_low_temperature_chooses_the_likeliest_and_the_same_seed_the_same() -> None:
    logits = np.array([0.1, 0.2, 0.0], np.float32)
    assert {choose_token(logits, 1e-3, 1.0, np.random.default_rng(s)) for s in range(20)} == {1}
    draws = [
        [choose_token(logits, 2.0, 1.0, rng) for _ in range(20)]
        for rng in map(np.random.default_rng, (5, 5, 6))
    ]
    assert draws[0] == draws[1] != draws[2]
