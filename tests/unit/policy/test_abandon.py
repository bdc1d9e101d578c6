"""When a draft counts as hopeless, on made outcomes."""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, binomtest

from policy_service.train.dataset import PREFIXES, Dataset
from policy_service.train.fit import DOUBT, HOPELESS, abandon_rules


def outcomes(means: np.ndarray, correct: np.ndarray) -> Dataset:
    """Return outcomes of two stages in which only the first prefixes of the first stage say anything.

    means: [n] or [n, prefixes].
    """
    count = len(means)
    means = means.reshape(count, -1)
    prefixes = np.full((count, 2, len(PREFIXES)), np.nan)
    prefixes[:, 0, : means.shape[1]] = means
    both = np.stack([correct, np.ones(count, np.bool_)], axis=1)
    return Dataset(("a", "b"), {}, both, {}, {}, ("",) * count, np.zeros(count, np.int64), prefixes)


def sharp(rng: np.random.Generator, count: int) -> Dataset:
    """Drafts that are right below -0.5 once in 100 times, above it always."""
    means = -rng.random(count)
    return outcomes(means, (means > -0.5) | (rng.random(count) < 0.01))


def test_a_rule_gives_up_drafts_that_are_almost_never_right() -> None:
    rng = np.random.default_rng(0)
    train, calibration = sharp(rng, 8000), sharp(rng, 4000)
    (rule,) = abandon_rules(train, calibration, 0)
    assert rule.tokens == PREFIXES[0]
    given_up = calibration.prefixes[:, 0, 0] < rule.mean_logprob
    right = calibration.correct[given_up, 0]
    # The bound holds on prompts that did not choose the rule, by another library's interval.
    assert binomtest(int(right.sum()), len(right), alternative="less").proportion_ci(0.95).high <= HOPELESS
    # At -0.478, one in twenty is right.
    assert -0.51 < rule.mean_logprob < -0.475


def test_a_rule_sees_what_the_rules_for_fewer_tokens_left() -> None:
    # The second prefix looks equally bad for the 1,900 wrong drafts of 2,000 and for 60 right ones: alone it
    # would do, with 3% of them right; of what the first prefix leaves, all are right.
    rng = np.random.default_rng(1)
    wrong = np.arange(2000) < 1900
    first = np.where(wrong, -1.0, 0.0)
    second = np.where(np.arange(2000) < 1960, -1.0, 0.0) - 1e-3 * rng.random(2000)
    alone = outcomes(np.stack([np.full(2000, np.nan), second], axis=1), ~wrong)
    assert [rule.tokens for rule in abandon_rules(alone, alone, 0)] == [PREFIXES[1]]
    # Every second of the wrong ones is told by the first prefix already: 60 of the other 1,010 are right.
    first[1:1900:2] = 0.0
    first -= 1e-3 * rng.random(2000)
    both = outcomes(np.stack([first, second], axis=1), ~wrong)
    assert [rule.tokens for rule in abandon_rules(both, both, 0)] == [PREFIXES[0]]


def test_few_or_promising_drafts_give_no_rule() -> None:
    few = outcomes(-np.linspace(0.0, 1.0, 40), np.zeros(40, np.bool_))
    # None of 40 is right: the bound is still 1 - 0.05 ** (1 / 40) = 0.072.
    assert abandon_rules(few, few, 0) == ()
    promising = outcomes(-np.ones(4000), np.ones(4000, np.bool_))
    assert abandon_rules(promising, promising, 0) == ()
    short = outcomes(np.full(400, np.nan), np.zeros(400, np.bool_))
    assert abandon_rules(short, short, 0) == ()


def test_rules_that_other_prompts_do_not_bear_out_are_not_taken() -> None:
    rng = np.random.default_rng(2)
    train = sharp(rng, 8000)
    means = -rng.random(4000)
    assert abandon_rules(train, outcomes(means, rng.random(4000) < 0.06), 0) == ()


def test_after_a_set_of_rules_that_fails_no_laxer_one_is_tried() -> None:
    # In training the lower ones are the worse ones. To calibrate, the lowest are right once in ten times and
    # no other ones are: the strictest rules fail, and the laxest would pass.
    rng = np.random.default_rng(3)
    means = -rng.random(8000)
    train = outcomes(means, rng.random(8000) < 0.1 * (1 + means))
    calibration = outcomes(means, (means < -0.8) & (rng.random(8000) < 0.1))
    assert abandon_rules(train, calibration, 0) == ()
    assert abandon_rules(train, outcomes(means, rng.random(8000) < 0.02), 0) != ()


def test_the_last_stage_is_always_heard_to_the_end() -> None:
    data = outcomes(-np.ones(4000), np.zeros(4000, np.bool_))
    assert abandon_rules(data, data, 1) == ()


def test_more_than_the_promised_share_is_right_in_at_most_one_of_twenty_draws() -> None:
    # As many as promised are right below -0.5, and all above: any rule is at the edge of a broken promise.
    broken, chosen_broken, draws = 0, 0, 150
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        means = -rng.random(1000)
        calibration = outcomes(means, (means > -0.5) | (rng.random(1000) < HOPELESS))
        broken += bool(abandon_rules(sharp(rng, 1000), calibration, 0))
        chosen_broken += chosen_by_its_bound(calibration) > -1.0
    # Three standard errors of a share of 0.05.
    allowed = draws * DOUBT + 3 * np.sqrt(draws * DOUBT * (1 - DOUBT))
    assert broken <= allowed
    # A rule that is chosen by the bound that it is to keep breaks it more often.
    assert chosen_broken > allowed


def chosen_by_its_bound(data: Dataset) -> float:
    """The highest mean below which the bound, uncorrected for the choice, is HOPELESS at most."""
    order = np.argsort(data.prefixes[:, 0, 0])
    right, counts = np.cumsum(data.correct[order, 0]), np.arange(1, len(order) + 1)
    fitting = np.flatnonzero(beta.ppf(1 - DOUBT, right + 1, counts - right) <= HOPELESS)
    return float(data.prefixes[order[fitting[-1]], 0, 0]) if len(fitting) else -1.0
