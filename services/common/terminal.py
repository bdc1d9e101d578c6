"""Output to a terminal: text from models and files is shown with its control characters escaped.

A model, a name or a message may contain escape sequences. A terminal would execute them: move the cursor,
change the title, write to the clipboard.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from asd.visible import UNSEEN, visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status

__all__ = ("LiteralConsole", "escape_unseen", "literal", "prepare_streams", "visible")

# Replacements in our own texts for characters that an encoding lacks.
_PLAIN = {"·": "-", "–": "-", "→": "->", "…": "...", "×": "x", "²": "2", "≥": ">=", "≤": "<=", "λ": "lambda"}
_SPINNER = range(0x2800, 0x2900)
_ERRORS = "asd.visible"


def escape_unseen(json_text: str) -> str:
    """Return JSON with control characters escaped as in `visible`, except for its own line breaks."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text)


def literal(text: str, style: str = "") -> Text:
    """Return untrusted text for a console, without markup and control characters."""
    return Text(visible(text), style=style)


class LiteralConsole(Console):
    """A console that prints strings as they are: without markup and emoji codes.

    Pass untrusted text through `literal`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Return a line with a spinner that shows while something takes time."""
        # A spinner reads a string as markup, whatever its console does.
        return super().status(literal(status) if isinstance(status, str) else status, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as a text."""
        return super().render_str(visible(text), **options)


def prepare_streams() -> None:
    """Make the standard streams usable for any text, and if they are closed (`asd up >&-`).

    Characters that an output's encoding lacks do not end the program: arrows and dashes are replaced by
    ASCII, other characters are shown as in Python's strings: `\\xe9`.
    """
    codecs.register_error(_ERRORS, _show_missing)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It stays open as long as the program runs.
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _show_missing(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(map(_likeness, missing)), error.end


def _likeness(character: str) -> str:
    if ord(character) in _SPINNER:
        return "*"
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()
