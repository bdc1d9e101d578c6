"""When drafts are left out: where they save no passes, and where they save no time under the load of now."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest

from services.router.domain import (
    Answer,
    FinishReason,
    Others,
    Stage,
    StageAction,
    StageResult,
    Timing,
    Tokens,
    Usage,
    Verification,
)
from services.router.load import Load
from services.router.speculation import Choice, Skip, Speculation
from tests.unit.router.batching import BatchingStage, Clock

if TYPE_CHECKING:
    from collections.abc import Callable

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
    replicas: int = 1,
    times: int = 1,
    passes: int = 2,
) -> list[Skip | None]:
    """Answer one request after the other, and return what was chosen for each."""
    reasons = []
    for _ in range(times):
        choice = speculation.choose("small", "large", depth, replicas)
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


@pytest.mark.parametrize(("replicas", "is_busy"), [(3, True), (4, False)])
def test_what_is_busy_is_a_replica(replicas: int, is_busy: bool) -> None:
    clock = Seconds()
    reasons = ask(
        Speculation(clock), clock, written_s=1.0, verified_s=50.0, depth=31, replicas=replicas, times=500
    )
    assert (Skip.LOAD in reasons) is is_busy


def test_a_busy_target_tries_both_ways_and_keeps_the_faster_one() -> None:
    clock = Seconds()
    found = runs(ask(Speculation(clock), clock, written_s=1.0, verified_s=1.2, depth=16, times=1000))
    assert found[:2] == [(None, 16), (Skip.PROBE, 16)]
    # 16 windows and more of it, as much as it is better: then the other one again, and twice as many.
    assert found[2] == (Skip.LOAD, int(16 * 1.2) * 16)
    assert found[3] == (None, 16)
    assert found[4][0] is Skip.LOAD
    assert found[4][1] > 500


def test_the_better_way_keeps_64_windows_at_most_and_three_times_as_many_where_it_is_much_better() -> None:
    clock = Seconds()
    found = runs(ask(Speculation(clock), clock, written_s=1.0, verified_s=1.2, depth=16, times=12_000))
    kept = [count for reason, count in found if reason is Skip.LOAD]
    assert kept[:4] == [16 * int(windows * 1.2) for windows in (16, 32, 64, 64)]
    # Whatever a trial ran into: a stall says no more than a threefold difference.
    found = runs(ask(Speculation(clock), clock, written_s=900.0, verified_s=1.0, depth=16, times=1000))
    assert found[2] == (None, 3 * 16 * 16)


def test_a_trial_of_what_is_much_slower_ends_early() -> None:
    clock = Seconds()
    found = runs(ask(Speculation(clock), clock, written_s=2.0, verified_s=1.0, depth=64, times=4000))
    # The first trial and every later one; a window of the way that holds takes its 64 all the same.
    assert found[:4] == [(None, 64), (Skip.PROBE, 8), (None, 2 * 16 * 64), (Skip.PROBE, 8)]


def test_a_trial_that_ends_nothing_is_given_up() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=16, times=16)
    reasons = []
    for _ in range(200):
        choice = speculation.choose("small", "large", 16)
        reasons.append(choice.reason)
        clock.now += 3.0
        if choice.reason is None:
            speculation.answered(answer(passes=2), choice)
        else:
            # Its deadline passed.
            speculation.ended(choice)
    assert runs(reasons) == [(Skip.PROBE, 8), (None, 192)]


def test_what_has_become_faster_is_found() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=16, times=100)
    assert set(ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=16, times=400)[-50:]) == {None}


def test_what_has_become_slower_than_the_other_way_does_not_keep_its_windows() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=0.9, depth=16, times=64)
    found = runs(ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=16, times=200))
    # One window shows it, at most two.
    assert found[0][0] is None
    assert found[0][1] <= 32
    assert [reason for reason, _ in found[1:]] == [Skip.PROBE, Skip.LOAD]


@pytest.mark.parametrize(("depth", "is_known"), [(9, False), (17, True), (60, True), (80, False)])
def test_another_load_is_learnt_anew(depth: int, is_known: bool) -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=32, times=100)
    found = runs(ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=depth, times=150))
    assert found[0][0] is Skip.LOAD
    # What is known of another load says nothing: the other way is tried once the window is over.
    assert (len(found) == 1) is is_known
    if not is_known:
        assert found[0][1] <= max(depth, 32)
        assert found[1][0] is None


def test_a_trial_is_not_judged_by_another_load() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    # Both ways take as long as there are calls, and verifying is the faster one.
    ask(speculation, clock, written_s=48.0, verified_s=40.0, depth=48, times=48)
    reasons = ask(speculation, clock, written_s=12.0, verified_s=10.0, depth=12, times=200)
    assert set(reasons[-100:]) == {None}


def test_nothing_is_left_out_once_the_target_is_no_longer_busy() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, times=1000)
    reasons = ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=7, times=100)
    assert set(reasons) == {None}


def test_what_is_chosen_while_the_other_way_is_under_way_does_not_count() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    under_way = [speculation.choose("small", "large", 1) for _ in range(32)]
    # The first seven were chosen for a target with fewer calls.
    assert [choice.counts for choice in under_way] == [False] * 7 + [True] * 25
    clock.now += 1.0
    for choice in under_way[:24]:
        speculation.answered(answer(passes=2), choice)
    others = []
    while True:
        choice = speculation.choose("small", "large", 1)
        if choice.reason is not None:
            break
        speculation.answered(answer(passes=2), choice)
    assert choice.reason is Skip.PROBE
    assert not choice.counts
    others.append(choice)
    for old in under_way[24:]:
        assert not speculation.choose("small", "large", 8).counts
        speculation.ended(old)
    assert speculation.choose("small", "large", 8).counts


def test_one_that_does_not_end_keeps_a_window_from_counting_for_a_while_only() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    stuck = speculation.choose("small", "large", 16)
    ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=16, times=16)
    choices = []
    for _ in range(60):
        choices.append(speculation.choose("small", "large", 16))
        speculation.ended(replace(choices[-1], counts=False))
    assert not choices[40].counts
    assert choices[55].counts
    speculation.ended(stuck)


def test_what_was_cut_off_or_is_of_another_way_counts_nowhere() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    for other in (replace(answer(passes=2), is_whole=False), answer(is_verified=False)):
        for _ in range(100):
            choice = speculation.choose("small", "large", 64)
            assert choice.reason is None
            clock.now += 100.0
            speculation.answered(other, choice)
    # An answer for which nothing was chosen.
    speculation.answered(answer(passes=2))
    assert runs(ask(speculation, clock, written_s=1.0, verified_s=0.5, times=100))[0] == (None, 64)


def test_a_pipelined_answer_takes_its_own_time() -> None:
    clock = Seconds()
    speculation = Speculation(clock)
    for _ in range(64):
        choice = speculation.choose("small", "large", 64)
        # Its target went on for long after it.
        clock.now += 100.0
        speculation.answered(replace(answer(passes=2), is_pipelined=True, latency_ms=500.0), choice)
    assert runs(ask(speculation, clock, written_s=2.0, verified_s=0.5, times=100))[0] == (Skip.PROBE, 8)


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
    assert speculation.choose("small", "large", 1).reason is None
    for _ in range(40):
        speculation.answered(answer(passes=64))
    assert speculation.choose("small", "large", 1) == Choice(Skip.WORTHLESS)
    # One drafter's are not another's.
    assert speculation.choose("medium", "large", 1).reason is None


def test_drafts_that_have_become_useful_are_found_by_the_first_of_them() -> None:
    speculation = Speculation(Seconds())
    for _ in range(100):
        speculation.answered(answer(passes=64))
    assert speculation.choose("small", "large", 1) == Choice(Skip.WORTHLESS)
    speculation.answered(answer(passes=2))
    assert speculation.choose("small", "large", 1).reason is None


def test_where_it_is_not_wanted_every_draft_is_verified() -> None:
    clock = Seconds()
    reasons = ask(
        Speculation(clock, enabled=False), clock, written_s=1.0, verified_s=9.0, times=500, passes=64
    )
    assert set(reasons) == {None}


# Both ways at stages that batch: requests that come without a pause, one for each that has ended.

# Of an H200 of their own (docs/engines.md): milliseconds of a pass, a computed token, a sequence that writes.
SPEEDS = {"13b": (7.9, 0.045, 0.06), "34b": (17.6, 0.11, 0.08), "70b": (34.0, 0.22, 0.1)}


def throughput(
    kept: int | None,
    at_a_time: int,
    *,
    adaptive: bool = True,
    drafter: str = "13b",
    deadline_s: float | None = None,
    has_draft: bool = False,
    routers: int = 1,
    seed: int = 0,
) -> float:
    """Return answers per simulated second. kept: tokens of each draft; None: asks the 70B alone.

    has_draft: the small stage has drafted before anything is chosen, as where a policy escalates. routers:
    each has some of the requests, drawn by the seed, and hears of the others' with the answers.
    """
    clock, chance = Clock(), Random(seed)
    small, large = (
        BatchingStage(clock, pass_ms=speeds[0], token_ms=speeds[1], sequence_ms=speeds[2])
        for speeds in (SPEEDS[drafter], SPEEDS["70b"])
    )
    known = [
        (Speculation(lambda: clock.now_ms / 1e3, enabled=adaptive), Load(1, lambda: clock.now_ms / 1e3))
        for _ in range(routers)
    ]
    ended: list[float] = []

    def request() -> None:
        speculation, load = chance.choice(known)
        calls = ExitStack()
        over = False
        cancel: Callable[[], None] = lambda: None  # noqa: E731 - what is under way changes
        choice: Choice | None = None

        def choose() -> Choice:
            if kept is None:
                return Choice(Skip.WORTHLESS)
            return speculation.choose("small", "large", load.calls(0) + 1)

        def submit(stage: BatchingStage, prefill: int, decode: int, then: Callable[[], None]) -> None:
            nonlocal cancel
            cancel = stage.submit(prefill, decode, then)

        def end(passes: int, is_verified: bool) -> None:
            nonlocal over
            over = True
            load.heard(
                0, Others("gpu", large.under_way + 1 - load.own_calls(0), ("gpu",), clock.now_ms / 1e3)
            )
            calls.close()
            speculation.answered(answer(passes=passes, is_verified=is_verified), choice)
            ended.append(clock.now_ms)
            request()

        def expire() -> None:
            nonlocal over
            if over:
                return
            over = True
            cancel()
            calls.close()
            if choice is not None:
                speculation.ended(choice)
            request()

        def verify() -> None:
            nonlocal choice
            choice = choice or choose()
            calls.enter_context(load.calling(0))
            left = 63 - (kept or 0)
            if choice.reason is not None:
                submit(large, PROMPT, 64, lambda: end(64, is_verified=False))
            elif left <= 0:
                submit(large, PROMPT + 64, 1, lambda: end(1, is_verified=True))
            else:
                submit(large, PROMPT + 64, 1, lambda: submit(large, 8, left, finish))

        def finish() -> None:
            end(64 - (kept or 0), is_verified=True)

        if not has_draft:
            choice = choose()
        if choice is not None and choice.reason is not None:
            verify()
        else:
            submit(small, PROMPT, 64, verify)
        if deadline_s is not None:
            clock.after(deadline_s * 1e3, expire)

    for _ in range(at_a_time):
        request()
    clock.run(400_000.0)
    return sum(when > 150_000.0 for when in ended) / 250.0


@pytest.mark.parametrize("at_a_time", [16, 64])
@pytest.mark.parametrize("kept", [0, 16, 32, 48, 64])
def test_a_chain_never_loses_to_its_last_stage_alone(kept: int, at_a_time: int) -> None:
    alone = throughput(None, at_a_time)
    # What trying the other way now and then costs.
    assert throughput(kept, at_a_time) > 0.97 * alone
    assert all(throughput(kept, at_a_time, routers=4, seed=seed) > 0.96 * alone for seed in range(3))


@pytest.mark.parametrize("at_a_time", [16, 64])
@pytest.mark.parametrize(
    ("drafter", "routers", "least"), [("13b", 1, 0.9), ("34b", 1, 0.9), ("13b", 4, 0.9), ("34b", 4, 0.6)]
)
def test_a_chain_keeps_what_it_gains_under_load(
    drafter: str, routers: int, least: float, at_a_time: int
) -> None:
    """Of several routers one gains by writing where the others verify, and leaves them a slow drafter."""
    alone, always = throughput(None, at_a_time), throughput(64, at_a_time, drafter=drafter, adaptive=False)
    assert always > 1.4 * alone
    for seed in range(1 if routers == 1 else 3):
        chain = throughput(64, at_a_time, drafter=drafter, routers=routers, seed=seed)
        assert chain - alone > least * (always - alone)


def test_without_the_rule_a_chain_loses_under_load() -> None:
    assert throughput(16, 64, adaptive=False) < 0.85 * throughput(None, 64)


@pytest.mark.parametrize("kept", [16, 64])
def test_an_escalation_takes_the_faster_way(kept: int) -> None:
    ways = [throughput(kept, 64, has_draft=True, adaptive=adaptive) for adaptive in (True, False)]
    assert ways[0] > 0.95 * ways[1]


@pytest.mark.parametrize("deadline_s", [3.0, 3.5])
def test_a_way_that_no_deadline_allows_does_not_hold(deadline_s: float) -> None:
    always = throughput(64, 64, adaptive=False, deadline_s=deadline_s)
    assert throughput(None, 64, deadline_s=deadline_s) < 0.1 * always
    assert throughput(64, 64, deadline_s=deadline_s) > 0.9 * always
