"""Verification slots over a tiny table model: whatever is proposed, and however, the answer is exact."""

from __future__ import annotations

import itertools
import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd.values import FinishReason, Sampling
from models.train.passes import count_passes
from services.stage.domain import Result, TokenChunk, VerificationResult
from services.stage.engines.onnx.generators import CachedSequence
from services.stage.engines.onnx.slots import SlotRequest, VerifySlot
from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.call import Call
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.verification import choose_token, evidence_signals
from tests.fakes.letter_grammars import letters_matcher

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCABULARY = 7
END = 0
PROMPT = [3, 5, 1]
MOST = 24


def table_logits(tokens: Sequence[int]) -> np.ndarray:
    """Return logits that depend on the last three tokens alone; the end is unlikely."""
    rng = np.random.default_rng(zlib.crc32(bytes(tokens[-3:])))
    logits = rng.normal(size=VOCABULARY).astype(np.float32) * 2
    logits[END] -= 2
    return logits


class TableGenerator:
    """What a slot uses of onnxruntime-genai's generator."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._output = np.zeros((1, 0, VOCABULARY), np.float32)

    def append_tokens(self, tokens: np.ndarray) -> None:
        rows = []
        for token in tokens[0].tolist():
            self.tokens.append(token)
            rows.append(table_logits(self.tokens))
        self._output = np.stack(rows)[None]

    def get_output(self, name: str) -> np.ndarray:
        assert name == "logits"
        return self._output

    def rewind_to(self, length: int) -> None:
        assert length < len(self.tokens)
        del self.tokens[length:]


class Letters:
    """Text of a token: its letter."""

    lag = 0

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + token) for token in ids)

    def finish(self) -> str:
        return ""

    def mark(self, token_id: int) -> str:
        return ""


def slot_for(
    draft: ReceivedDraft | None,
    *,
    most: int = MOST,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    threshold: float | None = None,
    resync: bool = True,
    regex: str = "",
) -> tuple[VerifySlot, list[object], SlotRequest]:
    events: list[object] = []
    sampling = Sampling(temperature=0.0 if seed is None else 1.0, seed=seed, stop=stop)
    answer = AnswerBuilder(Letters(), stop)
    matcher = letters_matcher(regex, "a", VOCABULARY) if regex else None
    call = Call(PROMPT, most, sampling, answer, (END,), evidence_signals, matcher=matcher)
    request = SlotRequest(call, events.extend, draft, threshold, resync)
    return VerifySlot(request, CachedSequence(TableGenerator())), events, request


def run(
    slot: VerifySlot, request: SlotRequest, draft: ReceivedDraft | None = None, pieces: Sequence[object] = ()
) -> Result:
    """Step a slot to its end; a piece of the draft comes whenever it has nothing to do."""
    waiting = iter(pieces)
    for _ in range(1000):
        request.is_taken = True
        if slot.is_ready:
            if slot.step():
                request.send()
                assert slot.sequence.tokens[: len(PROMPT)] == PROMPT
                return next(event for event in events_of(request) if isinstance(event, Result))
            continue
        piece = next(waiting)
        assert draft is not None
        if isinstance(piece, list):
            draft.add(piece)
        else:
            draft.finish(piece)  # type: ignore[arg-type]
    raise AssertionError("the slot does not end")


def events_of(request: SlotRequest) -> list[object]:
    return request.deliver.__self__  # type: ignore[attr-defined]


def alone(**options: object) -> Result:
    """Return what the table model writes token by token."""
    slot, _, request = slot_for(None, **options)  # type: ignore[arg-type]
    return run(slot, request)


def whole(ids: Sequence[int], *, has_ended: bool, most: int = MOST, regex: str = "") -> ReceivedDraft:
    draft = ReceivedDraft(most, letters_matcher(regex, "a", VOCABULARY) if regex else None)
    draft.add(ids)
    draft.finish(END if has_ended else None)
    return draft


@st.composite
def edited_drafts(draw: st.DrawFn, answer: Sequence[int]) -> list[int]:
    """Return an answer after insertions, deletions, replacements and reorderings."""
    draft = list(answer)
    for _ in range(draw(st.integers(0, 4))):
        index = draw(st.integers(0, len(draft)))
        match draw(st.sampled_from(["insert", "delete", "replace", "swap"])):
            case "insert":
                draft[index:index] = draw(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=4))
            case "delete":
                del draft[index : index + draw(st.integers(1, 4))]
            case "replace":
                draft[index : index + 1] = [draw(st.integers(1, VOCABULARY - 1))]
            case _:
                draft = draft[index:] + draft[:index]
    return draft


def test_the_table_model_by_hand() -> None:
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + MOST:
        token = int(np.argmax(table_logits(tokens)))
        if token == END:
            break
        tokens.append(token)
    assert list(alone().ids) == tokens[len(PROMPT) :]


@given(st.data(), st.booleans(), st.sampled_from([None, 7, 8]))
@settings(deadline=None, max_examples=300)
def test_edited_drafts_change_no_token(data: st.DataObject, has_ended: bool, seed: int | None) -> None:
    wanted = alone(seed=seed)
    draft = data.draw(edited_drafts(wanted.ids))
    slot, events, request = slot_for(whole(draft, has_ended=has_ended), seed=seed)
    result = run(slot, request)
    assert (result.ids, result.finish, result.text) == (wanted.ids, wanted.finish, wanted.text)
    assert isinstance(events[0], VerificationResult)
    assert sum(isinstance(event, VerificationResult) for event in events) == 1
    assert events[0].accepted <= events[0].proposed == len(events[0].ranks)
    assert result.accepted_tokens <= result.proposed_tokens
    # Never more passes than token by token: each pass emits one token at least.
    assert result.forward_passes <= wanted.forward_passes
    # A pass that scored nothing emits one token; together they emit the answer, its end included.
    emitted = sum(result.accept_lengths) + result.forward_passes - len(result.accept_lengths)
    assert emitted == len(result.ids) + (result.finish is FinishReason.EOS)


@given(st.data(), st.booleans())
@settings(deadline=None, max_examples=300)
def test_however_a_draft_comes_the_answer_is_the_same(data: st.DataObject, has_ended: bool) -> None:
    wanted = alone()
    ids = data.draw(edited_drafts(wanted.ids))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    pieces = [ids[a:b] for a, b in itertools.pairwise([0, *cuts, len(ids)])]
    draft = ReceivedDraft(MOST)
    slot, events, request = slot_for(draft)
    result = run(slot, request, draft, [*pieces, END if has_ended else None])
    assert (result.ids, result.finish) == (wanted.ids, wanted.finish)
    kinds = [type(event) for event in events]
    assert kinds.count(VerificationResult) == 1
    assert kinds.index(VerificationResult) < kinds.index(Result)
    assert "".join(event.text for event in events if isinstance(event, TokenChunk)) == wanted.text


REGEXES = ["[bc]+(d|ef)*", "(bcd|bce)+g", "[b-g]{4,30}", "g"]


def _constrained_by_hand(regex: str, seed: int | None) -> tuple[list[int], FinishReason]:
    """Return an answer by asking of every token at every place whether the rest can still match."""
    matcher, tokens = letters_matcher(regex, "a", VOCABULARY), list(PROMPT)
    while True:
        written = tokens[len(PROMPT) :]
        if len(written) == MOST:
            return written, FinishReason.LENGTH
        logits = table_logits(tokens)
        logits[[token for token in range(VOCABULARY) if not matcher.allowed([token])]] = -np.inf
        token = int(logits.argmax()) if seed is None else choose_token(logits, 1.0, 1.0, seed, len(written))
        matcher.take([token])
        if token == END:
            return written, FinishReason.EOS
        tokens.append(token)
        if not any(matcher.allowed([each]) for each in range(1, VOCABULARY)):
            return tokens[len(PROMPT) :], FinishReason.EOS


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("seed", [None, 7, 8])
def test_a_constrained_answer_by_hand(regex: str, seed: int | None) -> None:
    result = alone(regex=regex, seed=seed)
    assert (list(result.ids), result.finish) == _constrained_by_hand(regex, seed)
    assert result.constrained
    assert result.finish is FinishReason.LENGTH or re.fullmatch(regex, result.text)


@given(st.data(), st.booleans(), st.sampled_from([None, 7, 8]), st.sampled_from(REGEXES), st.booleans())
@settings(deadline=None, max_examples=400)
def test_under_a_constraint_drafts_change_no_token(
    data: st.DataObject, has_ended: bool, seed: int | None, regex: str, from_constrained: bool
) -> None:
    wanted = alone(seed=seed, regex=regex)
    ids = data.draw(edited_drafts(wanted.ids if from_constrained else alone(seed=seed).ids))
    slot, events, request = slot_for(whole(ids, has_ended=has_ended, regex=regex), seed=seed, regex=regex)
    result = run(slot, request)
    assert (result.ids, result.finish, result.text) == (wanted.ids, wanted.finish, wanted.text)
    evidence = events[0]
    assert isinstance(evidence, VerificationResult)
    given_ids = [*ids, *[END] * has_ended][:MOST]
    kept = letters_matcher(regex, "a", VOCABULARY).allowed(given_ids)
    assert evidence.allowed == (kept if kept < len(given_ids) else None)
    assert evidence.accepted <= evidence.proposed == kept
    assert result.forward_passes <= wanted.forward_passes
    emitted = sum(result.accept_lengths) + result.forward_passes - len(result.accept_lengths)
    assert emitted in {len(result.ids), len(result.ids) + (result.finish is FinishReason.EOS)}


@given(st.data(), st.booleans(), st.sampled_from(REGEXES))
@settings(deadline=None, max_examples=200)
def test_under_a_constraint_it_is_the_same_however_a_draft_comes(
    data: st.DataObject, has_ended: bool, regex: str
) -> None:
    wanted = alone(regex=regex)
    ids = data.draw(edited_drafts(wanted.ids))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    pieces = [ids[a:b] for a, b in itertools.pairwise([0, *cuts, len(ids)])]
    draft = ReceivedDraft(MOST, letters_matcher(regex, "a", VOCABULARY))
    slot, events, request = slot_for(draft, regex=regex)
    result = run(slot, request, draft, [*pieces, END if has_ended else None])
    assert (result.ids, result.finish) == (wanted.ids, wanted.finish)
    assert sum(isinstance(event, VerificationResult) for event in events) == 1


def test_tolerance_is_relative_to_the_likeliest_token_that_is_allowed() -> None:
    order = np.argsort(-table_logits(PROMPT))
    first, second, third = (chr(97 + token) for token in order[:3])
    ratio = float(np.exp(table_logits(PROMPT)[order[2]] - table_logits(PROMPT)[order[1]]))
    regex = f"[{second}{third}]"
    draft = [int(order[2])]
    for threshold, text in ((ratio * 0.9, third), (ratio * 1.1, second)):
        slot, _, request = slot_for(
            whole(draft, has_ended=False, regex=regex), threshold=threshold, regex=regex
        )
        assert run(slot, request).text == text != first


def test_the_first_token_goes_out_before_any_draft_comes() -> None:
    draft = ReceivedDraft(MOST)
    slot, events, _ = slot_for(draft)
    assert slot.step() == []
    assert not slot.is_ready
    assert [event.ids for event in events] == [alone().ids[:1]]  # type: ignore[attr-defined]


def test_while_the_target_agrees_each_pass_is_one_chunk() -> None:
    ids = alone().ids
    draft = ReceivedDraft(MOST)
    slot, events, request = slot_for(draft)
    assert slot.step() == []
    for end, tokens in ((4, 4), (6, 2), (12, 6)):
        draft.add(ids[len(draft.ids) : end])
        events.clear()
        request.is_taken = True
        # Overdue, as after every pass of a slow model.
        request.chunk_due = 0.0
        while slot.is_ready:
            assert slot.step() == []
        assert [len(event.ids) for event in events] == [tokens]  # type: ignore[attr-defined]


def test_a_tolerant_target_waits_for_the_draft_and_keeps_what_is_likely_enough() -> None:
    draft = ReceivedDraft(MOST)
    slot, _, request = slot_for(draft, threshold=1e-6)
    assert not slot.is_ready
    second = [int(np.argsort(table_logits(PROMPT))[-2])]
    result = run(slot, request, draft, [second, None])
    assert result.ids[0] == second[0] != alone().ids[0]


def test_its_own_output_takes_one_pass() -> None:
    wanted = alone()
    slot, events, request = slot_for(whole(wanted.ids, has_ended=wanted.finish.value == "eos"))
    result = run(slot, request)
    assert result.forward_passes == 1
    assert result.ids == wanted.ids
    assert isinstance(events[0], VerificationResult)
    assert events[0].accepted == events[0].proposed
    assert not events[0].ranks.any()


@pytest.mark.parametrize("stop", [("d",), ("bc", "fa"), ("zz",)])
def test_stop_sequences_end_verified_answers_where_they_end_generated_ones(stop: tuple[str, ...]) -> None:
    wanted = alone(stop=stop)
    slot, _, request = slot_for(whole(alone().ids, has_ended=True), stop=stop)
    result = run(slot, request)
    assert (result.text, result.finish, result.ids) == (wanted.text, wanted.finish, wanted.ids)


@pytest.mark.parametrize(
    ("options", "finish", "count"),
    [
        ({}, FinishReason.EOS, 19),
        ({"most": 10}, FinishReason.LENGTH, 10),
        ({"stop": ("bc",)}, FinishReason.STOP, 13),
    ],
    ids=["eos", "length", "stop"],
)
def test_nothing_accepted_beyond_the_end_is_counted(
    options: dict[str, Any], finish: FinishReason, count: int
) -> None:
    ids = alone(seed=5).ids
    assert Letters().push(ids) == "cgffebgfgggbcgfefe"
    draft = whole(ids, has_ended=True, most=options.get("most", MOST))
    slot, events, request = slot_for(draft, seed=5, **options)
    result = run(slot, request)
    assert (result.finish, result.accepted_tokens, result.accept_lengths) == (finish, count, (count,))
    # What draft and target have in common is as before.
    assert isinstance(events[0], VerificationResult)
    assert events[0].accepted == events[0].proposed == len(events[0].ranks) == len(draft.ids)


def test_a_pass_beyond_a_stop_sequence_that_is_seen_late_counts_for_nothing() -> None:
    ids = alone().ids
    assert Letters().push(ids[:11]) == "cgffebgfbec"
    # The first token is corrected; of four that are proposed then, two make the stop sequence. The answer has
    # no chunk due before its end, and so goes on to it.
    slot, _, request = slot_for(whole([3, *ids[1:]], has_ended=False), stop=("gf",), most=10)
    request.start(float("inf"))
    result = run(slot, request)
    assert (result.finish, result.text, result.forward_passes) == (FinishReason.STOP, "c", 3)
    assert (result.accept_lengths, result.accepted_tokens) == ((1, 2, 0), 2)


def test_resynchronisation_saves_passes_and_a_useless_draft_is_given_up() -> None:
    wanted = alone().ids
    draft = [*wanted[:3], wanted[3] % (VOCABULARY - 1) + 1, *wanted[4:]]
    passes = {}
    for resync in (True, False):
        slot, _, request = slot_for(whole(draft, has_ended=False), resync=resync)
        passes[resync] = run(slot, request).forward_passes
    assert passes[True] < passes[False]
    scored = []
    for junk in range(20):
        rng = np.random.default_rng(junk)
        slot, _, request = slot_for(whole(rng.integers(1, VOCABULARY, MOST).tolist(), has_ended=False))
        run(slot, request)
        scored.append(request.call.proposed)
    # The draft itself, and a few tokens in each of a few attempts.
    assert np.mean(scored) < MOST + 40


@given(st.data(), st.sampled_from([None, 5, 7, 10]))
@settings(deadline=None, max_examples=300)
def test_training_counts_the_passes_that_a_slot_takes(data: st.DataObject, seed: int | None) -> None:
    wanted = alone(seed=seed)
    answer = [*wanted.ids, *([END] if wanted.finish is FinishReason.EOS else [])]
    draft = whole(data.draw(edited_drafts(wanted.ids)), has_ended=data.draw(st.booleans()))
    slot, events, request = slot_for(draft, seed=seed)
    result = run(slot, request)
    first = events[0]
    assert isinstance(first, VerificationResult)
    accepted = next((i for i, (a, b) in enumerate(zip(draft.ids, answer, strict=False)) if a != b), None)
    if accepted is None:
        accepted = min(len(draft.ids), len(answer))
    assert count_passes(draft.ids, answer, accepted, MOST) == (
        result.forward_passes,
        result.proposed_tokens - first.proposed,
    )
