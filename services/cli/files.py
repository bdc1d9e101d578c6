"""What the commands read and write beside standard output: prompts, answers, figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from asd.values import Answer

# Of a file with an answer. Chosen: a thousand times a long answer's.
_MOST_ANSWER_BYTES = 64 << 20


def read_prompt(prompt: str | None) -> str:
    """Return what was typed, or standard input. Raises InvalidRequest where there is neither."""
    from asd.errors import InvalidRequest
    from services.common.validation import MAX_REQUEST_BYTES

    if prompt is not None and prompt != "-":
        return prompt
    missing = InvalidRequest("say what to ask, or send it to standard input", field="prompt")
    if prompt is None and sys.stdin.isatty():
        raise missing
    try:
        # No more than could be asked, however much comes.
        text = sys.stdin.read(MAX_REQUEST_BYTES + 1)
    except UnicodeError as error:
        # A missing byte order mark is a UnicodeError that names no encoding.
        raise InvalidRequest(f"standard input is not {sys.stdin.encoding} text", field="prompt") from error
    if len(text) > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            f"prompt is too long: {MAX_REQUEST_BYTES:,} bytes are the most that a request may have",
            field="prompt",
        )
    if prompt is None and not text:
        raise missing
    return text.removesuffix("\n")


def read_schema(given: str) -> str:
    """Return a JSON Schema: what was typed, if it is an object, or else what the file of that name holds."""
    from asd.transport.files import DamagedFile, read_content
    from services.common.constraints import MOST_SCHEMA_BYTES

    if given.lstrip().startswith("{"):
        return given
    option = "--json-schema"
    try:
        return read_content(Path(given), MOST_SCHEMA_BYTES, is_pipe_fine=True).decode()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise typer.BadParameter(f"{given} cannot be read: {reason}", param_hint=option) from error
    except (DamagedFile, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{given}: {error}", param_hint=option) from error


def read_answer(file: Path) -> Answer:
    """Return what `asd ask --json` or the gateway wrote; -: to standard input. The gateway's has no text.

    Raises InvalidRequest for anything else.
    """
    from pydantic import BeforeValidator, TypeAdapter, ValidationError

    from asd.errors import InvalidRequest
    from asd.transport.files import read_content
    from asd.values import Answer

    content = (
        sys.stdin.buffer.read()
        if file == Path("-")
        else read_content(file, _MOST_ANSWER_BYTES, is_pipe_fine=True)
    )
    try:
        return TypeAdapter(Annotated[Answer, BeforeValidator(_of_gateway)]).validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise InvalidRequest(
            f"{'standard input' if file == Path('-') else file} holds no answer of `asd ask --json` or of "
            f"the gateway: {problem['msg']}",
            field=field,
        ) from error


def _of_gateway(value: Any) -> Any:
    """Return an Answer's fields of the gateway's field `asd`; any other value as it is."""
    from pydantic_core import PydanticCustomError

    told = value.get("asd") if isinstance(value, dict) else None
    if not isinstance(told, dict):
        return value
    if "choices" in told:
        raise PydanticCustomError("several", 'there are several: leave one, as {{"asd": asd.choices[0]}}')
    stages = told.get("stages")
    if isinstance(stages, list):
        stages = [{"text": ""} | each if isinstance(each, dict) else each for each in stages]
    absent = {"text": "", "token_ids": (), "tokenizer_fingerprint": "", "finish_reason": ""}
    return absent | told | {"stages": stages}


def check_file(file: Path) -> None:
    """Refuse a file that cannot be written, before the work whose figures go there."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a directory", param_hint="--json")
    is_new = not file.exists()
    # Opening a pipe would wait for its reader.
    if is_new or file.is_file():
        try:
            file.open("ab").close()
        except OSError as error:
            raise typer.BadParameter(
                f"{file} cannot be written: {(error.strerror or str(error)).lower()}", param_hint="--json"
            ) from error
        if is_new:
            file.unlink()


def write_file(file: Path, text: str) -> None:
    """Replace a file's text, whole or not at all."""
    from services.common.disks import replace_file, writing

    with writing(file, "name another file"):
        replace_file(file, text)
