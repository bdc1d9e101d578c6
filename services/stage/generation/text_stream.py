"""Incremental detokenizing: text that grows token by token."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from services.stage.generation.tokenizer_description import check_decoders, steps
from services.stage.generation.tokenizer_faults import said

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class TextStream:
    """Text that grows token by token. It never shows what a later token can change, such as half a character.

    The texts of all `push` calls and of `finish` add up to what the tokenizer decodes from all ids.
    """

    def __init__(self, decoding: Decoding, special: Mapping[int, str]) -> None:
        self._decoding = decoding
        self._special = special
        # Tokens whose text is not fully shown, and how many of its characters are.
        self._open: list[int] = []
        self._shown = 0
        self._has_begun = False
        self.lag = 0

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that they add.

        Its first `lag` characters belong to tokens that were added before.
        """
        self.lag = 0
        earlier = list(self._open)
        self._open += self._decoding.with_text(ids)
        settled = self._decoding.settled(self._open)
        if not settled or len(self._open) == len(earlier):
            return ""
        text = self._text(self._open[:settled])
        is_complete = not (self._decoding.is_byte_level and text.endswith(_REPLACEMENT))
        new = text[self._shown : len(text) if is_complete else -1]
        if earlier and new:
            self.lag = min(len(new), len(self._text(earlier)) - self._shown)
        # The beginning of a text is decoded differently from its continuation.
        if is_complete and self._decoding.anchor and (text or self._has_begun):
            self._has_begun = True
            self._open, self._shown = self._open[settled:], 0
        else:
            self._shown += len(new)
        return new

    def finish(self) -> str:
        """Return the rest of the text: the replacement of an incomplete character."""
        return self._text(self._open)[self._shown :]

    def mark(self, token_id: int) -> str:
        """Return the text of a special token, which the answer leaves out; "" for any other token."""
        return self._special.get(token_id, "")

    def _text(self, ids: list[int]) -> str:
        return self._decoding.continue_with(ids) if self._has_begun else self._decoding.decode(ids)


class Decoding:
    """How a tokenizer's ids become text, and when that is certain.

    anchor: a token of plain letters to decode before ids that continue a text; empty if there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, description: dict[str, Any], path: Path, special: set[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        decoders = list(steps(description.get("decoder"), "decoders"))
        check_decoders(decoders, path)
        kinds = {decoder["type"] for decoder in decoders}
        self.is_byte_level = "ByteLevel" in kinds
        self._letters = _byte_letters() if self.is_byte_level else {}
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        self._bytes: set[int] = set()
        if "ByteFallback" in kinds:
            # A run of byte tokens becomes text if it is valid UTF-8, else one replacement character each.
            self._bytes = {token_id for token, token_id in vocabulary if _BYTE.fullmatch(token)}
        self.anchor: list[int] = []
        self._anchor_length = 0
        for token, token_id in vocabulary:
            if token_id not in special and token.isascii() and token.isalpha() and self.decode([token_id]):
                self.anchor = [token_id]
                self._anchor_length = len(self.decode(self.anchor))
                break

    def with_text(self, ids: Sequence[int]) -> list[int]:
        """Return the ids that stand for text."""
        id_to_token = self._tokenizer.id_to_token
        return [each for each in ids if each not in self._special and id_to_token(each) is not None]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for within a text; none for one that has no text."""
        if not self.with_text([token_id]):
            return b""
        token = self._tokenizer.id_to_token(token_id)
        assert token is not None
        if token_id in self._bytes:
            return bytes.fromhex(token[3:5])
        if token and self._letters.keys() >= set(token):
            return bytes(self._letters[letter] for letter in token)
        return self.continue_with([token_id]).encode()

    def settled(self, ids: list[int]) -> int:
        """Return how many of the first ids have a final text."""
        count = len(ids)
        while count and ids[count - 1] in self._bytes:
            count -= 1
        return count

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids that begin a text."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            # A panic of the library is not an Exception, and would end the model's thread.
            raise said("the model's tokenizer fails on a token", error) from error

    def continue_with(self, ids: list[int]) -> str:
        """Return the text of ids that continue a text."""
        return self.decode(self.anchor + ids)[self._anchor_length :]


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for.

    Printable bytes stand for themselves, the others for the letters from U+0100 on: GPT-2's encoder.py.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
