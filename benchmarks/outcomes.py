"""Collects outcomes from stages that it starts itself: `python -m benchmarks.outcomes FILE`.

`asd-policy collect` without a running cascade. Interrupt it at any time: the same command goes on.
With --replicas it takes as many cores: each replica is a set of stages that works on one prompt at a time, so
latencies are those of a stage that has nothing else to do. Leave this process a core: some 15 replicas keep
it busy.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from asd.errors import AsdError
from benchmarks.processes import ROOT, service
from policy_service.train.collect import CollectOptions, collect_outcomes
from policy_service.train.outcomes import UnfitOutcomes
from services.common.server import run_service

NAMES = ("small", "medium", "large")
_TIMEOUT_MS = 60_000


def stage_settings(name: str) -> dict[str, object]:
    """Return the settings of a stage whose calls are measured."""
    return {
        "models": [
            {
                "name": name,
                "path": str(ROOT / "models" / name),
                "threads": 1,
                # No prefix cache: a verification comes right after the stage's own answer to the same prompt,
                # whose cache would make it quicker than it is in a cascade, where the target is fresh.
                "cached_sequences": 0,
            }
        ],
    }


async def collect(options: argparse.Namespace) -> None:
    """Start the embedded family's stages and collect."""
    async with AsyncExitStack() as stack:
        # As many start at once as there are cores: more would only wait for each other.
        starting = asyncio.Semaphore(os.cpu_count() or 1)

        async def start(name: str) -> str:
            async with starting:
                return await stack.enter_async_context(service("services.stage", stage_settings(name)))

        async with asyncio.TaskGroup() as group:
            tasks = {
                name: [group.create_task(start(name)) for _ in range(options.replicas)] for name in NAMES
            }
        targets = {name: tuple(task.result() for task in each) for name, each in tasks.items()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        await collect_outcomes(
            CollectOptions(
                options.output,
                targets,
                options.split,
                options.prompts,
                options.conversations,
                seed=0,
                concurrency=options.replicas,
                timeout_ms=_TIMEOUT_MS,
            ),
            Console(),
        )


def main() -> None:
    """Collect what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outcomes", description=__doc__)
    parser.add_argument("output", type=Path, help="file to write, or to go on with (Parquet)")
    parser.add_argument("--split", default="evaluation", help="split of the suites")
    parser.add_argument("--prompts", type=int, default=27_384)
    parser.add_argument("--conversations", type=int, default=0, help="further ones that are second turns")
    parser.add_argument("--replicas", type=int, default=1, help="sets of stages, each with a core of its own")
    options = parser.parse_args()
    if options.replicas < 1:
        parser.error("--replicas must be 1 or more")
    try:
        run_service(collect(options))
    except (AsdError, UnfitOutcomes) as error:
        raise SystemExit(f"benchmarks.outcomes: {error}") from error
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
