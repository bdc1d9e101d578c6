"""Verified answers beside plain ones, for every pair of stages: `python -m benchmarks.gpu.exactness`.

    python -m benchmarks.gpu.exactness                          on a GPU: the embedded family, float32
    python -m benchmarks.gpu.exactness --dtype bfloat16
    python -m benchmarks.gpu.exactness --tiny --prompts 4       anywhere, on the stand-in for vLLM

Greedy answers of each stage are the drafts of the larger ones, which verify them inside vLLM, several at a
time. A verified answer that is not the one which the same engine writes without a draft counts as a near tie
if the two likeliest tokens are close where they first differ (docs/engines.md), else as unexplained. So does
an answer without a draft that an engine without verify_inside does not give. Writes
benchmarks/results/gpu_exactness.json. Ends with status 1 if anything is unexplained.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from asd.values import Message, Sampling
from benchmarks import arguments as kinds
from benchmarks.gpu import device
from benchmarks.gpu.__main__ import ENVIRONMENT, use_stand_in
from benchmarks.processes import ROOT
from benchmarks.record import RESULTS, keep_row, record
from services.stage.domain import DraftText
from services.stage.engines.conformance import EngineAnswer, NotConforming, Suite, collect
from services.stage.engines.vllm.engine import VllmOptions, make_engine
from suites import split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from services.stage.engines.engine import Engine

NAMES = ("small", "medium", "large")
# For bfloat16 as `asd-engine check` has it for vLLM. For float32 as far as rounding goes. Chosen.
TIE_MARGINS = {"float32": 1e-3, "bfloat16": 0.02}
SAMPLING = Sampling(max_new_tokens=160)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.exactness", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tiny", action="store_true", help="on the stand-in for vLLM")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=kinds.count, default=500)
    parser.add_argument(
        "--options", type=json.loads, default={}, help="further options of the engine, as JSON"
    )
    parser.add_argument("--at-a-time", type=kinds.count, default=8)
    parser.add_argument("--out", type=kinds.output, default=RESULTS / "gpu_exactness.json")
    options = parser.parse_args(arguments)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if options.tiny:
        use_stand_in()
    where = device.describe_processor() if options.tiny else device.describe()
    command = " ".join(
        ["python -m benchmarks.gpu.exactness", *(sys.argv[1:] if arguments is None else arguments)]
    )
    made = record(command) | {"versions": where["versions"]}

    def keep(row: dict[str, Any]) -> None:
        # After every pair: what a later one breaks off is not lost.
        about = {"device": where["device"], "dtype": options.dtype}
        keep_row(options.out, about | row | {"record": made}, _key_of)
        sys.stderr.write(f"{json.dumps(row)}\n")

    unexplained = asyncio.run(_measure(options, keep))
    sys.stdout.write(f"{options.out}\n")
    if unexplained:
        raise SystemExit(1)


def _key_of(row: Mapping[str, object]) -> tuple[object, ...]:
    return row["device"], row["dtype"], row["drafter"], row["target"]


async def _measure(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> int:
    """Return how many answers differ without an explanation."""
    unexplained = 0
    prompts = [(Message("user", task.prompt),) for task in split("evaluation", options.prompts)]
    answers: dict[str, list[EngineAnswer]] = {}

    async def write(engine: Engine) -> list[EngineAnswer]:
        return await _in_turn([partial(_write, engine, turns) for turns in prompts], options.at_a_time)

    def compare(engine: Engine, drafter: str | None, name: str, found: list[EngineAnswer]) -> int:
        row = _compare(engine, TIE_MARGINS[options.dtype], found, answers[name])
        keep({"drafter": drafter, "target": name} | row)
        return len(row["unexplained"])

    for name in NAMES:
        async with _loaded(options, name, inside=False) as engine:
            answers[name] = await write(engine)
        if name == NAMES[0]:
            continue
        async with _loaded(options, name, inside=True) as engine:
            if not engine.status().verifies_inside:
                raise SystemExit("this vLLM takes no proposer: nothing is verified inside")
            written = await write(engine)
            unexplained += compare(engine, None, name, written)
            answers[name] = written
            for drafter in NAMES[: NAMES.index(name)]:
                drafts = zip(prompts, answers[drafter], strict=True)
                verified = await _in_turn(
                    [partial(_verify, engine, turns, draft) for turns, draft in drafts], options.at_a_time
                )
                unexplained += compare(engine, drafter, name, verified)
    return unexplained


@asynccontextmanager
async def _loaded(options: argparse.Namespace, name: str, *, inside: bool) -> AsyncIterator[Engine]:
    section = VllmOptions(
        dtype=options.dtype,
        gpu_memory_utilization=0.2,
        kv_cache_gib=0.5,
        verify_inside=inside,
        max_batch=options.at_a_time,
        **options.options,
    )
    engine = make_engine(name, ROOT / "models" / name, section)
    await engine.load()
    try:
        yield engine
    finally:
        await engine.unload()


async def _in_turn(
    calls: Sequence[Callable[[], Awaitable[EngineAnswer]]], at_a_time: int
) -> list[EngineAnswer]:
    places = asyncio.Semaphore(at_a_time)

    async def wait_and(call: Callable[[], Awaitable[EngineAnswer]]) -> EngineAnswer:
        async with places:
            return await call()

    return await asyncio.gather(*map(wait_and, calls))


async def _write(engine: Engine, turns: tuple[Message, ...]) -> EngineAnswer:
    return await collect(engine.generate(turns, SAMPLING))


async def _verify(engine: Engine, turns: tuple[Message, ...], draft: EngineAnswer) -> EngineAnswer:
    fingerprint = engine.status().fingerprint
    text = DraftText(draft.result.text, draft.result.ids, fingerprint, draft.result.finish)
    return await collect(engine.verify(turns, SAMPLING, text, None), evidence="first")


def _compare(
    engine: Engine, tie_margin: float, verified: Sequence[EngineAnswer], plain: Sequence[EngineAnswer]
) -> dict[str, Any]:
    suite = Suite(engine, tie_margin=tie_margin)
    unexplained: list[str] = []
    same = 0
    for index, (found, wanted) in enumerate(zip(verified, plain, strict=True)):
        try:
            same += suite.expect_same(found, wanted, f"prompt {index}")
        except NotConforming as difference:
            unexplained.append(str(difference))
    evidence = [each.verification for each in verified if each.verification is not None]
    return {
        "prompts": len(verified),
        "same": same,
        "near_ties": suite.near_ties,
        "unexplained": unexplained,
        "accepted_tokens": sum(each.accepted for each in evidence),
        "proposed_tokens": sum(each.proposed for each in evidence),
        "forward_passes": sum(each.result.forward_passes for each in verified),
        "tokens": sum(len(each.result.ids) for each in verified),
    }


if __name__ == "__main__":
    main()
