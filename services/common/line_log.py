"""A file of lines that grows at its end: each line is there whole or not at all, also on a full disk.

What a failed write leaves is cut off at once. What a killed process leaves is ended before the next line, so
that no good line is glued to it. One process writes to a file.
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

# How an object begins. Objects in one line are looked for at so many places at most: a line that was glued to
# a cut one has two.
_BEGIN = '{"'
_MOST_BEGINNINGS = 8


class Appendable(Protocol):
    """A file that is written to at its end. Every method raises OSError."""

    def size(self) -> int:
        """Return its bytes."""

    def ends_a_line(self) -> bool:
        """Return whether it is empty, or its last byte ends a line."""

    def write(self, data: bytes) -> int:
        """Write some bytes at the end, or fewer; return how many."""

    def truncate(self, size: int) -> None:
        """Cut it to so many bytes."""


class LineLog:
    """Appends lines to a file, which is opened for each of them: it may be moved away meanwhile.

    Raises OSError where the file can never be written to. A full disk is no such thing: lines are refused
    until there is space. log: is told when writing begins to fail, and when it works again; nothing between.
    None: nobody is told but the caller.
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
        # Not known until a line was written.
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
        """Bytes of the file after the last line, or as it was found."""
        return self._size

    def append(self, line: str) -> None:
        """Write a line; its end is added. Raises the AsdError of cannot_write, and the line is not there."""
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
    """Write a line and return the size of the file; on failure, leave the file as it was if it can be had."""
    before = file.size()
    if not file.ends_a_line():
        data = b"\n" + data
    written = 0
    try:
        # Near the end of the disk, fewer bytes than wanted are written, and only then nothing.
        while written < len(data):
            written += file.write(data[written:])
    except OSError:
        # Cutting takes no space. Where it fails, the next line ends what is left.
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
    """Open a file for its end, made if missing. Network file systems tell of a full disk as it is closed."""
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
    """Yield what stands in the lines of a file, in order.

    parse: raises ValueError, TypeError or DamagedFile for what it does not take. A line that it does not take
    is searched for an object behind a damaged one. damaged: is told at the end, where there are damaged
    lines, of their number and which is the first, from 1 on. Raises OSError, DamagedFile where the file
    cannot be read.
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
    """Yield where an object may begin behind the beginning of a line, the last places only."""
    places: list[int] = []
    place = line.rfind(_BEGIN)
    while place > 0 and len(places) < _MOST_BEGINNINGS:
        places.append(place)
        place = line.rfind(_BEGIN, 0, place)
    yield from reversed(places)
