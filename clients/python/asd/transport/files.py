"""Reads files within bounds, and reads them again when they change, as mounted Secrets do."""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, Generic, TypeVar

from asd.errors import PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from io import BufferedReader
    from pathlib import Path

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int], ...]

# Largest token file, certificate or key. Chosen: room for thousands of them.
MOST_BYTES = 1 << 20
# Attempts to read files while they are being replaced. Chosen: Kubernetes replaces them by one rename.
_ATTEMPTS = 3


class DamagedFile(PreconditionFailed):
    """A file is damaged; the message names it, the position and the reason."""


class UnusableFile(PreconditionFailed):
    """A file that a setting names cannot be used; the message names both and the reason."""


class WatchedFiles(Generic[T]):
    """A value built from files, which are read again when they change. build: makes it from their contents.

    Raises UnusableFile, naming file and setting, if they cannot be used at first. Later the last value stays,
    and the reason is logged.
    """

    def __init__(self, files: Mapping[str, Path], build: Callable[[dict[str, bytes]], T]) -> None:
        self._files = files
        self._build = build
        self._stamp, self.value = self._read()
        # Stamp of files that could not be used, so that they are not read again for every call.
        self._refused: Stamp | None = None

    def refresh(self) -> bool:
        """Read the files again if they have changed; return whether there is a new value."""
        try:
            stamp = self._stamps()
        except OSError:
            stamp = ()
        if stamp in {self._stamp, self._refused}:
            return False
        try:
            self._stamp, self.value = self._read()
        except UnusableFile as error:
            self._refused = stamp
            logger.error("%s; what was read before stays in force", error)
            return False
        self._refused = None
        logger.info("read again: %s", ", ".join(map(str, self._files.values())))
        return True

    def _read(self) -> tuple[Stamp, T]:
        problem = UnusableFile("the files change while they are read")
        for _ in range(_ATTEMPTS):
            try:
                stamp = self._stamps()
            except OSError as error:
                raise self._unreadable(error) from error
            try:
                value = self._build({name: _read(name, file) for name, file in self._files.items()})
            except UnusableFile as error:
                problem = error
                value = None
            try:
                is_same = self._stamps() == stamp
            except OSError as error:
                raise self._unreadable(error) from error
            if is_same:
                if value is None:
                    raise problem
                return stamp, value
        raise problem

    def _unreadable(self, error: OSError) -> UnusableFile:
        name = next((name for name, file in self._files.items() if str(file) == str(error.filename)), "")
        return _unreadable(name, error)

    def _stamps(self) -> Stamp:
        return tuple(_stamp(file) for file in self._files.values())


def _read(setting: str, file: Path) -> bytes:
    try:
        return read_content(file, MOST_BYTES)
    except DamagedFile as error:
        raise UnusableFile(f"{setting} {error}") from error
    except OSError as error:
        raise _unreadable(setting, error) from error


def _unreadable(setting: str, error: OSError) -> UnusableFile:
    return UnusableFile(
        f"{setting} {error.filename} cannot be read: {(error.strerror or str(error)).lower()}".strip()
    )


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def read_content(path: Path, most_bytes: int, *, is_pipe_fine: bool = False) -> bytes:
    """Return a file's content. Raises OSError, DamagedFile if it is too large or not a regular file.

    A pipe or a device may never end, or block for ever: is_pipe_fine is for paths that a person has typed.
    """
    with open_file(path, is_pipe_fine=is_pipe_fine) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise DamagedFile(f"{path} has more than {_size(most_bytes)}, the most that is read: copy it again")
    return content


def open_file(path: Path, *, is_pipe_fine: bool = False) -> BufferedReader:
    """Return a file, open for reading. Raises OSError, DamagedFile if it is not regular; see read_content."""
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | (0 if is_pipe_fine else os.O_NONBLOCK)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or (is_pipe_fine and not stat.S_ISDIR(mode)):
        return open(descriptor, "rb")  # noqa: PTH123 - of a descriptor, for the caller to close
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise DamagedFile(f"{path} is a pipe or a device, not a file: put a file there")


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
