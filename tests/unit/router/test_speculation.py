"""When drafts are left out: where they save no passes, and where they save no time under the load of now."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest

from benchmarks.simulation import ClosedLoop, Workload, answer
from services.router.planning.draft_selection import (
    PROBE_EVERY,
    PROBE_EVERY_AT_MOST,
    WORTHLESS,
    DraftChoice,
    DraftSelection,
    SkipReason,
)

# Of an answer, the one that ends it included.
TOKENS = 64
# Of a verification that keeps so little of a draft that by the passes alone either way may be the faster one.
PASSES = round(0.95 * WORTHLESS * TOKENS)
ACCEPTED = (0.0, 0.25, 0.5, 0.75, 1.0)
AT_A_TIME = (1, 2, 4, 8, 16, 32, 64)


class Seconds:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(
    speculation: DraftSelection,
    clock: Seconds,
    *,
    written_s: float,
    verified_s: float,
    depth: int = 64,
    replicas: int = 1,
    times: int = 1,
    passes: int = PASSES,
    has_draft: bool = False,
) -> list[SkipReason | None]:
    """Answer one request after the other, and return what was chosen for each."""
    reasons = []
    for _ in range(times):
        choice = speculation.choose("small", "large", depth, replicas, has_draft=has_draft)
        is_verified = choice.reason is None
        seconds = verified_s if is_verified else written_s
        clock.now += seconds
        took = passes if is_verified else TOKENS
        speculation.answered(answer(TOKENS, took, seconds * 1e3, is_verified=is_verified), choice)
        reasons.append(choice.reason)
    return reasons


def runs(reasons: list[SkipReason | None]) -> list[tuple[SkipReason | None, int]]:
    return [(reason, len(list(group))) for reason, group in itertools.groupby(reasons)]


@pytest.mark.parametrize("depth", [1, 8, 64])
@pytest.mark.parametrize(("verified_s", "held"), [(1.3, SkipReason.LOAD), (0.7, None)])
def test_both_ways_are_tried_and_the_faster_one_holds(
    depth: int, verified_s: float, held: SkipReason | None
) -> None:
    clock = Seconds()
    found = ask(DraftSelection(clock), clock, written_s=1.0, verified_s=verified_s, depth=depth, times=400)
    assert found[0] is None
    assert (SkipReason.PROBE in found) or held is None
    # But for trials.
    assert found[-100:].count(held) >= 88


def test_what_verifying_foretells_spares_a_trial_of_writing() -> None:
    clock = Seconds()
    # One pass of 0.1 s, where writing takes 64.
    found = ask(DraftSelection(clock), clock, written_s=6.0, verified_s=0.1, depth=1, passes=1, times=200)
    assert set(found) == {None}


def test_a_wrong_forecast_is_corrected_by_a_trial() -> None:
    clock = Seconds()
    # A stage whose passes take as long as they compute tokens: writing is faster than one pass over a draft.
    found = ask(DraftSelection(clock), clock, written_s=0.9, verified_s=1.0, depth=1, passes=16, times=3000)
    assert set(found[-50:]) == {SkipReason.LOAD}


@pytest.mark.parametrize("slower", [1.1, 1.5, 3.0])
def test_trials_take_two_per_cent_of_the_time_at_most(slower: float) -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    ask(speculation, clock, written_s=1.0, verified_s=slower, depth=16, times=2000)
    found = ask(speculation, clock, written_s=1.0, verified_s=slower, depth=16, times=20_000)
    assert found.count(None) * (slower - 1.0) < 0.02 * len(found)
    # The other way is not given up for ever.
    assert None in found


def test_a_trial_that_ends_nothing_is_given_up() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=16, times=16)
    reasons = []
    for _ in range(400):
        choice = speculation.choose("small", "large", 16)
        reasons.append(choice.reason)
        clock.now += 3.0 if choice.reason else 0.5
        if choice.reason is None:
            speculation.answered(answer(TOKENS, 33, 500.0, is_verified=True), choice)
        else:
            # Its deadline passed.
            speculation.ended(choice)
    assert sum(reason is not None for reason in reasons) < 60
    assert set(reasons[-100:]) == {None}


def test_what_has_become_faster_is_found() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.2, depth=16, times=200)
    assert set(ask(speculation, clock, written_s=1.0, verified_s=0.5, depth=16, times=2500)[-50:]) == {None}


def test_what_has_become_slower_than_the_other_way_does_not_hold() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    ask(speculation, clock, written_s=1.0, verified_s=0.85, depth=16, times=200)
    found = ask(speculation, clock, written_s=1.0, verified_s=1.4, depth=16, times=200)
    assert set(found[-150:]) == {SkipReason.LOAD}


def test_windows_of_equal_ways_do_not_turn_about() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    ask(speculation, clock, written_s=1.0, verified_s=1.0, depth=16, times=1000)
    found = runs(ask(speculation, clock, written_s=1.0, verified_s=1.0, depth=16, times=4000))
    assert all(count >= 40 for reason, count in found[1:-1] if reason is not SkipReason.PROBE)


def test_each_load_has_a_verdict_of_its_own_that_is_remembered() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    for _ in range(2):
        ask(speculation, clock, written_s=4.0, verified_s=5.0, depth=64, times=300)
        ask(speculation, clock, written_s=2.5, verified_s=1.5, depth=8, times=100)
    found = ask(speculation, clock, written_s=4.0, verified_s=5.0, depth=64, times=60)
    assert found[-40:].count(SkipReason.LOAD) >= 32
    # Nor does it take long to see that the load has changed.
    found = ask(speculation, clock, written_s=2.5, verified_s=1.5, depth=8, times=40)
    assert found[-30:].count(None) >= 28


def test_the_load_is_that_of_a_replica() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    ask(speculation, clock, written_s=4.0, verified_s=5.0, depth=64, times=300)
    found = ask(speculation, clock, written_s=4.0, verified_s=5.0, depth=256, replicas=4, times=20)
    assert set(found) == {SkipReason.LOAD}


def test_chains_and_escalations_have_verdicts_of_their_own() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    for _ in range(300):
        ask(speculation, clock, written_s=1.0, verified_s=1.4)
        ask(speculation, clock, written_s=1.0, verified_s=0.7, has_draft=True)
    assert ask(speculation, clock, written_s=1.0, verified_s=1.4) == [SkipReason.LOAD]
    assert ask(speculation, clock, written_s=1.0, verified_s=0.7, has_draft=True) == [None]


def test_a_target_that_verifies_while_it_writes_gets_every_draft_that_is_there() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    # Drafts that save nothing.
    ask(speculation, clock, written_s=1.0, verified_s=1.4, passes=TOKENS, times=300)
    ask(speculation, clock, written_s=1.0, verified_s=1.4, passes=TOKENS, times=300, has_draft=True)
    assert speculation.choose("small", "large", 8, has_draft=True).reason is not None

    def verified(*, while_writing: bool) -> None:
        found = answer(TOKENS, TOKENS, 1.0, is_verified=True)
        assert found.verification is not None
        speculation.answered(
            replace(found, verification=replace(found.verification, while_writing=while_writing))
        )

    verified(while_writing=False)
    assert speculation.choose("small", "large", 8, has_draft=True).reason is not None
    verified(while_writing=True)
    # A pipeline's draft, or one with a seed, was scored by itself.
    verified(while_writing=False)
    assert speculation.choose("small", "large", 8, has_draft=True).reason is None
    # None is made for it.
    assert speculation.choose("small", "large", 8).reason is not None


def test_what_is_chosen_while_the_other_way_is_under_way_does_not_count() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    under_way = [speculation.choose("small", "large", 1) for _ in range(8)]
    while under_way[-1].reason is None:
        clock.now += 0.1
        speculation.answered(answer(TOKENS, PASSES, 800.0, is_verified=True), under_way.pop(0))
        under_way.append(speculation.choose("small", "large", 1))
    others, last = under_way[:-1], under_way[-1]
    assert last.start
    assert not last.start.is_settled
    for old in others:
        speculation.ended(old)
    settled = speculation.choose("small", "large", 1)
    assert settled.reason is SkipReason.PROBE
    assert settled.start
    assert settled.start.is_settled


def test_one_that_does_not_end_keeps_a_window_from_counting_for_a_while_only() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    speculation.choose("small", "large", 1)
    found = ask(speculation, clock, written_s=1.0, verified_s=1.4, depth=2, times=200)
    assert set(found[-100:]) == {SkipReason.LOAD}


def test_what_was_cut_off_or_is_of_another_way_counts_nowhere() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    cut = replace(answer(TOKENS, 33, 1e5, is_verified=True), is_whole=False)
    for other in (cut, answer(TOKENS, TOKENS, 1e5, is_verified=False)):
        for _ in range(100):
            choice = speculation.choose("small", "large", 64)
            assert choice.reason is None
            clock.now += 100.0
            speculation.answered(other, choice)
    # An answer for which nothing was chosen.
    speculation.answered(answer(TOKENS, 33, 1e5, is_verified=True))
    found = ask(speculation, clock, written_s=1.0, verified_s=0.1, passes=1, times=100)
    assert found.count(None) > 90


def test_a_pipelined_answer_takes_its_own_time() -> None:
    clock = Seconds()
    speculation = DraftSelection(clock)
    reasons = []
    for _ in range(300):
        choice = speculation.choose("small", "large", 64)
        # Its target went on for long after it.
        clock.now += 100.0
        is_verified = choice.reason is None
        one = answer(
            TOKENS, 33 if is_verified else TOKENS, 500.0 if is_verified else 0.0, is_verified=is_verified
        )
        speculation.answered(replace(one, is_pipelined=is_verified), choice)
        reasons.append(choice.reason)
    assert set(reasons[-50:]) == {None}


@pytest.mark.parametrize("depth", [1, 64])
def test_drafts_that_save_no_passes_are_left_out_at_any_load(depth: int) -> None:
    clock = Seconds()
    times = {"written_s": 9.0, "verified_s": 1.0}
    found = ask(DraftSelection(clock), clock, **times, depth=depth, times=500, passes=64)
    # After a few that say nothing yet, some are verified, and fewer each time.
    first = found.index(SkipReason.WORTHLESS)
    verified = [place for place, reason in enumerate(found) if place > first and reason is None]
    between = [later - earlier for earlier, later in itertools.pairwise([first - 1, *verified])]
    doubled = [min(PROBE_EVERY * 2**times, PROBE_EVERY_AT_MOST) for times in range(len(between))]
    assert between == doubled
    assert first < PROBE_EVERY


def test_a_few_bad_drafts_in_a_row_do_not_turn_what_many_have_shown() -> None:
    speculation = DraftSelection(Seconds())
    for _ in range(100):
        speculation.answered(answer(TOKENS, 32, is_verified=True))
    for _ in range(10):
        speculation.answered(answer(TOKENS, 64, is_verified=True))
    assert speculation.choose("small", "large", 1).reason is None
    for _ in range(40):
        speculation.answered(answer(TOKENS, 64, is_verified=True))
    assert speculation.choose("small", "large", 1) == DraftChoice(SkipReason.WORTHLESS)
    # One drafter's are not another's.
    assert speculation.choose("medium", "large", 1).reason is None


def test_drafts_that_have_become_useful_are_found_by_few_of_them() -> None:
    speculation = DraftSelection(Seconds())
    for _ in range(100):
        speculation.answered(answer(TOKENS, 64, is_verified=True))
    assert speculation.choose("small", "large", 1) == DraftChoice(SkipReason.WORTHLESS)
    for _ in range(3):
        speculation.answered(answer(TOKENS, 2, is_verified=True))
    assert speculation.choose("small", "large", 1).reason is None


def test_where_it_is_not_wanted_every_draft_is_verified() -> None:
    clock = Seconds()
    reasons = ask(
        DraftSelection(clock, enabled=False), clock, written_s=1.0, verified_s=9.0, times=500, passes=64
    )
    assert set(reasons) == {None}


# Both ways at stages that batch: requests that come without a pause, one for each that has ended.


def rate(workload: Workload, at_a_time: int, way: str = "", *, times: int = 1, **options: int) -> float:
    """Return tokens per second after max(40, 4 x at a time) answers, over so many times as many.

    way: always or never verifying; else as the rule chooses.
    """
    loop = ClosedLoop(
        workload,
        lambda clock: DraftSelection(clock, enabled=way != "always"),
        never=way == "never",
        **options,
    )
    few = max(40, 4 * at_a_time)
    loop.answers(at_a_time, few)
    return loop.answers(at_a_time, times * few)


@functools.cache
def better(workload: Workload, at_a_time: int) -> float:
    """Return the rate of the better one of both ways."""
    return max(rate(workload, at_a_time, way, times=4) for way in ("always", "never"))


@pytest.mark.parametrize("has_draft", [False, True])
@pytest.mark.parametrize("at_a_time", AT_A_TIME)
@pytest.mark.parametrize("drafter", ["13b", "34b"])
def test_the_better_way_is_soon_found(drafter: str, at_a_time: int, has_draft: bool) -> None:
    for accepted in ACCEPTED:
        workload = Workload(drafter, (accepted,), has_draft=has_draft)
        least = 0.9 * better(workload, at_a_time)
        assert rate(workload, at_a_time) > least, accepted
        for seed in range(2):
            assert rate(workload, at_a_time, routers=4, seed=seed) > least, accepted


@pytest.mark.parametrize("accepted", [1.0, 0.5, 0.0])
def test_a_load_that_falls_is_not_judged_by_what_the_higher_one_took(accepted: float) -> None:
    """As benchmarks/gpu/cascade.py measures it: one router at 64, then at 8 at a time, then alone."""
    workload = Workload("13b", (accepted,))
    loop, found = ClosedLoop(workload), []
    for at_a_time in (64, 8, 1):
        loop.answers(at_a_time, max(40, 5 * at_a_time))
        found.append(loop.answers(at_a_time, max(4 * at_a_time, 10)))
        loop.drain()
    for at_a_time, each in zip((64, 8, 1), found, strict=True):
        assert each > 0.9 * better(workload, at_a_time)


@pytest.mark.parametrize("at_a_time", [8, 16, 64])
@pytest.mark.parametrize("kept", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_chain_never_loses_to_its_last_stage_alone(kept: float, at_a_time: int) -> None:
    workload = Workload("13b", (kept,))
    alone = rate(workload, at_a_time, "never", times=4)
    loops = [ClosedLoop(workload), ClosedLoop(workload, routers=4)]
    for loop in loops:
        loop.answers(at_a_time, 16 * at_a_time)
    # What trying the other way now and then costs.
    found = [loop.answers(at_a_time, 60 * at_a_time) for loop in loops]
    assert found[0] > 0.97 * alone
    assert found[1] > 0.96 * alone


def test_without_the_rule_a_chain_loses_under_load() -> None:
    workload = Workload("13b", (0.25,))
    assert rate(workload, 64, "always") < 0.85 * rate(workload, 64, "never")


@pytest.mark.parametrize("deadline_s", [3.0, 3.5])
def test_a_way_that_no_deadline_allows_does_not_hold(deadline_s: float) -> None:
    workload = Workload("13b", deadline_s=deadline_s)
    always = ClosedLoop(workload, lambda clock: DraftSelection(clock, enabled=False))
    found = [loop.answers_within(64, 300.0) for loop in (always, ClosedLoop(workload, never=True))]
    assert found[1] < 0.1 * found[0]
    assert ClosedLoop(workload).answers_within(64, 300.0) > 0.9 * found[0]


def test_drafts_that_become_better_are_found_under_load() -> None:
    loop = ClosedLoop(Workload("13b", (0.25,)))
    loop.answers(32, 2000)
    loop.workload = Workload("13b", (1.0,))
    loop.answers(32, 6000)
    assert loop.answers(32, 500) > 0.9 * better(loop.workload, 32)


def test_drafts_that_become_worse_are_found_at_once() -> None:
    loop = ClosedLoop(Workload("13b", (1.0,)))
    loop.answers(32, 2000)
    loop.workload = Workload("13b", (0.25,))
    loop.answers(32, 200)
    assert loop.answers(32, 200) > 0.9 * better(loop.workload, 32)
