"""Stages that do not share a vocabulary: drafts travel as text, and change no token of the target."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from asd.values import FinishReason, Message, Sampling
from services.stage.domain import DraftPiece, DraftText, Result, VerificationResult
from tests.integration.stage.conftest import Reference, engine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from services.stage.domain import Event
    from services.stage.engines.onnx.engine import OnnxEngine

_GREEDY = Sampling()


async def _outcome(events: AsyncGenerator[Event, None]) -> tuple[Result, VerificationResult | None]:
    collected = [event async for event in events]
    checks = [event for event in collected if isinstance(event, VerificationResult)]
    assert isinstance(collected[-1], Result)
    return collected[-1], checks[0] if checks else None


async def _pieces(texts: Sequence[str], fingerprint: str) -> AsyncIterator[DraftPiece | FinishReason]:
    for text in texts:
        # Ids of another vocabulary, which must not be looked at.
        yield DraftPiece((7,), text, fingerprint)
        await asyncio.sleep(0)
    yield FinishReason.EOS


@pytest.mark.parametrize(("drafter", "target"), [("small", "foreign"), ("foreign", "medium")])
async def test_drafts_of_another_vocabulary_are_encoded_anew(
    drafter: str, target: str, reference: Reference
) -> None:
    one, other = engine(drafter), engine(target)
    await asyncio.gather(one.load(), other.load())
    assert one.status().fingerprint != other.status().fingerprint
    accepted = proposed = 0
    for prompt in reference.prompts[:40]:
        turns = (Message("user", prompt),)
        draft, _ = await _outcome(one.generate(turns, _GREEDY))
        alone, _ = await _outcome(other.generate(turns, _GREEDY))
        travelling = DraftText(draft.text, draft.ids, one.status().fingerprint, draft.finish)
        checked, verification = await _outcome(other.verify(turns, _GREEDY, travelling, None))
        assert (checked.ids, checked.text) == (alone.ids, alone.text)
        assert verification is not None
        assert not verification.ids_used
        accepted += verification.accepted
        proposed += verification.proposed
        texts = [draft.text[start : start + 7] for start in range(0, len(draft.text), 7)]
        pieces = _pieces(texts, one.status().fingerprint)
        streamed, again = await _outcome(other.verify_stream(turns, _GREEDY, pieces, None))
        assert streamed.ids == alone.ids
        assert again is not None
        assert not again.ids_used
    # Both models know most of these questions, and write answers alike.
    assert accepted > proposed / 2
    await asyncio.gather(one.unload(), other.unload())


@pytest.fixture
async def foreign() -> AsyncIterator[OnnxEngine]:
    model = engine("foreign")
    await model.load()
    yield model
    await model.unload()


@pytest.mark.parametrize("text", ["<|end|>", "19<|end|>19", "naïve 東京 🦊", "🦊🦊", "", " ", "\x00\ufffd"])
async def test_odd_text_is_proposed_as_letters(foreign: OnnxEngine, text: str, reference: Reference) -> None:
    turns = (Message("user", reference.prompts[0]),)
    alone, _ = await _outcome(foreign.generate(turns, _GREEDY))
    draft = DraftText(text, (), "", FinishReason.LENGTH)
    checked, verification = await _outcome(foreign.verify(turns, _GREEDY, draft, None))
    assert checked.ids == alone.ids
    assert verification is not None
    # A special token's name is as many letters as any other text, and never the token.
    assert verification.proposed >= len(text.split())
    whole = text.encode()
    for cut in range(len(text) + 1):
        pieces = _pieces([text[:cut], text[cut:]], "f" * 64)
        streamed, _ = await _outcome(foreign.verify_stream(turns, _GREEDY, pieces, None))
        assert streamed.ids == alone.ids
    assert len(whole) >= len(text)


async def test_a_character_cut_between_tokens_is_verified_and_shown_whole(foreign: OnnxEngine) -> None:
    turns = (Message("user", "Say 東京."),)
    alone, _ = await _outcome(foreign.generate(turns, _GREEDY))
    # With next to no threshold the target writes what it is given: each letter is several tokens.
    draft = DraftText("東京", (), "", FinishReason.LENGTH)
    result, verification = await _outcome(foreign.verify(turns, Sampling(max_new_tokens=40), draft, 1e-30))
    assert verification is not None
    assert verification.accepted == verification.proposed > 2
    assert result.text.startswith("東京")
    assert result.ids[:2] != alone.ids[:2]
