"""Outcome files: every stage's answer to each prompt, its grade, and the verifications of drafts.

A file is Parquet (see outcome_table), one row per prompt.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from asd.values import FinishReason
from policy_service.features import PromptText
from policy_service.train.faults import UnfitOutcomes, say_why
from policy_service.train.outcome_table import HEADER_KEY, table_schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

# Rows held as Python objects at a time.
_BATCH = 500

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]


class _OutcomeModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Header(_OutcomeModel):
    """Metadata of a file. cascade: stages in order."""

    schema_name: Literal["asd.outcomes"] = Field(alias="schema")
    version: Literal[2]
    cascade: Annotated[tuple[str, ...], Field(min_length=1)]


class StageOutcome(_OutcomeModel):
    """A stage's own answer. logprobs, entropies, top2_margins: one entry per token, as in TokenChunk."""

    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    top2_margins: tuple[float, ...]
    correct: bool
    latency_ms: Milliseconds | None = None


class VerificationOutcome(_OutcomeModel):
    """A later stage's verification of a stage's answer. ranks: one entry per proposed token.

    proposed_again: tokens that were proposed after the first correction.
    """

    proposed: Count
    accepted: Count
    ranks: tuple[Count, ...]
    forward_passes: Count
    proposed_again: Count = 0
    latency_ms: Milliseconds | None = None


class OutcomeRow(_OutcomeModel):
    """Outcomes of one prompt. verifications: by "draft stage>target stage", every pair of the cascade."""

    prompt: Annotated[str, Field(min_length=1)]
    history: tuple[str, ...] = ()
    suite: str = ""
    level: int = 0
    kind: str = ""
    split: str = ""
    stages: dict[str, StageOutcome]
    verifications: dict[str, VerificationOutcome]


def read_cascade(path: Path) -> tuple[str, ...]:
    """Return the stages of a file, in order. Raises UnfitOutcomes."""
    with _opened(path) as file:
        return _header(path, file).cascade


def read_rows(path: Path) -> Iterator[OutcomeRow]:
    """Yield the rows of a file. Raises UnfitOutcomes, naming the row, if one is wrong."""
    with _opened(path) as file:
        _check_columns(path, file, _header(path, file).cascade)
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield _parse_row(f"{path}: row {number}", record)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UnfitOutcomes(f"{path}: broken after row {number}: {say_why(error)}") from error


def read_prompts(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield history and prompt of every row. Raises UnfitOutcomes."""
    with _opened(path) as file:
        _check_columns(path, file, _header(path, file).cascade)
        number = 0
        try:
            for batch in file.iter_batches(columns=["history", "prompt"]):
                histories, prompts = batch["history"].to_pylist(), batch["prompt"].to_pylist()
                number += len(prompts)
                yield from zip((tuple(history or ()) for history in histories), prompts, strict=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UnfitOutcomes(f"{path}: broken after row {number}: {say_why(error)}") from error


def read_prompt_texts(path: Path) -> Iterator[PromptText]:
    """Yield the prompt of every row. Raises UnfitOutcomes."""
    for history, prompt in read_prompts(path):
        yield PromptText(prompt, history)


def check_disjoint(first: Path, second: Path) -> None:
    """Check that two files share no prompt. Raises UnfitOutcomes."""
    seen = set(read_prompts(first))
    for number, prompt in enumerate(read_prompts(second), 1):
        if prompt in seen:
            raise UnfitOutcomes(
                f"{second}: row {number}: the prompt is in {first} as well: calibrate on other prompts"
            )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UnfitOutcomes(f"{path}: not a file of outcomes, or truncated") from error
    # Column names that are not UTF-8 raise a ValueError, here or later.
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UnfitOutcomes(f"{path}: {say_why(error)}") from error
    with file:
        try:
            yield file
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UnfitOutcomes(f"{path}: damaged: {say_why(error)}") from error


def _header(path: Path, file: pq.ParquetFile) -> _Header:
    line = (file.schema_arrow.metadata or {}).get(HEADER_KEY)
    if line is None:
        raise UnfitOutcomes(f"{path}: not a file of outcomes")
    try:
        return _Header.model_validate_json(line)
    except ValidationError as error:
        raise UnfitOutcomes(f"{path}: header: {_explain(error)}") from error


def _check_columns(path: Path, file: pq.ParquetFile, cascade: Sequence[str]) -> None:
    """Check the names and types of the columns once, instead of in every row."""
    expected = table_schema(cascade)
    for field in expected:
        index = file.schema_arrow.get_field_index(field.name)
        if index < 0:
            raise UnfitOutcomes(f"{path}: has no column {field.name}")
        if file.schema_arrow.field(index).type != field.type:
            raise UnfitOutcomes(
                f"{path}: column {field.name} is {file.schema_arrow.field(index).type}; "
                f"outcomes of {', '.join(cascade)} have {field.type}"
            )


def _parse_row(where: str, record: Mapping[str, object]) -> OutcomeRow:
    """Return a row. where: its position, for messages. Raises UnfitOutcomes."""
    try:
        row = OutcomeRow.model_validate(record)
    except ValidationError as error:
        raise UnfitOutcomes(f"{where}: {_explain(error)}") from error
    for name, stage in row.stages.items():
        if not len(stage.logprobs) == len(stage.entropies) == len(stage.top2_margins):
            raise UnfitOutcomes(f"{where}: stages.{name}: token signals of different lengths")
    for name, check in row.verifications.items():
        if len(check.ranks) != check.proposed or check.accepted > check.proposed:
            raise UnfitOutcomes(f"{where}: verifications.{name}: proposed, accepted and ranks do not fit")
    return row


def _explain(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    entry = ".".join(str(part) for part in problem["loc"])
    return f"{entry}: {problem['msg']}" if entry else problem["msg"]
