"""The Parquet form of outcomes: its schema, and a writer that never leaves a partial file.

It needs only pyarrow, so that outcomes can be written where models are trained.
"""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from services.common.disks import sync, writing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

SCHEMA, VERSION = "asd.outcomes", 2
HEADER_KEY = b"asd.outcomes"
"""Key of the file's metadata that holds the header, as JSON: schema, version and cascade."""

# Prompts of a row group, which a reader holds in memory.
_GROUP = 2000

_ANSWER = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("entropies", pa.list_(pa.float32())),
        pa.field("top2_margins", pa.list_(pa.float32())),
        pa.field("correct", pa.bool_()),
        pa.field("latency_ms", pa.float64()),
    ]
)
_CHECK = pa.struct(
    [
        pa.field("proposed", pa.int32()),
        pa.field("accepted", pa.int32()),
        pa.field("ranks", pa.list_(pa.int32())),
        pa.field("forward_passes", pa.int32()),
        pa.field("proposed_again", pa.int32()),
        pa.field("latency_ms", pa.float64()),
    ]
)


def pairs(cascade: Sequence[str]) -> list[tuple[int, int]]:
    """Return the indices (draft stage, target stage) of every pair of a cascade."""
    return [(draft, target) for target in range(len(cascade)) for draft in range(target)]


def pair_name(cascade: Sequence[str], draft: int, target: int) -> str:
    """Return the key of a pair's verification."""
    return f"{cascade[draft]}>{cascade[target]}"


def table_schema(cascade: Sequence[str]) -> pa.Schema:
    """Return the columns of a cascade's outcomes: those of OutcomeRow, a struct per stage and pair."""
    header = json.dumps({"schema": SCHEMA, "version": VERSION, "cascade": list(cascade)})
    names = [pair_name(cascade, draft, target) for draft, target in pairs(cascade)]
    return pa.schema(
        [
            pa.field("prompt", pa.string()),
            pa.field("history", pa.list_(pa.string())),
            pa.field("suite", pa.string()),
            pa.field("level", pa.int16()),
            pa.field("kind", pa.string()),
            pa.field("split", pa.string()),
            pa.field("stages", pa.struct([pa.field(name, _ANSWER) for name in cascade])),
            pa.field("verifications", pa.struct([pa.field(name, _CHECK) for name in names])),
        ],
        metadata={HEADER_KEY: header.encode()},
    )


def write_outcomes(path: Path, cascade: Sequence[str], rows: Iterable[Mapping[str, object]]) -> int:
    """Write a file atomically and return its number of rows: an interrupted run leaves no file.

    rows: as outcomes.OutcomeRow describes them; they raise no OSError. Raises ResourceExhausted on a full
    disk, PreconditionFailed if the file cannot be written.
    """
    partial = path.with_name(path.name + ".writing")
    try:
        with writing(path, "name another file"):
            count = _write(partial, table_schema(cascade), iter(rows))
            sync(partial)
            partial.replace(path)
            sync(path.absolute().parent)
    except BaseException:
        # On a full disk, the partial file would take the space of the next attempt.
        with suppress(OSError):
            partial.unlink()
        raise
    return count


def _write(path: Path, schema: pa.Schema, rows: Iterator[Mapping[str, object]]) -> int:
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=9) as writer:
        while group := list(itertools.islice(rows, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count
