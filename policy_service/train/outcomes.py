"""Outcome files: what every stage answered to each prompt, whether it was right, and how drafts fared.

A file is gzip-compressed JSON lines: a header, then one record per prompt.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]


class UnfitOutcomes(Exception):  # noqa: N818 - an error is named by its cause
    """The file holds no usable outcomes; the message names the file and the row."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Header(_Record):
    """First line of a file. cascade: stages in order. rows: prompts that follow; None while it grows."""

    schema_name: Literal["asd.outcomes"] = Field("asd.outcomes", alias="schema")
    version: Literal[1] = 1
    cascade: Annotated[tuple[str, ...], Field(min_length=1)]
    rows: Count | None = None


class StageOutcome(_Record):
    """A stage's own answer. logprobs, entropies, top2_margins: one entry per token, as in TokenChunk."""

    text: str
    finish_reason: Literal["eos", "length", "stop"]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    top2_margins: tuple[float, ...]
    correct: bool
    latency_ms: Milliseconds | None = None


class VerificationOutcome(_Record):
    """How a stage's answer fared as a draft of a later one. ranks: one entry per proposed token.

    proposed_again: tokens that were proposed after the first correction.
    """

    proposed: Count
    accepted: Count
    ranks: tuple[Count, ...]
    forward_passes: Count
    proposed_again: Count = 0
    latency_ms: Milliseconds | None = None


class OutcomeRow(_Record):
    """What became of one prompt. verifications: by "draft stage>target stage", every pair of the cascade."""

    prompt: Annotated[str, Field(min_length=1)]
    history: tuple[str, ...] = ()
    suite: str = ""
    level: int = 0
    kind: str = ""
    split: str = ""
    stages: dict[str, StageOutcome]
    verifications: dict[str, VerificationOutcome]


def pairs(cascade: Sequence[str]) -> list[tuple[int, int]]:
    """Return places (draft stage, target stage) of every pair of a cascade."""
    return [(draft, target) for target in range(len(cascade)) for draft in range(target)]


def pair_name(cascade: Sequence[str], draft: int, target: int) -> str:
    """Return the key of a pair's verification."""
    return f"{cascade[draft]}>{cascade[target]}"


def read_header(path: Path) -> Header:
    """Return the header of a file. Raises UnfitOutcomes."""
    try:
        with gzip.open(path, "rb") as file:
            return _parse_header(path, file.readline())
    except (OSError, EOFError, zlib.error) as error:
        raise UnfitOutcomes(f"{path}: {say_why(error)}") from error


def read_rows(path: Path) -> Iterator[OutcomeRow]:
    """Yield the records of a file. Raises UnfitOutcomes, naming the row, where one is wrong or missing."""
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            header = _parse_header(path, file.readline())
            for number, line in enumerate(file, 1):
                yield _parse_row(path, number, line, header.cascade)
    except (OSError, EOFError, zlib.error) as error:
        where = f"broken after row {number}: " if number else ""
        raise UnfitOutcomes(f"{path}: {where}{say_why(error)}") from error
    if header.rows is not None and number != header.rows:
        raise UnfitOutcomes(f"{path}: the header promises {header.rows} rows, {number} are there: truncated")


def check_disjoint(first: Path, second: Path) -> None:
    """Check that two files share no prompt. Raises UnfitOutcomes."""
    seen = {(row.history, row.prompt) for row in read_rows(first)}
    for number, row in enumerate(read_rows(second), 1):
        if (row.history, row.prompt) in seen:
            raise UnfitOutcomes(
                f"{second}: row {number}: the prompt is in {first} as well: calibrate on other prompts"
            )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say_why(error: Exception) -> str:
    """Return why a file cannot be read, without its name."""
    if isinstance(error, gzip.BadGzipFile):
        return "not a file of outcomes"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


def _parse_header(path: Path, line: bytes) -> Header:
    try:
        return Header.model_validate_json(line)
    except ValidationError as error:
        if not line:
            raise UnfitOutcomes(f"{path}: not a file of outcomes") from error
        raise UnfitOutcomes(f"{path}: header: {_explain(error)}") from error


def _parse_row(path: Path, number: int, line: bytes, cascade: Sequence[str]) -> OutcomeRow:
    where = f"{path}: row {number}"
    try:
        row = OutcomeRow.model_validate_json(line)
    except ValidationError as error:
        raise UnfitOutcomes(f"{where}: {_explain(error)}") from error
    if set(row.stages) != set(cascade):
        raise UnfitOutcomes(f"{where}: has stages {', '.join(row.stages)}; the header {', '.join(cascade)}")
    wanted = {pair_name(cascade, draft, target) for draft, target in pairs(cascade)}
    if set(row.verifications) != wanted:
        raise UnfitOutcomes(f"{where}: needs verifications {', '.join(sorted(wanted))}")
    for name, stage in row.stages.items():
        if not len(stage.logprobs) == len(stage.entropies) == len(stage.top2_margins):
            raise UnfitOutcomes(f"{where}: stages.{name}: token signals of different lengths")
    for name, check in row.verifications.items():
        if len(check.ranks) != check.proposed or check.accepted > check.proposed:
            raise UnfitOutcomes(f"{where}: verifications.{name}: proposed, accepted and ranks do not fit")
    return row


def _explain(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
