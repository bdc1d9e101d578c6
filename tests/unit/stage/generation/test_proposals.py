"""What is proposed at a step: what writes most tokens per second, by what the engine has written."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from services.stage.generation.proposals import AverageDraft, DraftFollower, StepTimes, share_out

ANSWER = list(range(100, 164))


def wrong(ids: list[int], every: int) -> list[int]:
    return [7 if index % every == every // 2 else token for index, token in enumerate(ids)]


def taught(fixed: float, slope: float) -> StepTimes:
    times = StepTimes()
    for tokens in (*range(1, 600, 7), *range(1, 600, 7)):
        times.observe(tokens, fixed + slope * tokens)
    return times


def counts(
    likely: list[float], agreement: list[float], most: list[int], running: int, times: StepTimes
) -> list[int]:
    return list(share_out(np.array(likely), np.array(agreement), np.array(most), running, times))


def rate(
    shares: tuple[int, ...], likely: list[float], agreement: list[float], running: int, times: StepTimes
) -> float:
    written = running + sum(
        p * s**i for n, p, s in zip(shares, likely, agreement, strict=True) for i in range(1, n + 1)
    )
    return written / times.seconds(running + sum(shares))


@pytest.mark.parametrize("running", [2, 5, 40])
@pytest.mark.parametrize("likely", [[0.9, 0.2], [0.5, 0.5], [1.0, 0.01]])
@pytest.mark.parametrize("slope", [0.001, 0.02, 0.3])
def test_no_other_shares_write_more_per_second(running: int, likely: list[float], slope: float) -> None:
    agreement, most, times = [0.9, 0.7], [6, 5], taught(1.0, slope)
    got = tuple(counts(likely, agreement, most, running, times))
    every = itertools.product(range(most[0] + 1), range(most[1] + 1))
    best = max(rate(shares, likely, agreement, running, times) for shares in every)
    assert rate(got, likely, agreement, running, times) == pytest.approx(best)


def test_what_takes_no_time_is_proposed_whole() -> None:
    assert counts([0.5], [0.9], [64], 1, taught(1.0, 0.0)) == [64]


def test_no_more_is_proposed_than_there_is() -> None:
    assert counts([0.9, 0.9, 0.9], [0.99] * 3, [0, 3, 9], 3, taught(1.0, 1e-6)) == [0, 3, 9]


def test_steps_show_what_a_token_takes() -> None:
    times = taught(0.02, 0.0001)
    fixed, slope = times.line
    assert (fixed, slope) == (pytest.approx(0.02, rel=0.02), pytest.approx(0.0001, rel=0.02))


def test_one_long_step_moves_little() -> None:
    times = taught(0.02, 0.0001)
    times.observe(10, 60.0)
    assert times.seconds(10) == pytest.approx(0.021, rel=0.1)


def test_a_first_step_that_is_held_up_is_forgotten_at_once() -> None:
    # As where a library compiles a kernel when it verifies a draft first.
    chance, average, times = random.Random(1), AverageDraft(), StepTimes()
    for _ in range(64 * 5):
        times.observe(1, step_s(1))
    held_up = [3.0, 3.0]
    assert [simulated(1, "right", average, times, chance, held_up) for _ in range(4)][-1] >= 26


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    times, likely, agreement = taught(1.0, 0.0001), np.array([0.9, 0.5]), np.array([0.99, 0.9])
    for most_tokens in (3, 10, 50, 100):
        got = share_out(likely, agreement, np.array([64, 64]), 2, times, most_tokens)
        assert most_tokens - 2 <= 2 + sum(got) <= most_tokens
    # What is likelier goes first.
    first, second = share_out(likely, agreement, np.array([64, 64]), 2, times, 20)
    assert first > 2 * second


def test_a_draft_goes_on_after_a_replaced_token() -> None:
    follower = DraftFollower(AverageDraft(), wrong(ANSWER, 8))
    follower.took(ANSWER[:10])
    assert follower.has_departed
    assert follower.prefix == 4
    assert follower.rest(2) == ANSWER[10:12]


def test_a_draft_is_found_again_after_an_insertion() -> None:
    follower = DraftFollower(AverageDraft(), [*ANSWER[:10], 1, 2, 3, *ANSWER[10:]])
    follower.took(ANSWER[:14])
    assert follower.rest(3) == ANSWER[14:17]


def test_a_draft_that_is_still_written_is_followed_as_it_comes() -> None:
    follower = DraftFollower(AverageDraft(), ANSWER[:4])
    follower.took(ANSWER[:4])
    assert not follower.rest(8)
    follower.ids.extend(ANSWER[4:8])
    assert follower.rest(8) == ANSWER[4:8]
    assert not follower.has_departed


def test_what_comes_too_late_is_compared_with_what_was_written() -> None:
    follower = DraftFollower(AverageDraft(), ANSWER[:4])
    follower.took(ANSWER[:10])
    follower.ids.extend(ANSWER[4:16])
    follower.took(ANSWER[10:11])
    assert (follower.prefix, follower.has_departed) == (11, False)
    assert follower.rest(3) == ANSWER[11:14]


def test_noise_is_soon_disbelieved_and_agreement_believed() -> None:
    noise, right = DraftFollower(AverageDraft(), [9] * 64), DraftFollower(AverageDraft(), ANSWER)
    for follower in (noise, right):
        follower.took(ANSWER[:4])
    assert noise.likely < 0.05
    assert right.likely > 0.95


def test_the_average_draft_learns_from_those_that_are_done_with() -> None:
    average = AverageDraft()
    for _ in range(50):
        follower = DraftFollower(average, [9] * 64)
        follower.took(ANSWER)
        follower.close()
    assert DraftFollower(average).likely < 0.1
    for _ in range(50):
        follower = DraftFollower(average, wrong(ANSWER, 4))
        follower.took(ANSWER)
        follower.close()
    assert DraftFollower(average).likely > 0.9
    assert DraftFollower(average).agreement == pytest.approx(0.75, abs=0.05)


def step_s(tokens: int) -> float:
    """Seconds of a step, by a formula: bound by memory for few tokens, by sums for many.

    It is like a 34B's on an H200. What the engine itself takes there is measured by benchmarks.gpu.in_engine.
    """
    return 0.0226 * max(1.0 + 0.0006 * tokens, tokens / 270)


def drafted(kind: str, chance: random.Random) -> list[int]:
    noise = [chance.randrange(1_000, 30_000) for _ in ANSWER]
    half = len(ANSWER) // 2
    return {"right": ANSWER, "noise": noise, "half": ANSWER[:half] + noise[half:]}.get(kind) or wrong(
        ANSWER, int(kind)
    )


def simulated(
    batch: int,
    kind: str,
    average: AverageDraft,
    times: StepTimes,
    chance: random.Random,
    held_up: list[float] | None = None,
) -> float:
    """Return how many times as fast a batch is written with drafts as without.

    held_up: seconds that the next steps with a proposal take; they are taken out of it.
    """
    followers = [DraftFollower(average, drafted(kind, chance)) for _ in range(batch)]
    written, proposed = [0] * batch, [[] for _ in range(batch)]
    seconds = 0.0
    while live := [index for index in range(batch) if written[index] < len(ANSWER)]:
        tokens = sum(1 + len(proposed[index]) for index in live)
        seconds += step_s(tokens)
        is_held_up = held_up and tokens > len(live)
        times.observe(tokens, held_up.pop() if held_up and is_held_up else step_s(tokens))
        for index in live:
            left = ANSWER[written[index] :]
            accepted = next(
                (i for i, (a, b) in enumerate(zip(proposed[index], left, strict=False)) if a != b),
                min(len(proposed[index]), len(left)),
            )
            followers[index].took(left[: accepted + 1])
            written[index] += len(left[: accepted + 1])
        rests = [followers[index].rest(len(ANSWER) - written[index]) for index in live]
        shares = share_out(
            np.array([followers[index].likely for index in live]),
            np.array([followers[index].agreement for index in live]),
            np.array([len(rest) for rest in rests]),
            len(live),
            times,
        )
        for index, rest, share in zip(live, rests, shares, strict=True):
            proposed[index] = list(rest[:share])
    for follower in followers:
        follower.close()
    return len(ANSWER) * step_s(batch) / seconds


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        (1, {"right": 26, "16": 9.5, "8": 5.7, "4": 3.2, "half": 1.9, "noise": 0.97}),
        (8, {"right": 15, "16": 8.5, "8": 5.0, "4": 3.0, "half": 1.8, "noise": 0.97}),
        (64, {"right": 2.7, "16": 2.4, "8": 1.5, "4": 1.1, "half": 1.1, "noise": 0.97}),
    ],
)
def test_in_a_simulation_every_kind_of_draft_pays_or_costs_next_to_nothing(
    batch: int, wanted: dict[str, float]
) -> None:
    chance, average, times = random.Random(1), AverageDraft(), StepTimes()
    for kind, least in wanted.items():
        simulated(batch, kind, average, times, chance)
        assert simulated(batch, kind, average, times, chance) >= least, kind
