"""Verified answers beside plain ones, for every pair of stages: `python -m benchmarks.gpu.exactness`.

    python -m benchmarks.gpu.exactness                          on a GPU: the embedded family, float32
    python -m benchmarks.gpu.exactness --dtype bfloat16
    python -m benchmarks.gpu.exactness --tiny --prompts 4       anywhere, on the stand-in for vLLM

Greedy answers of each stage are the drafts of the larger ones, which verify them inside vLLM, some at a time.
A verified answer that is not the one which the same engine writes without a draft counts as a near tie if
the two likeliest tokens are close where they first differ (docs/engines.md), else as unexplained. Writes
benchmarks/results/gpu_exactness.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
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
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from services.stage.engines.engine import Engine

NAMES = ("small", "medium", "large")
# As `asd-engine check` has it for vLLM.
TIE_MARGIN = 0.02
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

    asyncio.run(_measure(options, keep))
    sys.stdout.write(f"{options.out}\n")


def _key_of(row: Mapping[str, object]) -> tuple[object, ...]:
    return row["device"], row["dtype"], row["drafter"], row["target"]


async def _measure(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    prompts = [(Message("user", task.prompt),) for task in split("evaluation", options.prompts)]
    answers: dict[str, list[EngineAnswer]] = {}
    for name in NAMES:
        inside = name != NAMES[0]
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
            if inside and not engine.status().verifies_inside:
                raise SystemExit("this vLLM takes no proposer: nothing is verified inside")
            answers[name] = await _in_turn(
                [partial(_write, engine, turns) for turns in prompts], options.at_a_time
            )
            for drafter in NAMES[: NAMES.index(name)]:
                drafts = zip(prompts, answers[drafter], strict=True)
                verified = await _in_turn(
                    [partial(_verify, engine, turns, draft) for turns, draft in drafts], options.at_a_time
                )
                keep(_compare(engine, drafter, name, verified, answers[name]))
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
    engine: Engine, drafter: str, target: str, verified: Sequence[EngineAnswer], plain: Sequence[EngineAnswer]
) -> dict[str, Any]:
    suite = Suite(engine, tie_margin=TIE_MARGIN)
    unexplained: list[str] = []
    same = 0
    for index, (found, wanted) in enumerate(zip(verified, plain, strict=True)):
        try:
            same += suite.expect_same(found, wanted, f"prompt {index}")
        except NotConforming as difference:
            unexplained.append(str(difference))
    evidence = [each.verification for each in verified if each.verification is not None]
    return {
        "drafter": drafter,
        "target": target,
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
