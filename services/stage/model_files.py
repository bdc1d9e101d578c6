"""Reading files of a model's directory that may be absent, empty, or a Git LFS pointer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.errors import PreconditionFailed
from asd.transport.files import open_file, read_content
from services.common.documents import parse_json

if TYPE_CHECKING:
    from pathlib import Path

_POINTER = b"version https://git-lfs"
# Chosen: the largest tokenizer.json of a public model has about 33 MB, the largest template about 20 KB.
MOST_JSON_BYTES = 64 << 20
MOST_TEXT_BYTES = 1 << 20


def read_json_file(path: Path, wanted: str) -> Any:
    """Return the content of a JSON file. wanted: advice for the message if it is missing.

    Raises PreconditionFailed, naming the file, if it cannot be read or is no JSON.
    """
    check_file(path, wanted)
    return parse_json(_read(path, MOST_JSON_BYTES), str(path))


def read_text_file(path: Path) -> str:
    """Return the text of a file. Raises PreconditionFailed, naming it, if it cannot be read or is no text."""
    try:
        return _read(path, MOST_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PreconditionFailed(f"{path} is not UTF-8 text: byte {error.start}") from error


def check_file(path: Path, wanted: str) -> None:
    """Raise PreconditionFailed unless there is a file with content of its own. wanted: as read_json_file."""
    try:
        with open_file(path) as file:
            begin = file.read(len(_POINTER))
    except FileNotFoundError as error:
        raise PreconditionFailed(f"{path} is missing: {wanted}") from error
    except IsADirectoryError as error:
        raise PreconditionFailed(f"{path} is a directory, not a file: copy the model again") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not begin:
        raise PreconditionFailed(f"{path} is empty: copy it again")
    if begin == _POINTER:
        raise PreconditionFailed(
            f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in its directory"
        )


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        return read_content(path, most_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> PreconditionFailed:
    # A ValueError means a path that no file can have, such as one with a zero byte.
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return PreconditionFailed(f"{path} cannot be read: {reason}")
