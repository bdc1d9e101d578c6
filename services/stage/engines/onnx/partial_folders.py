"""Folders that are filled under a temporary name and then renamed, and the removal of interrupted ones.

A process that fills a folder holds a lock on it, which the system releases when the process ends: a folder
whose lock is free has been abandoned. Some folders have no lock: those on NFS, and those of an earlier
version. They count as abandoned once nothing in them has changed for an hour.

A folder is renamed once its content is on the disk, with a list of its files. Later damage, by a crash or a
failing disk, shows against that list. The folder's mode follows the umask and its parent, so that other users
can read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from asd.transport.files import DamagedFile, open_file, read_content
from asd.visible import one_line
from services.common.disks import alone, sync
from services.common.documents import parse_json, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = ".partial-"
# A digest, then a part that makes the name unique to the process.
_NAME = re.compile(r"[0-9a-f]{32}\..+")
# Chosen: no step of filling a folder goes this long without a write.
_LEFT_SECONDS = 3600.0
# The list of a folder's files, with their bytes and SHA-256.
MANIFEST = "manifest.json"
# The largest such list. Chosen: a thousand times the size of a real one.
_MOST_LIST_BYTES = 1 << 20
# Names of prepared files: directly in the folder.
_FILE = re.compile(r"[\w-][\w.-]*")
# Files up to this size are read at every check. Chosen: a twentieth of a second's work.
_READ_BYTES = 64 << 20
# Folders that this process is filling.
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


def finish(partial: Path, target: Path, *, reads_all: bool = False) -> None:
    """Give a filled folder its name, once its files and their list are on the disk.

    If another process was first, its folder stays unless it is damaged.
    reads_all: as in find_damage. Raises OSError.
    """
    _write_manifest(partial)
    mode = partial.stat().st_mode & 0o666
    for path in partial.iterdir():
        # Libraries set modes of their own: onnx (1.23) makes the weights readable for its user only.
        path.chmod(mode)
        sync(path)
    sync(partial)
    # Held for milliseconds. Without locks, two processes may both replace a damaged folder.
    with alone(target.parent):
        if os.path.lexists(target):
            if find_damage(target, reads_all=reads_all) is None:
                return
            # It is removed as an abandoned folder; processes that have opened its files keep them.
            aside = target.with_name(f"{target.name}{_MARK}{secrets.token_hex(8)}")
            target.rename(aside)
            partial.rename(target)
            _remove(aside)
        else:
            partial.rename(target)
        sync(target.parent)


def find_damage(folder: Path, *, reads_all: bool = False) -> str | None:
    """Return what is damaged in a finished folder; None if nothing is.

    The size of every file is checked, and the content of files up to 64 MiB. reads_all: of larger ones, too.
    Raises PermissionError if this user may not read it.
    """
    try:
        for name, size, digest in _listed(folder):
            path = folder / name
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if (reads_all or size <= _READ_BYTES) and _digest(path) != digest:
                return f"{name} has another content than when it was made"
    except PermissionError:
        raise
    except OSError as error:
        name = Path(error.filename).name if error.filename else folder.name
        return f"{one_line(name)}: {(error.strerror or str(error)).lower()}"
    except DamagedFile as error:
        return error.message
    return None


def remove_own() -> None:
    """Remove the folders that this process is filling. For a process that is about to end on a signal."""
    for folder in tuple(_own):
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(parent: Path) -> None:
    """Remove abandoned folders; those that any process is filling now stay."""
    folders: list[Path] = []
    # If the parent is absent or unreadable, nothing in it is ours.
    with contextlib.suppress(OSError):
        folders.extend(parent.iterdir())
    for folder in folders:
        if _NAME.fullmatch(folder.name):
            with contextlib.suppress(OSError):
                _remove_if_left(folder)


def _make(target: Path) -> tuple[Path, int]:
    while True:
        folder = target.with_name(f"{target.name}{_MARK}{secrets.token_hex(8)}")
        # The mode that the umask leaves, and the parent's group if it is inherited.
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # Another process removed it as abandoned before it was locked.
            continue
        if _lock(lock) is not False and folder.exists():
            return folder, lock
        os.close(lock)


def _write_manifest(folder: Path) -> None:
    files = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _listed(folder: Path) -> list[tuple[str, int, str]]:
    """Return the files of a folder's list: each with its bytes and SHA-256. Raises OSError, DamagedFile."""
    content = parse_json(read_content(folder / MANIFEST, _MOST_LIST_BYTES), MANIFEST)
    files = content.get("files") if isinstance(content, dict) else None
    # An empty list would let an empty folder pass as whole.
    if not isinstance(files, dict) or not files:
        raise DamagedFile(f"{MANIFEST} lists no files")
    listed = []
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise DamagedFile(f"{MANIFEST} lists {quoted(name)}, which is no file of the folder's")
        match entry:
            case [int(size), str(digest)]:
                listed.append((name, size, digest))
            case _:
                raise DamagedFile(f"{MANIFEST} lists {name} without its size and its SHA-256")
    return listed


def _digest(path: Path) -> str:
    # Opening a pipe would block for ever.
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


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
    """Return whether the lock was free; None if the file system has no locks."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
