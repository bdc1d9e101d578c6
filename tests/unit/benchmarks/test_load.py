"""The measurements under load: intervals, what counts as what, what is quoted, and what is kept."""

from __future__ import annotations

import argparse
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, BudgetSpent, ResourceExhausted, Unavailable
from benchmarks.load import CELLS, WAYS, Kept, Tally, cells, headline
from benchmarks.stats import wilson
from suites import generate

if TYPE_CHECKING:
    from pathlib import Path

TASK = generate("arithmetic", 1, random.Random(0))


def answer(text: str, source: str = "policy", *reasons: str) -> Any:
    stages = [SimpleNamespace(reason=reason) for reason in reasons or ("value",)]
    return SimpleNamespace(text=text, cost=2.0, stage="small", plan_source=source, stages=stages)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_what_is_not_answered_is_counted_and_spoils_no_figure() -> None:
    tally = Tally()
    tally.take(TASK, answer(TASK.solution), 10.0)
    tally.take(TASK, answer("no answer", "static", "static_plan"), 30.0)
    tally.take(TASK, answer(TASK.solution, "policy", "static_plan", "last_stage"), 20.0)
    told, untold = ResourceExhausted("full", retry_after_s=1.0), ResourceExhausted("full")
    failures: list[AsdError] = [told, untold, BudgetSpent("late"), Unavailable("gone")]
    for error in failures:
        tally.take(TASK, error, 99.0)
    row = tally.row(2.0)
    assert (row["asked"], row["answered"], row["answers_per_s"]) == (7, 3, 1.5)
    assert row["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert (row["refused"], row["refused_without_retry_info"], row["deadline_exceeded"]) == (2, 1, 1)
    assert row["failed"] == {"Unavailable": 1}
    assert row["planned_by"] == {"policy": 2, "static": 1}
    assert row["judged_by_static_plan"] == 1
    assert (row["p50_ms"], row["p95_ms"]) == (20.0, 30.0)


def test_a_cell_in_which_everything_was_refused_has_a_row() -> None:
    tally = Tally()
    tally.take(TASK, ResourceExhausted("full"), 1.0)
    row = tally.row(0.5)
    assert (row["answered"], row["accuracy_95"], row["answers_per_s"]) == (0, [0.0, 1.0], 0.0)


def test_the_quoted_figures_are_read_off_their_cells() -> None:
    rows = {
        f"{way}@{n}": {
            "accuracy": n / 100 + place / 1000,
            "answers_per_s": 10.0 * (place + 1),
            "refused": n + place,
            "answered": 100,
            "planned_by": {"policy": 97, "static": place},
            "judged_by_static_plan": 1,
        }
        for place, way in enumerate(WAYS)
        for n in (32, 64)
    }
    assert list(WAYS) == ["largest", "balanced", "min_quality", "best"]
    assert headline(rows) == {
        "best_c32": 0.323,
        "best_c64": 0.643,
        "balanced_c32": 0.321,
        "balanced_c64": 0.641,
        "largest_c32": 0.32,
        "best_rate_ratio_c32": 4.0,
        "balanced_rate_ratio_c32": 2.0,
        "refused_c32": 4 * 32 + 6,
        "refused_c64": 4 * 64 + 6,
        # Of 200: planned, 1 and 3; judged, 1 and 1.
        "static_share_c64": 0.03,
    }


def test_cells_of_the_same_tree_are_kept_and_those_of_another_are_not(tmp_path: Path) -> None:
    file = tmp_path / "build" / "load.json"
    kept = Kept(file, "one")
    assert kept.rows == {}
    kept.keep("best@32", {"accuracy": 0.9})
    kept.keep("burst", {"accuracy": 0.8})
    assert Kept(file, "one").rows == {"best@32": {"accuracy": 0.9}, "burst": {"accuracy": 0.8}}
    assert Kept(file, "two").rows == {}
    file.write_text('{"tree": "one", "rows"', encoding="utf-8")
    assert Kept(file, "one").rows == {}


def test_cells_are_chosen_by_name() -> None:
    assert cells("burst,best@32") == ("best@32", "burst")
    assert "largest@64" in CELLS
    with pytest.raises(argparse.ArgumentTypeError, match="best@33"):
        cells("best@33")
