"""Reads JSON and YAML from untrusted files, with bounds on size, depth, numbers and aliases.

A reader gets either plain values or one DamagedFile, which names the file and the line. Plain values have no
lone surrogates, no repeated keys, nothing nested deeper than MOST_LEVELS and, in JSON, no NaN or infinity. In
YAML, the settings' models refuse NaN, since they can name the entry.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import yaml

from asd.transport.files import DamagedFile, open_file
from asd.visible import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Nesting of objects and lists. Chosen: far more than any real file has, far less than would exhaust the stack
# of code that reads or prints the content.
MOST_LEVELS = 100
# Size of a settings file. Chosen: a hundred times a real one's; PyYAML reads some 200 KB a second.
MOST_YAML_BYTES = 256 << 10
# Values in such a file; values that an alias repeats count each time. Chosen.
MOST_YAML_VALUES = 20_000
# Size of a line in a file of records. Chosen: a thousand times a report's.
MOST_LINE_BYTES = 1 << 20
# Digits of a whole number: what a float can hold. Tokenizers' configurations write 10**30 for "no limit".
_MOST_DIGITS = 300
# Characters of a name in a message.
_MOST_NAME = 80
# A text of JSON, which may lack its end. Possessive: it never goes back.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def numbered_lines(
    path: Path, most_bytes: int = MOST_LINE_BYTES, *, is_pipe_fine: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, from 1. Bytes that are not UTF-8 are replaced.

    A longer line is cut to most_bytes. Raises OSError, and DamagedFile if it is not a regular file.
    """
    with open_file(path, is_pipe_fine=is_pipe_fine) as file:
        number = 0
        while line := file.readline(most_bytes):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and len(rest) == most_bytes:
                rest = file.readline(most_bytes)
            yield number, line.decode("utf-8", "replace")


def parse_json(content: bytes | str, where: str, *, most_values: int | None = None) -> Any:
    """Return the value of JSON in UTF-8. where: the file, for messages. Raises DamagedFile."""
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    if most_values is not None:
        _check_count(raw, most_values, where)
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        text = text.removeprefix("\ufeff")
        value = json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_constant=_constant,
            parse_float=_real,
            parse_int=_whole,
        )
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{where} is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DamagedFile(f"{where} is not JSON: {error.msg}: {place}") from error
    except _RefusedError as error:
        raise DamagedFile(f"{where} is not JSON: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise _too_deep(where) from error
    _check_depth(value, where)
    if _MAYBE_SURROGATE.search(raw):
        _check_surrogates(value, where)
    return value


def parse_yaml(content: bytes | str, where: str) -> Any:
    """Return the value of YAML in UTF-8. where: the file, for messages. Raises DamagedFile."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = yaml.load(text, _Loader)  # noqa: S506 - it is a safe one
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{where}: not YAML: byte {error.start} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        raise DamagedFile(f"{where}: not YAML: {_say_marked(error)}") from error
    except yaml.reader.ReaderError as error:
        raise DamagedFile(
            f"{where}: not YAML: character {error.position} is {_character(error.character)}: {error.reason}"
        ) from error
    except yaml.YAMLError as error:
        raise DamagedFile(f"{where}: not YAML: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise _too_deep(where) from error
    if "\\" in text:
        _check_surrogates(value, where)
    return value


def quoted(value: object, most: int = _MOST_NAME) -> str:
    """Return a value of a file for a message: its repr on one line, cut if it is long."""
    return one_line(repr(value), most)


class _RefusedError(Exception):
    """The file has something that JSON allows and these readers refuse."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _RefusedError(f"{quoted(twice)} is there twice in one object: keep one of them")
    return made


def _constant(name: str) -> float:
    raise _RefusedError(f"{name} is not a number of JSON")


def _real(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _RefusedError(f"{one_line(text, _MOST_NAME)} is too large a number")
    return number


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _RefusedError(f"{one_line(text, _MOST_NAME)} is too large a number")
    return int(text)


class _Loader(yaml.SafeLoader):
    """Refuses what SafeLoader allows and no settings need: see DamagedFile's causes in this module."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._values = 0
        # Number of values below each node, with aliases expanded; None while the node is read.
        self._sizes: dict[int, int | None] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            size = self._sizes.get(id(node))
            if size is None:
                raise _marked("an alias of what it is within", mark)
            self._count(size, mark)
            return node
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _marked(f"nests more than {MOST_LEVELS} levels deep", mark)
        before = self._values
        self._count(1, mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        self._sizes[id(node)] = self._values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _marked(f"{one_line(key.value, _MOST_NAME)} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            made = super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception as error:
            # The library's constructors raise these if a value does not fit its tag, such as 2001-99-99.
            kind = str(node.tag).rpartition(":")[2]
            raise _marked(f"not of type {one_line(kind, _MOST_NAME)}: {error}", node.start_mark) from error
        if isinstance(made, int) and len(str(node.value)) > _MOST_DIGITS:
            raise _marked("too large a number", node.start_mark)
        return made

    def _count(self, values: int, mark: Any) -> None:
        self._values += values
        if self._values > MOST_YAML_VALUES:
            raise _marked(f"more than {MOST_YAML_VALUES} values, each alias counted with all it names", mark)


def _marked(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _say_marked(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{error.problem or error.context}"


def _character(character: Any) -> str:
    return quoted(character if isinstance(character, str | bytes) else chr(character))


def _check_count(raw: bytes, most: int, where: str) -> None:
    """Refuse more values before any of them is made. Without texts, each follows a bracket or a comma."""
    if _count_signs(raw) > most and _count_signs(_TEXT.sub(b"", raw)) > most:
        raise DamagedFile(f"{where} has more than {most} values")


def _count_signs(raw: bytes) -> int:
    return sum(raw.count(sign) for sign in (b",", b"[", b"{"))


def _check_depth(value: Any, where: str) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS):
        level = [part for each in level for part in _parts(each) if isinstance(part, dict | list)]
        if not level:
            return
    raise _too_deep(where)


def _parts(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


def _check_surrogates(value: Any, where: str) -> None:
    """Refuse lone surrogates, which cannot be encoded, printed or sent. value: of bounded depth."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        try:
            if isinstance(each, str):
                each.encode()
            elif isinstance(each, dict):
                waiting.extend((*each.keys(), *each.values()))
            elif isinstance(each, list | tuple | set):
                waiting.extend(each)
        except UnicodeEncodeError as error:
            raise DamagedFile(f"{where}: {quoted(error.object)} holds half of a surrogate pair") from error


def _too_deep(where: str) -> DamagedFile:
    return DamagedFile(f"{where} nests more than {MOST_LEVELS} levels deep: copy it again")
