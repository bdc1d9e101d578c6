"""What a stage measures of its calls: time to the first token, and per token after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asd.values import FinishReason
from services.stage.domain import Result, VerificationResult
from services.stage.instruments import StageInstruments
from tests.recording import metered, sums  # noqa: F401 - a fixture


def result(tokens: int, **times: float) -> Result:
    """Return an answer of so many tokens."""
    return Result(
        text="a" * tokens,
        ids=tuple(range(tokens)),
        finish=FinishReason.EOS,
        prompt_tokens=1,
        cached_prompt_tokens=0,
        proposed_tokens=0,
        accepted_tokens=0,
        forward_passes=tokens,
        accept_lengths=(),
        **{"queue_ms": 0.0, "prefill_ms": 0.0, "decode_ms": 0.0, "total_ms": 0.0, **times},
    )


def test_the_times_of_tokens_are_measured_by_model(metered: Any) -> None:  # noqa: F811 - the fixture
    instruments = StageInstruments()
    instruments.answered("small", result(5, queue_ms=250.0, prefill_ms=500.0, decode_ms=2000.0))
    instruments.answered("large", result(2, prefill_ms=100.0, decode_ms=40.0))
    metrics = metered()
    small, large = ("chat", "asd", "small", "small"), ("chat", "asd", "large", "large")
    for name, of_small, of_large in (
        ("gen_ai.server.time_to_first_token", 0.75, 0.1),
        ("gen_ai.server.time_per_output_token", 0.5, 0.04),
    ):
        assert metrics[name].unit == "s"
        assert sums(metrics[name]) == {
            small: (1, pytest.approx(of_small)),
            large: (1, pytest.approx(of_large)),
        }


def test_one_token_has_none_after_it_and_an_empty_answer_no_first(metered: Any) -> None:  # noqa: F811 - the fixture
    instruments = StageInstruments()
    instruments.answered("small", result(0, prefill_ms=1.0))
    assert not metered()
    instruments.answered("small", result(1, prefill_ms=1.0, decode_ms=1.0))
    assert set(metered()) == {"gen_ai.server.time_to_first_token"}


def test_verifications_are_counted_by_where_they_were_made(metered: Any) -> None:  # noqa: F811 - the fixture
    instruments = StageInstruments()
    ranks, logprobs = np.ones(1, np.int64), np.zeros(1, np.float32)
    for inside in (True, False, True):
        instruments.verified(
            "small", VerificationResult(1, 1, ranks, logprobs, ids_used=True, while_writing=inside)
        )
    points = metered()["asd.stage.verifications"].data.data_points
    assert {tuple(value for _, value in sorted(each.attributes.items())): each.value for each in points} == {
        ("inside", "small"): 2,
        ("outside", "small"): 1,
    }
