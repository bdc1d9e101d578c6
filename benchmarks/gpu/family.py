"""The embedded family served by vLLM through the whole cascade: `python -m benchmarks.gpu.family`.

    python -m benchmarks.gpu.family --engine onnx --answers onnx.json      anywhere
    python -m benchmarks.gpu.family --engine vllm --beside onnx.json       on a GPU

Graded evaluation prompts, every one asked of each stage alone and with the policy deciding, against real
stage, policy and router processes. The policy was fitted to the `onnx` engine's signals, which another
engine's equal up to rounding, entropies apart (docs/engines.md): what that does to its decisions shows here.
With --beside, answers are compared with those that another engine gave to the same prompts. Writes an entry
of benchmarks/results/gpu_family.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from asd.client import AsyncClient
from asd.values import Objective, Request
from benchmarks import arguments as kinds
from benchmarks.gpu import device
from benchmarks.gpu.service import load_model
from benchmarks.processes import ROOT, service
from benchmarks.record import RESULTS, record
from suites import grade, split

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from asd.values import Answer
    from suites import Task

COSTS = {"small": 1.6, "medium": 4.2, "large": 8.8}
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"stage": name} for name in COSTS},
    "small, medium, large": {"chain": tuple(COSTS)},
    "the policy decides": {"objective": Objective(preference="balanced")},
}
CALL_MS = 120_000.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.family", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--engine", choices=["onnx", "vllm"], default="vllm")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of vllm")
    parser.add_argument("--prompts", type=kinds.count, default=500)
    parser.add_argument(
        "--at-a-time", type=kinds.count, default=8, help="requests, but for those that the policy decides"
    )
    parser.add_argument("--answers", type=kinds.output, help="write the answers here")
    parser.add_argument("--beside", type=kinds.file, help="compare with these")
    parser.add_argument("--out", type=kinds.output, default=RESULTS / "gpu_family.json")
    options = parser.parse_args(arguments)
    tasks = list(split("evaluation", options.prompts))
    # First: what is missing must not cost the measurement.
    where = device.describe_processor() if options.engine == "onnx" else device.describe()
    for file in (options.answers, options.out):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    beside = json.loads(options.beside.read_text(encoding="utf-8")) if options.beside else {}
    answers = asyncio.run(_ask(tasks, options.engine, options.dtype, options.at_a_time))
    texts = {way: [answer.text for answer in each] for way, each in answers.items()}
    if options.answers:
        options.answers.write_text(json.dumps(texts), encoding="utf-8")
    own = "python -m benchmarks.gpu.family " + " ".join(sys.argv[1:] if arguments is None else arguments)
    entry = {
        "engine": options.engine,
        "dtype": options.dtype if options.engine == "vllm" else "float32",
        "device": where["device"],
        "versions": where["versions"],
        "prompts": len(tasks),
        "ways": {way: _summarise(tasks, each, beside.get(way)) for way, each in answers.items()},
        "record": record(own.strip()),
    }
    _merge(options.out, entry)
    sys.stdout.write(json.dumps(entry["ways"], indent=2) + "\n")


async def _ask(tasks: Sequence[Task], engine: str, dtype: str, at_a_time: int) -> dict[str, list[Answer]]:
    async with AsyncExitStack() as stack:

        async def start(module: str, settings: dict[str, Any]) -> str:
            return await stack.enter_async_context(service(module, settings))

        # Three models share a GPU.
        section = {"dtype": dtype, "gpu_memory_utilization": 0.2, "kv_cache_gib": 0.5}
        options = {"engine": "vllm", "vllm": section, "preload": False} if engine == "vllm" else {}
        targets = {}
        for name in COSTS:
            model = {"name": name, "path": str(ROOT / "models" / name), **options}
            targets[name] = await start("services.stage", {"models": [model]})
        if engine == "vllm":
            await asyncio.gather(*(load_model(target) for target in targets.values()))
        artifact = str(ROOT / "policy_service" / "policy.zip")
        policy = await start("policy_service", {"artifact": artifact})
        settings = {
            "stages": [
                {"name": name, "target": target, "cost": COSTS[name], "timeout_ms": CALL_MS}
                for name, target in targets.items()
            ],
            "static_plan": ["large"],
            "policy": {"target": policy, "timeout_ms": 1000},
            "default_deadline_ms": CALL_MS,
        }

        async def ask(
            client: AsyncClient, task: Task, way: dict[str, Any], places: asyncio.Semaphore
        ) -> Answer:
            async with places:
                return await client.ask(Request(task.prompt, **way))

        answers = {}
        for name, way in WAYS.items():
            # A router for each: what one has seen of the stages' queues is not another's.
            router = await start("services.router", settings)
            client = await stack.enter_async_context(AsyncClient(router, timeout_ms=CALL_MS))
            # The policy weighs the stages' queues, which are not what is measured here.
            places = asyncio.Semaphore(1 if "objective" in way else at_a_time)
            answers[name] = await asyncio.gather(*(ask(client, task, way, places) for task in tasks))
            sys.stderr.write(f"{name}: {len(tasks)} prompts\n")
        return answers


def _summarise(
    tasks: Sequence[Task], answers: Sequence[Answer], others: Sequence[str] | None
) -> dict[str, Any]:
    right = [grade(task, answer.text) for task, answer in zip(tasks, answers, strict=True)]
    found: dict[str, Any] = {
        "accuracy": statistics.mean(right),
        "cost": statistics.mean(answer.cost for answer in answers),
        "early_stops": statistics.mean(answer.stage != "large" for answer in answers),
        "latency_p50_ms": statistics.median(answer.latency_ms for answer in answers),
    }
    if others is not None:
        pairs = zip(answers, others[: len(answers)], strict=True)
        found["differs_from_the_other_engine"] = sum(answer.text != other for answer, other in pairs)
    return found


def _merge(file: Path, entry: dict[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    kept = [
        each
        for each in content["rows"]
        if any(each[key] != entry[key] for key in ("engine", "dtype", "device", "prompts"))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": [*kept, entry]}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
