"""Checks of constraints and tools as callers write them, before any model sees them. Pure.

What a schema or a regular expression means is the engines' to know: here its size, its form and its
references are checked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from asd.errors import InvalidRequest
from asd.transport.files import DamagedFile
from services.common.documents import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Bytes of a schema, and characters of a regular expression and of a choice. Chosen: ten times a large real
# one's.
MOST_SCHEMA_BYTES = 256 << 10
MOST_REGEX = 16 << 10
MOST_CHOICE = 16 << 10
# The names that OpenAI's and Anthropic's APIs allow.
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def check_schema(text: str, field: str) -> Any:
    """Return a JSON Schema's value. Raises InvalidRequest, naming the place, for what is none."""
    size = len(text.encode())
    if size > MOST_SCHEMA_BYTES:
        raise InvalidRequest(
            f"the schema has {size:,} bytes, and {MOST_SCHEMA_BYTES:,} are the most: ask for a smaller part",
            field=field,
        )
    schema = _parse(text, "the schema", field)
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("a JSON Schema is an object, or true or false", field=field)
    for place, name, target in _references(schema, "#"):
        if not target.startswith("#"):
            raise InvalidRequest(
                f"{place}/{name} refers to {target!r}, another document: put what it holds under $defs, and "
                "refer to it as #/$defs/NAME",
                field=field,
            )
    return schema


def check_regex(text: str, field: str) -> None:
    """Raise InvalidRequest for an empty regular expression, or one that is too long."""
    if not text:
        raise InvalidRequest("the regular expression is empty: leave the constraint out", field=field)
    if len(text) > MOST_REGEX:
        raise InvalidRequest(
            f"the regular expression has {len(text):,} characters, and {MOST_REGEX:,} are the most",
            field=field,
        )


def check_choice(texts: Sequence[str], field: str) -> None:
    """Raise InvalidRequest for a choice of nothing, an empty text, the same text twice, or too long ones."""
    if not texts:
        raise InvalidRequest("a choice needs one text or more", field=field)
    seen: set[str] = set()
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest("a text of a choice is empty", field=f"{field}[{index}]")
        if text in seen:
            raise InvalidRequest(f"{text!r} stands twice in the choice", field=f"{field}[{index}]")
        seen.add(text)
    if sum(map(len, texts)) > MOST_CHOICE:
        raise InvalidRequest(
            f"the texts of the choice have more than {MOST_CHOICE:,} characters", field=field
        )


def check_parameters(text: str, field: str) -> None:
    """Raise InvalidRequest unless the text is the JSON Schema of an object."""
    schema = check_schema(text, field)
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise InvalidRequest(
            'the arguments of a tool are an object: its schema needs "type": "object"', field=field
        )


def check_arguments(text: str, field: str) -> None:
    """Raise InvalidRequest unless the text is a JSON object."""
    if not isinstance(_parse(text, "the arguments of a call", field), dict):
        raise InvalidRequest("the arguments of a call are a JSON object", field=field)


def _parse(text: str, what: str, field: str) -> Any:
    try:
        return parse_json(text, what)
    except DamagedFile as error:
        # The reader's advice is for files.
        raise InvalidRequest(str(error).removesuffix(": copy it again"), field=field) from error


def _references(value: Any, place: str) -> Iterator[tuple[str, str, str]]:
    """Yield (place, keyword, target) of a schema's references; parse_json has bounded its depth."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name in _REFERENCES and isinstance(each, str):
                yield place, name, each
            else:
                yield from _references(each, f"{place}/{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _references(each, f"{place}/{index}")
