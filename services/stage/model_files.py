"""Files of a model's directory as they may really be: absent, empty, or a pointer in place of the content."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from services.common.errors import PreconditionFailed

if TYPE_CHECKING:
    from pathlib import Path

_POINTER = b"version https://git-lfs"
# Objects and lists within each other. Chosen: far more than any real file has, far fewer than would exhaust
# the stack of what reads the content, or prints it.
_MOST_LEVELS = 100


def read_json_file(path: Path, wanted: str) -> Any:
    """Return what a JSON file holds. wanted: what to do about a missing one, for its message.

    Raises PreconditionFailed, naming the file, if it cannot be read or is no JSON.
    """
    check_file(path, wanted)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PreconditionFailed(f"{path} cannot be read: {error.strerror}") from error
    return parse_json(content, str(path))


def parse_json(content: bytes, where: str) -> Any:
    """Return what JSON in UTF-8 says. Raises PreconditionFailed, naming where it stands, if it is none."""
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise PreconditionFailed(f"{where} is not JSON: {error}") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        inner = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in inner if isinstance(part, dict | list)]
    if level:
        raise _too_deep(where)
    return value


def check_file(path: Path, wanted: str) -> None:
    """Raise PreconditionFailed unless there is a file with content of its own. wanted: as read_json_file."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except FileNotFoundError as error:
        raise PreconditionFailed(f"{path} is missing: {wanted}") from error
    except IsADirectoryError as error:
        raise PreconditionFailed(f"{path} is a directory, not a file: copy the model again") from error
    except OSError as error:
        raise PreconditionFailed(f"{path} cannot be read: {error.strerror}") from error
    if not begin:
        raise PreconditionFailed(f"{path} is empty: copy it again")
    if begin == _POINTER:
        raise PreconditionFailed(
            f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in its directory"
        )


def _too_deep(where: str) -> PreconditionFailed:
    return PreconditionFailed(f"{where} nests more than {_MOST_LEVELS} levels deep: copy the model again")
