"""Measures the services on this machine: `python -m benchmarks.service` (or `make bench`).

Everything but the stage is real; where a stage would hide what is measured, benchmarks.instant_stage answers.
Ratios are measured interleaved in one run. Writes benchmarks/results/service.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import yaml

from asd.client import AsyncClient
from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2, policy_pb2, policy_pb2_grpc
from asd.values import Message, Objective, Sampling
from benchmarks.processes import READY_TIMEOUT, ROOT, embedded_cascade, process
from benchmarks.record import write_result
from services.cli.demo import ask_both_ways, choose_tasks, summarise
from services.common.channel import open_channel
from services.common.privacy import report_nothing
from services.common.server import run_service
from services.common.stats import percentile
from services.stage.domain import Result, TokenChunk
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.engines.onnx.export import prepare
from services.stage.engines.onnx.llama_config import read_shape
from services.stage.generation.tokenizer import ChatTokenizer
from suites import split

report_nothing()
import onnxruntime_genai as og  # noqa: E402 - it reads the environment as it is imported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

NAMES = ("small", "medium", "large")
CALL_TIMEOUT = 30.0


@asynccontextmanager
async def instant_cascade() -> AsyncIterator[tuple[str, str, list[psutil.Process]]]:
    """Run router and policy in front of an instant stage; yield their addresses and processes."""
    with tempfile.TemporaryDirectory() as folder:
        policy_file, router_file = Path(folder, "policy.yaml"), Path(folder, "router.yaml")
        artifact = str(ROOT / "policy_service" / "policy.zip")
        policy_file.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "artifact": artifact}))
        async with (
            process("benchmarks.instant_stage", "127.0.0.1:0") as (stage, _),
            process("policy_service", "--config", str(policy_file)) as (policy, policy_process),
        ):
            stages = [
                {"name": name, "target": stage, "cost": cost}
                for name, cost in zip(NAMES, (1.6, 4.2, 8.8), strict=True)
            ]
            settings = {
                "listen": "127.0.0.1:0",
                "policy": {"target": policy, "timeout_ms": 1000},
                "stages": stages,
                "static_plan": ["small"],
            }
            router_file.write_text(yaml.safe_dump(settings))
            async with process("services.router", "--config", str(router_file)) as (router, router_process):
                yield router, policy, [router_process, policy_process]


def requests(count: int) -> list[cascade_pb2.GenerateRequest]:
    """Return requests with the suites' prompts; at lambda 0 the first answer always stands."""
    objective = common_pb2.Objective(**{"lambda": 0.0})
    return [
        cascade_pb2.GenerateRequest(prompt=task.prompt, objective=objective) for task in split("demo", count)
    ]


async def load(
    target: str, concurrency: int, count: int
) -> tuple[float, list[float], list[cascade_pb2.GenerateResponse]]:
    """Send requests; return requests per second, each latency in ms, and the answers."""
    prepared = requests(240)
    latencies_ms: list[float] = []
    answers: list[cascade_pb2.GenerateResponse] = []
    async with open_channel(target, retry=False) as channel:
        generate = cascade_pb2_grpc.CascadeServiceStub(channel).Generate
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                started = time.perf_counter()
                answer = await generate(prepared[number % len(prepared)], timeout=CALL_TIMEOUT)
                latencies_ms.append((time.perf_counter() - started) * 1000.0)
                if concurrency == 1:
                    answers.append(answer)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return count / (time.perf_counter() - started), latencies_ms, answers


async def measure_overhead(samples: int) -> dict[str, object]:
    """Measure the router's own time at concurrency 1: the caller's latency less stage and policy time."""
    async with instant_cascade() as (router, _, _):
        await load(router, 1, 200)
        _, latencies_ms, answers = await load(router, 1, samples)
    own = [
        ms - answer.policy_ms - sum(stage.latency_ms for stage in answer.stages)
        for ms, answer in zip(latencies_ms, answers, strict=True)
    ]
    return {
        "router_overhead_p50_ms": round(percentile(own, 0.5), 3),
        "router_overhead_p95_ms": round(percentile(own, 0.95), 3),
        "router_overhead_samples": samples,
    }


async def measure_decide(samples: int) -> dict[str, object]:
    """Measure Decide calls at concurrency 1, and the predictor and look-up within them."""
    drafts = [
        policy_pb2.DecideRequest(
            prompt=task.prompt,
            cascade=NAMES,
            stage="small",
            draft=policy_pb2.DraftEvidence(
                text=task.solution,
                logprobs=[-0.01] * 36,
                entropies=[0.05] * 36,
                top2_margins=[0.98] * 36,
                finish_reason=common_pb2.FINISH_REASON_EOS,
            ),
        )
        for task in split("demo", 240)
    ]
    calls_ms, predict_us = [], []
    async with instant_cascade() as (_, policy, _), open_channel(policy, retry=False) as channel:
        decide = policy_pb2_grpc.PolicyServiceStub(channel).Decide
        for number in range(samples + 200):
            started = time.perf_counter()
            response = await decide(drafts[number % len(drafts)], timeout=CALL_TIMEOUT)
            if number >= 200:
                calls_ms.append((time.perf_counter() - started) * 1000.0)
                predict_us.append(response.predict_us)
    return {
        "decide_p50_ms": round(percentile(calls_ms, 0.5), 3),
        "decide_p95_ms": round(percentile(calls_ms, 0.95), 3),
        "predict_p50_us": round(percentile(predict_us, 0.5), 1),
        "predict_p95_us": round(percentile(predict_us, 0.95), 1),
        "decide_samples": samples,
    }


async def measure_throughput(count: int, runs: int) -> dict[str, object]:
    """Measure requests/s at concurrency 32, and the memory of router and policy as requests pass."""
    async with instant_cascade() as (router, _, processes):
        await load(router, 32, 5_000)
        before = [each.memory_info().rss for each in processes]
        rates = [(await load(router, 32, count // runs))[0] for _ in range(runs)]
        after = [each.memory_info().rss for each in processes]
    return {
        "router_rps_c32": round(statistics.median(rates), 1),
        "router_rps_c32_lowest": round(min(rates), 1),
        "router_rps_c32_highest": round(max(rates), 1),
        "throughput_requests": count,
        "router_rss_mb_before_and_after": [round(before[0] / 2**20, 1), round(after[0] / 2**20, 1)],
        "policy_rss_mb_before_and_after": [round(before[1] / 2**20, 1), round(after[1] / 2**20, 1)],
    }


async def measure_engine(prompts: int) -> dict[str, object]:
    """Measure ms per token of the `onnx` engine and of a bare onnxruntime-genai loop, prompt by prompt."""
    ratios, details = [], {}
    for name in NAMES:
        directory = ROOT / "models" / name
        form = prepare(directory)
        tokenizer = ChatTokenizer(directory)
        end_ids = read_shape(directory).eos_ids
        engine = OnnxEngine(name, directory, OnnxOptions())
        await engine.load()
        config = og.Config(str(form))
        model = og.Model(config)
        bare, ours = [], []
        for index, task in enumerate(split("evaluation", prompts)):
            turns = (Message("user", task.prompt),)
            ids = tokenizer.encode_chat(turns)
            pair = {}
            for way in ("bare", "ours") if index % 2 else ("ours", "bare"):
                if way == "bare":
                    pair[way] = _bare_ms_per_token(model, ids, end_ids)
                else:
                    pair[way] = await _engine_ms_per_token(engine, turns)
            if index >= 5:
                bare.append(pair["bare"])
                ours.append(pair["ours"])
        await engine.unload()
        ratio = statistics.median(b / a for a, b in zip(bare, ours, strict=True))
        ratios.append(ratio)
        details[name] = {
            "bare_ms_per_token": round(statistics.median(bare), 4),
            "engine_ms_per_token": round(statistics.median(ours), 4),
            "ratio": round(ratio, 3),
        }
    return {
        "onnx_vs_bare_ratio": round(max(ratios), 3),
        "onnx_vs_bare": details,
        "onnx_vs_bare_prompts": prompts - 5,
    }


def _bare_ms_per_token(model: og.Model, ids: list[int], end_ids: tuple[int, ...]) -> float:
    """Return the time per token of the library's own loop, prefill included."""
    started = time.perf_counter()
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 160, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    count = 0
    while not generator.is_done() and count < 160:
        generator.generate_next_token()
        count += 1
        if generator.get_next_tokens()[0] in end_ids:
            break
    return (time.perf_counter() - started) * 1000.0 / count


async def _engine_ms_per_token(engine: OnnxEngine, turns: tuple[Message, ...]) -> float:
    """Return the time per token of the engine: tokens with log-probability, entropy and margin."""
    started = time.perf_counter()
    count = 0
    async for event in engine.generate(turns, Sampling(max_new_tokens=160)):
        if isinstance(event, TokenChunk):
            count += len(event.ids)
        elif isinstance(event, Result):
            break
    # The end mark is computed too.
    return (time.perf_counter() - started) * 1000.0 / (count + 1)


async def measure_batching(prompts: int) -> dict[str, object]:
    """Measure tokens/s of the medium model with all requests at once, three ways.

    In lanes, one by one, and by the library's Engine, whose tokens come without log-probabilities. Rounds
    take turns.
    """
    directory = ROOT / "models" / "medium"
    tasks = list(split("evaluation", prompts))
    engines = {
        "lanes": OnnxEngine("medium", directory, OnnxOptions()),
        "one_by_one": OnnxEngine("medium", directory, OnnxOptions(max_batch=1, max_lanes=1)),
    }
    for engine in engines.values():
        await engine.load()
    tokenizer = ChatTokenizer(directory)
    encoded = [tokenizer.encode_chat((Message("user", task.prompt),)) for task in tasks]
    model = og.Model(og.Config(str(prepare(directory))))
    rates: dict[str, list[float]] = {name: [] for name in (*engines, "library_engine")}
    for _ in range(5):
        for name, engine in engines.items():
            started = time.perf_counter()
            counts = await asyncio.gather(*(_count_tokens(engine, task.prompt) for task in tasks))
            rates[name].append(sum(counts) / (time.perf_counter() - started))
        rates["library_engine"].append(_library_engine_rate(model, encoded))
    for engine in engines.values():
        await engine.unload()
    return {
        "batching_tokens_per_s": {name: round(statistics.median(each)) for name, each in rates.items()},
        "batching_requests": prompts,
    }


async def _count_tokens(engine: OnnxEngine, prompt: str) -> int:
    async for event in engine.generate((Message("user", prompt),), Sampling(max_new_tokens=160)):
        if isinstance(event, Result):
            return len(event.ids) + 1
    raise SystemExit("an answer ended without a result")


def _library_engine_rate(model: og.Model, prompts: list[list[int]]) -> float:
    started = time.perf_counter()
    engine = og.Engine(model)
    events = engine.create_event_buffer(64)
    for ids in prompts:
        request = engine.create_request()
        turn = og.TurnOptions(request)
        turn.set_do_sample(False)
        turn.set_max_generated_tokens(160)
        request.begin_turn(np.array(ids, np.int32), turn)
    count = 0
    while engine.has_pending_requests():
        count += sum(event.token is not None for event in engine.run(events) or events)
    return count / (time.perf_counter() - started)


async def measure_cold_start(runs: int) -> dict[str, object]:
    """Measure the start of `asd up --no-gateway` until all serve, and the memory of all processes."""
    seconds, memory = [], []
    for _ in range(runs):
        started = time.perf_counter()
        options = ("--json", "--no-gateway", "--port-base", "21050")
        command = [sys.executable, "-m", "services.cli", "up", *options]
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
        assert child.stdout is not None
        await asyncio.wait_for(child.stdout.readuntil(b"\n"), READY_TIMEOUT)
        seconds.append(time.perf_counter() - started)
        async with AsyncClient("127.0.0.1:21050") as client:
            rows = [row async for row in ask_both_ways(client, choose_tasks(60), Objective())]
        assert len(rows) == 60
        services = psutil.Process(child.pid).children(recursive=True)
        memory.append(sum(each.memory_info().rss for each in services) / 2**20)
        child.terminate()
        await child.wait()
    return {
        "cold_start_s": round(statistics.median(seconds), 2),
        "cold_start_runs": runs,
        "rss_mb": round(max(memory), 1),
        "rss_processes": len(services),
    }


async def measure_cascade(prompts: int) -> dict[str, object]:
    """Measure the cascade beside always asking the largest stage, taking turns."""
    async with embedded_cascade() as address, AsyncClient(address) as client:
        rows = [row async for row in ask_both_ways(client, choose_tasks(prompts), Objective())]
    summary = asdict(summarise(rows))
    ratio = summary["accuracy"] / summary["accuracy_largest"]
    return {"cascade": {**summary, "accuracy_ratio": round(ratio, 4)}}


MEASUREMENTS = ("overhead", "decide", "throughput", "engine", "batching", "cold_start", "cascade")


async def measure(names: Iterable[str], quick: bool) -> dict[str, object]:
    """Run measurements one after the other; return all figures."""
    share = 10 if quick else 1
    runs = {
        "overhead": lambda: measure_overhead(5_000 // share),
        "decide": lambda: measure_decide(5_000 // share),
        "throughput": lambda: measure_throughput(100_000 // share, 10),
        "engine": lambda: measure_engine(205 // share),
        "batching": lambda: measure_batching(128 // share),
        "cold_start": lambda: measure_cold_start(5 if not quick else 1),
        "cascade": lambda: measure_cascade(600 // share),
    }
    figures: dict[str, object] = {}
    for name in names:
        started = time.perf_counter()
        figures |= await runs[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Measure what was asked for; a full run is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=[*MEASUREMENTS, []], help="print these alone, keep nothing"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples; keep nothing")
    options = parser.parse_args()
    figures = run_service(measure(options.only or MEASUREMENTS, options.quick))
    print(json.dumps(figures, indent=2))
    if not options.only and not options.quick:
        print(write_result("service", "make bench", figures), file=sys.stderr)


if __name__ == "__main__":
    main()
