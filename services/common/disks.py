"""What a disk does to those who write: why a write failed, in one sentence, and content that stays.

Files and folders are made with the modes that the umask leaves, so that other users of a shared folder can
read what one of them has made there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from asd.errors import AsdError, PreconditionFailed, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Iterator

# No space for what is written. The same write may succeed later, so that they are RESOURCE_EXHAUSTED, as
# gRPC's list of status codes has it ("perhaps the entire file system is out of space").
_FULL = {
    errno.ENOSPC: ("the disk is full", "make room there"),
    errno.EDQUOT: ("this user's quota of disk space is used up", "make room, or have the quota raised"),
    errno.EFBIG: ("the file would be larger than files may be here", "move it away, or raise `ulimit -f`"),
}
# Nothing changes by trying again: FAILED_PRECONDITION.
_REFUSED = {
    errno.EACCES: ("no permission to write there", "grant it"),
    errno.EPERM: ("no permission to write there", "grant it"),
    errno.EROFS: ("its file system is read-only", "have it mounted for writing"),
    errno.EIO: ("the disk fails", "check the disk"),
}


def is_full(error: OSError) -> bool:
    """Return whether a write failed for lack of space."""
    return error.errno in _FULL


def is_of_disk(error: OSError) -> bool:
    """Return whether an error is one that disks and their permissions make, and not one of the network."""
    return error.errno in _FULL or error.errno in _REFUSED


def cannot_write(path: Path, error: OSError, instead: str = "name another place") -> AsdError:
    """Return what stands for a failed write: one sentence with the path, the cause and what to do.

    path: as the user knows it. instead: what else than mending the cause would help.
    """
    cause, remedy = _FULL.get(error.errno or 0) or _REFUSED.get(error.errno or 0) or ("", "")
    if not cause:
        cause = (error.strerror or str(error)).lower()
    what = " or ".join(filter(None, (remedy, instead)))
    # A remedy with a comma in it needs one before its alternative, too.
    text = f"{path} cannot be written: {cause}: {what.replace(' or ', ', or ') if ',' in remedy else what}"
    return ResourceExhausted(text) if is_full(error) else PreconditionFailed(text)


def explain(error: OSError) -> str:
    """Return one sentence on an error that nobody else has explained, of a write or a read."""
    path = str(error.filename) if error.filename is not None else ""
    if is_full(error):
        return cannot_write(Path(path or "what was to be written"), error).message
    reason = (error.strerror or str(error)).lower()
    return f"{path}: {reason}" if path else reason


@contextmanager
def writing(path: Path, instead: str = "name another place") -> Iterator[None]:
    """Turn an OSError of the block into what cannot_write returns."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, instead) from error


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, written to the disk. Raises OSError.

    A file system that cannot sync folders keeps them by its own means.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait until no other process works in a folder under this lock, which ends with its process.

    Where the file system cannot lock a folder, as some of the network cannot, nobody waits.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: str | bytes, *, is_alone: bool = False) -> None:
    """Write a file whole or not at all: what was there before stays until its successor is on the disk.

    Text is written as UTF-8. What is no regular file, such as a pipe or a terminal, is written to as it is.
    is_alone: nobody else writes it meanwhile, so that the next writer takes what a killed one left. Raises
    OSError.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    # Links stay links.
    target = path.resolve()
    own = "" if is_alone else f".{secrets.token_hex(4)}"
    partial = target.with_name(f".{target.name}{own}.partial")
    try:
        with partial.open("wb" if is_alone else "xb") as file:
            file.write(data)
            file.flush()
            if target.exists():
                os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync(target.parent)
