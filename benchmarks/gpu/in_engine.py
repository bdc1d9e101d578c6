"""Measures verification inside vLLM: `python -m benchmarks.gpu.in_engine 34b` (dummy weights of true shape).

    python -m benchmarks.gpu.in_engine 70b --batches 1,8    into benchmarks/results/gpu_in_engine.json
    python -m benchmarks.gpu.in_engine --tiny --out FILE    here, on the stand-in for vLLM

Two engines, one after the other: one without a proposer and with asynchronous scheduling, one with the
proposer. A draft is the engine's own greedy answer, with tokens replaced. Prompts are in the prefix cache.
There is a row for each kind of draft and batch. `times_plain`: beside the same engine without drafts;
`times_async`: beside the other one; `same`: answers equal to the greedy ones. The row of draft "none" shows
what the loaded proposer costs a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import sys
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arguments as kinds
from benchmarks.gpu import device
from benchmarks.gpu.__main__ import ENVIRONMENT, LONGEST, SMALL, use_stand_in
from benchmarks.gpu.measure import TINY, MeasurePlan, Prompts, timed
from benchmarks.gpu.shapes import SHAPES, make_model
from benchmarks.record import RESULTS, record
from services.stage.engines.backend import RequestDraft, TokenRequest
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.vllm.engine import VllmBackend, VllmOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

DRAFTS = ("right", "one in 16 wrong", "one in 8 wrong", "one in 4 wrong", "half right", "noise")
PLAIN = "none"
# Runs before the first that counts: what is compiled on first use, and what the proposer learns of drafts.
_WARM = 2


def altered(own: Sequence[int], kind: str, chance: random.Random, highest: int) -> list[int]:
    """Return a draft of a kind for an answer of one's own."""
    noise = [chance.randrange(5, highest) for _ in own]
    if kind == "noise":
        return noise
    if kind == "half right":
        return [*own[: len(own) // 2], *noise[len(own) // 2 :]]
    if kind == "right":
        return list(own)
    every = int(kind.split()[2])
    return [noise[index] if index % every == every // 2 else token for index, token in enumerate(own)]


async def write(backend: VllmBackend, prompt: list[int], tokens: int, draft: Sequence[int] = ()) -> list[int]:
    """Return a greedy answer of so many tokens, written with a draft beside it if there is one."""
    own = RequestDraft(secrets.token_hex(8), tuple(draft)) if draft else None
    ids: list[int] = []
    async with aclosing(backend.generate(prompt, TokenRequest(tokens, draft=own))) as pieces:
        async for piece in pieces:
            ids += [row.token for row in piece.rows]
    return ids


async def fastest(
    backend: VllmBackend, prompts: list[list[int]], drafts: list[Sequence[int]], plan: MeasurePlan
) -> tuple[float, list[list[int]]]:
    """Return the least milliseconds of some runs of a batch, and the answers of the last."""
    times = []
    for _ in range(_WARM + plan.repeats):
        taken, answers = await timed(
            *(write(backend, each, plan.answer, draft) for each, draft in zip(prompts, drafts, strict=True))
        )
        times.append(taken)
    return min(times[_WARM:]), answers


async def measure(model: Path, settings: dict[str, Any], plan: MeasurePlan) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    checkpoint = read_checkpoint(model)
    prompt, chance = Prompts(plan), random.Random(3)
    batches = {batch: [prompt(plan.prompt) for _ in range(batch)] for batch in plan.batches}
    found: list[dict[str, Any]] = []
    without: dict[int, float] = {}
    for inside in (False, True):
        options = VllmOptions(max_batch=max(plan.batches), verify_inside=inside, **settings)
        backend = VllmBackend("m", model, checkpoint, options)
        await backend.start()
        try:
            for batch, prompts in batches.items():
                plain, owns = await fastest(backend, prompts, [()] * batch, plan)
                if not inside:
                    without[batch] = plain
                    continue
                rows = [(PLAIN, plain, owns)]
                for kind in DRAFTS:
                    drafts = [altered(own, kind, chance, plan.highest_id) for own in owns]
                    rows.append((kind, *await fastest(backend, prompts, drafts, plan)))
                for kind, taken, answers in rows:
                    found.append(
                        {
                            "draft": kind,
                            "batch": batch,
                            "plain_ms": plain,
                            "async_ms": without[batch],
                            "drafted_ms": taken,
                            "times_plain": plain / taken,
                            "times_async": without[batch] / taken,
                            "same": sum(a == b for a, b in zip(answers, owns, strict=True)),
                        }
                    )
                    sys.stderr.write(f"{json.dumps(found[-1])}\n")
        finally:
            await backend.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.in_engine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("shape", nargs="?", choices=[*SHAPES], help="Default: 13b")
    parser.add_argument(
        "--tiny", action="store_true", help="the embedded small model on the stand-in for vLLM"
    )
    parser.add_argument("--model", type=kinds.model, help="a real checkpoint in the place of dummy weights")
    parser.add_argument("--batches", type=kinds.counts, help="requests at a time, such as 1,8,64")
    parser.add_argument("--repeats", type=kinds.count)
    parser.add_argument(
        "--options", type=json.loads, default={}, help="further options of the engine, as JSON"
    )
    parser.add_argument(
        "--out", type=kinds.output, help="in the place of benchmarks/results/gpu_in_engine.json"
    )
    options = parser.parse_args(arguments)
    shape = options.shape or "13b"
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    is_small = options.tiny or (options.model and read_checkpoint(options.model).context < LONGEST)
    plan = TINY if is_small else MeasurePlan()
    plan = MeasurePlan(
        options.batches or plan.batches,
        prompt=plan.prompt,
        answer=plan.answer,
        repeats=options.repeats or plan.repeats,
        highest_id=plan.highest_id,
    )
    settings: dict[str, Any] = {"max_model_len": LONGEST} if not is_small else {}
    if not options.model and not options.tiny:
        settings |= {"load_format": "dummy", "dtype": "bfloat16", "cuda_graph_tokens": 512}
    settings |= options.options
    command = " ".join(
        ["python -m benchmarks.gpu.in_engine", *(sys.argv[1:] if arguments is None else arguments)]
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            use_stand_in()
        model = options.model or (SMALL if options.tiny else make_model(shape, Path(folder) / "model"))
        rows = asyncio.run(measure(model, settings, plan))
    where = device.describe_processor() if options.tiny else device.describe()
    name = "tiny" if options.tiny else options.model.name if options.model else shape
    about = {"model": name, "device": where["device"]}
    file = options.out or RESULTS / "gpu_in_engine.json"
    merge(file, [about | row for row in rows], record(command) | {"settings": settings, "on": where})
    sys.stdout.write(f"{file}\n")


def merge(file: Path, rows: list[dict[str, Any]], made: dict[str, Any]) -> None:
    """Put rows into a file: they replace those of the same model, device, draft and batch."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": [], "records": {}}

    def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["device"], row["draft"], row["batch"]

    kept = {key_of(row): row for row in content["rows"]} | {key_of(row): row for row in rows}
    records = content["records"] | {f"{rows[0]['model']} on {rows[0]['device']}": made}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": list(kept.values()), "records": records}, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
