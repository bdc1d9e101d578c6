"""When drafts are left out: where they save no passes, and where they save no time under the load of now."""

from __future__ import annotations

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
from services.router.speculation import Skip, Speculation

LARGE = Stage("large", 2, 8.8, 1000.0)
# An answer of 19 tokens and the one that ends it.
TOKENS = 19


def answer(action: StageAction, pace_ms: float, *, passes: int = 2, queue_ms: float = 0.0) -> Answer:
    """Return an answer of large that took so long per token."""
    is_verified = action is StageAction.VERIFY
    usage = Usage(completion_tokens=TOKENS, proposed_tokens=20 if is_verified else 0, forward_passes=passes)
    timing = Timing(queue_ms=queue_ms, total_ms=queue_ms + pace_ms * (TOKENS + 1))
    return Answer(
        LARGE,
        action,
        StageResult("hi", (1,) * TOKENS, "", FinishReason.EOS, usage, timing),
        Tokens((1,) * TOKENS, "hi"),
        Verification(20, 10) if is_verified else None,
        timing.total_ms,
        LARGE.cost,
        "small" if is_verified else "",
    )


def written(pace_ms: float, **options: float) -> Answer:
    return answer(StageAction.GENERATE, pace_ms, **options)


def verified(pace_ms: float, **options: float) -> Answer:
    return answer(StageAction.VERIFY, pace_ms, **options)


def asked(speculation: Speculation, depth: int, times: int = 64) -> list[Skip | None]:
    return [speculation.reason_to_skip("small", "large", depth) for _ in range(times)]


def test_a_target_with_few_calls_verifies_however_long_that_takes():
    speculation = Speculation()
    for depth in range(1, 8):
        speculation.answered(written(10.0), depth)
        speculation.answered(verified(50.0), depth)
        assert asked(speculation, depth) == [None] * 64


@pytest.mark.parametrize(("pace_ms", "is_left_out"), [(8.9, False), (9.1, True), (30.0, True)])
def test_a_busy_target_verifies_only_where_that_is_faster_than_writing(pace_ms, is_left_out):
    speculation = Speculation()
    for _ in range(5):
        speculation.answered(written(10.0), 64)
        speculation.answered(verified(pace_ms), 64)
    reasons = asked(speculation, 64, 63)
    if not is_left_out:
        assert reasons == [None] * 63
        return
    # One in 16 is verified all the same.
    assert [place for place, reason in enumerate(reasons) if reason is None] == [15, 31, 47]
    assert set(reasons) == {None, Skip.LOAD}


def test_pipelined_verifications_are_no_part_of_the_comparison():
    speculation = Speculation()
    for _ in range(5):
        speculation.answered(written(10.0), 64)
        speculation.answered(verified(5.0), 64)
        # Most of it is its drafter's time.
        speculation.answered(replace(verified(30.0), is_pipelined=True), 64)
    assert asked(speculation, 64, 63) == [None] * 63


def test_pipelined_verifications_show_what_drafts_are_worth_all_the_same():
    speculation = Speculation()
    speculation.answered(replace(verified(5.0, passes=20), is_pipelined=True), 1)
    assert speculation.reason_to_skip("small", "large", 1) is Skip.WORTHLESS


def test_waits_are_no_part_of_the_comparison():
    speculation = Speculation()
    speculation.answered(written(10.0), 64)
    speculation.answered(verified(5.0, queue_ms=1e6), 64)
    assert asked(speculation, 64, 10) == [None] * 10


def test_only_times_under_about_the_same_load_are_compared():
    speculation = Speculation()
    # Verifying pays at 8 to 15 calls, and not at 64 to 127.
    speculation.answered(written(10.0), 15)
    speculation.answered(verified(5.0), 8)
    speculation.answered(written(40.0), 64)
    speculation.answered(verified(60.0), 127)
    assert asked(speculation, 12, 10) == [None] * 10
    assert asked(speculation, 100, 10) == [Skip.LOAD] * 10
    # What was never seen is tried: written first, then verified until something is known of both.
    assert asked(speculation, 32, 4) == [Skip.PROBE, None, None, None]


def test_a_load_that_has_passed_is_forgotten():
    speculation = Speculation()
    speculation.answered(written(10.0), 64)
    speculation.answered(verified(20.0), 64)
    assert asked(speculation, 64, 2) == [Skip.LOAD] * 2
    for _ in range(10):
        speculation.answered(verified(5.0), 64)
    assert asked(speculation, 64, 10) == [None] * 10


def test_one_in_64_is_written_where_nothing_else_shows_how_long_that_takes():
    speculation = Speculation()
    reasons = asked(speculation, 64, 200)
    assert [place for place, reason in enumerate(reasons) if reason is Skip.PROBE] == [0, 64, 128, 192]
    # Answers that were written for other reasons show it as well.
    for _ in range(10):
        speculation.answered(written(10.0), 64)
        speculation.answered(verified(5.0), 64)
        assert asked(speculation, 64, 20) == [None] * 20


def test_what_was_cut_off_or_verified_a_fragment_says_nothing_of_times():
    speculation = Speculation()
    speculation.answered(written(10.0), 64)
    speculation.answered(replace(verified(50.0), is_whole=False), 64)
    assert asked(speculation, 64, 10) == [None] * 10
    speculation.answered(verified(8.0), 64)
    for _ in range(10):
        speculation.answered(replace(verified(1.0), draft_stage="", verification=None), 64)
    assert asked(speculation, 64, 10) == [None] * 10


def test_drafts_that_save_no_passes_are_left_out_at_any_load():
    for depth in (1, 64):
        speculation = Speculation()
        speculation.answered(verified(1.0, passes=20), depth)
        reasons = asked(speculation, depth, 32)
        assert [place for place, reason in enumerate(reasons) if reason is None] == [15, 31]
        assert set(reasons) == {None, Skip.WORTHLESS}


def test_where_it_is_not_wanted_every_draft_is_verified():
    speculation = Speculation(enabled=False)
    speculation.answered(written(10.0), 64)
    speculation.answered(verified(50.0, passes=20), 64)
    assert asked(speculation, 64) == [None] * 64
