"""Answers as they grow: chunks add up, stop sequences cut, half characters wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.verification import token_signals

if TYPE_CHECKING:
    from services.stage.domain import TokenChunk


def _extend(builder: AnswerBuilder, ids: list[int], logits: np.ndarray) -> TokenChunk | None:
    return builder.extend(ids, token_signals(logits, np.array(ids, np.int64)))


class _Letters:
    """A text whose token n is a string of a table, or a special token of that name: in square brackets."""

    lag = 0

    def __init__(self, table: list[str]) -> None:
        self._table = table

    def push(self, ids: list[int]) -> str:
        return "".join(self._table[i] for i in ids if not self.mark(i))

    def finish(self) -> str:
        return ""

    def mark(self, token_id: int) -> str:
        return self._table[token_id] if self._table[token_id].startswith("[") else ""


def _build(pieces: list[str], stop: tuple[str, ...], batch: int) -> tuple[AnswerBuilder, list[TokenChunk]]:
    builder = AnswerBuilder(_Letters(pieces), stop)
    chunks = []
    for start in range(0, len(pieces), batch):
        ids = list(range(start, min(start + batch, len(pieces))))
        chunks.append(_extend(builder, ids, np.zeros((len(ids), 3 + len(pieces)), np.float32)))
    chunks.append(builder.finish())
    return builder, [chunk for chunk in chunks if chunk is not None]


@given(
    st.lists(st.text("ab.", min_size=1, max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_an_answer_is_cut_before_the_first_stop_sequence(
    pieces: list[str], stop: list[str], batch: int
) -> None:
    whole = "".join(pieces)
    cuts = [whole.find(s) for s in stop if s in whole]
    # Token by token, the stop that is complete first ends the answer.
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    builder, chunks = _build(pieces, tuple(stop), batch)
    assert builder.has_stopped is bool(cuts)
    assert "".join(chunk.text for chunk in chunks) == builder.text
    assert tuple(i for chunk in chunks for i in chunk.ids) == builder.ids
    assert sum(chunk.logprobs.size for chunk in chunks) == len(builder.ids)
    if not ends:
        assert builder.text == whole
        return
    assert whole.startswith(builder.text)
    assert not any(s in builder.text for s in stop)
    assert any(whole.startswith(s, len(builder.text)) for s in stop)
    assert (
        "".join(pieces[i] for i in builder.ids)
        == builder.text[: len("".join(pieces[i] for i in builder.ids))]
    )


def test_without_stop_sequences_chunks_go_out_at_once() -> None:
    _, chunks = _build(["a", "b", "c"], (), 2)
    assert [(chunk.ids, chunk.text) for chunk in chunks] == [((0, 1), "ab"), ((2,), "c")]


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_signals_stay_with_their_tokens(stop: tuple[str, ...]) -> None:
    builder = AnswerBuilder(_Letters(["x", "y"]), stop)
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32))
    chunks = [_extend(builder, [0, 1], logits), builder.finish()]
    logprobs = np.concatenate([chunk.logprobs for chunk in chunks if chunk is not None])
    assert np.exp(logprobs) == pytest.approx([0.7, 0.8], abs=1e-6)


def _cut(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, tuple[int, ...], bool]:
    """Return text, ids and whether a stop sequence came, token by token and naively."""
    whole, ends = "", []
    for index, piece in enumerate(pieces):
        whole += piece
        ends.append(len(whole))
        indices = _indices(pieces[: index + 1])
        shown = "".join(whole[each] for each in indices)
        cuts = [whole.find(each) for each in stop if each in whole]
        cuts += [indices[shown.find(each)] for each in stop if each in shown]
        if cuts:
            kept = tuple(i for i in range(index + 1) if ends[i] <= min(cuts))
            return _shown(pieces, whole[: min(cuts)]), kept, True
    return _shown(pieces, whole), tuple(range(len(pieces))), False


def _indices(pieces: list[str]) -> list[int]:
    """Return where in the text of all pieces the characters are that stand in no special token."""
    indices, end = [], 0
    for piece in pieces:
        if not piece.startswith("["):
            indices += range(end, end + len(piece))
        end += len(piece)
    return indices


def _shown(pieces: list[str], whole: str) -> str:
    for mark in {piece for piece in pieces if piece.startswith("[")}:
        whole = whole.replace(mark, "")
    return whole


_PIECES = st.lists(st.text("ab", min_size=1, max_size=3) | st.sampled_from(["[x]", "[y]"]), max_size=14)
_STOP = st.lists(st.sampled_from(["a", "b", "[x]", "[y]"]), min_size=1, max_size=4).map("".join)
_STOPS = st.lists(_STOP, min_size=1, max_size=3)


@settings(max_examples=300)
@given(_PIECES, _STOPS, st.integers(1, 4))
def test_a_stop_sequence_may_hold_special_tokens(pieces: list[str], stop: list[str], batch: int) -> None:
    builder, chunks = _build(pieces, tuple(stop), batch)
    text, ids, has_stopped = _cut(pieces, tuple(stop))
    # A special token that a stop sequence ends within cannot be shown in part.
    assert (builder.text, builder.ids, builder.has_stopped) == (text, ids, has_stopped)
    assert "".join(chunk.text for chunk in chunks) == text
    assert tuple(i for chunk in chunks for i in chunk.ids) == ids


@given(_PIECES, _STOPS)
def test_only_what_may_become_a_stop_sequence_is_held_back(pieces: list[str], stop: list[str]) -> None:
    builder, whole, ends, sent = AnswerBuilder(_Letters(pieces), tuple(stop)), "", [0], 0
    for token, piece in enumerate(pieces):
        chunk = _extend(builder, [token], np.zeros((1, len(pieces)), np.float32))
        if builder.has_stopped:
            return
        sent += len(chunk.ids) if chunk is not None else 0
        whole += piece
        ends.append(len(whole))
        indices = [*_indices(pieces[: token + 1]), len(whole)]
        shown = "".join(whole[each] for each in indices[:-1])
        begins = [each[:length] for each in stop for length in range(len(each))]
        certain = min(
            *(len(whole) - len(each) for each in begins if whole.endswith(each)),
            *(indices[len(shown) - len(each)] for each in begins if shown.endswith(each)),
        )
        # Whole tokens go out, with their text: what follows may yet replace the rest.
        assert sent == max(count for count, end in enumerate(ends) if end <= certain)


def test_a_stop_sequence_is_found_around_a_special_token_that_the_answer_leaves_out() -> None:
    builder, chunks = _build(["xb", "[x]", "a", "c"], ("ba",), 1)
    assert (builder.text, builder.ids, builder.has_stopped, builder.taken) == ("x", (), True, 3)
    assert [(chunk.ids, chunk.text) for chunk in chunks] == [((), "x")]


def test_a_long_stop_sequence_holds_nothing_back_that_it_does_not_begin_with() -> None:
    builder = AnswerBuilder(_Letters(["hello ", "E", "ND", "!"]), ("END" + "x" * 100_000,))
    row = np.zeros((1, 4), np.float32)
    chunks = [_extend(builder, [token], row) for token in range(4)]
    assert [chunk.text if chunk is not None else None for chunk in chunks] == ["hello ", None, None, "END!"]


class _Bytes:
    """A text whose letters come a token late, as bytes do that may yet become part of a character."""

    def __init__(self) -> None:
        self.lag = 0
        self._waits = ""

    def push(self, ids: list[int]) -> str:
        text = "".join("" if self.mark(i) else chr(i) for i in ids)
        if not text:
            self.lag = 0
            return ""
        if text == "\n":
            self._waits += text
            return ""
        self.lag, self._waits, before = len(self._waits), "", self._waits
        return before + text

    def finish(self) -> str:
        return self._waits

    def mark(self, token_id: int) -> str:
        return "[x]" if token_id == 1 else ""


@pytest.mark.parametrize(
    ("stop", "text", "ids", "taken"),
    [
        ("\n", "a", "a", 3),
        ("[x]", "a\n", "a\n", 3),
        ("\n[x]", "a", "a", 3),
        ("b", "a\n", "a\n\x01", 4),
        ("[x]b", "a\n", "a\n", 4),
        ("\nb", "a", "a", 4),
        ("a\n", "", "", 3),
    ],
)
def test_text_that_waits_for_later_tokens_is_part_of_the_answer(
    stop: str, text: str, ids: str, taken: int
) -> None:
    builder = AnswerBuilder(_Bytes(), (stop,))
    chunks = [
        _extend(builder, [ord(letter)], np.zeros((1, 128), np.float32)) for letter in ("a", "\n", "\x01", "b")
    ]
    chunks.append(builder.finish())
    assert (builder.text, builder.ids, builder.taken) == (text, tuple(map(ord, ids)), taken)
    assert "".join(chunk.text for chunk in chunks if chunk is not None) == text


def test_a_stop_sequence_that_shows_only_at_the_end_ends_the_answer_before_itself() -> None:
    builder = AnswerBuilder(_Bytes(), ("\n",))
    _extend(builder, [ord("a")], np.zeros((1, 128), np.float32))
    _extend(builder, [ord("\n")], np.zeros((1, 128), np.float32))
    assert not builder.has_stopped
    builder.finish()
    assert (builder.text, builder.ids, builder.has_stopped) == ("a", (ord("a"),), True)
