"""Where in a draft the target is expected to go on, by hand-worked examples."""

from __future__ import annotations

from services.stage.generation.resync import Resynchroniser

#        0   1   2   3   4   5   6   7   8   9
DRAFT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def test_after_a_replaced_token_the_draft_is_expected_to_go_on_behind_it() -> None:
    # The target wrote 99 for 13: nothing of the answer is in the rest yet.
    assert Resynchroniser(DRAFT, 3).propose([10, 11, 12, 99]) == [14, 15, 16, 17]


def test_after_an_insertion_the_last_tokens_say_where_the_draft_goes_on() -> None:
    # 98 and 99 were put before 13, and 13, 14 followed.
    rest = Resynchroniser(DRAFT, 3)
    for answer in ([10, 11, 12, 98], [10, 11, 12, 98, 99]):
        rest.judged(len(rest.propose(answer)), 0)
    assert rest.propose([10, 11, 12, 98, 99, 13, 14])[:2] == [15, 16]


def test_after_a_deletion_the_last_tokens_are_found_further_on() -> None:
    assert Resynchroniser(DRAFT, 3).propose([10, 11, 12, 16, 17]) == [18, 19]


def test_of_several_places_the_longest_run_wins_and_then_the_nearest() -> None:
    draft = [0, 1, 2, 3, 9, 1, 2, 3, 8, 2, 3, 7]
    assert Resynchroniser(draft, 0).propose([5, 1, 2, 3])[0] in (9, 8)
    near = Resynchroniser(draft, 8)
    assert near.propose([6, 2, 3]) == [7]


def test_what_the_target_agreed_with_is_not_proposed_again() -> None:
    draft = [1, 2, 3, 4, 5, 6]
    # 1, 2 stands in the part that was used.
    assert Resynchroniser(draft, 3).propose([1, 2]) == [5, 6]


def test_proposals_grow_with_success_and_end_with_failure() -> None:
    draft = list(range(100))
    rest = Resynchroniser(draft, 0)
    assert len(rest.propose([77])) == 4
    rest.judged(4, 4)
    # One token more than was accepted has been written.
    assert rest.propose([77, *range(1, 5), 70]) == list(range(6, 14))
    for _ in range(3):
        rest.judged(8, 0)
    # In doubt, a place alone is not enough; what the answer ends with still is.
    assert rest.propose([55]) == []
    assert rest.propose([20, 21])[0] == 22
    for _ in range(5):
        rest.judged(2, 0)
    assert rest.propose([20, 21]) == []


def test_a_draft_that_is_still_being_written_is_read_as_it_grows() -> None:
    draft = [10, 11, 12]
    rest = Resynchroniser(draft, 2)
    assert rest.propose([10, 11, 99]) == []
    draft += [13, 14]
    assert rest.propose([10, 11, 99]) == [13, 14]
