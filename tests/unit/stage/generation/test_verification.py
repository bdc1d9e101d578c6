"""The acceptance rule against a token-by-token loop, and signals against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.stage.generation.logprobs import make_row, verify_rows
from services.stage.generation.verification import (
    SampledVerdict,
    ShapeMismatch,
    choose_token,
    likeliest_tokens,
    sample_draft,
    token_signals,
    verify_draft,
)

Rule = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], SampledVerdict]

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
    for index, (row, token) in enumerate(zip(logits, draft, strict=True)):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        assert verdict.ranks[index] == order.index(int(token))
        assert verdict.logprobs[index] == pytest.approx(math.log(_softmax(row)[token]), abs=1e-5)


def test_under_a_constraint_the_likeliest_allowed_token_is_compared_with() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]], np.float32))
    draft, allowed = np.array([2, 2], np.int64), np.array([1, 1], np.int64)
    assert verify_draft(draft, logits, 0.3).accepted == 0
    tolerant = verify_draft(draft, logits, 0.3, likeliest=allowed)
    assert tolerant.accepted == 2
    assert tolerant.ranks.tolist() == [2, 2]
    np.testing.assert_allclose(np.exp(tolerant.logprobs), 0.1, rtol=1e-5)
    assert verify_draft(allowed, logits, likeliest=allowed).accepted == 2


@given(_LOGITS, st.integers(0, 7))
def test_the_likeliest_tokens_come_first_and_the_lower_id_of_equal_ones(
    logits: np.ndarray, most: int
) -> None:
    for row in logits:
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:most]
        found = likeliest_tokens(row, most)
        assert [token for token, _ in found] == order
        assert [p for _, p in found] == pytest.approx([math.log(_softmax(row)[i]) for i in order], abs=1e-5)


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
    counts = np.bincount(
        [choose_token(logits, 1.0, 0.75, 1, position) for position in range(4000)], minlength=4
    )
    assert counts[2:].sum() == 0
    assert _chi_square(counts[:2], np.array([0.625, 0.375])) < _QUANTILE[1]


def test_low_temperature_chooses_the_likeliest_and_the_same_seed_the_same() -> None:
    logits = np.array([0.1, 0.2, 0.0], np.float32)
    assert {choose_token(logits, 1e-3, 1.0, seed, 0) for seed in range(20)} == {1}
    draws = [[choose_token(logits, 2.0, 1.0, seed, position) for position in range(20)] for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


def test_models_that_share_their_noise_draw_the_same_token_far_more_often() -> None:
    rng = np.random.default_rng(4)
    one = rng.normal(size=16).astype(np.float32)
    other = one + rng.normal(size=16).astype(np.float32) * 0.3
    same = np.mean(
        [choose_token(one, 1.0, 1.0, 9, p) == choose_token(other, 1.0, 1.0, 9, p) for p in range(2000)]
    )
    apart = np.mean(
        [choose_token(one, 1.0, 1.0, 9, p) == choose_token(other, 1.0, 1.0, 10, p) for p in range(2000)]
    )
    distance = np.abs(_softmax(one) - _softmax(other)).sum() / 2
    # The bound of Daliri et al. 2024, theorem 2, less four standard deviations of 2000 draws.
    assert same > (1 - distance) / (1 + distance) - 0.045
    assert apart < same - 0.3


# The 0.999 quantile of chi-square by degrees of freedom.
_QUANTILE = {1: 10.83, 4: 18.47, 24: 51.18}


def _chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    expected = counts.sum() * probs
    return float(((counts - expected) ** 2 / expected).sum())


def _tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return draft and target distributions of the first token and, given it, of the second: [6, 5] each."""
    rng = np.random.default_rng(seed)
    draft, target = (rng.dirichlet(np.ones(5), size=6).astype(np.float32) for _ in range(2))
    return draft, target


def _first_two(
    rule: Rule, draft: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> tuple[int, int]:
    """Return two tokens as a target answers that has one draft token verified at a time."""
    tokens: list[int] = []
    while len(tokens) < 2:
        row = 0 if not tokens else 1 + tokens[0]
        proposed = int(rng.choice(5, p=draft[row] / draft[row].sum()))
        after = target[1 + proposed] if not tokens else target[0]
        verdict = rule(np.array([proposed]), draft[row][None], np.stack([target[row], after]), rng)
        tokens += [proposed] * verdict.accepted
        tokens.append(verdict.next_id)
    return tokens[0], tokens[1]


def _keep_draft_where_likely(
    draft_ids: np.ndarray, draft_probs: np.ndarray, target_probs: np.ndarray, rng: np.random.Generator
) -> SampledVerdict:
    """A wrong rule: after a refusal it draws from the target, not from what the draft left of it."""
    token = int(draft_ids[0])
    if rng.random() < min(1.0, target_probs[0][token] / draft_probs[0][token]):
        return SampledVerdict(1, int(rng.choice(5, p=target_probs[1] / target_probs[1].sum())))
    return SampledVerdict(0, int(rng.choice(5, p=target_probs[0] / target_probs[0].sum())))


@pytest.mark.parametrize("seed", [0, 1])
def test_speculative_sampling_keeps_the_target_distribution(seed: int) -> None:
    draft, target = _tables(seed)
    joint = (target[0][:, None] * target[1:]).ravel()
    joint /= joint.sum()
    statistics = []
    for rule in (sample_draft, _keep_draft_where_likely):
        rng = np.random.default_rng(seed + 10)
        pairs = [_first_two(rule, draft, target, rng) for _ in range(10_000)]
        counts = np.bincount([5 * first + second for first, second in pairs], minlength=25)
        statistics.append(_chi_square(counts, joint))
    assert statistics[0] < _QUANTILE[24]
    # The test sees a rule that is wrong.
    assert statistics[1] > 2 * _QUANTILE[24]


def test_sampled_acceptance_equals_a_loop_over_the_tokens() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        k = int(rng.integers(0, 5))
        draft_probs = rng.dirichlet(np.ones(4), size=k).astype(np.float32).reshape(k, 4)
        target_probs = rng.dirichlet(np.ones(4), size=k + 1).astype(np.float32)
        draft_ids = np.array([rng.integers(0, 4) for _ in range(k)], np.int64)
        verdict = sample_draft(draft_ids, draft_probs, target_probs, np.random.default_rng(seed))
        again = np.random.default_rng(seed)
        uniforms = again.random(k)
        accepted = 0
        while accepted < k:
            token = draft_ids[accepted]
            if uniforms[accepted] >= target_probs[accepted, token] / draft_probs[accepted, token]:
                break
            accepted += 1
        rest = target_probs[accepted].astype(float)
        if accepted < k:
            rest = np.array([max(t - d, 0.0) for t, d in zip(rest, draft_probs[accepted], strict=True)])
        mass = np.cumsum(rest)
        wanted = int(np.sum(mass <= again.random() * mass[-1]))
        assert (verdict.accepted, verdict.next_id) == (accepted, wanted)


def test_equal_distributions_accept_everything() -> None:
    rng = np.random.default_rng(2)
    probs = rng.dirichlet(np.ones(8), size=6).astype(np.float32)
    ids = probs[:5].argmax(axis=1)
    assert sample_draft(ids, probs[:5], probs, rng).accepted == 5


@pytest.mark.parametrize(
    ("ids", "draft_shape", "target_shape"),
    [([0], (1, 4), (1, 4)), ([0], (1, 4), (2, 5)), ([0, 1], (1, 4), (2, 4)), ([4], (1, 4), (2, 4))],
)
def test_distributions_that_do_not_fit_are_refused(
    ids: list[int], draft_shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeMismatch):
        sample_draft(
            np.array(ids, np.int64),
            np.full(draft_shape, 0.25, np.float32),
            np.full(target_shape, 0.25, np.float32),
            np.random.default_rng(0),
        )


@given(_LOGITS, st.sampled_from([None, 0.05, 0.3, 0.9, 1.0]), st.data())
def test_log_probabilities_are_accepted_as_logits_are(
    logits: np.ndarray, threshold: float | None, data: st.DataObject
) -> None:
    draft = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits], np.int64)
    rows = []
    for row, token in zip(logits, draft.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
        logprobs = np.log(_softmax(row))
        entries = {each: (float(logprobs[each]), rank) for rank, each in enumerate(order, start=1)}
        rows.append(make_row(token, {**dict([*entries.items()][:2]), token: entries[token]}, 2))
    wanted, found = verify_draft(draft, logits, threshold), verify_rows(draft.tolist(), rows, threshold)
    assert found.accepted == wanted.accepted
    assert found.ranks.tolist() == wanted.ranks.tolist()
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
