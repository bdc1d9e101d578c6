"""Tables of published outcomes: one prompt a row, one model a column, 1 right and 0 wrong."""

from __future__ import annotations

import csv
import gzip
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from policy_service.train.faults import UnfitOutcomes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

# What is not a model's column.
_DESCRIPTIONS = frozenset(
    "prompt_id benchmark subject hash_heldout origin n_options prompt reference_answer contaminated turn "
    "second_turn".split()
)
# Folds need some of everything.
_LEAST_PROMPTS = 50


class UnfitOptions(UnfitOutcomes):
    """What the command line asks of a file does not fit it; the message names the option."""


@dataclass(frozen=True)
class RoutingTable:
    """Outcomes of n prompts. outcomes: [n, models], of the ladder first, then of the other models.

    Cells of the ladder are filled; a missing outcome of another model is its mean. ladder: names, smallest
    first. dropped: prompts left out because an outcome of the ladder is missing.
    """

    benchmark: str
    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    subjects: tuple[str, ...]
    ladder: tuple[str, ...]
    outcomes: Floats
    dropped: int

    @property
    def gains(self) -> Floats:
        """Return the quality of the largest model less that of the smallest: [n]."""
        gains: Floats = self.outcomes[:, len(self.ladder) - 1] - self.outcomes[:, 0]
        return gains

    @property
    def others(self) -> Floats:
        """Return outcomes of the models that are not in the ladder: [n, others]."""
        return self.outcomes[:, len(self.ladder) :]


def read_table(path: Path, ladder: Sequence[str], also: Sequence[Path] = ()) -> RoutingTable:
    """Return the outcomes of a file. also: files whose models answered the same prompts, by prompt_id.

    Raises UnfitOutcomes.
    """
    if len(set(ladder)) < 2 or len(set(ladder)) < len(ladder):
        raise UnfitOptions("--ladder needs two or more different models, smallest first")
    rows = _read_rows(path)
    models = _models(rows)
    for name in ladder:
        if name not in models:
            raise UnfitOptions(f"{path}: no model {name}; it has {', '.join(models)}")
    columns = [*ladder, *(name for name in models if name not in ladder)]
    values = _values(path, rows, columns)
    for each in also:
        values = np.hstack([values, _joined(each, rows, ladder)])
    kept = np.logical_not(np.isnan(values[:, : len(ladder)]).any(axis=1))
    if kept.sum() < _LEAST_PROMPTS:
        raise UnfitOutcomes(
            f"{path}: {kept.sum()} prompts have an outcome of every model of the ladder; "
            f"{_LEAST_PROMPTS} are needed"
        )
    values = values[kept]
    values = values[:, ~np.isnan(values).all(axis=0)]
    values = np.where(np.isnan(values), np.nanmean(values, axis=0), values)
    rows = [row for row, is_kept in zip(rows, kept.tolist(), strict=True) if is_kept]
    table = RoutingTable(
        rows[0].get("benchmark", ""),
        tuple(row["prompt_id"] for row in rows),
        tuple(row["prompt"] for row in rows),
        tuple(row.get("subject", "") for row in rows),
        tuple(ladder),
        values,
        int((~kept).sum()),
    )
    if table.gains.sum() <= 0:
        raise UnfitOptions(f"{path}: {ladder[-1]} is no better than {ladder[0]}: give the smallest first")
    return table


def read_sizes(path: Path, ladder: Sequence[str]) -> tuple[float, ...] | None:
    """Return the active parameters of models, billions, of models.csv beside a file; None if not known."""
    listed = path.parent / "models.csv"
    if not listed.exists():
        return None
    with listed.open(encoding="utf-8", newline="") as file:
        sizes = {row["model"]: row["params_active_b"] for row in csv.DictReader(file)}
    found = [sizes.get(name, "") for name in ladder]
    return tuple(float(size) for size in found) if all(found) else None


def read_answers(path: Path, table: RoutingTable) -> tuple[Floats, npt.NDArray[np.str_]] | None:
    """Return lengths and parsed answers, [n, ladder] each; None where no *_aux file has them."""
    extra = path.with_name(path.name.replace(".csv", "_aux.csv"))
    if extra == path or not extra.exists():
        return None
    rows = {row["prompt_id"]: row for row in _read_rows(extra, prompts=False)}
    first = next(iter(rows.values()))
    if any(f"{name}_{what}" not in first for name in table.ladder for what in ("chars", "pred")):
        return None
    found = [rows.get(each, {}) for each in table.ids]
    lengths = [[float(row.get(f"{name}_chars") or 0) for name in table.ladder] for row in found]
    answers = [[row.get(f"{name}_pred", "") for name in table.ladder] for row in found]
    return np.array(lengths), np.array(answers)


def _read_rows(path: Path, *, prompts: bool = True) -> list[dict[str, str]]:
    needed = {"prompt_id", "prompt"} if prompts else {"prompt_id"}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UnfitOutcomes(f"{path}: not a gzip-compressed CSV file") from error
    if not rows or not needed <= set(rows[0]):
        raise UnfitOutcomes(f"{path}: needs rows and the columns {', '.join(sorted(needed))}")
    if any(None in row or None in row.values() for row in rows):
        raise UnfitOutcomes(f"{path}: a row has more or fewer cells than the header")
    return rows


def _models(rows: Sequence[dict[str, str]]) -> list[str]:
    return [name for name in rows[0] if name not in _DESCRIPTIONS]


def _values(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> Floats:
    try:
        values = np.array([[float(row[name] or "nan") for name in columns] for row in rows])
    except ValueError as error:
        raise UnfitOutcomes(f"{path}: an outcome is no number: {error}") from error
    for row, column in np.argwhere((values < 0) | (values > 1)):
        raise UnfitOutcomes(
            f"{path}: row {row + 1}: {columns[column]} is {values[row, column]:g}; an outcome is 0 to 1"
        )
    return values


def _joined(path: Path, rows: Sequence[dict[str, str]], ladder: Sequence[str]) -> Floats:
    """Return outcomes of further models: [n, models]. Those of the ladder may be the same run: left out."""
    others = _read_rows(path)
    names = [name for name in _models(others) if name not in ladder]
    values = dict(zip((row["prompt_id"] for row in others), _values(path, others, names), strict=True))
    missing = np.full(len(names), np.nan)
    joined = np.array([values.get(row["prompt_id"], missing) for row in rows])
    if np.isnan(joined).all():
        raise UnfitOutcomes(f"{path}: shares no prompt_id with the outcomes")
    return joined
