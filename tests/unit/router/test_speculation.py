"""When drafts are left out: where they save no passes, and where they save no time under the load of now."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from services.router.domain import (
    Answer,
    FinishReason,
    Stage,
    StageAction,
    StageResult,
    Timing,
    Tokens,
    Usage,
    Verification,
)
from services.router.speculation import Choice, Skip, Speculation
from tests.unit.router.batching import BatchingStage, Clock

LARGE = Stage("large", 2, 8.8, 1000.0)
# An answer of 63 tokens and the one that ends it.
TOKENS = 63
PROMPT = 128


def answer(*, passes: int = TOKENS + 1, is_verified: bool = True) -> Answer:
    usage = Usage(completion_tokens=TOKENS, proposed_tokens=64 if is_verified else 0, forward_passes=passes)
    return Answer(
        LARGE,
        StageAction.VERIFY if is_verified else StageAction.GENERATE,
        StageResult("hi", (1,) * TOKENS, "", FinishReason.EOS, usage, Timing()),
        Tokens((1,) * TOKENS, "hi"),
        Verification(64, 10) if is_verified else None,
        0.0,
        LARGE.cost,
        "small" if is_verified else "",
    )


class Seconds:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(
    speculation: Speculation,
    clock: Seconds,
    *,
    written_s: float,
    verified_s: float,
    depth: int = 64,
    times: int = 1,
    passes: int = 2,
) -> list[Skip | None]:
    """Answer one request after the other, and return what was chosen for each."""
    reasons = []
    for _ in range(times):
        choice = speculation.choose("small", "large", depth)
        is_verified = choice.reason is None
        clock.now += verified_s if is_verified else written_s
        speculation.answered(answer(passes=passes if is_verified else 64, is_verified=is_verified), choice)
        reasons.append(choice.reason)
    return reasons


def runs(reasons: list[Skip | None]) -> list[tuple[Skip | None, int]]:
    return [(reason, len(list(group))) for reason, group in itertools.groupby(reasons)]


@pytest.mark.parametrize("depth", [1, 7])
def test_a_target_with_few_calls_verifies_however_long_that_takes(depth: int) -> None:
    clock = Seconds()
    reasons = ask(Speculation(clock), clock, written_s=1.0, verified_s=50.0, depth=depth, times=500)
    assert set(reasons) == {None}


def test_a_busy_target_tries_both_ways_and_keeps_the_faster_one() -> None:
    clock = Seconds()
    # 16 at a time: 16 choices that do not count, while others are under way, then 16 that do.
    found = runs(ask(Speculation(clock), clock, written_s=1.0, verified_s=1.2, depth=16, times=1000))
    assert found[:2] == [(None, 32), (Skip.PROBE, 32)]
    # 16 windows and more of it, as much as it is better: then the other one again, and twice as many.
    assert found[2] == (Skip.LOAD, int(16 * 1.2) * 16)
    assert found[3] == (None, 32)
    assert found[4][0] is Skip.LOAD
    assert found[4][1] > 500


def test_a_trial_of_what_is_much_slower_ends_early() -> None:
    clock = Seconds()
    found = runs(ask(Speculation(clock), clock, written_s=3.0, verified_s=1.0, depth=16, times=1000))
    assert found[:4] == [(None, 32), (Skip.PROBE, 16 + 8), (None, 16 + 3 * 16 * 16), (Skip.PROBE, 16 + 8)]


def test_what_has_become_faster_is_found() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=16, times=100)
    assert set(ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=16, times=400)[-50:]) == {None}


def test_another_load_is_learnt_anew() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=80, times=1000)
    reasons = ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=10, times=300)
    assert reasons[0] is Skip.LOAD
    assert set(reasons[-50:]) == {None}


def test_nothing_is_left_out_once_the_target_is_no_longer_busy() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, times=1000)
    reasons = ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=7, times=100)
    assert set(reasons) == {None}


def test_what_was_cut_off_or_is_of_another_way_counts_nowhere() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=0.5, times=64)
    for other in (replace(answer(passes=2), is_whole=False), answer(is_verified=False)):
        for _ in range(100):
            choice = speculation.choose("small", "large", 64)
            assert choice.reason is None
            clock.now += 100.0
            speculation.answered(other, choice)
    # An answer for which nothing was chosen.
    speculation.answered(answer(passes=2))
    assert runs(ask(speculation, clock, written_s=1.0, verified_s=0.5, times=200))[1][0] is Skip.PROBE


def test_drafts_that_save_no_passes_are_left_out_at_any_load() -> None:
    for depth in (1, 64):
        clock = Seconds()
        reasons = ask(
            Speculation(clock), clock, written_s=1.0, verified_s=1.0, depth=depth, times=500, passes=64
        )
        # A few that say nothing yet; then one in 16 is verified, one in 32, one in 64, and one in 128.
        verified = [place for place, reason in enumerate(reasons) if reason is None]
        assert verified == [*range(8), 7 + 16, 7 + 48, 7 + 112, 7 + 240, 7 + 368]
        assert set(reasons) == {None, Skip.WORTHLESS}


def test_a_few_bad_drafts_in_a_row_do_not_turn_what_many_have_shown() -> None:
    speculation = Speculation(Seconds())
    for _ in range(100):
        speculation.answered(answer(passes=32))
    for _ in range(10):
        speculation.answered(answer(passes=64))
    assert speculation.choose("small", "large", 1) == Choice()
    for _ in range(40):
        speculation.answered(answer(passes=64))
    assert speculation.choose("small", "large", 1) == Choice(Skip.WORTHLESS)
    # One drafter's are not another's.
    assert speculation.choose("medium", "large", 1) == Choice()


def test_drafts_that_have_become_useful_are_found_by_the_first_of_them() -> None:
    speculation = Speculation(Seconds())
    for _ in range(100):
        speculation.answered(answer(passes=64))
    assert speculation.choose("small", "large", 1) == Choice(Skip.WORTHLESS)
    speculation.answered(answer(passes=2))
    assert speculation.choose("small", "large", 1) == Choice()


def test_where_it_is_not_wanted_every_draft_is_verified() -> None:
    clock = Seconds()
    reasons = ask(
        Speculation(clock, enabled=False), clock, written_s=1.0, verified_s=9.0, times=500, passes=64
    )
    assert set(reasons) == {None}


# Both ways at a stage that batches: requests that come without a pause, one for each that is answered.


def throughput(kept: int | None, at_a_time: int, *, adaptive: bool = True) -> float:
    """Return answers per simulated second of a chain. kept: tokens of each draft; None: asks large alone."""
    clock = Clock()
    # A 13B and a 70B on an H200 of their own (docs/engines.md).
    small = BatchingStage(clock, pass_ms=7.9, token_ms=0.045, sequence_ms=0.06)
    large = BatchingStage(clock, pass_ms=34.0, token_ms=0.22, sequence_ms=0.1)
    speculation = Speculation(lambda: clock.now_ms / 1e3, enabled=adaptive)
    ended: list[float] = []

    def request() -> None:
        choice = Choice(Skip.LOAD)
        if kept is not None:
            choice = speculation.choose("small", "large", large.under_way + 1)

        def end(passes: int, is_verified: bool) -> None:
            speculation.answered(answer(passes=passes, is_verified=is_verified), choice)
            ended.append(clock.now_ms)
            request()

        def go_on() -> None:
            left = 63 - (kept or 0)
            if left <= 0:
                end(1, is_verified=True)
            else:
                large.submit(8, left, lambda: end(1 + left, is_verified=True))

        if choice.reason is not None:
            large.submit(PROMPT, 64, lambda: end(64, is_verified=False))
        else:
            small.submit(PROMPT, 64, lambda: large.submit(PROMPT + 64, 1, go_on))

    for _ in range(at_a_time):
        request()
    clock.run(400_000.0)
    return sum(when > 150_000.0 for when in ended) / 250.0


@pytest.mark.parametrize("at_a_time", [16, 64])
@pytest.mark.parametrize("kept", [0, 16, 32, 48, 64])
def test_a_chain_never_loses_to_its_last_stage_alone(kept: int, at_a_time: int) -> None:
    alone, chain = throughput(None, at_a_time), throughput(kept, at_a_time)
    # What trying the other way now and then costs.
    assert chain > 0.97 * alone


def test_a_chain_keeps_what_it_gains_under_load() -> None:
    assert throughput(64, 64) > 0.93 * throughput(64, 64, adaptive=False) > 1.4 * throughput(None, 64)


def test_without_the_rule_a_chain_loses_under_load() -> None:
    assert throughput(16, 64, adaptive=False) < 0.85 * throughput(None, 64)
