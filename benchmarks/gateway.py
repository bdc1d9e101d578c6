"""What HTTP adds to the cascade, and what the gateway bears: `python -m benchmarks.gateway`.

    python -m benchmarks.gateway --parts latency,streams,gaps
    python -m benchmarks.gateway --parts throughput --litellm ENVIRONMENT/bin/litellm
    python -m benchmarks.gateway --parts cancels --cancels 10000

Gateway, router and policy are processes of their own, before a stage that answers at once; for `gaps` and
`cancels`, the embedded cascade. `latency`, `streams` and `gaps` ask by gRPC and by HTTP in turn: for whole
answers, for the first text, and for the time from one text to the next. `throughput` loads the gateway,
and LiteLLM's proxy before an upstream that answers at once, in turn. `cancels` leaves streams at random
moments and says what is left of them. Writes benchmarks/results/gateway.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml

from asd.client import AsyncClient
from asd.v1 import stage_pb2, stage_pb2_grpc
from asd.values import Committed, Objective, Request
from benchmarks import arguments as kinds
from benchmarks.processes import embedded_cascade, process
from benchmarks.record import update_result
from benchmarks.service import instant_cascade
from services.common.channel import open_channel
from services.common.stats import percentile
from services.local.cascade_file import Ports
from suites import split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import psutil

PARTS = ("latency", "streams", "gaps", "throughput", "cancels")
CONCURRENCIES = (1, 4, 16, 32, 64)
# At this one, requests per second are compared.
COMPARED = 32
_WARM = 200
_WARM_STREAMS = 10
# A stage of the embedded cascade, whose answers come in several parts.
_STREAMED = "large"
_CALL_S = 30.0
PORT_BASE = 21_050
# LiteLLM loads for long.
_READY_S = 120.0
# Of LiteLLM: answers without a database, and says nothing. It refuses to start without a key.
_KEY = "sk-" + secrets.token_hex(24)
_LITELLM_ENVIRONMENT = {
    "LITELLM_MASTER_KEY": _KEY,
    "LITELLM_LOG": "ERROR",
    "LITELLM_TELEMETRY": "False",
    "NO_DOCS": "True",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gateway", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--samples", type=kinds.count, default=2000, help="of each way, for latencies")
    parser.add_argument("--answers", type=kinds.count, default=200, help="of each way, for gaps in streams")
    parser.add_argument("--requests", type=kinds.count, default=2000, help="of each row of the throughput")
    parser.add_argument("--cancels", type=kinds.count, default=10_000, help="streams that are left")
    parser.add_argument("--litellm", type=kinds.file, help="the program `litellm`, to compare with")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no part {unknown.pop()}: choose of {', '.join(PARTS)}")
    command = " ".join(["python -m benchmarks.gateway", *(sys.argv[1:] if arguments is None else arguments)])
    for part in parts:
        figures = asyncio.run(_measure(part, options))
        sys.stderr.write(f"{part}: {json.dumps(figures)}\n")
        path = update_result("gateway", command, figures)
    sys.stdout.write(f"{path}\n")


async def _measure(part: str, options: argparse.Namespace) -> dict[str, object]:
    if part == "cancels":
        return await measure_cancels(options.cancels)
    if part == "gaps":
        return await measure_gaps(options.answers)
    async with AsyncExitStack() as stack:
        router, _, _ = await stack.enter_async_context(instant_cascade())
        gateway, _ = await stack.enter_async_context(gateway_of(router))
        if part == "throughput":
            return await measure_throughput(gateway, options.litellm, options.requests)
        client = await stack.enter_async_context(AsyncClient(router))
        session = await stack.enter_async_context(aiohttp.ClientSession(f"http://{gateway}"))
        measure = measure_latency if part == "latency" else measure_streams
        return await measure(client, session, gateway, options.samples)


@asynccontextmanager
async def gateway_of(router: str) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Run a gateway before a router; yield its address and its process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gateway.yaml")
        file.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "router": {"target": router}}))
        async with process("services.gateway", "--config", str(file)) as running:
            yield running


def body(prompt: str, *, stream: bool = False) -> dict[str, object]:
    """Return the body of a chat completion whose first answer stands."""
    return {
        "model": "asd",
        "messages": [{"role": "user", "content": prompt}],
        "stream": stream,
        "asd": {"lambda": 0.0},
    }


async def post(session: aiohttp.ClientSession, prompt: str) -> None:
    """Ask by HTTP, and read the whole answer."""
    async with session.post("/v1/chat/completions", json=body(prompt)) as response:
        found = await response.json()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {found}")


async def in_turn(ways: dict[str, Callable[[str], Awaitable[float]]], samples: int) -> dict[str, list[float]]:
    """Ask each way the same prompts in turn, one at a time; return what each call gave, by way."""
    prompts = [task.prompt for task in split("demo", 240)]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(_WARM + samples):
        for way, ask in ways.items():
            figure = await ask(prompts[number % len(prompts)])
            if number >= _WARM:
                found[way].append(figure)
    return found


def timed(call: Callable[[str], Awaitable[object]]) -> Callable[[str], Awaitable[float]]:
    """Return what makes a call and gives the milliseconds that it took."""

    async def ask(prompt: str) -> float:
        started = time.perf_counter()
        await call(prompt)
        return (time.perf_counter() - started) * 1e3

    return ask


async def measure_latency(
    client: AsyncClient, session: aiohttp.ClientSession, gateway: str, samples: int
) -> dict[str, object]:
    """Measure whole requests by gRPC, by HTTP, and by OpenAI's SDK, in turn."""
    import openai

    first = Objective(quality_value=0.0)
    async with openai.AsyncOpenAI(base_url=f"http://{gateway}/v1", api_key="none") as sdk:
        found = await in_turn(
            {
                "grpc": timed(lambda prompt: client.ask(Request(prompt, objective=first))),
                "http": timed(lambda prompt: post(session, prompt)),
                "openai": timed(
                    lambda prompt: sdk.chat.completions.create(
                        model="asd",
                        messages=[{"role": "user", "content": prompt}],
                        extra_body={"asd": {"lambda": 0.0}},
                    )
                ),
            },
            samples,
        )
    at = {
        way: {f"p{share}_ms": percentile(times, share / 100) for share in (50, 95, 99)}
        for way, times in found.items()
    }
    return {
        "latency": at,
        "latency_samples": samples,
        **{
            f"added_p{share}_ratio": at["http"][f"p{share}_ms"] / at["grpc"][f"p{share}_ms"]
            for share in (50, 95, 99)
        },
        **{
            f"openai_p{share}_ratio": at["openai"][f"p{share}_ms"] / at["grpc"][f"p{share}_ms"]
            for share in (50, 99)
        },
    }


async def measure_streams(
    client: AsyncClient, session: aiohttp.ClientSession, _gateway: str, samples: int
) -> dict[str, object]:
    """Measure the first committed text by gRPC and by HTTP, in turn."""
    first = Objective(quality_value=0.0)

    async def by_grpc(prompt: str) -> float:
        started, at = time.perf_counter(), 0.0
        async for event in client.stream(Request(prompt, objective=first)):
            if not at and isinstance(event, Committed):
                at = time.perf_counter()
        return (at - started) * 1e3

    async def by_http(prompt: str) -> float:
        started, at = time.perf_counter(), 0.0
        async with session.post("/v1/chat/completions", json=body(prompt, stream=True)) as response:
            async for line in response.content:
                if not at and line.startswith(b"data: {") and _has_text(line):
                    at = time.perf_counter()
        return (at - started) * 1e3

    found = await in_turn({"grpc": by_grpc, "http": by_http}, samples)
    added = [http - grpc for http, grpc in zip(found["http"], found["grpc"], strict=True)]
    return {
        "sse_first_chunk_added_ms": statistics.median(added),
        "sse_first_chunk_added_p95_ms": percentile(added, 0.95),
        "sse_samples": samples,
    }


async def measure_gaps(answers: int) -> dict[str, object]:
    """Measure the time from one text of a stream to the next, by gRPC and by HTTP, in turn."""
    prompts = [task.prompt for task in split("demo", 240)]
    gaps: dict[str, list[float]] = {"grpc": [], "http": []}
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(embedded_cascade(PORT_BASE))
        gateway, _ = await stack.enter_async_context(gateway_of(router))
        client = await stack.enter_async_context(AsyncClient(router))
        session = await stack.enter_async_context(aiohttp.ClientSession(f"http://{gateway}"))

        async def by_grpc(prompt: str) -> list[float]:
            events = client.stream(Request(prompt, stage=_STREAMED))
            return [time.perf_counter() async for event in events if isinstance(event, Committed)]

        async def by_http(prompt: str) -> list[float]:
            sent = _plain_body(prompt) | {"model": _STREAMED, "stream": True}
            async with session.post("/v1/chat/completions", json=sent) as response:
                return [
                    time.perf_counter()
                    async for line in response.content
                    if line.startswith(b"data: {") and _has_text(line)
                ]

        for number in range(_WARM_STREAMS + answers):
            for way, ask in (("grpc", by_grpc), ("http", by_http)):
                times = await ask(prompts[number % len(prompts)])
                if number >= _WARM_STREAMS:
                    gaps[way] += [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)]
    return {
        "chunk_gaps": {
            way: {f"p{share}_ms": percentile(found, share / 100) for share in (50, 95)} | {"gaps": len(found)}
            for way, found in gaps.items()
        },
        "chunk_gap_answers": answers,
    }


def _has_text(line: bytes) -> bool:
    choices = json.loads(line[6:])["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


async def measure_throughput(gateway: str, litellm: Path | None, count: int) -> dict[str, object]:
    """Measure requests per second and latencies of the gateway and of LiteLLM, in turn at each load."""
    rows: list[dict[str, object]] = []
    async with AsyncExitStack() as stack:
        systems = {"asd": (gateway, body)}
        if litellm is not None:
            address = await stack.enter_async_context(litellm_of(litellm))
            systems["litellm"] = (address, _plain_body)
        for concurrency in CONCURRENCIES:
            for system, (address, make) in systems.items():
                rows.append({"system": system, "at_a_time": concurrency})
                rows[-1] |= await load(address, make, concurrency, count)
                sys.stderr.write(f"{json.dumps(rows[-1])}\n")

    def rate(system: str) -> object:
        found = [row["per_s"] for row in rows if (row["system"], row["at_a_time"]) == (system, COMPARED)]
        return found[0] if found else None

    # Each side's processes, of one worker each, on the cores that the record names.
    sides = {"asd": ["gateway", "router", "policy", "instant stage"]}
    if litellm is not None:
        sides["litellm"] = ["litellm", "instant upstream"]
    return {
        "throughput_processes": sides,
        "throughput_cores": len(os.sched_getaffinity(0)),
        "throughput": rows,
        "rps_c32": rate("asd"),
        "litellm_rps_c32": rate("litellm"),
    }


def _plain_body(prompt: str) -> dict[str, object]:
    return {"model": "asd", "messages": [{"role": "user", "content": prompt}]}


async def load(
    address: str, make: Callable[[str], dict[str, object]], concurrency: int, count: int
) -> dict[str, object]:
    """Send requests, some at a time; return requests per second, and percentiles of their milliseconds."""
    prompts = [task.prompt for task in split("demo", 240)]
    times: list[float] = []
    connector = aiohttp.TCPConnector(limit=concurrency)
    headers = {"authorization": f"Bearer {_KEY}"}
    async with aiohttp.ClientSession(f"http://{address}", connector=connector, headers=headers) as session:

        async def ask(number: int) -> None:
            url, sent = "/v1/chat/completions", make(prompts[number % len(prompts)])
            async with session.post(url, json=sent) as response:
                found = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {found[:300]!r}")

        async def work(numbers: Any) -> None:
            for number in numbers:
                started = time.perf_counter()
                await ask(number)
                times.append((time.perf_counter() - started) * 1e3)

        await work(iter(range(_WARM)))
        times.clear()
        shared = iter(range(count))
        started = time.perf_counter()
        await asyncio.gather(*(work(shared) for _ in range(concurrency)))
        rate = count / (time.perf_counter() - started)
    return {
        "per_s": rate,
        **{f"p{share}_ms": percentile(times, share / 100) for share in (50, 95, 99)},
        "requests": count,
    }


@asynccontextmanager
async def litellm_of(program: Path) -> AsyncIterator[str]:
    """Run LiteLLM's proxy before an upstream of OpenAI's form that answers at once; yield its address."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream, _ = await stack.enter_async_context(process("benchmarks.instant_upstream", "127.0.0.1:0"))
        entry = {
            "model_name": "asd",
            "litellm_params": {
                "model": "openai/asd",
                "api_base": f"http://{upstream}/v1",
                "api_key": "none",
            },
        }
        file = folder / "litellm.yaml"
        file.write_text(yaml.safe_dump({"model_list": [entry]}))
        port = 21_890
        child = await asyncio.create_subprocess_exec(
            str(program),
            *("--config", str(file), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **_LITELLM_ENVIRONMENT},
        )
        try:
            await _until_ready(f"http://127.0.0.1:{port}/health/liveliness")
            yield f"127.0.0.1:{port}"
        finally:
            child.terminate()
            await child.wait()


async def _until_ready(url: str) -> None:
    async with asyncio.timeout(_READY_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.25)


async def measure_cancels(count: int) -> dict[str, object]:
    """Leave streams at random moments; return what is left running, and the gateway's memory and sockets."""
    chance = random.Random(7)
    prompts = [task.prompt for task in split("demo", 240)]
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(embedded_cascade(PORT_BASE))
        gateway, running = await stack.enter_async_context(gateway_of(router))
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(f"http://{gateway}", connector=connector)
        )
        left = {"whole": 0, "left": 0}

        async def ask(number: int) -> None:
            path, sent = _mixed(prompts[number % len(prompts)], chance)
            lines = chance.choice((0, 1, 3, 1_000))
            async with session.post(path, json=sent) as response:
                async for _ in response.content:
                    lines -= 1
                    if lines < 0:
                        # The connection is closed at once.
                        response.close()
                        left["left"] += 1
                        return
            left["whole"] += 1

        async def work(numbers: Any) -> None:
            for number in numbers:
                async with asyncio.timeout(_CALL_S):
                    await ask(number)

        # What is kept for good is there after some.
        await asyncio.gather(*(work(shared) for shared in [iter(range(min(count, 1000)))] * 16))
        before = running.memory_info().rss
        await asyncio.gather(*(work(shared) for shared in [iter(range(count))] * 16))
        stages = [
            await stack.enter_async_context(open_channel(f"127.0.0.1:{port}", retry=False))
            for port in Ports.from_base(PORT_BASE, 3).stages
        ]
        # What was left ends within a few steps.
        deadline = time.monotonic() + _CALL_S
        while (busy := await _running(stages)) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await session.close()
        port = int(gateway.rpartition(":")[2])
        own = [each for each in running.net_connections() if each.laddr and each.laddr.port == port]
        return {
            "cancels": count,
            "cancels_left": left,
            "left_running": busy,
            "rss_mb": running.memory_info().rss / 1e6,
            "rss_growth_mb": (running.memory_info().rss - before) / 1e6,
            "sockets_left": sum(each.status not in {"LISTEN", "TIME_WAIT"} for each in own),
        }


def _mixed(prompt: str, chance: random.Random) -> tuple[str, dict[str, object]]:
    """Return a path and a body: chat, text or Anthropic's, at some objective."""
    asd = {"lambda": chance.choice((0.0, 5.0, 100.0))}
    turns = [{"role": "user", "content": prompt}]
    return chance.choice(
        (
            ("/v1/chat/completions", {"model": "asd", "messages": turns, "stream": True, "asd": asd}),
            ("/v1/completions", {"model": "asd", "prompt": prompt, "stream": True, "asd": asd}),
            ("/v1/messages", {"model": "asd-exact", "messages": turns, "max_tokens": 64, "stream": True}),
        )
    )


async def _running(stages: Sequence[Any]) -> int:
    """Return the calls under way and waiting in all stages."""
    found = await asyncio.gather(
        *(
            stage_pb2_grpc.StageServiceStub(channel).Status(stage_pb2.StatusRequest(), timeout=_CALL_S)
            for channel in stages
        )
    )
    return sum(model.running_requests + model.queued_requests for status in found for model in status.models)


if __name__ == "__main__":
    main()
