"""Sends graded tasks to a running cascade and prints one JSON object: latency, cost, stages, share right.

`python benchmark.py --target HOST:PORT`: needs asd installed (the tools image has it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import grpc

import suites
from asd.v1 import cascade_pb2, cascade_pb2_grpc
from services.common.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Answer = tuple[suites.Task, cascade_pb2.GenerateResponse, float]


async def _run(options: argparse.Namespace) -> dict[str, object]:
    tasks = list(suites.split("evaluation", options.warmup + options.requests, seed=options.seed))
    async with grpc.aio.insecure_channel(options.target) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        # On a fresh release the router may still be starting.
        await asyncio.wait_for(channel.channel_ready(), timeout=60)
        cascade = await stub.Describe(cascade_pb2.DescribeRequest(), timeout=options.timeout_s)
        await _ask(stub, tasks[: options.warmup], options)
        started = time.monotonic()
        answers = await _ask(stub, tasks[options.warmup :], options)
        seconds = time.monotonic() - started
    latencies = sorted(latency for _, _, latency in answers)
    return {
        "asd_version": VERSION,
        "stages": [stage.stage for stage in cascade.stages],
        "policy_version": cascade.policy.policy_version,
        "seed": options.seed,
        "stage": options.stage,
        "warmup": options.warmup,
        "requests": len(answers),
        "concurrency": options.concurrency,
        "requests_per_second": len(answers) / seconds,
        "latency_ms": {f"p{share}": _percentile(latencies, share) for share in (50, 95, 99)},
        "mean_cost": statistics.fmean(answer.cost for _, answer, _ in answers),
        "answering_stage": dict(Counter(answer.stage for _, answer, _ in answers)),
        "plan_source": dict(
            Counter(cascade_pb2.PlanSource.Name(answer.plan_source) for _, answer, _ in answers)
        ),
        "share_right": statistics.fmean(suites.grade(task, answer.text) for task, answer, _ in answers),
    }


async def _ask(
    stub: cascade_pb2_grpc.CascadeServiceAsyncStub,
    tasks: Sequence[suites.Task],
    options: argparse.Namespace,
) -> list[Answer]:
    """Return every task's answer and latency in milliseconds. Raises grpc.RpcError if one call fails."""
    waiting: Iterator[suites.Task] = iter(tasks)
    answers: list[Answer] = []

    async def work() -> None:
        for task in waiting:
            request = cascade_pb2.GenerateRequest(prompt=task.prompt, stage=options.stage)
            started = time.monotonic()
            answer = await stub.Generate(request, timeout=options.timeout_s)
            answers.append((task, answer, (time.monotonic() - started) * 1000.0))

    await asyncio.gather(*(work() for _ in range(options.concurrency)))
    return answers


def _percentile(ordered: Sequence[float], share: int) -> float:
    """Return the nearest-rank percentile of ascending values."""
    return ordered[max(0, -(-share * len(ordered) // 100) - 1)]


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--target", required=True, help="the router, HOST:PORT")
    parser.add_argument("--requests", type=int, default=500, help="requests measured")
    parser.add_argument("--warmup", type=int, default=50, help="requests before, not measured")
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    parser.add_argument("--stage", default="", help="ask this stage only, for a baseline")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="deadline of one request, in seconds")
    options = parser.parse_args()
    if min(options.requests, options.concurrency) < 1 or options.warmup < 0:
        parser.error("--requests and --concurrency must be 1 or more, --warmup 0 or more")
    try:
        result = asyncio.run(_run(options))
    except grpc.RpcError as error:
        sys.exit(f"{options.target}: {error.code().name}: {error.details()}")
    except TimeoutError:
        sys.exit(f"{options.target} cannot be reached: is the router Ready?")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
