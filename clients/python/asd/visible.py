"""Untrusted text in messages and logs: control characters escaped, on one line, of bounded length. Pure."""

from __future__ import annotations

import re

# Control characters other than newline and tab, surrogates, and invisible characters that change the text's
# direction or break lines. A carriage return before a newline does nothing.
UNSEEN = re.compile(
    r"\r(?=\n)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Most characters of a message. Chosen: room for a path and a long reason; a name could have megabytes.
MOST_CHARACTERS = 2000
_LINES = {"\n": "\\n", "\t": "\\t"}


def visible(text: str) -> str:
    """Return a text with control characters shown as in Python's strings: `\\x1b`, `\\u202e`."""
    return UNSEEN.sub(_show, text)


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text as one line of at most `most` characters, with control characters and breaks escaped."""
    if text.isprintable() and len(text) <= most:
        return text
    # Cut first, since the rest may be megabytes. Escaping makes at most ten characters of one.
    cut = text[: most + 1]
    cut = visible(cut.replace("\r\n", "\n"))
    for character, shown in _LINES.items():
        cut = cut.replace(character, shown)
    return cut if len(cut) <= most else f"{cut[: most - 1]}…"


class OneLineError(Exception):
    """An error whose message is one line that is safe for a terminal and a log, whatever it quotes."""

    def __init__(self, message: str) -> None:
        self.message = one_line(message)
        super().__init__(self.message)


def _show(found: re.Match[str]) -> str:
    character = found[0]
    # A carriage return before a newline changes nothing.
    if character == "\r" and found.string[found.end() : found.end() + 1] == "\n":
        return ""
    return character.encode("unicode_escape").decode()
