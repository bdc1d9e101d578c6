"""Folders that are filled under a name of their own and then renamed, and what is left of interrupted ones.

Whoever fills a folder holds a lock on it, which the system lets go with the process: a folder whose lock can
be had is nobody's. Where the file system has no locks on folders (NFS), or the folder is of an earlier
version, which took none, it counts as left once nothing in it has changed for an hour.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = ".partial-"
# A digest, then what makes the name the filler's own.
_NAME = re.compile(r"[0-9a-f]{32}\..+")
# Chosen: no step of filling one is without a write for so long.
_LEFT_SECONDS = 3600.0
# Those that this process is filling.
_own: set[Path] = set()


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside a target, to be renamed to it; remove it at the end if it is still there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _make(target)
    _own.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own.discard(folder)
        os.close(lock)


def remove_own() -> None:
    """Remove the folders that this process is filling: for a process that is about to end on a signal."""
    for folder in tuple(_own):
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(parent: Path) -> None:
    """Remove the folders whose filler is gone; those being filled now, by any process, stay."""
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if _NAME.fullmatch(folder.name):
            with contextlib.suppress(OSError):
                _remove_if_left(folder)


def _make(target: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{target.name}{_MARK}", dir=target.parent))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # Another process took it for a left one before it was locked.
            continue
        if _lock(lock) is not False and folder.exists():
            return folder, lock
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        had = _lock(lock)
        if had is False:
            return
        if not had or _MARK not in folder.name:
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - changed < _LEFT_SECONDS:
                return
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(folder: int) -> bool | None:
    """Return whether a lock could be had; None where the file system has none."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
