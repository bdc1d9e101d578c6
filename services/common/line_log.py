"""An append-only file of lines: each line is complete or absent, even on a full disk.

The remains of a failed write are cut off at once. If a killed process left half a line, it is ended before
the next line is written, so that no good line is joined to it. Only one process may write to a file.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from asd.transport.files import DamagedFile
from services.common.disks import cannot_write, is_full
from services.common.documents import numbered_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How an object begins, and at how many positions of a line an object is looked for. A line that was joined to
# a cut one has two objects.
_BEGIN = '{"'
_MOST_BEGINNINGS = 8


class Appendable(Protocol):
    """A file to append to. Every method raises OSError."""

    def size(self) -> int:
        """Return its size in bytes."""

    def ends_a_line(self) -> bool:
        """Return whether it is empty, or its last byte ends a line."""

    def write(self, data: bytes) -> int:
        """Append bytes; return how many were written, which may be fewer."""

    def truncate(self, size: int) -> None:
        """Cut it to a size in bytes."""


class LineLog:
    """Appends lines to a file. It opens the file for each line: the file may be moved away in between.

    Raises OSError if the file can never be written to. On a full disk, lines are refused until there is
    space. log: is told when writes begin to fail, and when they work again; None: only the caller is told.
    """

    def __init__(
        self,
        path: Path,
        *,
        opened: Callable[[Path], AbstractContextManager[Appendable]] | None = None,
        log: logging.Logger | None = logger,
    ) -> None:
        self._path = path
        self._opened = opened or open_for_appending
        self._log = log
        self._problem = ""
        self._refused = 0
        # It stays 0 while the file cannot be opened.
        self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._opened(path) as file:
                self._size = file.size()
        except OSError as error:
            if not is_full(error):
                raise
            self._note(cannot_write(path, error).message)

    @property
    def size(self) -> int:
        """Size of the file after the last line, or as found at first, in bytes."""
        return self._size

    def append(self, line: str) -> None:
        """Append a line and its line end. Raises the AsdError of cannot_write; the line is then absent."""
        try:
            with self._opened(self._path) as file:
                self._size = _append(file, line.encode() + b"\n")
        except OSError as error:
            refusal = cannot_write(self._path, error)
            self._refused += 1
            self._note(refusal.message)
            raise refusal from error
        if self._problem:
            if self._log is not None:
                text = "%s is written again; lines refused meanwhile: %d"
                self._log.warning(text, self._path, self._refused)
            self._problem, self._refused = "", 0

    def _note(self, problem: str) -> None:
        if problem != self._problem and self._log is not None:
            self._log.error("%s", problem)
        self._problem = problem


def _append(file: Appendable, data: bytes) -> int:
    """Append a line and return the size of the file. On failure, restore the file if possible."""
    before = file.size()
    if not file.ends_a_line():
        data = b"\n" + data
    written = 0
    try:
        # On a nearly full disk, a write takes fewer bytes first, and fails only at the next one.
        while written < len(data):
            written += file.write(data[written:])
    except OSError:
        # Truncating needs no space. If it fails, the next append ends the half line.
        if written and file.size() == before + written:
            file.truncate(before)
        raise
    return before + written


class _LineFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def ends_a_line(self) -> bool:
        size = self.size()
        return not size or os.pread(self._descriptor, 1, size - 1) == b"\n"

    def write(self, data: bytes) -> int:
        return os.write(self._descriptor, data)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)


@contextmanager
def open_for_appending(path: Path) -> Iterator[Appendable]:
    """Open a file to append to; create it if missing. Network file systems report a full disk at close."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _LineFile(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)


def parse_lines(
    path: Path,
    parse: Callable[[str], T],
    damaged: Callable[[int, int], None],
    *,
    is_pipe_fine: bool = False,
) -> Iterator[T]:
    """Yield the parsed lines of a file, in order.

    parse: raises ValueError, TypeError or DamagedFile for a damaged line, which is then searched for an
    object behind the damage. damaged: is called at the end if lines were damaged, with their number and the
    first one's line number (from 1). Raises OSError or DamagedFile if the file cannot be read.
    """
    count = first = 0
    for number, line in numbered_lines(path, is_pipe_fine=is_pipe_fine):
        if not line.strip():
            continue
        try:
            yield parse(line)
            continue
        except (TypeError, ValueError, RecursionError, DamagedFile):
            count, first = count + 1, first or number
        for begin in _beginnings(line):
            try:
                behind = parse(line[begin:])
            except (TypeError, ValueError, RecursionError, DamagedFile):
                continue
            yield behind
            break
    if count:
        damaged(count, first)


def _beginnings(line: str) -> Iterator[int]:
    """Yield the positions inside a line where an object may begin, the last ones only."""
    places: list[int] = []
    place = line.rfind(_BEGIN)
    while place > 0 and len(places) < _MOST_BEGINNINGS:
        places.append(place)
        place = line.rfind(_BEGIN, 0, place)
    yield from reversed(places)
