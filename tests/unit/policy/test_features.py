"""Features: values worked out by hand, and bounded work on hostile input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policy_service.features import HASH_BUCKETS, Draft, DraftVerification, FeatureSpace, PromptText

SPACE = FeatureSpace(3)


def named(vector: np.ndarray) -> dict[str, float]:
    return dict(zip(SPACE.names, vector.tolist(), strict=True))


def a_draft(text: str = "6*7=42. Answer: 42", logprobs: tuple[float, ...] = (-0.1, -2.0, -0.0004)) -> Draft:
    signals = np.array(logprobs, np.float32)
    return Draft(text, signals, -signals, np.exp(signals), "eos")


def test_a_prompt() -> None:
    features = named(SPACE.prompt(PromptText("Is 12 not 7?\nA) yes B) no")))
    assert features["prompt_characters"] == pytest.approx(math.log1p(25))
    assert features["prompt_words"] == pytest.approx(math.log1p(6))
    assert features["prompt_longest_number"] == 2
    assert features["prompt_largest_number"] == pytest.approx(math.log1p(12), rel=1e-6)
    assert features["prompt_options"] == 2
    assert features["prompt_negations"] == 2
    assert features["turns"] == 0
    assert [features[f"stage_is_{i}"] for i in range(3)] == [0, 0, 0]


def test_a_draft() -> None:
    prompt = PromptText("What is 6 times 7?")
    features = named(SPACE.answer(SPACE.prompt(prompt), prompt, 1, a_draft()))
    assert [features[f"stage_is_{i}"] for i in range(3)] == [0, 1, 0]
    assert features["draft_tokens"] == pytest.approx(math.log1p(3))
    assert features["draft_logprob_min"] == -2.0
    assert features["draft_logprob_second"] == pytest.approx(-0.1)
    # Signals count to three decimals, as outcome files keep them.
    assert features["draft_logprob_third"] == 0.0
    assert features["draft_logprob_mean"] == pytest.approx(-0.7)
    assert features["draft_unsure_50"] == 1
    assert features["draft_unsure_99"] == 2
    assert features["draft_first_unsure"] == pytest.approx(1 / 3)
    assert features["draft_equations"] == 1
    assert features["draft_false_equations"] == 0
    assert features["draft_is_eos"] == 1
    assert features["verify_tokens"] == 0


@pytest.mark.parametrize(
    ("text", "found", "false"),
    [
        ("2+2=4", 1, 0),
        ("2+2=5", 1, 1),
        ("7 - 9 = -2; 8/2=4; 3x3=9", 3, 0),
        ("9/2=4", 1, 1),
        ("1/0=1", 1, 1),
        ("x = 3", 0, 0),
    ],
)
def test_equations_are_checked(text: str, found: int, false: int) -> None:
    prompt = PromptText("?")
    features = named(SPACE.answer(SPACE.prompt(prompt), prompt, 0, a_draft(text)))
    assert (features["draft_equations"], features["draft_false_equations"]) == (found, false)


def test_a_verification() -> None:
    prompt = PromptText("?")
    check = DraftVerification(2, np.array([0, 0, 3, 0]))
    features = named(SPACE.answer(SPACE.prompt(prompt), prompt, 2, a_draft(), 1, check))
    assert [features[f"origin_is_{i}"] for i in range(2)] == [0, 1]
    assert features["verify_accepted_share"] == 0.5
    assert features["verify_is_whole"] == 0
    assert features["verify_reject_share"] == 0.25
    assert features["verify_rank_max"] == pytest.approx(math.log1p(3))
    assert features["verify_rank_of_first_reject"] == pytest.approx(math.log1p(3))


def test_earlier_turns_count() -> None:
    alone, told = (
        SPACE.prompt(PromptText("And now?")),
        SPACE.prompt(PromptText("And now?", ("Add 3.", "Ok."))),
    )
    assert named(told)["turns"] == 2
    assert (alone[-HASH_BUCKETS:] != told[-HASH_BUCKETS:]).any()


@pytest.mark.parametrize("text", ["a " * 2_000_000, "9" * 1_000_000, "\0" * 100_000, "=+" * 500_000])
def test_hostile_text_gives_finite_features(text: str) -> None:
    prompt = PromptText(text)
    vector = SPACE.answer(SPACE.prompt(prompt), prompt, 0, a_draft(text, ()))
    assert np.isfinite(vector).all()
