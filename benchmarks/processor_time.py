"""Compares the router's processor time per request with an earlier commit's, by turns, on this machine.

    .venv/bin/python -m benchmarks.processor_time COMMIT

Both routers run with their own commit's policy service and instant stage (benchmarks.instant_stage), and
answer the same requests, one at a time, in turns: each pair of turns gives a ratio. Which commit is first
alternates. Writes benchmarks/results/processor_time.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
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

    import grpc
    import psutil

COSTS = {"small": 1.6, "medium": 4.2, "large": 8.8}
CALL_TIMEOUT = 30.0
KINDS = ("unary", "stream")
# Requests before any time is taken: imports, connections, caches.
WARM = 300


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


class Turns:
    """Sends requests to one router, a turn at a time, and takes the processor time of its process."""

    def __init__(self, channel: grpc.aio.Channel, router: psutil.Process) -> None:
        self._stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        self._router = router
        # Nothing is worth more than the first answer: one draft, one decision.
        objective = common_pb2.Objective(**{"lambda": 0.0})
        prompts = [task.prompt for task in split("demo", 240)]
        self._requests = [cascade_pb2.GenerateRequest(prompt=each, objective=objective) for each in prompts]

    async def take(self, kind: str, count: int) -> float:
        """Send requests one after the other; return the milliseconds of processor time for each.

        kind: "unary" or "stream".
        """
        before = self._processor_s()
        for request in itertools.islice(itertools.cycle(self._requests), count):
            if kind == "unary":
                await self._stub.Generate(request, timeout=CALL_TIMEOUT)
            else:
                whole = cascade_pb2.GenerateStreamRequest(request=request)
                async for _ in self._stub.GenerateStream(whole, timeout=CALL_TIMEOUT):
                    pass
        return (self._processor_s() - before) * 1000.0 / count

    def _processor_s(self) -> float:
        times = self._router.cpu_times()
        return float(times.user + times.system)


async def compare(roots: dict[str, Path], pairs: int, count: int) -> dict[str, object]:
    """Run pairs of turns. roots: the earlier commit's clone, then the later one's. count: of requests."""
    before, after = roots
    async with AsyncExitStack() as stack:
        routers = {}
        for name, root in roots.items():
            address, router = await stack.enter_async_context(router_of(root))
            channel = await stack.enter_async_context(open_channel(address, retry=False))
            routers[name] = Turns(channel, router)
            for kind in KINDS:
                await routers[name].take(kind, WARM)
        figures: dict[str, object] = {"before": before, "after": after, "requests_per_turn": count}
        for kind in KINDS:
            taken: dict[str, list[float]] = {name: [] for name in roots}
            for pair in range(pairs):
                for name in (before, after) if pair % 2 == 0 else (after, before):
                    taken[name].append(await routers[name].take(kind, count))
                line = ", ".join(f"{name} {ms[-1]:.3f} ms" for name, ms in taken.items())
                print(f"{kind}, pair {pair + 1} of {pairs}: {line}", file=sys.stderr, flush=True)
            ratios = [later / earlier for earlier, later in zip(taken[before], taken[after], strict=True)]
            figures[f"{kind}_ms_before"] = round(statistics.median(taken[before]), 3)
            figures[f"{kind}_ms_after"] = round(statistics.median(taken[after]), 3)
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
    parser.add_argument("--pairs", type=int, default=20, help="pairs of turns, for each kind of call (20)")
    parser.add_argument("--requests", type=int, default=400, help="of a turn (400)")
    options = parser.parse_args()
    before, after = commit_of(options.before), commit_of(options.after)
    with cloned(before) as earlier, cloned(after) as later:
        roots = {before: earlier, after: later}
        figures = asyncio.run(compare(roots, options.pairs, options.requests))
    command = f"python -m benchmarks.processor_time {before} --after {after} --pairs {options.pairs}"
    print(update_result("processor_time", command, figures), file=sys.stderr)


if __name__ == "__main__":
    main()
