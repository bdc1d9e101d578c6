"""Prompts and drafts as engines read them: bounded before they are encoded, and beside the event loop."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from asd.errors import InvalidRequest, PromptTooLong
from asd.values import FinishReason, Message
from services.stage.domain import DraftPiece, DraftText
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.inputs import RequestReader
from services.stage.generation.tokenizer import ChatTokenizer
from tests.fakes.chat_templates import FAMILIES
from tests.fakes.tiny_tokenizers import byte_level, pieces, write, write_family

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tokenizers import Encoding

_SPECIAL = ("<unk>", "<s>", "</s>")
_CONFIG = {"chat_template": "<s>{{ messages[-1].content | trim }}</s>"}
CONTEXT = 40


class Counting(ChatTokenizer):
    """A tokenizer that keeps what it was given to encode, and where."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.texts: list[str] = []
        self.threads: set[int] = set()

    def encode_text(self, text: str) -> list[int]:
        self.texts.append(text)
        self.threads.add(threading.get_ident())
        return super().encode_text(text)

    def encode_chat(self, turns: Any, text: str | None = None, most: int | None = None) -> list[int]:
        self.texts.append(turns[-1].content)
        self.threads.add(threading.get_ident())
        return super().encode_chat(turns, text, most)


@pytest.fixture(params=[byte_level, pieces], ids=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Counting:
    return Counting(write(tmp_path, request.param(_SPECIAL), _CONFIG))


@pytest.fixture
def reader(tokenizer: Counting) -> RequestReader:
    return RequestReader("m", tokenizer, CONTEXT, tokenizer.vocabulary_size, (2,))


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(
    reader: RequestReader, tokenizer: Counting
) -> None:
    with pytest.raises(InvalidRequest, match=r"2000000 .* 39 tokens") as caught:
        await reader.read_prompt((Message("user", "a " * 1_000_000),))
    assert caught.value.field == "prompt"
    assert tokenizer.texts == []


class Watched:
    """The library's tokenizer; keeps which texts it encodes, and what is read of their encodings."""

    def __init__(self, inner: Tokenizer, log: list[str]) -> None:
        self._inner = inner
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_batch(self, texts: list[str], **options: bool) -> list[Any]:
        self._log.append("encode")
        return [WatchedEncoding(each, self._log) for each in self._inner.encode_batch(texts, **options)]

    def encode_batch_fast(self, texts: list[str], **options: bool) -> list[Any]:
        self._log.append("encode")
        return [WatchedEncoding(each, self._log) for each in self._inner.encode_batch_fast(texts, **options)]


class WatchedEncoding:
    def __init__(self, inner: Encoding, log: list[str]) -> None:
        self._inner = inner
        self._log = log

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        self._log.append(name)
        return getattr(self._inner, name)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    kept: list[str] = []

    class Library:
        @staticmethod
        def from_str(text: str) -> Watched:
            return Watched(Tokenizer.from_str(text), kept)

    monkeypatch.setattr("services.stage.generation.tokenizer.Tokenizer", Library)
    return kept


@pytest.mark.parametrize("make", [byte_level, pieces])
@pytest.mark.parametrize("text", ["a b ", "a </s> "])
async def test_of_a_prompt_that_is_too_long_nothing_is_read_but_its_length(
    tmp_path: Path, log: list[str], make: Callable[..., dict[str, Any]], text: str
) -> None:
    tokenizer = ChatTokenizer(write(tmp_path, make(_SPECIAL), _CONFIG))
    turns = (Message("user", text * 30),)
    count = len(tokenizer.encode_chat(turns))
    reader = RequestReader("m", tokenizer, count, tokenizer.vocabulary_size, (2,))
    log.clear()
    with pytest.raises(PromptTooLong, match=f"{count} .* {count - 1}"):
        await reader.read_prompt(turns)
    assert log == ["encode"]


@pytest.mark.parametrize(
    ("flags", "encoded", "found"), [({}, 1, 0), ({"single_word": True}, 2, 32), ({"normalized": True}, 2, 32)]
)
def test_of_special_tokens_in_a_message_no_other_tokens_places_are_read(
    tmp_path: Path, log: list[str], flags: dict[str, bool], encoded: int, found: int
) -> None:
    tokenizer = ChatTokenizer(write(tmp_path, byte_level(_SPECIAL, **flags), _CONFIG))
    log.clear()
    tokenizer.encode_chat((Message("user", f"({'hello </s> ' * 30})"),))
    assert log.count("encode") == log.count("ids") == encoded
    assert log.count("token_to_chars") == found
    assert "offsets" not in log


@pytest.mark.parametrize("other", ["</s>b", "a<s", "<s>"])
def test_a_token_that_may_share_text_with_a_special_one_is_left_to_the_library(
    tmp_path: Path, log: list[str], other: str
) -> None:
    special = ("</s>", "<s>") if other != "<s>" else ("</s>", "[<s>]")
    config = {"chat_template": "{{ messages[-1].content }}</s>b a<s>"}
    tokenizer = ChatTokenizer(write(tmp_path, byte_level(special, (other,)), config))
    plain = tokenizer.encode_chat((Message("user", "x"),))
    log.clear()
    marked = tokenizer.encode_chat((Message("user", "</s>x"),))
    assert log.count("encode") == 2
    assert marked[-len(plain) + 1 :] == plain[1:]


async def test_what_a_template_leaves_out_counts_for_nothing(
    reader: RequestReader, tokenizer: Counting
) -> None:
    short = await reader.read_prompt((Message("user", "hello"),))
    assert await reader.read_prompt((Message("user", "hello" + " " * 1_000_000),)) == short
    # Long text is encoded beside the event loop.
    assert len(tokenizer.threads) == 2


async def test_a_whole_draft_is_encoded_as_far_as_it_is_wanted(
    reader: RequestReader, tokenizer: Counting
) -> None:
    text = "the user is in the system " * 100_000
    feed = ReceivedDraft(30)
    await reader.read_draft(DraftText(text, (), "", FinishReason.EOS), feed)
    assert feed.ids == ChatTokenizer.encode_text(tokenizer, text[:1000])[:30]
    assert feed.is_complete
    assert sum(map(len, tokenizer.texts)) < 1000


async def test_a_draft_in_pieces_is_encoded_as_far_as_it_is_wanted(
    reader: RequestReader, tokenizer: Counting
) -> None:
    text = "the user is in the system " * 100_000

    async def come() -> AsyncIterator[DraftPiece | FinishReason]:
        for start in range(0, len(text), len(text) // 3):
            yield DraftPiece((7,), text[start : start + len(text) // 3], "f" * 64)
        yield FinishReason.EOS

    feed, told = ReceivedDraft(30), []
    await reader.follow_draft(come(), feed, told.append)
    assert feed.ids == ChatTokenizer.encode_text(tokenizer, text[:1000])[:30]
    assert feed.is_complete
    assert not any(told)
    assert max(map(len, tokenizer.texts)) < 1000


@pytest.mark.parametrize(("blanks", "is_whole"), [(1, True), (100_000, False)])
async def test_the_end_of_a_draft_is_proposed_only_where_all_of_it_was_read(
    tmp_path: Path, blanks: int, is_whole: bool
) -> None:
    # Blanks make no token here, so that what is read of the draft does not fill the feed.
    description = pieces(_SPECIAL, form="bare") | {
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "normalizer": None,
    }
    tokenizer = ChatTokenizer(write(tmp_path, description, _CONFIG))
    reader = RequestReader("m", tokenizer, CONTEXT, tokenizer.vocabulary_size, (2,))
    text, whole, stream = f"a{' ' * blanks}b", ReceivedDraft(30), ReceivedDraft(30)
    await reader.read_draft(DraftText(text, (), "", FinishReason.EOS), whole)

    async def come() -> AsyncIterator[DraftPiece | FinishReason]:
        yield DraftPiece((), text, "")
        yield FinishReason.EOS

    await reader.follow_draft(come(), stream, lambda error: None)
    assert whole.ids == stream.ids == tokenizer.encode_text("a b" if is_whole else "a") + [2] * is_whole


async def test_ids_beyond_what_a_draft_may_have_are_not_looked_at(
    reader: RequestReader, tokenizer: Counting
) -> None:
    feed = ReceivedDraft(3)
    ids = (*tokenizer.encode_text("abcd"), 2, 99_999)
    await reader.read_draft(DraftText("", ids[:3] + ids[-2:], tokenizer.fingerprint, FinishReason.EOS), feed)
    assert feed.ids == list(ids[:3])
    with pytest.raises(InvalidRequest, match="99999"):
        await reader.read_draft(
            DraftText("", (99_999,), tokenizer.fingerprint, FinishReason.EOS), ReceivedDraft(3)
        )


def test_other_threads_go_on_while_text_is_encoded(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_family(tmp_path, FAMILIES["llama 3"]))
    turns, is_over = [0], threading.Event()

    def take_turns() -> None:
        while not is_over.is_set():
            turns[0] += 1
            # Gives the interpreter's lock to a thread that waits for it.
            time.sleep(0)

    interval = sys.getswitchinterval()
    other = threading.Thread(target=take_turns)
    other.start()
    # Longer than the test: a thread runs only where another one lets the lock go by itself.
    sys.setswitchinterval(60.0)
    try:
        before = turns[0]
        tokenizer.encode_text("the user is in the system. " * 2_000)
        after = turns[0]
    finally:
        sys.setswitchinterval(interval)
        is_over.set()
        other.join()
    assert after > before


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": ""}},
    ],
)
def test_no_bound_is_known_where_a_tokenizer_drops_text(tmp_path: Path, change: dict[str, Any]) -> None:
    tokenizer = ChatTokenizer(write(tmp_path, pieces(_SPECIAL) | change, _CONFIG))
    assert tokenizer.least_tokens("a" * 10_000) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: byte_level(_SPECIAL),
        lambda: byte_level(_SPECIAL, rstrip=True),
        lambda: pieces(_SPECIAL),
        lambda: pieces(_SPECIAL, form="new", lstrip=True),
    ],
)
@pytest.mark.parametrize("text", ["the " * 50, "e\u0301" * 50, "🙂" * 50, " " * 200 + "a", "system"])
def test_a_text_has_no_fewer_tokens_than_is_said(
    tmp_path: Path, make: Callable[[], dict[str, Any]], text: str
) -> None:
    tokenizer = ChatTokenizer(write(tmp_path, make(), {"chat_template": "</s>{{ messages[-1].content }}"}))
    turns = (Message("user", text),)
    assert tokenizer.least_tokens(tokenizer.render(turns)) <= len(tokenizer.encode_chat(turns))
    assert tokenizer.least_tokens("the " * 1000) > 100
