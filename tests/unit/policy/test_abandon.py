"""When a draft counts as hopeless, on made outcomes."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest

from policy_service.train.dataset import PREFIXES, Dataset
from policy_service.train.fit import HOPELESS, abandon_rules


def outcomes(means: np.ndarray, correct: np.ndarray) -> Dataset:
    """Return outcomes of two stages in which only the first prefix of the first stage says anything."""
    count = len(means)
    prefixes = np.full((count, 2, len(PREFIXES)), np.nan)
    prefixes[:, 0, 0] = means
    both = np.stack([correct, np.ones(count, np.bool_)], axis=1)
    return Dataset(("a", "b"), {}, both, {}, {}, ("",) * count, np.zeros(count, np.int64), prefixes)


def test_a_rule_gives_up_drafts_that_are_almost_never_right() -> None:
    rng = np.random.default_rng(0)
    means = -rng.random(4000)
    correct = (means > -0.5) | (rng.random(4000) < 0.01)
    (rule,) = abandon_rules(outcomes(means, correct), 0)
    assert rule.tokens == PREFIXES[0]
    given_up = means < rule.mean_logprob
    # The bound holds, by another library's interval, and would not with many more.
    interval = binomtest(int(correct[given_up].sum()), int(given_up.sum()), alternative="less").proportion_ci(
        0.95
    )
    assert interval.high <= HOPELESS + 1e-6
    assert -0.56 < rule.mean_logprob < -0.47


def test_few_or_promising_drafts_give_no_rule() -> None:
    means = -np.linspace(0.0, 1.0, 40)
    # None of 40 is right: the bound is still 1 - 0.05 ** (1 / 40) = 0.072.
    assert abandon_rules(outcomes(means, np.zeros(40, np.bool_)), 0) == ()
    assert abandon_rules(outcomes(-np.ones(4000), np.ones(4000, np.bool_)), 0) == ()
    assert abandon_rules(outcomes(np.full(400, np.nan), np.zeros(400, np.bool_)), 0) == ()


def test_the_last_stage_is_always_heard_to_the_end() -> None:
    assert abandon_rules(outcomes(-np.ones(4000), np.zeros(4000, np.bool_)), 1) == ()
