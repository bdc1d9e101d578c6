"""The cascade benchmark's own arithmetic: what is accepted follows from a prompt's last token."""

from __future__ import annotations

import pytest

from benchmarks.gpu.cascade import ALWAYS, ANSWER, LEAST_ANSWERS, GpuStage, chains, main, mixes
from benchmarks.gpu.predictable import block_pairs, last_token, last_token_of_replaced, successor

VOCABULARY = 32_000


def _writes(token: int, count: int, *, jumps: bool) -> list[int]:
    ids = []
    for _ in range(count):
        token = successor(token, VOCABULARY, jumps=jumps)
        ids.append(token)
    return ids


@pytest.mark.parametrize("pair", [0, 3, block_pairs(VOCABULARY) - 1])
@pytest.mark.parametrize("accepted", [0, 1, 32, ANSWER - 1, None])
def test_a_prompts_last_token_sets_how_much_of_a_draft_is_accepted(accepted: int | None, pair: int) -> None:
    start = last_token(accepted, pair)
    assert start < VOCABULARY - 1
    draft = _writes(start, ANSWER, jumps=False)
    # What a target says after each prefix of the draft.
    own = [successor(token, VOCABULARY, jumps=True) for token in [start, *draft]]
    agreed = [ours == theirs for ours, theirs in zip(own, draft, strict=False)]
    assert (agreed.index(False) if False in agreed else ANSWER) == (ANSWER if accepted is None else accepted)


@pytest.mark.parametrize("pair", [0, block_pairs(VOCABULARY) - 1])
def test_one_token_in_eight_is_another_one_and_the_rest_fits_again(pair: int) -> None:
    start = last_token_of_replaced(pair)
    target, draft = _writes(start, ANSWER, jumps=True), _writes(start, ANSWER, jumps=False)
    differing = [index for index in range(ANSWER) if target[index] != draft[index]]
    assert differing == list(range(4, ANSWER, 8))
    assert not {target[index] for index in differing} & set(draft)


def test_after_a_correction_nothing_of_the_draft_fits_even_moved_along() -> None:
    start = last_token(8, 3)
    target, draft = _writes(start, ANSWER, jumps=True), _writes(start, ANSWER, jumps=False)
    assert target[:8] == draft[:8]
    assert not set(target[8:]) & set(draft)


def test_two_models_that_jump_agree_whatever_the_prompt() -> None:
    start = last_token(0, 5)
    assert _writes(start, ANSWER, jumps=True) == _writes(start, ANSWER, jumps=True)
    assert _writes(start, ANSWER, jumps=True) != _writes(start, ANSWER, jumps=False)


def test_no_word_is_followed_by_what_ends_an_answer_or_is_no_word() -> None:
    following = {successor(token, VOCABULARY, jumps=True) for token in range(VOCABULARY)}
    assert min(following) >= 3
    assert max(following) < VOCABULARY - 1


def test_stages_are_read_with_their_gpus() -> None:
    assert GpuStage.read("large", "70b@1+2") == GpuStage("large", "70b", ("1", "2"))
    assert GpuStage.read("small", "tiny").gpus == ()
    with pytest.raises(ValueError, match=r"'7b': .*13b"):
        GpuStage.read("small", "7b@0")
    with pytest.raises(ValueError, match="13b@x: "):
        GpuStage.read("small", "13b@x")


def test_what_is_asked_of_two_and_of_three_stages() -> None:
    assert chains(("small", "large")) == [("small", "large")]
    assert chains(("small", "medium", "large"))[-1] == ("small", "medium", "large")
    assert "the policy decides" not in mixes(("small", "large"))
    asked = mixes(("small", "medium", "large"))
    assert asked["the policy decides"]
    early = [way for way, _ in asked["four of five stop early"] if way == {"stage": "small"}]
    assert len(early) / len(asked["four of five stop early"]) == 0.8
    assert all(LEAST_ANSWERS % len(mix) == 0 for mix in asked.values())


def test_only_what_is_named_is_asked_beside_always_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(mixes(("small", "large"), ("all-accepted",))) == [ALWAYS, "escalated, all accepted"]
    with pytest.raises(SystemExit):
        main(["tiny", "tiny", "--asked", "all-accepted,al"])
    assert "'al' is none of all-accepted" in capsys.readouterr().err
