"""Measures the GPU engines: `python -m benchmarks.gpu 13b` (or 34b, 70b; dummy weights of the true shapes).

    python -m benchmarks.gpu 13b                         all parts, into benchmarks/results/gpu.json
    python -m benchmarks.gpu 70b --parts passes --batches 1,8 --out FILE
    python -m benchmarks.gpu --tiny                      here, on the stand-in for vLLM; writes nothing

A row per model, engine and device; a later run replaces the figures that it has. HF_HUB_OFFLINE=1 and
VLLM_USE_FLASHINFER_SAMPLER=0 are set unless they are already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arguments as kinds
from benchmarks.gpu import device, service
from benchmarks.gpu.measure import TINY, MeasurePlan, passes, prefilled, residency, speculation
from benchmarks.gpu.shapes import RESEARCH_MS, SHAPES, make_model
from benchmarks.record import RESULTS, record
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.vllm.engine import VllmOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PARTS = ("passes", "prefilled", "speculation", "residency", "service")
# Tokens of the longest prompt and answer that are measured.
LONGEST = 2048
SMALL = Path(__file__).parents[2] / "models" / "small"
# What a later run may have had otherwise.
_OF_A_PART = ("settings", "versions")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options, parts = _read(arguments)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    is_small = options.tiny or (options.model and read_checkpoint(options.model).context < LONGEST)
    plan = TINY if is_small else MeasurePlan()
    if options.batches:
        plan = replace(plan, batches=options.batches, speculation_batches=options.batches)
    if options.speculation_batches:
        plan = replace(plan, speculation_batches=options.speculation_batches)
    if options.acceptances:
        plan = replace(plan, acceptances=options.acceptances)
    if options.repeats:
        plan = replace(plan, repeats=options.repeats)
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            use_stand_in()
        model = options.model or (
            SMALL if options.tiny else make_model(options.shape, Path(folder) / "model")
        )
        target = options.out or (None if options.tiny else RESULTS / "gpu.json")

        def keep(part: str, row: dict[str, Any]) -> None:
            # After every part: what a later one breaks off is not lost.
            own = {key: row[key] for key in _OF_A_PART} | record(command)
            kept = {key: value for key, value in row.items() if key not in _OF_A_PART}
            if target is not None:
                merge(target, kept | {"records": {part: own}})

        row = asyncio.run(_measure(options, plan, parts, model, keep))
    sys.stdout.write(json.dumps(row, indent=2) + "\n" if target is None else f"{target}\n")


def _read(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the parts to measure; exit with a sentence where they make no sense."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", nargs="?", choices=[*SHAPES], help="Default: 13b")
    parser.add_argument(
        "--tiny", action="store_true", help="the embedded small model on the stand-in for vLLM"
    )
    parser.add_argument("--model", type=kinds.model, help="a real checkpoint in the place of dummy weights")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)} (the last not with --tiny). Default: all")
    parser.add_argument("--batches", type=kinds.counts, help="of decoding and speculation, such as 1,8,64")
    parser.add_argument("--speculation-batches", type=kinds.counts, help="of speculation alone")
    parser.add_argument("--acceptances", type=kinds.shares, help="of speculation, such as 0,0.5,1")
    parser.add_argument("--repeats", type=kinds.count)
    parser.add_argument(
        "--sleep-levels", type=kinds.counts, default=(1,), help="of the part residency, such as 1,2"
    )
    parser.add_argument("--tensor-parallel", type=kinds.count, default=1)
    parser.add_argument("--gpu-memory-utilization", type=kinds.part, default=0.9)
    parser.add_argument("--max-model-len", type=kinds.count, default=LONGEST)
    parser.add_argument("--top-logprobs", type=kinds.count, default=20)
    parser.add_argument("--cached-scoring", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cuda-graph-tokens", type=kinds.count)
    parser.add_argument("--out", type=kinds.output, help="in the place of benchmarks/results/gpu.json")
    options = parser.parse_args(arguments)
    if options.tiny and (options.shape or options.model):
        parser.error("--tiny is the small model: leave out the shape and --model")
    options.shape = options.shape or "13b"
    # The stand-in is in this process alone: there is no service to ask.
    possible = [part for part in PARTS if not (options.tiny and part == "service")]
    parts = options.parts.split(",") if options.parts else possible
    if unknown := set(parts) - set(possible):
        parser.error(f"--parts: no part {unknown.pop()}: choose of {', '.join(possible)}")
    if not set(options.sleep_levels) <= {1, 2}:
        parser.error("--sleep-levels: there are 1 and 2")
    if options.top_logprobs < 2:
        parser.error("--top-logprobs: must be 2 or more")
    return options, parts


async def _measure(
    options: argparse.Namespace,
    plan: MeasurePlan,
    parts: list[str],
    model: Path,
    keep: Callable[[str, dict[str, Any]], None],
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tensor_parallel": options.tensor_parallel,
        "top_logprobs": options.top_logprobs,
        "cached_scoring": options.cached_scoring,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    if options.cuda_graph_tokens:
        settings["cuda_graph_tokens"] = options.cuda_graph_tokens
    if not options.model:
        settings |= {"load_format": "dummy", "dtype": "bfloat16"}
    checkpoint = read_checkpoint(model)
    if not options.tiny:
        settings["max_model_len"] = min(options.max_model_len, checkpoint.context)
    largest = max(plan.batches)

    def make(level: int = 0) -> service.BareBackend:
        chosen = VllmOptions(max_batch=largest, sleep_level=level, **settings)
        return service.BareBackend("m", model, checkpoint, chosen)

    where = device.describe_processor() if options.tiny else device.describe()
    rate = float(str(where["copy_bytes_per_s"])) * options.tensor_parallel
    floor = checkpoint.weight_bytes / rate * 1e3
    row: dict[str, Any] = {
        "model": "tiny" if options.tiny else options.model.name if options.model else options.shape,
        "engine": "vllm (stand-in)" if options.tiny else "vllm",
        **where,
        "tensor_parallel": options.tensor_parallel,
        "weights": "checkpoint" if options.model or options.tiny else "dummy",
        "settings": settings,
        "weight_bytes": checkpoint.weight_bytes,
        "floor_ms": floor,
        "research_ms": RESEARCH_MS.get(options.shape),
    }
    if set(parts) - {"residency"}:
        backend = make()
        await backend.start()
        try:
            if "passes" in parts:
                row |= await passes(backend, plan)
                keep("passes", row)
                _say("passes", row)
            if "prefilled" in parts:
                found = await prefilled(backend, plan)
                row |= found
                keep("prefilled", row)
                _say("prefilled", found)
            if "speculation" in parts:
                row["speculation"] = await speculation(backend, plan)
                keep("speculation", row)
                _say("speculation", row["speculation"])
            bare = await service.bare(backend, plan) if "service" in parts else {}
        finally:
            await backend.close()
        if bare:
            served = await service.served(model, settings, largest, plan)
            row["service_ms"] = {str(batch): [bare[batch][1], served[batch]] for batch in bare}
            row["bare_ms"] = {str(batch): bare[batch][0] for batch in bare}
            for batch, (without_logprobs, with_them) in bare.items():
                row[f"service_overhead_b{batch}"] = served[batch] / with_them - 1
                row[f"stage_beside_bare_b{batch}"] = served[batch] / without_logprobs
            keep("service", row)
    if "residency" in parts:
        row["residency"] = await residency(make, options.sleep_levels, plan)
        keep("residency", row)
        _say("residency", row["residency"])
    return row


def merge(file: Path, row: dict[str, Any]) -> None:
    """Put a row into a file of rows: its figures replace those of the same model, engine and device.

    `records` says of each part how its figures came about.

    Then derive `escalated_speedup` of every row: the time of an answer of the larger model alone, over that
    of the 13B on the same device writing it and the larger one verifying it, fully accepted.
    """
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}

    def key_of(each: dict[str, Any]) -> tuple[str, str, str, int]:
        return each["model"], each["engine"], each["device"], each["tensor_parallel"]

    rows = {key_of(each): each for each in content["rows"]}
    old = rows.get(key_of(row), {})
    rows[key_of(row)] = old | row | {"records": old.get("records", {}) | row["records"]}
    for (model, engine, name, _), each in rows.items():
        small = rows.get(("13b", engine, name, 1), {})
        if model != "13b" and "generate64_ms" in small and {"generate64_ms", "verify64_ms"} <= each.keys():
            each["escalated_speedup"] = each["generate64_ms"] / (small["generate64_ms"] + each["verify64_ms"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": list(rows.values())}, indent=2) + "\n", encoding="utf-8")


def use_stand_in() -> None:
    """Put the stand-in for vLLM into the library's place."""
    from tests.fakes import fake_vllm

    sys.modules.update(fake_vllm.modules())


def _say(part: str, figures: Any) -> None:
    sys.stderr.write(f"{part}: {json.dumps(figures, default=str)}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
