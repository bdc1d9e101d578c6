"""Tool calls in what a model writes, in the two forms that most open models use. Pure.

- Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or several, with text
  around them. The last end tag may be missing.
- Llama 3: the answer is `{"name": ..., "parameters": {...}}`, or several of them separated by `;`, with or
  without `<|python_tag|>` before them.

What is not exactly that stays content: a tool that was not offered, arguments that are no object, broken or
unfinished JSON, and what follows many unfinished ones. A model may write anything, so nothing here raises.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asd.transport.files import DamagedFile
from services.common.documents import parse_json

if TYPE_CHECKING:
    from collections.abc import Collection

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
# Keys of which a call begins with one. Other JSON is shown as it comes.
_FIRST_KEYS = ('"name"', '"arguments"', '"parameters"', '"type"')
_SPACE = re.compile(r"\s*")
# Objects without an end after which nothing more is a call. Chosen: each is read to the answer's end.
_MOST_UNCLOSED = 32
_MARKS = re.compile(r'\\.|["{}]', re.DOTALL)


@dataclass(frozen=True)
class WrittenCall:
    """A call as the model wrote it. arguments: a JSON object, as JSON."""

    name: str
    arguments: str


def read_tool_calls(text: str, tools: Collection[str]) -> tuple[str, tuple[WrittenCall, ...]]:
    """Return a whole answer's text without its calls, and the calls. tools: names of those offered."""
    reader = ToolCallReader(tools)
    content = reader.read(text) + reader.end()
    return content, tuple(reader.calls)


class _Unfinished(Exception):  # noqa: N818 - named by its cause
    """What is held may still become a call."""


class ToolCallReader:
    """Reads an answer as it comes. However it is split, the outcome is that of the whole.

    calls: the complete calls so far. White space beside a call belongs to it.
    """

    def __init__(self, tools: Collection[str]) -> None:
        self.calls: list[WrittenCall] = []
        self._tools = frozenset(tools)
        self._held = ""
        self._has_ended = False
        # Whether all that was read is calls without tags.
        self._is_bare = True
        self._follows_call = False
        # Where the search for the end of an object goes on, and what it is within there.
        self._begin, self._at, self._depth, self._in_string = -1, 0, 0, False
        self._unclosed = 0

    def read(self, text: str) -> str:
        """Take a piece of the answer, and return the content that is certain now."""
        self._held += text
        shown = []
        while self._held:
            try:
                if self._is_bare:
                    self._is_bare = self._take_bare_call()
                else:
                    shown.append(self._take_text() or self._take_tagged_call())
            except _Unfinished:
                break
        return "".join(shown)

    def end(self) -> str:
        """End the answer, and return the rest of its content."""
        self._has_ended = True
        return self.read("")

    def _take_bare_call(self) -> bool:
        """Take a call without tags, and return whether there is one.

        It stands at the beginning of the answer, or behind another one and `;`. What follows it is `;` or
        nothing.
        """
        before = ";" if self.calls else _PYTHON
        start = self._skip(0)
        if self._begins(start, before):
            start += len(before)
        elif self.calls:
            return False
        found = self._find_object(start)
        if found is None:
            return False
        stop = self._skip(found[1])
        if stop == len(self._held):
            self._need_more()
        return self._held[stop : stop + 1] in {"", ";"} and self._take_call(found, stop)

    def _take_text(self) -> str:
        """Take the text before what may be a call between tags."""
        tag = self._held.find(OPEN)
        end = tag if tag >= 0 else len(self._held)
        if tag < 0 and not self._has_ended:
            end -= _overlap(self._held, OPEN)
        if tag >= 0 or not self._has_ended:
            end = len(self._held[:end].rstrip())
        if tag < 0 and end == 0:
            raise _Unfinished
        # A cut would begin the search for a call's end anew.
        return self._cut(end) if end else ""

    def _take_tagged_call(self) -> str:
        """Take a call between tags; return the opening tag if what follows is no call."""
        start = self._skip(0) + len(OPEN)
        found = self._find_object(start)
        if found is not None:
            stop = self._skip(found[1])
            if self._begins(stop, CLOSE):
                stop += len(CLOSE)
                is_closed = True
            else:
                is_closed = stop == len(self._held)
            if is_closed and self._take_call(found, stop):
                return ""
        return self._cut(start)

    def _find_object(self, start: int) -> tuple[int, int] | None:
        """Return the bounds of the JSON object from a place on, if it may be a call."""
        begin = self._skip(start)
        if self._unclosed >= _MOST_UNCLOSED or not self._begins(begin, "{"):
            return None
        key = self._skip(begin + 1)
        if not any(self._begins(key, each) for each in _FIRST_KEYS):
            return None
        if begin != self._begin:
            self._begin = self._at = begin
            self._in_string = False
        elif self._depth == 0:
            return begin, self._at
        while mark := _MARKS.search(self._held, self._at):
            self._at = mark.end()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif mark[0] in "{}" and not self._in_string:
                self._depth += 1 if mark[0] == "{" else -1
                if self._depth == 0:
                    return begin, self._at
        # An escape may go on in the next piece.
        self._at = max(self._at, len(self._held) - 1)
        self._need_more()
        self._unclosed += 1
        return None

    def _take_call(self, bounds: tuple[int, int], stop: int) -> bool:
        """Take a call up to a place, and return whether the object is one."""
        try:
            value = parse_json(self._held[slice(*bounds)], "a call")
        except DamagedFile:
            return False
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
        if not isinstance(name, str) or name not in self._tools or not isinstance(arguments, dict):
            return False
        self.calls.append(WrittenCall(name, json.dumps(arguments, ensure_ascii=False)))
        self._cut(stop)
        self._follows_call = True
        return True

    def _cut(self, stop: int) -> str:
        """Remove what is held up to a place, and return it as content."""
        piece, self._held = self._held[:stop], self._held[stop:]
        self._begin, self._depth = -1, 0
        if self._follows_call:
            piece = piece.lstrip()
        self._follows_call &= not piece
        return piece

    def _begins(self, start: int, text: str) -> bool:
        """Return whether a text stands at a place."""
        found = self._held[start : start + len(text)]
        if found != text and text.startswith(found):
            self._need_more()
        return found == text

    def _need_more(self) -> None:
        if not self._has_ended:
            raise _Unfinished

    def _skip(self, start: int) -> int:
        """Return the next place without white space."""
        found = _SPACE.match(self._held, start)
        return found.end() if found else start


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may begin a tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
