"""A model counts as loaded once it has answered, alone and in a batch, with numbers that are finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asd.errors import InvalidRequest, PreconditionFailed
from services.stage.engines.probe import ANSWER_TOKENS, probe, probe_prompts
from services.stage.generation.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

SMALL = Path(__file__).parents[4] / "models" / "small"
PROMPTS = [[1, 2], [3, 4, 5]]


async def test_a_model_answers_alone_and_then_in_a_batch() -> None:
    seen: list[Sequence[list[int]]] = []

    async def answer(prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
        seen.append(prompts)
        return np.zeros(3, np.float32)

    await probe("m", PROMPTS, answer)
    assert seen == [[[1, 2]], [[1, 2], [3, 4, 5]]]


@pytest.mark.parametrize(("rows", "way"), [(1, "alone"), (2, "in a batch")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_numbers_that_are_not_finite_are_refused(rows: int, way: str, value: float) -> None:
    async def answer(prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
        return np.array([0.0, value if len(prompts) == rows else 1.0], np.float32)

    with pytest.raises(PreconditionFailed, match=way):
        await probe("m", PROMPTS, answer)


@pytest.mark.parametrize(("rows", "way"), [(1, "alone"), (2, "in a batch")])
@pytest.mark.parametrize("error", [RuntimeError("head_size"), InvalidRequest("head_size")])
async def test_what_a_library_raises_is_the_reason(rows: int, way: str, error: Exception) -> None:
    async def answer(prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
        if len(prompts) == rows:
            raise error
        return np.zeros(1, np.float32)

    with pytest.raises(PreconditionFailed, match=f"{way}: head_size"):
        await probe("m", PROMPTS, answer)


@pytest.mark.parametrize("context", [2, 4, 8, 512])
def test_prompts_differ_in_length_and_leave_room(context: int) -> None:
    prompts = probe_prompts(ChatTokenizer(SMALL), 512, context)
    assert all(1 <= len(ids) <= max(context - ANSWER_TOKENS - 1, 1) for ids in prompts)
    if context == 512:
        assert len(prompts[0]) < len(prompts[1])
    assert probe_prompts(ChatTokenizer(SMALL), 1, context) == [[0], [0]]
