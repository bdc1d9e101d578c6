"""Text that keeps the origin of each character: the template itself, or a message. Pure.

A chat template works on strings as any program does: it trims, splits, joins and repeats them. TracedText is
a string that does all of that, and keeps the origin of each character.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# The origin of a character: the template, a message, or an operation that is not traced.
TEMPLATE, MESSAGE, UNKNOWN = "t", "m", "?"


class TracedText(str):
    """A string with the origin of each of its characters.

    origins: one of TEMPLATE, MESSAGE and UNKNOWN per character; without it all are UNKNOWN. The result of a
    method that is not defined here is of UNKNOWN origin too.
    """

    __slots__ = ("_origins",)

    _origins: str

    def __new__(cls, text: str = "", origins: str | None = None) -> TracedText:
        """Return a traced copy of a text."""
        traced = super().__new__(cls, text)
        traced._origins = UNKNOWN * len(text) if origins is None else origins
        return traced

    @property
    def origins(self) -> str:
        """The origin of each character."""
        return self._origins

    def __str__(self) -> str:
        """Return the text itself, still traced: templates turn all that they write into strings."""
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> TracedText:
        """Return a character or a part."""
        return TracedText(super().__getitem__(key), self._origins[key])

    def __iter__(self) -> Iterator[TracedText]:
        """Yield the characters."""
        return map(TracedText, super().__iter__(), self._origins)

    def __add__(self, other: str) -> TracedText:
        """Return this text and another one behind it."""
        if not isinstance(other, str):
            return NotImplemented
        return TracedText(super().__add__(other), self._origins + origins_of(other))

    def __radd__(self, other: str) -> TracedText:
        """Return another text and this one behind it."""
        if not isinstance(other, str):
            return NotImplemented
        return TracedText(str.__add__(other, self), origins_of(other) + self._origins)

    def __mul__(self, count: SupportsIndex) -> TracedText:
        """Return this text some times over."""
        return TracedText(super().__mul__(count), self._origins * count)

    __rmul__ = __mul__

    def strip(self, chars: str | None = None) -> TracedText:
        """Return the text without these characters at its ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> TracedText:
        """Return the text without these characters at its beginning."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> TracedText:
        """Return the text without these characters at its end."""
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str) -> TracedText:
        """Return the text without a beginning."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> TracedText:
        """Return the text without an end."""
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Return the parts between separators."""
        return self._traced_parts(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Return the parts between separators, counted from the end."""
        return self._traced_parts(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """Return the lines."""
        lines: list[str] = []
        start = 0
        for line, whole in zip(super().splitlines(keepends), super().splitlines(True), strict=True):
            lines.append(self[start : start + len(line)])
            start += len(whole)
        return lines

    def partition(self, sep: str) -> tuple[str, str, str]:
        """Return what is before the first separator, the separator, and what is after it."""
        before, found, _ = super().partition(sep)
        end = len(before) + len(found)
        return self[: len(before)], self[len(before) : end], self[end:]

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        """Return what is before the last separator, the separator, and what is after it."""
        before, found, _ = super().rpartition(sep)
        end = len(before) + len(found)
        return self[: len(before)], self[len(before) : end], self[end:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> TracedText:
        """Return the text with each part equal to `old` replaced by `new`."""
        if not old:
            return TracedText(super().replace(old, new, count))
        return join_texts(new, self.split(old, count))

    def join(self, parts: Iterable[str]) -> TracedText:
        """Return the parts with this text between them."""
        return join_texts(self, parts)

    def upper(self) -> TracedText:
        """Return the text in upper case."""
        return self._changed(super().upper())

    def lower(self) -> TracedText:
        """Return the text in lower case."""
        return self._changed(super().lower())

    def casefold(self) -> TracedText:
        """Return the text for comparisons without case."""
        return self._changed(super().casefold())

    def swapcase(self) -> TracedText:
        """Return the text with upper and lower case exchanged."""
        return self._changed(super().swapcase())

    def capitalize(self) -> TracedText:
        """Return the text with a capital at its beginning."""
        return self._changed(super().capitalize())

    def title(self) -> TracedText:
        """Return the text with a capital at the beginning of each word."""
        return self._changed(super().title())

    def center(self, width: SupportsIndex, fillchar: str = " ") -> TracedText:
        """Return the text in the middle of a field."""
        return self._padded(super().center(width, fillchar))

    def ljust(self, width: SupportsIndex, fillchar: str = " ") -> TracedText:
        """Return the text at the left of a field."""
        return self._padded(super().ljust(width, fillchar))

    def rjust(self, width: SupportsIndex, fillchar: str = " ") -> TracedText:
        """Return the text at the right of a field."""
        return self._padded(super().rjust(width, fillchar))

    def _traced_parts(self, parts: list[str], gap: int) -> list[str]:
        """Return traced parts. They occur in this text in this order. gap: length of a separator."""
        traced: list[str] = []
        start = 0
        for part in parts:
            # Parts are separated by a separator or by blanks, and no part begins inside those.
            start = self.find(part, start)
            traced.append(self[start : start + len(part)])
            start += len(part) + gap
        return traced

    def _changed(self, text: str) -> TracedText:
        """Trace a text whose characters correspond one to one to this text's."""
        if len(text) == len(self):
            return TracedText(text, self._origins)
        return TracedText(text, self._origins[:1] * len(text) if len(set(self._origins)) == 1 else None)

    def _padded(self, text: str) -> TracedText:
        before = text.find(self)
        after = len(text) - before - len(self)
        return TracedText(text, TEMPLATE * before + self._origins + TEMPLATE * after)


def origins_of(text: str) -> str:
    """Return the origin of each character: UNKNOWN for a text that is not traced."""
    return text.origins if isinstance(text, TracedText) else UNKNOWN * len(text)


def join_texts(between: str, parts: Iterable[str]) -> TracedText:
    """Return parts with a text between them."""
    parts = list(parts)
    return TracedText(str.join(between, parts), origins_of(between).join(map(origins_of, parts)))


def written_by_template(text: TracedText, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """Return a pattern's matches that the template alone wrote, as spans."""
    return _find(text, pattern, f"{TEMPLATE}+")


def of_unknown_origin(text: TracedText, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """Return a pattern's matches that hold no character of a message and some of unknown origin, as spans."""
    origins = origins_of(text)
    found = _find(text, pattern, f"[{TEMPLATE}{UNKNOWN}]+")
    return [(start, end) for start, end in found if UNKNOWN in origins[start:end]]


def _find(text: TracedText, pattern: re.Pattern[str], runs: str) -> list[tuple[int, int]]:
    plain = str.__str__(text)
    return [
        match.span()
        for run in re.finditer(runs, origins_of(text))
        for match in pattern.finditer(plain, *run.span())
    ]
