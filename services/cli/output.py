"""What the commands write: lines for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from services.common.terminal import escape_unseen, visible


def say(line: str) -> None:
    """Show a line on standard output."""
    typer.echo(visible(line))


def write_json(value: object) -> None:
    """Write a value to standard output as JSON."""
    sys.stdout.write(json_text(value, sys.stdout.encoding))
    sys.stdout.flush()


def json_text(value: object, encoding: str | None = "utf-8") -> str:
    """Return a value as JSON that a terminal shows and every reader takes for the same value.

    encoding: of where it goes. JSON is UTF-8; in others everything but ASCII is escaped.
    """
    is_utf8 = (encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf8, default=token_text)
    # Of these JSON escapes by itself only the oldest.
    return escape_unseen(text) + "\n"


def token_text(value: bytes) -> str:
    """Return a token's bytes as text. Those that are no UTF-8, such as half a character, are escaped."""
    return value.decode("utf-8", "backslashreplace")


def json_error(code: str, message: str, field: str) -> dict[str, Any]:
    """Return a failure as the commands write it. field: what it is about, or ""."""
    return {"error": {"code": code, "message": message, "field": field}}
