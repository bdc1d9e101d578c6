"""Where in a draft the target is expected to go on, by hand-worked examples."""

from __future__ import annotations

from dataclasses import replace

from services.stage.generation.resync import Resynchroniser, ResyncPayoff, ResyncRule

#        0   1   2   3   4   5   6   7   8   9
DRAFT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
ROOM = 100
RULE = ResyncRule(
    first_chunk=4,
    least_chunk=2,
    most_chunk=8,
    least_proposal=1,
    least_hit=1,
    misses_to_doubt=3,
    misses_to_end=8,
    seeks_ngrams=True,
)


def test_after_a_replaced_token_the_draft_is_expected_to_go_on_behind_it() -> None:
    # The target wrote 99 for 13: nothing of the answer is in the rest yet.
    assert Resynchroniser(DRAFT, 3, RULE).propose([10, 11, 12, 99], ROOM) == [14, 15, 16, 17]


def test_after_an_insertion_the_last_tokens_say_where_the_draft_goes_on() -> None:
    # 98 and 99 were put before 13, and 13, 14 followed.
    rest = Resynchroniser(DRAFT, 3, RULE)
    for answer in ([10, 11, 12, 98], [10, 11, 12, 98, 99]):
        rest.judged(len(rest.propose(answer, ROOM)), 0)
    assert rest.propose([10, 11, 12, 98, 99, 13, 14], ROOM)[:2] == [15, 16]


def test_after_a_deletion_the_last_tokens_are_found_further_on() -> None:
    assert Resynchroniser(DRAFT, 3, RULE).propose([10, 11, 12, 16, 17], ROOM) == [18, 19]


def test_of_several_positions_the_longest_run_wins_and_then_the_nearest() -> None:
    draft = [0, 1, 2, 3, 9, 1, 2, 3, 8, 2, 3, 7]
    assert Resynchroniser(draft, 0, RULE).propose([5, 1, 2, 3], ROOM)[0] in (9, 8)
    near = Resynchroniser(draft, 8, RULE)
    assert near.propose([6, 2, 3], ROOM) == [7]


def test_what_the_target_agreed_with_is_not_proposed_again() -> None:
    draft = [1, 2, 3, 4, 5, 6]
    # 1, 2 stands in the part that was used.
    assert Resynchroniser(draft, 3, RULE).propose([1, 2], ROOM) == [5, 6]


def test_proposals_grow_with_success_and_end_with_failure() -> None:
    draft = list(range(100))
    rest = Resynchroniser(draft, 0, RULE)
    assert len(rest.propose([77], ROOM)) == 4
    rest.judged(4, 4)
    # One token more than was accepted has been written.
    assert rest.propose([77, *range(1, 5), 70], ROOM) == list(range(6, 14))
    for _ in range(3):
        rest.judged(8, 0)
    # In doubt, a position alone is not enough; what the answer ends with still is.
    assert rest.propose([55], ROOM) == []
    assert rest.propose([20, 21], ROOM)[0] == 22
    for _ in range(5):
        rest.judged(2, 0)
    assert rest.propose([20, 21], ROOM) == []


def test_a_draft_that_is_still_being_written_is_read_as_it_grows() -> None:
    draft = [10, 11, 12]
    rest = Resynchroniser(draft, 2, RULE)
    assert rest.propose([10, 11, 99], ROOM) == []
    draft += [13, 14]
    assert rest.propose([10, 11, 99], ROOM) == [13, 14]


def test_no_more_is_proposed_than_the_answer_has_room_for() -> None:
    assert Resynchroniser(DRAFT, 3, RULE).propose([10, 11, 12, 99], 3) == [14, 15, 16]


def test_where_a_pass_is_dear_all_that_is_left_is_proposed_once() -> None:
    rule = replace(RULE, first_chunk=99, least_proposal=4, least_hit=3, misses_to_end=1, seeks_ngrams=False)
    rest = Resynchroniser(DRAFT, 1, rule)
    # 17, 18 stands in the draft: where it occurs is not looked for.
    assert rest.propose([10, 17, 18], ROOM) == DRAFT[2:] == rest.propose([10, 17, 18], len(DRAFT[2:]))
    # Less is not worth a pass.
    assert rest.propose([10, 99], 3) == []
    rest.judged(8, 3)
    assert rest.propose([10, 99, 12, 13, 14, 98], ROOM) == DRAFT[6:]
    rest.judged(4, 2)
    assert rest.propose([10, 99], ROOM) == []


def test_what_follows_a_correction_must_keep_more_where_the_library_is_busy() -> None:
    payoff = ResyncPayoff()
    for _ in range(50):
        # Enough tokens for a pass that is as long as four written ones, a small part of what was scored.
        payoff.learn(48, 8)
    assert payoff.is_worth(1)
    busy = [payoff.is_worth(1000) for _ in range(64)]
    # One in so many is tried all the same.
    assert 0 < sum(busy) <= 8
