"""Compares the router's processor time per request with an earlier commit's, by turns, on this machine.

    .venv/bin/python -m benchmarks.processor_time COMMIT

Both routers run with their own commit's policy service and instant stage (benchmarks.instant_stage), and
answer the same requests, one at a time. Each pair of runs gives a ratio, the commit that runs first alternating.
Writes benchmarks/results/processor_time.json.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from asd.transport.channel import open_channel
from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2
from benchmarks.processes import process
from benchmarks.record import update_result
from benchmarks.revisions import cloned, commit_of, environment_of
from suites import split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import psutil

COSTS = {"small": 1.6, "medium": 4.2, "large": 8.8}
CALL_TIMEOUT = 30.0
# Of a run's requests, what is sent before time is taken: imports, connections, caches.
WARM = 500


@asynccontextmanager
async def router_of(root: Path) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Run a commit's router, policy service and instant stage; yield the router's address and process."""
    run = partial(process, environment=environment_of(root), folder=root)
    service = root / "policy_service"
    artifact = next(path for path in (service / "policy.zip", service / "artifact") if path.exists())
    with tempfile.TemporaryDirectory() as folder:
        policy_file, router_file = Path(folder, "policy.yaml"), Path(folder, "router.yaml")
        policy_file.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "artifact": str(artifact)}))
        async with (
            run("benchmarks.instant_stage", "127.0.0.1:0") as (stage, _),
            run("policy_service", "--config", str(policy_file)) as (policy, _),
        ):
            settings = {
                "listen": "127.0.0.1:0",
                "policy": {"target": policy, "timeout_ms": 1000},
                "stages": [{"name": name, "target": stage, "cost": cost} for name, cost in COSTS.items()],
                "static_plan": ["small"],
            }
            router_file.write_text(yaml.safe_dump(settings))
            async with run("services.router", "--config", str(router_file)) as running:
                yield running


async def milliseconds_per_request(address: str, router: psutil.Process, samples: int) -> dict[str, float]:
    """Return the router's processor time per request, by kind of call."""
    requests = [
        cascade_pb2.GenerateRequest(
            prompt=task.prompt,
            # Nothing is worth more than the first answer: one draft, one decision.
            objective=common_pb2.Objective(**{"lambda": 0.0}),
        )
        for task in split("demo", 240)
    ]
    async with open_channel(address, retry=False) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)

        async def unary(number: int) -> None:
            await stub.Generate(requests[number % len(requests)], timeout=CALL_TIMEOUT)

        async def stream(number: int) -> None:
            request = cascade_pb2.GenerateStreamRequest(request=requests[number % len(requests)])
            async for _ in stub.GenerateStream(request, timeout=CALL_TIMEOUT):
                pass

        figures = {}
        for kind, call in (("unary", unary), ("stream", stream)):
            for number in range(WARM):
                await call(number)
            before = sum(router.cpu_times()[:2])
            for number in range(samples):
                await call(number)
            figures[kind] = (sum(router.cpu_times()[:2]) - before) * 1000.0 / samples
    return figures


async def compare(roots: dict[str, Path], pairs: int, samples: int) -> dict[str, object]:
    """Run pairs of turns. roots: the earlier commit's clone, then the later one's."""
    before, after = roots
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for pair in range(pairs):
        for name in (before, after) if pair % 2 == 0 else (after, before):
            async with router_of(roots[name]) as (address, router):
                runs[name].append(await milliseconds_per_request(address, router, samples))
            print(f"pair {pair + 1}/{pairs}: {name} {runs[name][-1]}", file=sys.stderr, flush=True)
    figures: dict[str, object] = {"before": before, "after": after, "requests_per_run": samples}
    for kind in runs[before][0]:
        ratios = [b[kind] / a[kind] for a, b in zip(runs[before], runs[after], strict=True)]
        figures[f"{kind}_ms_before"] = [round(run[kind], 3) for run in runs[before]]
        figures[f"{kind}_ms_after"] = [round(run[kind], 3) for run in runs[after]]
        figures[f"{kind}_ratio_median"] = round(statistics.median(ratios), 3)
        figures[f"{kind}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return figures


def main() -> None:
    """Compare HEAD with an earlier commit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processor_time", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("before", help="the earlier commit")
    parser.add_argument("--after", default="HEAD", help="the later one (HEAD)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of turns (5)")
    parser.add_argument("--requests", type=int, default=4000, help="for each kind of call and turn (4000)")
    options = parser.parse_args()
    before, after = commit_of(options.before), commit_of(options.after)
    with cloned(before) as earlier, cloned(after) as later:
        roots = {before: earlier, after: later}
        figures = asyncio.run(compare(roots, options.pairs, options.requests))
    command = f"python -m benchmarks.processor_time {before} --after {after} --pairs {options.pairs}"
    print(update_result("processor_time", command, figures), file=sys.stderr)


if __name__ == "__main__":
    main()
