"""Text as it grows: together it is what the tokenizer makes of all ids, and nothing shown changes later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd.errors import PreconditionFailed
from services.stage.generation.tokenizer import ChatTokenizer
from tests.fakes.tiny_tokenizers import byte_level, pieces, write

if TYPE_CHECKING:
    from pathlib import Path

_SPECIAL = ("<unk>", "<s>", "</s>")
_CONFIG = {"chat_template": "{{ messages[-1].content }}"}


def _metaspace() -> dict[str, Any]:
    """Return a tokenizer whose decoder is Metaspace alone: it drops the blanks of a text's first token."""
    tokenizer = pieces(_SPECIAL, form="new")
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return tokenizer | {"decoder": decoder}


def _with_empty_token() -> dict[str, Any]:
    tokenizer = pieces(_SPECIAL)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[""] = len(vocabulary)
    return tokenizer


_TOKENIZERS = {
    "bytes": byte_level(_SPECIAL, ("<think>", "ü ")),
    "legacy": pieces(_SPECIAL, ("<think>",)),
    "new": pieces(_SPECIAL, form="new"),
    "bare": pieces(_SPECIAL, form="bare"),
    "metaspace": _metaspace(),
    "empty token": _with_empty_token(),
}


class Tokenizers(dict[str, ChatTokenizer]):
    """Tokenizers by name; hypothesis shows them with a failing example."""

    def __repr__(self) -> str:
        """Return less than their vocabularies."""
        return "Tokenizers"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    root = tmp_path_factory.mktemp("tokenizers")
    return Tokenizers(
        {
            name: ChatTokenizer(write(root / name.replace(" ", "-"), tokenizer, _CONFIG))
            for name, tokenizer in _TOKENIZERS.items()
        }
    )


def _ids(tokenizer: ChatTokenizer) -> st.SearchStrategy[list[int]]:
    known = tokenizer.encode_text
    # Halves of characters, whole ones, letters, blanks, special tokens, and an id of no token.
    likely = {*known("é🙂\ufffd\n \n"), *known(" a b"), *known("the ▁"), *tokenizer.special, 9999}
    # The last one is the empty token, where there is one.
    likely.add(tokenizer.vocabulary_size - 1)
    return st.lists(st.sampled_from(sorted(likely)) | st.integers(0, 420), max_size=14)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(_TOKENIZERS)), st.integers(1, 4))
def test_streamed_text_is_the_text_of_all_ids(
    tokenizers: Tokenizers, data: st.DataObject, name: str, batch: int
) -> None:
    tokenizer = tokenizers[name]
    ids = data.draw(_ids(tokenizer))
    stream, shown = tokenizer.stream(), ""
    for start in range(0, len(ids), batch):
        new = stream.push(ids[start : start + batch])
        assert 0 <= stream.lag <= len(new)
        shown += new
        # Whatever comes later, what is shown stands.
        assert tokenizer.decode(ids).startswith(shown)
        assert shown + stream.finish() == tokenizer.decode(ids[: start + batch])
    assert shown + stream.finish() == tokenizer.decode(ids)


@given(st.data(), st.sampled_from(sorted(_TOKENIZERS)))
def test_whole_text_is_shown_as_soon_as_it_is_certain(
    tokenizers: Tokenizers, data: st.DataObject, name: str
) -> None:
    tokenizer = tokenizers[name]
    text = data.draw(st.text(alphabet="abc the\nüé🙂", min_size=1, max_size=12))
    stream = tokenizer.stream()
    stream.push(tokenizer.encode_text(f"a{text}a"))
    assert stream.finish() == ""


@given(st.data(), st.sampled_from(sorted(_TOKENIZERS)))
def test_the_bytes_of_tokens_are_the_text(tokenizers: Tokenizers, data: st.DataObject, name: str) -> None:
    tokenizer = tokenizers[name]
    text = data.draw(st.text(alphabet="abc the\nüé🙂", min_size=1, max_size=12))
    ids = tokenizer.encode_text(f"a{text}a")
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined == " " * tokenizer.drops_blank() + tokenizer.decode(ids)


def test_special_tokens_and_ids_of_no_token_have_no_bytes(tokenizers: Tokenizers) -> None:
    for tokenizer in tokenizers.values():
        assert {tokenizer.token_bytes(each) for each in (*tokenizer.special, 9999)} == {b""}


def test_half_a_character_behind_a_newline_is_replaced_and_nothing_raised(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["legacy"]
    newline, letter = tokenizer.encode_text("a\n")[-1], tokenizer.encode_text("a")[-1]
    half = tokenizer.encode_text("🙂")[1]
    stream = tokenizer.stream()
    text = "".join(stream.push([token]) for token in (letter, newline, half, letter))
    assert text == tokenizer.decode([letter, newline, half, letter])
    assert text[0] == text[-1] == "a"
    assert "\ufffd" in text


def test_how_much_of_new_text_belongs_to_earlier_tokens_is_said(tokenizers: Tokenizers) -> None:
    for name, waits in (("bytes", ["é"]), ("legacy", ["é", "\n", "é\n"])):
        tokenizer = tokenizers[name]
        for each in waits:
            *head, last = tokenizer.encode_text(f"a{each}b")
            stream = tokenizer.stream()
            pushed = [(stream.push([token]), stream.lag) for token in head]
            new, lag = stream.push([last]), stream.lag
            assert "".join(text for text, _ in pushed).strip() + new == f"a{each}b"
            if name == "legacy":
                assert (new, lag) == (f"{each}b", len(each))
            else:
                assert pushed[-1] == (each, 1)
                assert (new, lag) == ("b", 0)


def test_a_special_tokens_text_is_no_text_of_the_answer(tokenizers: Tokenizers) -> None:
    for tokenizer in tokenizers.values():
        stream = tokenizer.stream()
        for token, mark in tokenizer.special.items():
            assert stream.push([token]) == ""
            assert stream.mark(token) == mark
        assert stream.mark(tokenizer.encode_text("a")[-1]) == ""


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
        },
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}],
        },
    ],
)
def test_a_decoder_that_cannot_stream_is_refused_by_name(tmp_path: Path, decoder: dict[str, Any]) -> None:
    last = decoder["decoders"][-1] if "decoders" in decoder else decoder
    with pytest.raises(PreconditionFailed, match=last["type"]):
        ChatTokenizer(write(tmp_path, byte_level(_SPECIAL) | {"decoder": decoder}, _CONFIG))
