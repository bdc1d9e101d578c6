"""Measures what load does to answers: `python -m benchmarks.load`, the embedded family on this machine.

The same held-out prompts by each way of asking, so many at a time, each when an earlier one is answered; and
after each of these cells, one by one with the policy deciding: whether what the router saw of the load still
shows. Then a burst of more requests than can be answered within their deadlines. It takes half an hour; cells
that were measured of this very tree are kept in build/load.json. Writes benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asd.client import AsyncClient
from asd.errors import AsdError, BudgetSpent, ResourceExhausted
from asd.values import Objective, Request
from benchmarks.processes import embedded_cascade
from benchmarks.record import write_result
from benchmarks.stats import wilson
from services.common.server import run_service
from services.common.stats import percentile
from suites import grade, split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asd.values import Answer
    from suites import Task

BALANCED: dict[str, Any] = {"objective": Objective(preference="balanced")}
WAYS: dict[str, dict[str, Any]] = {
    "largest": {"stage": "large"},
    "balanced": BALANCED,
    "min_quality": {"objective": Objective(min_quality=0.99)},
    "best": {"objective": Objective(preference="best")},
}
AT_A_TIME = (1, 8, 32, 64)
PROMPTS = 1200
# Asked one by one after each load.
AFTER = 40
CALL_MS = 120_000.0
# So many requests at once, so many times, each with this deadline. Chosen: the cascade answers some 30 a
# second, so that two thirds of them cannot be answered in time; and they are as many as a router takes.
BURST, BURSTS, BURST_MS = 256, 3, 3_000.0
CELLS = (*(f"{way}@{at_a_time}" for at_a_time in AT_A_TIME for way in WAYS), "burst")
_WORK = Path(__file__).parents[1] / "build" / "load.json"


@dataclass
class Tally:
    """What became of requests. asked: all of them, so far. unexplained: refusals without a RetryInfo.

    failed: by the error's kind, what was neither refused nor late.
    """

    asked: int = 0
    right: int = 0
    times_ms: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    answered_by: collections.Counter[str] = field(default_factory=collections.Counter)
    planned_by: collections.Counter[str] = field(default_factory=collections.Counter)
    judged_statically: int = 0
    refused: int = 0
    unexplained: int = 0
    deadline_exceeded: int = 0
    failed: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def answered(self) -> int:
        """Requests that were answered."""
        return len(self.times_ms)

    def take(self, task: Task, outcome: Answer | AsdError, ms: float) -> None:
        """Count what became of a request. ms: how long it took."""
        self.asked += 1
        if isinstance(outcome, ResourceExhausted):
            self.refused += 1
            self.unexplained += outcome.retry_after_s is None
        elif isinstance(outcome, BudgetSpent):
            self.deadline_exceeded += 1
        elif isinstance(outcome, AsdError):
            self.failed[type(outcome).__name__] += 1
        else:
            self.right += grade(task, outcome.text)
            self.times_ms.append(ms)
            self.costs.append(outcome.cost)
            self.answered_by[outcome.stage] += 1
            self.planned_by[outcome.plan_source] += 1
            is_static = any(each.reason == "static_plan" for each in outcome.stages)
            self.judged_statically += is_static and outcome.plan_source != "static"

    def row(self, seconds: float) -> dict[str, Any]:
        """Return the figures. seconds: that all requests took together."""
        share, answered = self.right / max(self.answered, 1), self.answered
        row: dict[str, Any] = {
            "asked": self.asked,
            "answered": answered,
            "accuracy": round(share, 4),
            "accuracy_95": [round(each, 4) for each in wilson(self.right, answered)],
            "answers_per_s": round(answered / seconds, 2),
            "refused": self.refused,
            "refused_without_retry_info": self.unexplained,
            "deadline_exceeded": self.deadline_exceeded,
            "failed": dict(self.failed),
            "answered_by": dict(self.answered_by),
            "planned_by": dict(self.planned_by),
            "judged_by_static_plan": self.judged_statically,
        }
        if answered:
            row["p50_ms"] = round(statistics.median(self.times_ms), 1)
            row["p95_ms"] = round(percentile(self.times_ms, 0.95), 1)
            row["cost"] = round(statistics.mean(self.costs), 3)
        return row


def headline(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures that are quoted, from the rows by cell."""
    largest = rows["largest@32"]
    decided = [rows["balanced@64"], rows["best@64"]]
    static = sum(row["planned_by"].get("static", 0) + row["judged_by_static_plan"] for row in decided)
    return {
        **{f"{way}_c{n}": rows[f"{way}@{n}"]["accuracy"] for way in ("best", "balanced") for n in (32, 64)},
        "largest_c32": largest["accuracy"],
        **{
            f"{way}_rate_ratio_c32": round(
                rows[f"{way}@32"]["answers_per_s"] / max(largest["answers_per_s"], 0.01), 2
            )
            for way in ("best", "balanced")
        },
        **{f"refused_c{n}": sum(rows[f"{way}@{n}"]["refused"] for way in WAYS) for n in (32, 64)},
        "static_share_c64": round(static / max(sum(row["answered"] for row in decided), 1), 4),
    }


class Kept:
    """Rows of cells that were measured of one tree, in a file. Those of another tree are forgotten."""

    def __init__(self, file: Path, tree: str) -> None:
        self._file = file
        self._tree = tree
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["tree"] == tree:
                self.rows = {name: content["rows"][name] for name in CELLS if name in content["rows"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def keep(self, cell: str, row: dict[str, Any]) -> None:
        """Keep a cell's row: a run that is interrupted now goes on with the next one."""
        self.rows[cell] = row
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps({"tree": self._tree, "rows": self.rows}, indent=1), encoding="utf-8")
        partial.replace(self._file)


def tree_state() -> str:
    """Return what names the tree's content: its commit, and a hash of what was changed since."""
    commit, changes = (
        subprocess.run(["git", *arguments], capture_output=True, check=False, timeout=30).stdout
        for arguments in (["rev-parse", "HEAD"], ["diff", "HEAD"])
    )
    return f"{commit.decode().strip()} {hashlib.sha256(changes).hexdigest()[:12]}"


def cells(text: str) -> tuple[str, ...]:
    """Return the cells of a list with commas, in the order of CELLS."""
    names = text.split(",")
    unknown = [name for name in names if name not in CELLS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no cell: choose of {', '.join(CELLS)}")
    return tuple(name for name in CELLS if name in names)


async def measure(
    names: Sequence[str], prompts: int, kept: Kept | None, port_base: int
) -> dict[str, dict[str, Any]]:
    """Return a row for each cell. kept: gets each row as it is there; None: nothing is kept."""
    tasks = list(split("evaluation", prompts))
    rows = {}
    async with embedded_cascade(port_base) as address, AsyncClient(address, timeout_ms=CALL_MS) as client:
        # A router that has seen nothing yet is not what is measured.
        await _ask(client, tasks[:AFTER], BALANCED, 1, "start")
        for name in names:
            way, _, at_a_time = name.partition("@")
            if name == "burst":
                row = await _burst(address, list(split("evaluation", BURST * BURSTS)), name)
            else:
                row = await _ask(client, tasks, WAYS[way], int(at_a_time), name)
            after = await _ask(client, tasks[:AFTER], BALANCED, 1, "after it")
            rows[name] = {
                **row,
                "balanced_right_after": after["accuracy"],
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            sys.stderr.write(f"{name}: {json.dumps(rows[name])}\n")
            if kept is not None:
                kept.keep(name, rows[name])
    return rows


async def _ask(
    client: AsyncClient, tasks: Sequence[Task], way: dict[str, Any], at_a_time: int, name: str
) -> dict[str, Any]:
    """Ask all tasks, so many at a time, each when an earlier one has ended."""
    waiting, tally = iter(tasks), Tally()

    async def work() -> None:
        for task in waiting:
            await _ask_one(client, task, way, tally)
            _show(name, tally.asked, len(tasks))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_a_time)))
    return tally.row(time.perf_counter() - started)


async def _burst(address: str, tasks: Sequence[Task], name: str) -> dict[str, Any]:
    """Ask many tasks in the same instant, BALANCED and BEST by turns, each with a short deadline."""
    tally, seconds = Tally(), 0.0
    ways = [WAYS["balanced"], WAYS["best"]]
    async with AsyncClient(address, timeout_ms=BURST_MS) as client:
        for start in range(0, len(tasks), BURST):
            batch = tasks[start : start + BURST]
            started = time.perf_counter()
            pairs = zip(batch, itertools.cycle(ways), strict=False)
            await asyncio.gather(*(_ask_one(client, task, way, tally) for task, way in pairs))
            seconds += time.perf_counter() - started
            _show(name, tally.asked, len(tasks))
    return {**tally.row(seconds), "at_once": BURST, "deadline_ms": BURST_MS}


async def _ask_one(client: AsyncClient, task: Task, way: dict[str, Any], tally: Tally) -> None:
    started = time.perf_counter()
    outcome: Answer | AsdError
    try:
        outcome = await client.ask(Request(task.prompt, **way))
    except AsdError as error:
        outcome = error
    tally.take(task, outcome, (time.perf_counter() - started) * 1e3)


def _show(name: str, done: int, of: int) -> None:
    """Say how far a cell is: on a terminal at each answer, else at each tenth."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{name}: {done} of {of} " + ("\n" if done == of else ""))
    elif of >= PROMPTS and done % (of // 10) == 0:
        sys.stderr.write(f"{name}: {done} of {of}\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts; keep nothing")
    parser.add_argument("--cells", type=cells, default=CELLS, help="such as best@32,burst; default: all")
    parser.add_argument("--anew", action="store_true", help="measure again what this tree has kept")
    parser.add_argument("--port-base", type=int, default=21050, help="the cascade's first port (21050)")
    options = parser.parse_args()
    if options.quick:
        run_service(measure(options.cells, PROMPTS // 10, None, options.port_base))
        return
    kept = Kept(_WORK, tree_state())
    names = [name for name in options.cells if options.anew or name not in kept.rows]
    if names:
        run_service(measure(names, PROMPTS, kept, options.port_base))
    missing = [name for name in CELLS if name not in kept.rows]
    if missing:
        sys.stderr.write(f"kept in {_WORK}; still to be measured: {', '.join(missing)}\n")
        return
    rows = [{"cell": name, **kept.rows[name]} for name in CELLS]
    figures = {**headline(kept.rows), "rows": rows, "prompts": PROMPTS, "prompts_after": AFTER}
    sys.stderr.write(f"{write_result('load', 'python -m benchmarks.load', figures)}\n")


if __name__ == "__main__":
    main()
