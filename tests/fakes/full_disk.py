"""A file on a disk that is full after so many bytes."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.common.line_log import Appendable, open_for_appending

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class FullFile:
    """Takes so many bytes in all, and fails with an error from there on. may_cut: whether it can be cut."""

    def __init__(
        self, content: bytes = b"", room: int = 0, error: int = errno.ENOSPC, *, may_cut: bool = True
    ) -> None:
        self.content = content
        self.room = room
        self.error = error
        self.may_cut = may_cut

    def size(self) -> int:
        return len(self.content)

    def ends_a_line(self) -> bool:
        return not self.content or self.content.endswith(b"\n")

    def write(self, data: bytes) -> int:
        written = data[: max(self.room - len(self.content), 0)]
        if not written:
            raise OSError(self.error, os.strerror(self.error))
        self.content += written
        return len(written)

    def truncate(self, size: int) -> None:
        if not self.may_cut:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.content = self.content[:size]

    @contextmanager
    def opened(self, path: Path) -> Iterator[Appendable]:
        yield self


@contextmanager
def filling(path: Path, full: list[bool]) -> Iterator[Appendable]:
    """Open a real file whose disk takes ten bytes more of each line where it is full."""
    with open_for_appending(path) as file:
        if not full[0]:
            yield file
            return
        short = FullFile(path.read_bytes(), file.size() + 10)
        try:
            yield short
        finally:
            path.write_bytes(short.content)
