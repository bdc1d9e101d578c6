"""How a model's requests are read: what only this model refuses, and where a draft ends."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, InvalidRequest, PromptTooLong
from asd.values import FinishReason, Message
from services.stage.domain import DraftPiece, DraftText
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.inputs import RequestReader
from services.stage.generation.tokenizer import TooManyTokens
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

OWN = "a" * 64
# Ends of the model's answers, and the size of its vocabulary.
ENDS, VOCABULARY, CONTEXT = (7, 3), 40, 16


class Letters:
    """A tokenizer whose tokens are letters; four of them at most make one in a prompt."""

    fingerprint = OWN
    longest_token = 4

    def render(self, turns: Sequence[Message]) -> str:
        return "".join(turn.content for turn in turns)

    def least_tokens(self, text: str) -> int:
        return -(-len(text) // self.longest_token)

    def most_characters(self, tokens: int) -> int:
        return tokens * self.longest_token

    def encode_chat(self, turns: Sequence[Message], text: str, most: int) -> list[int]:
        if len(text) > most:
            raise TooManyTokens(len(text))
        return [9 for _ in text]

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) - 97 for letter in text]


class Gated(Letters):
    """Encodes only once its gate is open, and keeps how many texts it had at a time."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._now = self.most = 0

    def encode_chat(self, turns: Sequence[Message], text: str, most: int) -> list[int]:
        return self._encode(text)

    def encode_text(self, text: str) -> list[int]:
        return self._encode(text)

    def least_tokens(self, text: str) -> int:
        return 0

    def most_characters(self, tokens: int) -> int:
        return 100_000

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self.begun.put(text[0])
        self.gate.wait(CALL_S)
        with self._lock:
            self._now -= 1
        return [9]


@pytest.mark.parametrize("kind", ["prompt", "draft"])
async def test_a_cancelled_requests_long_text_counts_until_it_is_encoded(kind: str) -> None:
    gated: Any = Gated()
    reader = RequestReader("small", gated, CONTEXT, VOCABULARY, ENDS)

    async def read(letter: str) -> None:
        text = letter * 10_000
        if kind == "prompt":
            await reader.read_prompt((Message("user", text),))
        else:
            await reader.read_draft(DraftText(text, (), "", FinishReason.EOS), ReceivedDraft(100))

    tasks = {letter: asyncio.create_task(read(letter)) for letter in "abcdef"}
    try:
        begun = {await asyncio.to_thread(gated.begun.get, timeout=CALL_S) for _ in range(2)}
        # Two are being encoded; another one is cancelled while it waits.
        waiting = sorted(set(tasks) - begun)
        gone = [tasks.pop(letter) for letter in (*begun, waiting[0])]
        for task in gone:
            task.cancel()
        assert all(isinstance(each, asyncio.CancelledError) for each in await _settled(gone))
        # Whatever could begin now would: the loop has nothing else to do, and hands it to a thread.
        for _ in range(10):
            await asyncio.sleep(0)
        await asyncio.to_thread(int)
    finally:
        gated.gate.set()
    assert await _settled(list(tasks.values())) == [None] * 3
    assert gated.most == 2
    rest = {gated.begun.get_nowait() for _ in range(3)}
    assert rest == set(waiting[1:])
    assert gated.begun.empty()


async def _settled(tasks: list[asyncio.Task[None]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def reader() -> RequestReader:
    letters: Any = Letters()
    return RequestReader("small", letters, CONTEXT, VOCABULARY, ENDS)


@pytest.mark.parametrize("count", [CONTEXT, CONTEXT * Letters.longest_token])
async def test_a_prompt_beyond_the_context_is_refused_for_this_model_alone(
    reader: RequestReader, count: int
) -> None:
    assert len(await reader.read_prompt((Message("user", "x" * (CONTEXT - 1)),))) == CONTEXT - 1
    with pytest.raises(PromptTooLong) as caught:
        await reader.read_prompt((Message("user", "x" * count),))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("ids", "finish", "read"),
    [
        ((1, 2), FinishReason.LENGTH, [1, 2]),
        # Where the drafter ended by itself, the target's own end is proposed.
        ((1, 2), FinishReason.EOS, [1, 2, 7]),
        # The drafter has other ends, and wrote on.
        ((1, 2, 3, 4), FinishReason.EOS, [1, 2]),
        ((1, 7, 3, 4), FinishReason.LENGTH, [1]),
        ((7,), FinishReason.EOS, []),
        # What stands behind an end is not read.
        ((1, 7, 9999), FinishReason.EOS, [1]),
    ],
)
@pytest.mark.parametrize("size", [None, 1, 3])
async def test_a_draft_ends_at_a_token_that_ends_the_models_answers(
    reader: RequestReader, ids: tuple[int, ...], finish: FinishReason, read: list[int], size: int | None
) -> None:
    feed = ReceivedDraft(most_tokens=100)
    if size is None:
        await reader.read_draft(DraftText("", ids, OWN, finish), feed)
    else:
        errors = await follow(
            reader, feed, [*(ids[start : start + size] for start in range(0, len(ids), size)), finish]
        )
        assert errors == []
    assert (feed.ids, feed.is_complete, feed.ids_used) == (read, True, True)


async def test_ids_beyond_the_vocabulary_are_refused(reader: RequestReader) -> None:
    for ids in ((1, VOCABULARY), (VOCABULARY, 7)):
        with pytest.raises(InvalidRequest) as caught:
            await reader.read_draft(DraftText("", ids, OWN, FinishReason.EOS), ReceivedDraft(100))
        assert caught.value.field == "draft.token_ids"
        (error,) = await follow(reader, ReceivedDraft(100), [ids, FinishReason.EOS])
        assert error.field == "chunk.token_ids"


async def follow(
    reader: RequestReader, feed: ReceivedDraft, pieces: Sequence[tuple[int, ...] | FinishReason]
) -> list[AsdError]:
    """Have a draft read as it comes; return the errors that its target is told of."""
    errors: list[AsdError] = []

    async def come() -> AsyncIterator[DraftPiece | FinishReason]:
        for piece in pieces:
            yield piece if isinstance(piece, FinishReason) else DraftPiece(piece, "", OWN)
            await asyncio.sleep(0)

    def notify(error: AsdError | None) -> None:
        if error is not None:
            errors.append(error)

    await reader.follow_draft(come(), feed, notify)
    return errors
