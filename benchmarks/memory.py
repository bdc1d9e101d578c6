"""Measures whether the services' memory grows: `python -m benchmarks.memory`, a real router and policy.

Requests of every kind, in an order that a seed fixes, come to a router whose stages answer at once
(benchmarks.mixed_stage). Resident memory is read every 2,000 requests, and whether it ends is told from the
second half of the run. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import tempfile
import time
import urllib.request
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import yaml

from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2, policy_pb2, policy_pb2_grpc
from benchmarks.arguments import count
from benchmarks.mixed_stage import BROKEN, FULL, LONG, SLOW, TASK
from benchmarks.processes import ROOT, process
from benchmarks.record import write_result
from services.common.channel import open_channel
from services.common.server import run_service
from suites import split

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    import psutil

NAMES = ("small", "medium", "large")
REQUESTS = 100_000
EVERY = 2_000
AT_A_TIME = 16
CALL_SECONDS = 30.0
# A caller's connection is closed and opened anew after so many requests.
PER_CONNECTION = 100
# Characters of long prompts: beyond what is kept from Plan to Decide, and most of what a request may have.
LONG_PROMPT, LONGEST_PROMPT = 20_000, 1_000_000


class Mix:
    """Draws requests: kinds by weight, contents at random, all by one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._prompts = [task.prompt for task in split("demo", 240)]
        self._number = 0

    def kind(self) -> str:
        """Return the kind of the next request."""
        return self._rng.choices(tuple(_WEIGHTS), tuple(_WEIGHTS.values()))[0]

    def request(self, first_word: str = "") -> cascade_pb2.GenerateRequest:
        """Return a request: no two are alike."""
        rng = self._rng
        self._number += 1
        prompt = f"{first_word}{self._number}. {rng.choice(self._prompts)}"
        message = cascade_pb2.GenerateRequest(
            sampling=common_pb2.Sampling(
                max_new_tokens=rng.randrange(8, 64), temperature=rng.choice((0, 0.7))
            )
        )
        shape = rng.random()
        if shape < 0.25:
            turns = [(common_pb2.ROLE_USER, rng.choice(self._prompts)), (common_pb2.ROLE_ASSISTANT, "ok")]
            turns = [*turns * rng.randrange(1, 6), (common_pb2.ROLE_USER, prompt)]
            message.conversation.messages.extend(common_pb2.Message(role=r, content=c) for r, c in turns)
            # Some conversations come back, others are never heard of again.
            message.session_id = f"s{rng.choice((rng.randrange(50), self._number))}"
        elif shape < 0.35 and not first_word:
            message.prompt = (prompt * LONG_PROMPT)[:LONG_PROMPT]
        elif shape < 0.352 and not first_word:
            message.prompt = (prompt * LONGEST_PROMPT)[:LONGEST_PROMPT]
        else:
            message.prompt = prompt
        if rng.random() < 0.2:
            message.task = rng.choice((TASK, f"task-{self._number}"))
        self._set_objective(message.objective)
        return message

    def _set_objective(self, objective: common_pb2.Objective) -> None:
        rng = self._rng
        match rng.randrange(6):
            case 0:
                objective.preference = common_pb2.PREFERENCE_BEST
            case 1:
                objective.preference = common_pb2.PREFERENCE_FASTEST
            case 2:
                # As many values as there are requests: callers may compute theirs.
                setattr(objective, "lambda", rng.uniform(0.0, 60.0))
            case 3:
                objective.max_cost = rng.uniform(2.0, 16.0)
            case 4:
                objective.max_latency_ms = rng.uniform(20.0, 2000.0)
            case _:
                objective.min_quality = rng.uniform(0.5, 0.99)

    def invalid(self) -> cascade_pb2.GenerateRequest:
        """Return a request that is refused."""
        message = self.request()
        match self._rng.randrange(5):
            case 0:
                message.stage = f"stage-{self._number}"
            case 1:
                message.ClearField("input")
            case 2:
                message.sampling.temperature = -1.0
            case 3:
                message.chain.extend((NAMES[1], NAMES[0]))
            case _:
                message.objective.Clear()
                message.objective.max_cost = 0.01
        return message

    def chosen(self, names: Sequence[str]) -> str:
        """Return one of some names."""
        return self._rng.choice(names)

    @property
    def number(self) -> int:
        """How many requests were made."""
        return self._number


# How often each kind comes. Chosen: about as often good as bad, and the bad ones in all their ways.
_WEIGHTS = {
    "unary": 34,
    "stream": 12,
    "drafts": 6,
    "stage": 6,
    "chain": 8,
    "batch": 2,
    "invalid": 8,
    "garbage": 2,
    "cancelled": 5,
    "cancelled stream": 3,
    "late": 3,
    "full": 2,
    "too long": 2,
    "broken": 1,
    "describe": 1,
    "report": 5,
}


class Caller:
    """One of those that call, each when its last call has ended."""

    def __init__(self, router: str, policy: str, mix: Mix, version: str) -> None:
        self._router, self._policy, self._mix, self._version = router, policy, mix, version

    async def call(self, calls: int) -> collections.Counter[str]:
        """Make so many calls over a connection of their own; return how often each end came."""
        ends: collections.Counter[str] = collections.Counter()
        async with open_channel(self._router, retry=False) as router, open_channel(self._policy) as policy:
            stub = cascade_pb2_grpc.CascadeServiceStub(router)
            ways = self._ways(router, stub, policy_pb2_grpc.PolicyServiceStub(policy))
            for _ in range(calls):
                kind = self._mix.kind()
                try:
                    await ways[kind]()
                except grpc.aio.AioRpcError as error:
                    ends[f"{kind}: {error.code().name}"] += 1
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise
                    ends[f"{kind}: CANCELLED"] += 1
                else:
                    ends[f"{kind}: OK"] += 1
        return ends

    def _ways(
        self,
        channel: grpc.aio.Channel,
        stub: cascade_pb2_grpc.CascadeServiceAsyncStub,
        policy: policy_pb2_grpc.PolicyServiceAsyncStub,
    ) -> Mapping[str, Callable[[], Coroutine[object, object, None]]]:
        mix = self._mix

        async def unary(
            message: cascade_pb2.GenerateRequest | None = None, seconds: float = CALL_SECONDS
        ) -> None:
            await stub.Generate(message or mix.request(), timeout=seconds)

        async def stream(
            *, drafts: bool = False, message: cascade_pb2.GenerateRequest | None = None, seconds: float = 0.0
        ) -> None:
            asked = cascade_pb2.GenerateStreamRequest(request=message or mix.request(), include_drafts=drafts)
            call = stub.GenerateStream(asked, timeout=CALL_SECONDS)
            if seconds:
                asyncio.get_running_loop().call_later(seconds, call.cancel)
            async for _ in call:
                pass

        async def stage() -> None:
            message = mix.request()
            message.stage = mix.chosen(NAMES)
            await unary(message)

        async def chain() -> None:
            message = mix.request()
            message.chain.extend(mix.chosen((NAMES, NAMES[:2], NAMES[1:])))  # type: ignore[arg-type]
            await (unary(message) if mix.number % 2 else stream(drafts=True, message=message))

        async def batch() -> None:
            asked = cascade_pb2.GenerateBatchRequest(
                requests=[mix.request(), mix.request(), mix.invalid(), mix.request(FULL), mix.request()]
            )
            async for _ in stub.GenerateBatch(asked, timeout=CALL_SECONDS):
                pass

        async def garbage() -> None:
            call = channel.unary_unary("/asd.v1.CascadeService/Generate")
            await call(b"\xff" * 40, timeout=CALL_SECONDS)

        async def cancelled() -> None:
            call = stub.Generate(mix.request(SLOW), timeout=CALL_SECONDS)
            asyncio.get_running_loop().call_later(0.02, call.cancel)
            await call

        async def describe() -> None:
            await stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_SECONDS)

        async def report() -> None:
            await policy.Report(
                policy_pb2.ReportRequest(
                    request_id=f"request-{mix.number}",
                    stage=mix.chosen(NAMES),
                    p_correct=0.9,
                    policy_version=self._version,
                    correct=mix.number % 10 != 0,
                ),
                timeout=CALL_SECONDS,
            )

        return {
            "unary": unary,
            "stream": stream,
            "drafts": lambda: stream(drafts=True),
            "stage": stage,
            "chain": chain,
            "batch": batch,
            "invalid": lambda: unary(mix.invalid()),
            "garbage": garbage,
            "cancelled": cancelled,
            "cancelled stream": lambda: stream(drafts=True, message=mix.request(SLOW), seconds=0.02),
            "late": lambda: unary(mix.request(SLOW), 0.1),
            "full": lambda: unary(mix.request(FULL)),
            "too long": lambda: unary(mix.request(LONG)),
            "broken": lambda: unary(mix.request(BROKEN)),
            "describe": describe,
            "report": report,
        }


async def measure(requests: int, at_a_time: int, seed: int) -> dict[str, object]:
    """Return the memory of router, policy and stage as requests pass."""
    samples: list[dict[str, float]] = []
    ends: collections.Counter[str] = collections.Counter()
    mix = Mix(seed)
    started = time.perf_counter()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = stack.enter_context((folder / "log").open("w", encoding="utf-8"))
        stage, stage_process = await stack.enter_async_context(
            process("benchmarks.mixed_stage", "127.0.0.1:0", errors=log)
        )
        policy_settings = {
            "artifact": str(ROOT / "policy_service" / "policy.zip"),
            "reports_path": str(folder / "reports.jsonl"),
        }
        policy, policy_process = await stack.enter_async_context(
            process("policy_service", *_config(folder / "policy.yaml", policy_settings), errors=log)
        )
        metrics_port = _free_port()
        router_settings = {
            "policy": {"target": policy, "timeout_ms": 1000},
            "stages": [
                {"name": name, "target": stage, "cost": cost, "model": "mixed"}
                for name, cost in zip(NAMES, (1.6, 4.2, 8.8), strict=True)
            ],
            "static_plan": [NAMES[0]],
            "metrics_listen": f"127.0.0.1:{metrics_port}",
        }
        router, router_process = await stack.enter_async_context(
            process("services.router", *_config(folder / "router.yaml", router_settings), errors=log)
        )
        watched = {"router": router_process, "policy": policy_process, "stage": stage_process}
        version = await _version(policy)
        samples.append(_sample(0, watched))
        done = 0
        while done < requests:
            part = min(EVERY, requests - done)
            ends.update(await _call(part, at_a_time, Caller(router, policy, mix, version)))
            done += part
            await asyncio.to_thread(_scrape, metrics_port)
            samples.append(_sample(done, watched))
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
        series = await asyncio.to_thread(_scrape, metrics_port)
    return {
        "requests": requests,
        "at_a_time": at_a_time,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "metric_series_of_router": series,
        "growth": {name: growth(samples, name) for name in watched},
        "ends": dict(sorted(ends.items())),
        "samples": samples,
    }


async def _call(requests: int, at_a_time: int, caller: Caller) -> collections.Counter[str]:
    """Make so many calls, so many at a time; return how often each end came."""
    waiting = iter([*[PER_CONNECTION] * (requests // PER_CONNECTION), requests % PER_CONNECTION])
    ends: collections.Counter[str] = collections.Counter()

    async def work() -> None:
        for calls in waiting:
            ends.update(await caller.call(calls))

    await asyncio.gather(*(work() for _ in range(at_a_time)))
    return ends


def growth(samples: Sequence[Mapping[str, float]], name: str) -> dict[str, float]:
    """Return how a process's memory went: at the start, half way and at the end, and its slope after half.

    The slope is the least squares' one over the second half: where it is about 0, memory has levelled off.
    """
    later = samples[len(samples) // 2 :]
    times, sizes = [each["requests"] for each in later], [each[f"{name}_mb"] for each in later]
    mean_time, mean_size = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((each - mean_time) ** 2 for each in times)
    joint = sum((t - mean_time) * (s - mean_size) for t, s in zip(times, sizes, strict=True))
    return {
        "first_mb": samples[0][f"{name}_mb"],
        "half_way_mb": sizes[0],
        "last_mb": sizes[-1],
        "most_mb": max(each[f"{name}_mb"] for each in samples),
        "later_mb_per_10000": round(joint / spread * 10_000, 3) if spread else 0.0,
    }


def _config(path: Path, settings: Mapping[str, object]) -> tuple[str, str]:
    path.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **settings}), encoding="utf-8")
    return "--config", str(path)


def _sample(requests: int, watched: Mapping[str, psutil.Process]) -> dict[str, float]:
    memory = {f"{name}_mb": round(each.memory_info().rss / 2**20, 1) for name, each in watched.items()}
    return {"requests": requests, **memory}


async def _version(policy: str) -> str:
    async with open_channel(policy) as channel:
        describe = policy_pb2_grpc.PolicyServiceStub(channel).Describe
        answer = await describe(policy_pb2.PolicyServiceDescribeRequest(), timeout=CALL_SECONDS)
        return answer.policy_version


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scrape(port: int) -> int:
    """Return the number of series that the router shows to Prometheus."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return sum(not line.startswith(b"#") for line in answer)
    return 0


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--requests", type=count, default=REQUESTS, help="how many; fewer are not kept")
    parser.add_argument("--at-a-time", type=count, default=AT_A_TIME)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = run_service(measure(options.requests, options.at_a_time, options.seed))
    print(json.dumps(figures, indent=2))
    if options.requests >= REQUESTS:
        command = f"python -m benchmarks.memory --requests {options.requests} --seed {options.seed}"
        print(write_result("memory", command, figures), file=sys.stderr)


if __name__ == "__main__":
    main()
