"""A model's tokenizer with its chat template."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from asd.errors import ConversationRefused, InputFailed, PreconditionFailed
from services.stage.generation.chat_template import ChatTemplate
from services.stage.generation.text_stream import Decoding, TextStream
from services.stage.generation.tokenizer_description import TextLimit, as_is, renamed
from services.stage.generation.tokenizer_faults import check_patterns, explained
from services.stage.generation.traced_text import of_unknown_origin, written_by_template
from services.stage.model_files import read_json_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from asd.values import Message
    from services.stage.generation.traced_text import TracedText

# Private-use characters for the names of special tokens, which occur in no text.
_PRIVATE, _PRIVATE_COUNT = 0xF0000, 0xFFFE


# Most pairs of added tokens to compare. Chosen: a second's work; models have a thousandth of it.
_MOST_PAIRS = 1_000_000


class TooManyTokens(Exception):  # noqa: N818 - named by its cause
    """A text has more tokens than allowed. count: how many."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


class ChatTokenizer:
    """Turns conversations into ids, and ids into text, by the files of a Hugging Face directory.

    Raises PreconditionFailed if tokenizer.json or the chat template is missing or broken.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        content = read_json_file(path, "a model directory needs its tokenizer")
        with explained(f"{path} is not a tokenizer"):
            self._read(content, path)
        self._template = ChatTemplate(directory)
        self._template.check_reads_messages()

    def _read(self, content: Any, path: Path) -> None:
        description = as_is(content)
        self._tokenizer = Tokenizer.from_str(json.dumps(description))
        canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocabulary_size = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        # Text of each special token, by id.
        self.special = {
            token_id: token.content for token_id, token in added.items() if token.special and token.content
        }
        self._literal = _LiteralTokenizer(self._tokenizer, description, tuple(self.special.values()))
        # The library prefers the longest token that begins at an index.
        longest_first = sorted(self.special.values(), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        edges = "".join({edge for mark in longest_first for edge in (mark[0], mark[-1])})
        self._edges = re.compile(f"[{re.escape(edges)}]" if edges else "(?!)")
        self._longest = max(map(len, self._tokenizer.get_vocab()))
        self._limit = TextLimit(description, self._longest, any(t.lstrip or t.rstrip for t in added.values()))
        self._decoding = Decoding(self._tokenizer, description, path, set(self.special))
        check_patterns(self._tokenizer, description, path)

    def render(self, turns: Sequence[Message]) -> str:
        """Return a conversation's text as the chat template writes it.

        Raises ConversationRefused if the template refuses it, InputFailed if the template fails.
        """
        return self._template.render(turns)

    def encode_chat(
        self, turns: Sequence[Message], text: str | None = None, most: int | None = None
    ) -> list[int]:
        """Return the ids of a conversation, ready for the model's answer.

        Only the template's own text makes special tokens; in a message, their text is plain text.
        text: from `render`. most: largest number of ids.
        Raises as `render` does. Raises ConversationRefused if a message holds the text of a special token and
        the template hides whether that is part of the prompt, TooManyTokens for more ids than `most`.
        """
        if text is None:
            text = self.render(turns)
        # A message without such text cannot become part of a special token, whatever the template does.
        if any(self._edges.search(turn.content) for turn in turns):
            traced = self._template.trace(turns)
            own = written_by_template(traced, self._marks)
            if own != [match.span() for match in self._marks.finditer(str.__str__(traced))]:
                self._check_origins(traced, turns)
                return self._literal.encode_around(traced, own, most)
            text = str.__str__(traced)
        return _encode(self._tokenizer, text, most)

    def plain_prompt(self) -> list[int]:
        """Return the ids of the shortest plain conversation that the chat template takes."""
        texts = map(self._template.render, self._template.plain)
        return min((_encode(self._tokenizer, text) for text in texts), key=len)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text; special tokens in it are ordinary letters."""
        return self._literal.encode(text)

    def least_tokens(self, text: str) -> int:
        """Return a lower bound on the number of a text's tokens, without encoding it; 0 if there is none."""
        return self._limit.least_tokens(text)

    def most_characters(self, tokens: int) -> int:
        """Return how many characters to encode to get that many tokens."""
        return (tokens + 1) * self._longest

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; none for a special one."""
        return self._decoding.token_bytes(token_id)

    def drops_blank(self) -> bool:
        """Return whether texts begin with a blank that decoding drops, as SentencePiece has it."""
        return self.token_bytes(self.encode_text("a")[0]).startswith(b" ")

    def to_json(self) -> str:
        """Return the tokenizer as tokenizer.json holds it."""
        return self._tokenizer.to_str()

    def stream(self) -> TextStream:
        """Return an empty growing text."""
        return TextStream(self._decoding, self.special)

    def _check_origins(self, text: TracedText, turns: Sequence[Message]) -> None:
        unknown = of_unknown_origin(text, self._marks)
        if unknown:
            mark = str.__str__(text)[slice(*unknown[0])]
            raise ConversationRefused(
                f"a message holds the text of the special token {mark}, and the model's chat template hides "
                "whether it stands in the prompt: leave it out of the message",
                field="prompt" if len(turns) == 1 else "conversation",
            )


class _LiteralTokenizer:
    """A tokenizer for which the text of a special token is text.

    Its special tokens get random names, which no caller can know. Otherwise it behaves as the library does,
    also in how it splits the text around a token.
    """

    def __init__(self, tokenizer: Tokenizer, description: dict[str, Any], marks: Sequence[str]) -> None:
        nonce = "".join(chr(_PRIVATE + secrets.randbelow(_PRIVATE_COUNT)) for _ in range(8))
        self._names = {mark: nonce + chr(_PRIVATE + index) for index, mark in enumerate(marks)}
        self._plain = tokenizer
        self._tokenizer = Tokenizer.from_str(json.dumps(renamed(description, self._names)))
        # Names by id, except for the token for unknown text, which also stands for other text.
        self._special: dict[int, str] = {}
        unknown = _unknown(description["model"])
        self._plain_special: set[int] = set()
        # Names that the library could not give the token's own id.
        self._ids: dict[int, int] = {}
        for token in tokenizer.get_added_tokens_decoder().values():
            real = tokenizer.token_to_id(token.content)
            mine = self._tokenizer.token_to_id(self._names.get(token.content, token.content))
            assert real is not None
            assert mine is not None
            if mine != real:
                self._ids[mine] = real
            if token.content in self._names:
                self._plain_special.add(real)
                if token.content != unknown:
                    self._special[mine] = self._names[token.content]
        self._finds_all = _finds_all(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that holds no special token."""
        return [self._ids.get(each, each) for each in _encode(self._tokenizer, text)]

    def encode_around(
        self, text: str, spans: Sequence[tuple[int, int]], most: int | None = None
    ) -> list[int]:
        """Return the ids of a text whose special tokens stand at the given spans (begin, end) alone.

        Raises PreconditionFailed if the tokenizer finds other ones, TooManyTokens if there are more than
        `most` ids.
        """
        text = str.__str__(text)
        if not self._finds_all:
            # The library may ignore a token's text because of its neighbours: then it is text here too.
            spans = _within(spans, _spans(self._plain, text, self._plain_special))
        parts, names, end = [], [], 0
        for start, stop in spans:
            names.append(self._names[text[start:stop]])
            parts += [text[end:start], names[-1]]
            end = stop
        ids = _encode(self._tokenizer, "".join([*parts, text[end:]]), most)
        known = set(self._special.values())
        expected = [name for name in names if name in known]
        if [self._special[each] for each in ids if each in self._special] != expected:
            raise PreconditionFailed("the tokenizer does not find its special tokens by other names")
        return [self._ids.get(each, each) for each in ids]


def _encode(tokenizer: Tokenizer, text: str, most: int | None = None) -> list[int]:
    # Only the library's batch calls release the interpreter's lock; this one computes no offsets.
    with explained("the model's tokenizer fails on the text", InputFailed):
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
    if most is not None and len(encoding) > most:
        raise TooManyTokens(len(encoding))
    return list(encoding.ids)


def _spans(tokenizer: Tokenizer, text: str, ids: set[int]) -> list[tuple[int, int]]:
    """Return the spans of a set of tokens in a text."""
    with explained("the model's tokenizer fails on the text", InputFailed):
        encoding = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    # `offsets` would make a pair of every token, under the interpreter's lock.
    spans = [encoding.token_to_chars(index) for index, each in enumerate(encoding.ids) if each in ids]
    return [span for span in spans if span is not None]


def _unknown(model: dict[str, Any]) -> str | None:
    """Return the token for text that a model's vocabulary lacks."""
    index = model.get("unk_id")
    token = model.get("unk_token") if index is None else model["vocab"][index][0]
    return token if isinstance(token, str) else None


def _finds_all(tokenizer: Tokenizer) -> bool:
    """Return whether the library finds special tokens wherever their text occurs."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token for token in added if token.special]
    if any(token.single_word or (token.normalized and tokenizer.normalizer is not None) for token in special):
        return False
    others = [token.content for token in added if not token.special]
    if len(special) * len(others) > _MOST_PAIRS:
        return False
    return not any(_overlap(token.content, other) for token in special for other in others)


def _overlap(one: str, other: str) -> bool:
    """Return whether a text can hold both so that they share characters."""
    if one in other or other in one:
        return True
    lengths = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in lengths)


def _within(spans: Sequence[tuple[int, int]], wider: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans that lie within a wider one; both in order."""
    begins = [begin for begin, _ in wider]
    kept = []
    for start, stop in spans:
        index = bisect_right(begins, start) - 1
        if index >= 0 and stop <= wider[index][1]:
            kept.append((start, stop))
    return kept
