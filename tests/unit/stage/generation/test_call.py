"""Calls by hand: where an answer ends, and what is counted of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asd.values import FinishReason, Sampling
from services.stage.domain import Result, TokenChunk
from services.stage.generation import call as call_module
from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.call import Call
from tests.fakes.letter_grammars import letters_matcher

if TYPE_CHECKING:
    from collections.abc import Sequence

END = 0


class Letters:
    lag = 0

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + token) for token in ids)

    def finish(self) -> str:
        return ""

    def mark(self, token_id: int) -> str:
        return ""


def signals(ids: Sequence[int], rows: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert len(ids) == len(rows)
    column = np.array(rows, np.float32)
    return column, column, column


def make(most_tokens: int = 9, stop: tuple[str, ...] = ()) -> Call[float]:
    sampling = Sampling(stop=stop)
    return Call([7, 7], most_tokens, sampling, AnswerBuilder(Letters(), stop), (END,), signals)


def add(call: Call[float], ids: Sequence[int]) -> bool:
    """Add tokens up to the one that ends the answer; return whether one did."""
    return any(call.add(token, float(token)) for token in ids)


def end(call: Call[float]) -> Result:
    *_, result = call.end()
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize(
    ("ids", "most_tokens", "stop", "finish", "text"),
    [
        ([1, 2, END, 3], 9, (), FinishReason.EOS, "ab"),
        ([1, 2, 3], 2, (), FinishReason.LENGTH, "ab"),
        # The end and the length at once.
        ([1, 2, END], 2, (), FinishReason.LENGTH, "ab"),
        ([1, END], 2, (), FinishReason.EOS, "a"),
        # A stop sequence is seen when the text is made, and goes before the other ends.
        ([1, 2, 3, END], 9, ("b",), FinishReason.STOP, "a"),
        ([1, 2], 2, ("b",), FinishReason.STOP, "a"),
    ],
)
def test_where_an_answer_ends(
    ids: list[int], most_tokens: int, stop: tuple[str, ...], finish: FinishReason, text: str
) -> None:
    call = make(most_tokens, stop)
    assert add(call, ids)
    assert call.is_over()
    result = end(call)
    assert (result.finish, result.text, len(result.ids)) == (finish, text, len(text))


def test_text_is_made_of_the_tokens_since_the_last_time() -> None:
    call = make()
    add(call, [1, 2])
    first = call.flush()
    assert first is not None
    assert (first.ids, first.text, first.logprobs.tolist()) == ((1, 2), "ab", [1.0, 2.0])
    assert call.flush() is None
    add(call, [3, END])
    chunk, result = call.end()
    assert isinstance(chunk, TokenChunk)
    assert (chunk.ids, chunk.text) == ((3,), "c")
    assert isinstance(result, Result)
    assert (result.text, result.ids) == ("abc", (1, 2, 3))


def test_a_stop_sequence_ends_the_answer_where_the_text_is_made() -> None:
    call = make(stop=("b",))
    assert not add(call, [1, 2])
    assert not call.is_over()
    call.flush()
    assert call.is_over()


def test_tokens_accepted_beyond_the_end_are_not_counted() -> None:
    call = make(stop=("c",))
    # One pass accepts three tokens and writes the fourth, the next accepts one and writes one.
    for ids, accepted in (([1, 2, 3, 4], 3), ([5, 6], 1)):
        call.proposed += accepted + 1
        call.accepted += accepted
        call.emitted.append(range(len(call.ids), len(call.ids) + len(ids)))
        add(call, ids)
    call.flush()
    result = end(call)
    # The answer ended at the third token, an accepted one.
    assert (result.text, result.accept_lengths, result.accepted_tokens) == ("ab", (3, 0), 3)
    assert result.proposed_tokens == 6


def test_an_end_of_sequence_token_counts_among_what_a_pass_emits() -> None:
    call = make()
    call.proposed, call.accepted = 3, 3
    call.emitted.append(range(4))
    add(call, [1, 2, END])
    result = end(call)
    assert (result.ids, result.accept_lengths, result.accepted_tokens) == ((1, 2), (3,), 3)


def test_times_add_up_whatever_waited_when(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(call_module, "time", SimpleNamespace(monotonic=lambda: now))
    call = make(1)
    call.arrived = now
    # 2 s in the queue, 3 s for the prompt, once more 5 s in the queue, 7 s for the answer.
    call.queued = 2.0
    now += 5.0
    call.mark_prefilled(cached=1)
    call.queued += 5.0
    now += 12.0
    # Only the first time counts.
    call.mark_prefilled(cached=2)
    add(call, [1])
    result = end(call)
    assert (result.queue_ms, result.prefill_ms) == (7000.0, 3000.0)
    assert (result.decode_ms, result.total_ms) == (7000.0, 17000.0)
    assert (result.prompt_tokens, result.cached_prompt_tokens) == (2, 1)


def test_an_answer_ends_where_its_constraint_does() -> None:
    for regex, ids, finish in (("ab", [1, 2], "eos"), ("ab+", [1, 2, 2, END], "eos"), ("a{9}", [1], None)):
        call = make()
        call.matcher = letters_matcher(regex)
        assert add(call, ids) is (finish is not None)
        if finish:
            result = end(call)
            assert (result.text, result.finish.value) == ("abb"[: len(result.ids)], finish)
            assert result.constrained


def test_a_limit_cuts_what_a_constraint_does_not_end() -> None:
    for regex, finish in (("abc", FinishReason.EOS), ("abcd", FinishReason.LENGTH)):
        call = make(most_tokens=3)
        call.matcher = letters_matcher(regex)
        assert add(call, [1, 2, 3])
        assert end(call).finish is finish


@pytest.mark.parametrize("token", [2, END])
def test_a_token_that_the_constraint_does_not_allow_is_no_answer(token: int) -> None:
    call = make()
    call.matcher = letters_matcher("ac")
    with pytest.raises(RuntimeError, match=str(token)):
        add(call, [1, token])


def test_each_token_has_its_details() -> None:
    call = make(stop=("cd",))
    call.details = lambda ids, rows: [(token, row) for token, row in zip(ids, rows, strict=True)]  # type: ignore[misc]
    chunks = []
    for ids in ([1], [3], [2, 3], [4]):
        add(call, ids)
        chunks.append(call.flush())
    found = [(chunk.ids, chunk.details) for chunk in chunks if chunk is not None]
    assert [each for each, _ in found] == [(1,), (3, 2)]
    assert [each for _, each in found] == [((1, 1.0),), ((3, 3.0), (2, 2.0))]
