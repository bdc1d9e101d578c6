"""What the onnx engine sets aside for a request."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.stage.engines.onnx.generators import CachedSequence
from services.stage.engines.onnx.llama_config import read_shape
from services.stage.engines.onnx.memory import capacity_for, pass_tokens
from tests.fakes import tiny_llama
from tests.unit.stage.engines.onnx.test_slots import TableGenerator

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [(1, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 2048), (90_000, 131_072), (131_073, 131_072)],
)
def test_the_capacity_of_a_cache_is_the_next_power_of_two(tokens: int, capacity: int) -> None:
    assert capacity_for(tokens, 131_072) == capacity


def test_a_cache_is_never_larger_than_the_context() -> None:
    assert [capacity_for(tokens, 300) for tokens in (1, 300, 301)] == [300, 300, 300]
    assert capacity_for(600, 1000) == 1000


def test_passes_are_bounded_by_what_they_take(tmp_path: Path) -> None:
    tiny_llama.write(tmp_path)
    shape = read_shape(tmp_path)
    wide = replace(shape, vocabulary=128_256)
    # 64 MiB of logits alone hold 130 rows of Llama 3's vocabulary.
    assert 100 <= pass_tokens(wide) <= 130
    assert pass_tokens(shape) > 8192
    # 8 billion weights in float32 take 30 GiB: a pass may take one of these.
    large = replace(wide, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14_336)
    assert 1000 <= pass_tokens(large) <= 1500


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, None])
@pytest.mark.parametrize("first", [0, 3, 6])
def test_tokens_in_several_passes_have_the_logits_of_one(step: int | None, first: int) -> None:
    tokens = [3, 5, 1, 2, 6, 4, 3]
    whole, pieces = CachedSequence(TableGenerator()), CachedSequence(TableGenerator(), 16, step)
    wanted = whole.append(tokens)[first:]
    assert (pieces.append(tokens, first) == wanted).all()
    assert pieces.tokens == tokens
