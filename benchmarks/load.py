"""Measures what load does to answers: `python -m benchmarks.load`, the embedded family on this machine.

The same held-out prompts by each way of asking, so many at a time, each when an earlier one is answered; and
after each of these, one by one with the policy deciding: whether what the router saw of the load still shows.
Writes benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.processes import embedded_cascade
from benchmarks.record import percentile, write_result
from services.client.client import CascadeClient
from services.client.values import Objective, Request
from services.common.server import run_service
from suites import grade, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.client.values import Answer
    from suites import Task

BALANCED: dict[str, Any] = {"objective": Objective(preference="balanced")}
WAYS: dict[str, dict[str, Any]] = {
    "always large": {"stage": "large"},
    "balanced": BALANCED,
    "min_quality 0.99": {"objective": Objective(min_quality=0.99)},
    "best": {"objective": Objective(preference="best")},
}
AT_A_TIME = (1, 8, 32)
PROMPTS = 240
# Asked one by one after each load.
AFTER = 40
CALL_MS = 120_000.0


async def measure(prompts: int) -> dict[str, object]:
    """Return a row for each way and number of requests at a time."""
    tasks = list(split("evaluation", prompts))
    rows = []
    async with embedded_cascade() as address, CascadeClient(address, timeout_ms=CALL_MS) as client:
        # A router that has seen nothing yet is not what is measured.
        await _ask(client, tasks[:AFTER], BALANCED, 1)
        for at_a_time, (name, way) in itertools.product(AT_A_TIME, WAYS.items()):
            rows.append({"way": name, "at_a_time": at_a_time, **await _ask(client, tasks, way, at_a_time)})
            after = await _ask(client, tasks[:AFTER], BALANCED, 1)
            rows[-1]["balanced_right_after"] = after["accuracy"]
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    return {"rows": rows, "prompts_after": AFTER}


async def _ask(
    client: CascadeClient, tasks: Sequence[Task], way: dict[str, Any], at_a_time: int
) -> dict[str, Any]:
    waiting = iter(tasks)
    found: list[tuple[Task, Answer, float]] = []

    async def work() -> None:
        for task in waiting:
            started = time.perf_counter()
            answer = await client.answer(Request(task.prompt, **way))
            found.append((task, answer, (time.perf_counter() - started) * 1e3))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_a_time)))
    seconds = time.perf_counter() - started
    times = [ms for _, _, ms in found]
    return {
        "prompts": len(tasks),
        "accuracy": round(statistics.mean(grade(task, answer.text) for task, answer, _ in found), 4),
        "answers_per_s": round(len(tasks) / seconds, 2),
        "p50_ms": round(statistics.median(times), 1),
        "p95_ms": round(percentile(times, 0.95), 1),
        "cost": round(statistics.mean(answer.cost for _, answer, _ in found), 3),
        "answered_by": dict(collections.Counter(answer.stage for _, answer, _ in found)),
        "planned_by": dict(collections.Counter(answer.plan_source for _, answer, _ in found)),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts; keep nothing")
    options = parser.parse_args()
    figures = run_service(measure(PROMPTS // 10 if options.quick else PROMPTS))
    if not options.quick:
        print(write_result("load", "python -m benchmarks.load", figures), file=sys.stderr)


if __name__ == "__main__":
    main()
