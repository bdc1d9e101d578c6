"""Answers as they grow: chunks add up, stop sequences cut, half characters wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.stage.answer import AnswerBuilder

if TYPE_CHECKING:
    from services.stage.engine import TokenChunk


class _Letters:
    """A text whose token n is a string of a table."""

    def __init__(self, table: list[str]) -> None:
        self._table = table

    def push(self, ids: list[int]) -> str:
        return "".join(self._table[i] for i in ids)

    def finish(self) -> str:
        return ""


def _build(pieces: list[str], stop: tuple[str, ...], batch: int) -> tuple[AnswerBuilder, list[TokenChunk]]:
    builder = AnswerBuilder(_Letters(pieces), stop)
    chunks = []
    for start in range(0, len(pieces), batch):
        ids = list(range(start, min(start + batch, len(pieces))))
        chunks.append(builder.extend(ids, np.zeros((len(ids), 3 + len(pieces)), np.float32)))
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
    chunks = [builder.extend([0, 1], logits), builder.finish()]
    logprobs = np.concatenate([chunk.logprobs for chunk in chunks if chunk is not None])
    assert np.exp(logprobs) == pytest.approx([0.7, 0.8], abs=1e-6)
