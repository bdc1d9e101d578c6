"""How a model's requests are read: what only this model refuses, and where a draft ends."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, InvalidRequest, ModelRefusal, PromptTooLong
from asd.values import Candidate, Constraint, FinishReason, Message, Sampling, TokenDetail
from services.stage.domain import DraftPiece, DraftText
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.inputs import RequestReader
from services.stage.generation.logprobs import row_signals
from services.stage.generation.tokenizer import ChatTokenizer, TooManyTokens
from tests.fakes.letter_grammars import letters_matcher
from tests.fakes.tiny_tokenizers import byte_level, pieces, write
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

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


class OneLetters(Letters):
    """Letters that begin with token 1."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + each) for each in ids)


MATCHER = letters_matcher("ab+")


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


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(constraint=Constraint(regex="a")), "sampling.constraint"),
        (Sampling(top_logprobs=0), "sampling.top_logprobs"),
    ],
)
async def test_a_model_refuses_what_it_cannot_do(
    reader: RequestReader, sampling: Sampling, field: str
) -> None:
    with pytest.raises(ModelRefusal) as refused:
        await reader.open_call((Message("user", "a"),), sampling, lambda _, rows: row_signals(rows))
    assert refused.value.field == field


def _whole(tmp_path: Path, description: dict[str, Any]) -> tuple[ChatTokenizer, RequestReader, int]:
    """Return a tokenizer, a reader that can do all, and the end token."""
    tokenizer = ChatTokenizer(write(tmp_path, description, {"chat_template": "{{ messages[-1].content }}"}))
    end = next(token for token, mark in tokenizer.special.items() if mark == "</s>")
    size = tokenizer.vocabulary_size
    return (
        tokenizer,
        RequestReader("m", tokenizer, 99, size, (end,), constrains=True, most_top_logprobs=2),
        end,
    )


async def test_log_probabilities_come_with_the_tokens_bytes(tmp_path: Path) -> None:
    tokenizer, reader, end = _whole(tmp_path, byte_level(("</s>",)))
    half, letter = tokenizer.encode_text("é")[0], tokenizer.encode_text("a")[0]
    turns = (Message("user", "a"),)

    def likeliest(evidence: int, most: int) -> list[tuple[int, float]]:
        return [(evidence, -0.5), (end, -1.0)][:most]

    for most, candidates in ((0, 0), (1, 1), (2, 2)):
        call = await reader.open_call(
            turns, Sampling(top_logprobs=most), lambda i, r: row_signals([]), likeliest
        )
        assert call.details is not None
        wanted = (Candidate(letter, b"a", -0.5), Candidate(end, b"", -1.0))[:candidates]
        assert call.details([half], [letter]) == [TokenDetail(b"\xc3", wanted)]
    with pytest.raises(ModelRefusal, match="2"):
        await reader.open_call(turns, Sampling(top_logprobs=3), lambda i, r: row_signals([]), likeliest)


@pytest.mark.parametrize("form", ["bytes", "legacy", "new", "bare"])
async def test_a_constrained_answer_is_the_text_of_its_tokens(tmp_path: Path, form: str) -> None:
    tokenizer, reader, end = _whole(
        tmp_path, byte_level(("</s>",)) if form == "bytes" else pieces(("<unk>", "<s>", "</s>"), form=form)
    )
    assert reader.constrains
    sampling = Sampling(constraint=Constraint(regex=r"\{é🙂the \d+"))
    call = await reader.open_call((Message("user", "a"),), sampling, lambda i, r: row_signals([]))
    assert call.matcher is not None
    ids = tokenizer.encode_text("{é🙂the 12")
    assert tokenizer.decode(ids) == "{é🙂the 12"
    assert call.matcher.allowed([*ids, end]) == len(ids) + 1


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize(
    ("text", "finish", "kept"),
    [
        ("abb", FinishReason.EOS, None),
        ("ab", FinishReason.LENGTH, None),
        ("a", FinishReason.LENGTH, None),
        ("a", FinishReason.EOS, 1),
        ("abca", FinishReason.EOS, 2),
        ("c", FinishReason.LENGTH, 0),
    ],
)
async def test_a_draft_ends_where_it_breaks_the_constraint_and_a_prediction_is_refused(
    text: str, finish: FinishReason, kept: int | None, as_text: bool
) -> None:
    ids = tuple(ord(letter) - 96 for letter in text)
    letters: Any = OneLetters()
    reader = RequestReader("small", letters, CONTEXT, VOCABULARY, (0,))
    if as_text:
        sent = DraftText(text, (), "", finish)
        steps = [DraftPiece((), each, "f" * 64) for each in text]
    else:
        sent = DraftText("", ids, OWN, finish)
        steps = [DraftPiece((each,), "", OWN) for each in ids]
    whole, written = ([*ids, 0] if finish is FinishReason.EOS else [*ids]), ReceivedDraft(9, MATCHER)
    streamed = ReceivedDraft(9, MATCHER)

    async def pieces_of() -> AsyncIterator[DraftPiece | FinishReason]:
        for step in (*steps, finish):
            yield step

    await reader.read_draft(sent, written)
    await reader.follow_draft(pieces_of(), streamed, lambda error: None)
    for draft in (written, streamed):
        assert draft.ids == whole[:kept]
        assert draft.is_complete
        assert draft.evidence().allowed == kept
    predicted = DraftText(sent.text, sent.ids, sent.fingerprint, finish, is_prediction=True)
    if kept is None:
        await reader.read_draft(predicted, ReceivedDraft(9, MATCHER))
    else:
        with pytest.raises(InvalidRequest) as refused:
            await reader.read_draft(predicted, ReceivedDraft(9, MATCHER))
        assert refused.value.field == "draft"


async def test_a_tokenizer_that_llguidance_cannot_use_takes_no_constraints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    description = pieces(("<unk>", "<s>", "</s>"), form="new") | {"decoder": decoder}
    _, reader, _ = _whole(tmp_path, description)
    assert not reader.constrains
    assert "decoder" in caplog.text
    sampling = Sampling(constraint=Constraint(regex="a"))
    with pytest.raises(ModelRefusal):
        await reader.open_call((Message("user", "a"),), sampling, lambda i, r: row_signals([]))
