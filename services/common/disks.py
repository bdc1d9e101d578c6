"""Writes to disk: durable, atomic replacement of files, and failures explained in one sentence.

Files and folders are made with the modes that the umask leaves, so that all users of a shared folder can read
them.
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

# Errors for lack of space. The same write may succeed later, so they are RESOURCE_EXHAUSTED, as in gRPC's
# list of status codes ("perhaps the entire file system is out of space").
_FULL = {
    errno.ENOSPC: ("the disk is full", "make room there"),
    errno.EDQUOT: ("this user's quota of disk space is used up", "make room, or have the quota raised"),
    errno.EFBIG: ("the file would be larger than files may be here", "move it away, or raise `ulimit -f`"),
}
# Errors that a retry does not help: FAILED_PRECONDITION.
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
    """Return whether an error comes from a disk or its permissions, and not from the network."""
    return error.errno in _FULL or error.errno in _REFUSED


def cannot_write(path: Path, error: OSError, instead: str = "name another place") -> AsdError:
    """Return the AsdError of a failed write: one sentence with the path, the cause and what to do.

    path: as the user knows it. instead: what helps other than removing the cause.
    """
    cause, remedy = _FULL.get(error.errno or 0) or _REFUSED.get(error.errno or 0) or ("", "")
    if not cause:
        cause = (error.strerror or str(error)).lower()
    what = " or ".join(filter(None, (remedy, instead)))
    # A remedy with a comma in it needs one before its alternative, too.
    text = f"{path} cannot be written: {cause}: {what.replace(' or ', ', or ') if ',' in remedy else what}"
    return ResourceExhausted(text) if is_full(error) else PreconditionFailed(text)


def explain(error: OSError) -> str:
    """Return one sentence on an error of a read or a write that no caller has explained."""
    path = str(error.filename) if error.filename is not None else ""
    if is_full(error):
        return cannot_write(Path(path or "what was to be written"), error).message
    reason = (error.strerror or str(error)).lower()
    return f"{path}: {reason}" if path else reason


@contextmanager
def writing(path: Path, instead: str = "name another place") -> Iterator[None]:
    """Raise the error of cannot_write for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, instead) from error


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk. Raises OSError.

    Errors for a folder are ignored if its file system cannot sync folders.
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
    """Hold a folder's lock for the block; wait for it if needed. The system releases it with the process.

    If the file system cannot lock a folder, as some network file systems cannot, nobody waits.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: str | bytes, *, is_alone: bool = False) -> None:
    """Replace a file atomically: the old content stays until the new content is on the disk.

    Text is written as UTF-8. A pipe, a terminal or the like is written to directly. is_alone: nobody else
    writes the file meanwhile, so the temporary file has a fixed name, and the next writer replaces one that
    a killed process left. Raises OSError.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    # A symbolic link stays a link: its target is replaced.
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
