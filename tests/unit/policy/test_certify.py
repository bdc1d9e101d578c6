"""What min_quality rests on: shares of right answers that hold with 95% confidence over calibration draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from policy_service.train.fit import DOUBT, certify

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWS = 1000
# Three standard errors of a share of 0.05.
ALLOWED = DRAWS * DOUBT + 3 * np.sqrt(DRAWS * DOUBT * (1 - DOUBT))
PER_BIN = 300

# Shares of right answers by bin, from the lowest scores on, and min_quality just above the share of some of
# them: where a certified share is wrong the most often.
SHAPES = {
    "one bin falls short": ([0.5] * 16 + [0.945] + [0.999] * 15, 0.95),
    "the best bins fall short": ([0.4] * 20 + [0.89] * 12, 0.9),
    "all fall short alike": ([0.899] * 32, 0.9),
    "a dent between good bins": ([0.2] * 8 + [0.99] * 10 + [0.93] * 2 + [0.99] * 12, 0.95),
    "a slope": (list(np.linspace(0.6, 0.995, 32)), 0.9),
    "few bins": ([0.7, 0.849, 0.9], 0.85),
}


def point_estimate(bins: np.ndarray, correct: np.ndarray, doubt: float) -> np.ndarray:
    return np.bincount(bins, weights=correct) / np.bincount(bins)


def each_by_itself(bins: np.ndarray, correct: np.ndarray, doubt: float) -> np.ndarray:
    """A bound per bin at the whole doubt, as if there were one bin."""
    right, count = np.bincount(bins, weights=correct), np.bincount(bins)
    bounds: np.ndarray = beta.ppf(doubt, right, count - right + 1)
    return bounds


def draws_broken(certified_by: Callable[..., np.ndarray], shape: str) -> tuple[int, int]:
    """In how many draws some answers are returned that are right less often, and in how many any are.

    Returned are a bin's answers by themselves where the bin alone is certified; where it is not, for certain,
    those of the four bins that it is certified with, counted from the highest.
    """
    shares, min_quality = np.array(SHAPES[shape][0]), SHAPES[shape][1]
    bins = np.repeat(np.arange(len(shares)), PER_BIN)
    four = (len(shares) - 1 - np.arange(len(shares))) // 4
    of_four = (np.bincount(four, weights=shares) / np.bincount(four))[four]
    broken = returned = 0
    for seed in range(DRAWS):
        correct = np.random.default_rng(seed).random(len(bins)) < shares[bins]
        passes = certified_by(bins, correct, DOUBT) >= min_quality
        returned += passes.any()
        broken += bool((np.maximum(shares, of_four)[passes] < min_quality).any())
    return broken, returned


@pytest.mark.parametrize("shape", SHAPES)
def test_a_certified_share_is_wrong_in_at_most_one_of_twenty_draws(shape: str) -> None:
    broken, _ = draws_broken(certify, shape)
    assert broken <= ALLOWED


@pytest.mark.parametrize("shape", ["one bin falls short", "a slope", "a dent between good bins"])
def test_it_certifies_what_is_good(shape: str) -> None:
    _, returned = draws_broken(certify, shape)
    assert returned > 0.9 * DRAWS


@pytest.mark.parametrize("shape", ["the best bins fall short", "all fall short alike"])
@pytest.mark.parametrize("uncertified", [point_estimate, each_by_itself])
def test_shares_that_are_not_certified_are_wrong_more_often(
    shape: str, uncertified: Callable[..., np.ndarray]
) -> None:
    broken, _ = draws_broken(uncertified, shape)
    assert broken > 2 * ALLOWED


def test_bounds_are_those_of_clopper_and_pearson_from_the_highest_scores_downwards() -> None:
    bins = np.repeat(np.arange(6), 200)
    right = [100, 170, 199, 180, 200, 199]
    correct = np.concatenate([np.arange(200) < each for each in right])
    certified = certify(bins, correct, DOUBT)

    def low(wins: int, count: int) -> float:
        return float(binomtest(wins, count, alternative="greater").proportion_ci(1 - DOUBT / 2).low)

    four = low(199 + 180 + 200 + 199, 800)
    # The bin of 180 holds down those below it; four together lend to the bins among them.
    single = np.minimum.accumulate([low(each, 200) for each in right[::-1]])[::-1]
    together = np.array([low(270, 400)] * 2 + [four] * 4)
    np.testing.assert_allclose(certified, np.maximum(single, together), atol=1.1e-5)
    assert (certified <= np.maximum(single, together)).all()


def test_without_right_answers_nothing_is_certified() -> None:
    bins = np.repeat(np.arange(3), 50)
    assert certify(bins, np.zeros(150, np.bool_), DOUBT).tolist() == [0.0, 0.0, 0.0]
