"""What a caller holds after every event of an answer's stream is what stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd.errors import AsdError
from services.router.domain import DraftPart, FinalPart, Revision, ScoredTokens, Visibility
from services.router.stream import AnswerStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.router.domain import Event


class Caller:
    """Holds what the events say. A token of a test is a letter of one or two bytes."""

    def __init__(self) -> None:
        self.text = b""
        self.count = 0
        self.final = 0
        self.final_text = b""

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Revision):
                assert event.kept_tokens >= self.final, "final tokens are not taken back"
                self.count, self.text = event.kept_tokens, self.text[: event.kept_bytes]
            elif isinstance(event, FinalPart | DraftPart) and event.tokens is not None:
                self.count += len(event.tokens.ids)
                self.text += event.tokens.text.encode()
            if isinstance(event, FinalPart):
                assert event.count > self.final, "a commit commits something"
                self.final = event.count
                kept = "".join(list(self.text.decode())[: event.count]).encode()
                assert kept.startswith(self.final_text)
                self.final_text = kept


def tokens(text: str) -> ScoredTokens:
    count = len(text)
    return ScoredTokens(tuple(map(ord, text)), text, (-0.1,) * count, (0.1,) * count, (0.9,) * count)


def chunks(text: str, sizes: Sequence[int]) -> list[ScoredTokens]:
    """Cut a text into chunks of these sizes, the last one of what is left."""
    found, begin = [], 0
    for size in sizes:
        found.append(tokens(text[begin : begin + size]))
        begin += size
    return [*found, tokens(text[begin:])]


def agreed(one: str, other: str) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


TEXTS = st.text(alphabet="abäö", max_size=6)
SIZES = st.lists(st.integers(1, 3), max_size=4)


@given(
    view=st.sampled_from(Visibility),
    answers=st.lists(st.tuples(TEXTS, SIZES, st.booleans()), min_size=1, max_size=3),
    is_last_final=st.booleans(),
)
def test_the_caller_ends_with_the_answer_whatever_was_drafted(
    view: Visibility, answers: list[tuple[str, list[int], bool]], is_last_final: bool
) -> None:
    stream, caller, earlier = AnswerStream(view), Caller(), ""
    for place, (text, sizes, verifies) in enumerate(answers):
        stream.start(is_final=is_last_final and place == len(answers) - 1)
        if place and verifies:
            caller.take(stream.verified(agreed(earlier, text)))
        for chunk in chunks(text, sizes):
            caller.take(stream.written(chunk))
        earlier = text
    caller.take(stream.commit(tokens(earlier)))
    shown = "" if view is Visibility.OUTCOME else earlier
    assert (caller.text.decode(), caller.final) == (shown, len(shown))
    assert stream.has_committed == bool(shown)


@given(view=st.sampled_from(Visibility), first=TEXTS, second=TEXTS, sizes=SIZES, heard=st.integers(0, 4))
def test_the_earlier_answer_stands_after_a_stage_that_failed(
    view: Visibility, first: str, second: str, sizes: list[int], heard: int
) -> None:
    stream, caller = AnswerStream(view), Caller()
    stream.start(is_final=False)
    caller.take(stream.written(tokens(first)))
    stream.start(is_final=True)
    caller.take(stream.verified(agreed(first, second)))
    for chunk in chunks(second, sizes)[:heard]:
        caller.take(stream.written(chunk))
    if stream.can_revert():
        caller.take(stream.revert())
        caller.take(stream.commit(tokens(first)))
        assert caller.text.decode() == ("" if view is Visibility.OUTCOME else first)
    else:
        # The failed stage's own tokens are final.
        assert not first.startswith(caller.final_text.decode())


def test_drafts_are_shown_to_those_who_ask_for_them_alone() -> None:
    seen = {}
    for view in Visibility:
        stream = AnswerStream(view)
        stream.start(is_final=False)
        seen[view] = list(stream.written(tokens("ab")))
    assert seen[Visibility.DRAFTS] == [DraftPart(tokens("ab"))]
    assert seen[Visibility.COMMITTED] == seen[Visibility.OUTCOME] == []


def test_a_final_stage_commits_what_it_accepts_before_it_writes() -> None:
    stream = AnswerStream(Visibility.DRAFTS)
    stream.start(is_final=False)
    for chunk in chunks("abc", [1, 1]):
        list(stream.written(chunk))
    stream.start(is_final=True)
    assert list(stream.verified(2)) == [FinalPart(2), Revision(2, 2)]
    # Its stream begins with what the caller holds.
    assert [*stream.written(tokens("ab")), *stream.written(tokens("x"))] == [FinalPart(3, tokens("x"))]


def test_a_text_that_does_not_begin_with_what_was_accepted_is_a_fault() -> None:
    stream = AnswerStream(Visibility.DRAFTS)
    stream.start(is_final=False)
    list(stream.written(tokens("a")))
    stream.start(is_final=True)
    list(stream.verified(1))
    with pytest.raises(AsdError):
        list(stream.written(tokens("ä")))
