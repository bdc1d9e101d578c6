"""A whole cascade of true shapes on one host, through its real services: `python -m benchmarks.gpu.cascade`.

    python -m benchmarks.gpu.cascade 13b@0 34b@0 70b@1      13B and 34B on the first GPU, 70B on the second
    python -m benchmarks.gpu.cascade 13b@0 34b@1 70b@2+3    70B on two, with tensor parallelism
    python -m benchmarks.gpu.cascade 13b@0 70b@1 --parts throughput --asked all-accepted --concurrencies 64,8
    python -m benchmarks.gpu.cascade 13b@0 70b@1 --inside   drafts are verified inside vLLM
    python -m benchmarks.gpu.cascade tiny tiny tiny         anywhere that vLLM runs; its figures mean nothing

Stage processes, a policy service and routers of this project; dummy weights whose next token is known
(benchmarks/gpu/predictable.py), so that how much of a draft is accepted is set by the prompt. Measures the
loading of all stages at once, latencies of every chain at set acceptance, throughput at 1 to 64 requests at
a time against always asking the largest, and keeps the spans of one request of every chain. With --inside
the largest is measured without the proposer, before the others. Writes a row of
benchmarks/results/gpu_cascade.json.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc

from asd.client import AsyncClient
from asd.values import Objective, Request, Sampling
from benchmarks import arguments as kinds
from benchmarks.gpu import device
from benchmarks.gpu.measure import TINY, MeasurePlan, Prompts
from benchmarks.gpu.predictable import REPLACED_EVERY, block_pairs, last_token, last_token_of_replaced
from benchmarks.gpu.service import load_model
from benchmarks.gpu.shapes import SHAPES, make_model
from benchmarks.processes import ROOT, service
from benchmarks.record import RESULTS, keep_row, record
from services.common.server import ServiceRegistration, start_server
from services.common.stats import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from asd.values import Answer

# The policy artifact's, smallest first.
NAMES = ("small", "medium", "large")
COSTS = {"small": 1.6, "medium": 4.2, "large": 8.8}
CALL_MS = 300_000.0
ANSWER = 64
PROMPT = 128
# Of its GPU's memory, by shape: what vLLM wants to find free when it starts. The KV cache has its own size.
SHARES = {"13b": 0.3, "34b": 0.5, "70b": 0.95, "tiny": 0.2}
CACHE_GIB = {"13b": 18.0, "34b": 6.0, "70b": 4.5, "tiny": 0.5}
# Requests at a time; the largest is also every engine's batch.
CONCURRENCIES = (1, 8, 16, 32, 64)
ACCEPTANCES = (1.0, 0.5, 0.0)
# All of the draft but single tokens.
REPLACED = 1 - 1 / REPLACED_EVERY
# Of every throughput, where fewer requests come at a time; and before it, for the router to learn from.
LEAST_ANSWERS = 10
LEAST_TO_LEARN = 40
PARTS = ("latencies", "throughput")
# What can be asked, by the name on the command line, beside always the largest.
ASKED = {
    "all-accepted": "escalated, all accepted",
    "one-in-8-wrong": "escalated, one in 8 wrong",
    "half-accepted": "escalated, half accepted",
    "nothing-accepted": "escalated, nothing accepted",
    "early-stops": "four of five stop early",
    "policy": "the policy decides",
}
ALWAYS = "always the largest"


@dataclass(frozen=True)
class GpuStage:
    """One stage: its name in the cascade, the shape of its model, and the GPUs that hold it."""

    name: str
    shape: str
    gpus: tuple[str, ...]

    @classmethod
    def read(cls, name: str, text: str) -> GpuStage:
        """Read SHAPE@GPU, SHAPE@GPU+GPU, or SHAPE where there is none. Raises ValueError."""
        shape, _, gpus = text.partition("@")
        if shape not in SHAPES:
            raise ValueError(f"{text}: no shape {shape!r}: choose of {', '.join(SHAPES)}")
        if gpus and not all(gpu.isdigit() for gpu in gpus.split("+")):
            raise ValueError(f"{text}: GPUs are numbers, such as {shape}@0 or {shape}@0+1")
        return cls(name, shape, tuple(gpus.split("+")) if gpus else ())


class SpanStore(collector_grpc.TraceServiceServicer):
    """Receives what the services trace."""

    def __init__(self) -> None:
        self._spans: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)

    async def Export(  # noqa: N802 - the proto's name
        self, request: collector.ExportTraceServiceRequest, context: object
    ) -> collector.ExportTraceServiceResponse:
        """Keep the spans by trace."""
        for resource in request.resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            for span in itertools.chain.from_iterable(scope.spans for scope in resource.scope_spans):
                self._spans[span.trace_id.hex()].append(
                    {
                        "service": named.get("service.name", ""),
                        "name": span.name,
                        "span": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "start_ns": span.start_time_unix_nano,
                        "end_ns": span.end_time_unix_nano,
                    }
                )
        return collector.ExportTraceServiceResponse()

    def is_pipelined(self, trace_id: str) -> bool:
        """Return whether a stage verified a draft while it was being written."""
        return any(span["name"].endswith("/VerifyStream") for span in self._spans.get(trace_id, ()))

    def timeline(self, trace_id: str) -> list[dict[str, Any]]:
        """Return a trace's spans in the order of their starts, in ms from the first one's."""
        spans = sorted(self._spans.get(trace_id, []), key=lambda span: int(span["start_ns"]))
        first = spans[0]["start_ns"] if spans else 0
        return [
            {key: span[key] for key in ("service", "name", "span", "parent")}
            | {f"{end}_ms": round((span[f"{end}_ns"] - first) / 1e6, 2) for end in ("start", "end")}
            for span in spans
        ]


class Questions:
    """Prompts of which a set part of a 64-token draft is accepted, no two with a common beginning."""

    def __init__(self, plan: MeasurePlan, pairs: int) -> None:
        self._prompts = Prompts(plan)
        self._rng = random.Random(29)
        self._pairs = pairs

    def __call__(self, acceptance: float) -> str:
        """Return the text of one. acceptance: the share of the draft that is accepted, its beginning, or
        REPLACED."""
        pair = self._rng.randrange(self._pairs)
        if acceptance == REPLACED:
            last = last_token_of_replaced(pair)
        else:
            last = last_token(None if acceptance >= 1 else round(acceptance * ANSWER), pair)
        ids = [*self._prompts(PROMPT - 1), last]
        return " ".join(f"w{token}" for token in ids)


class Running:
    """The services, up."""

    def __init__(self, clients: dict[str, AsyncClient], questions: Questions, spans: SpanStore) -> None:
        self.clients = clients
        self.questions = questions
        self.spans = spans

    async def ask(self, router: str, way: dict[str, Any], acceptance: float) -> tuple[float, Answer]:
        """Return the caller's milliseconds and the answer."""
        request = Request(self.questions(acceptance), sampling=Sampling(max_new_tokens=ANSWER), **way)
        started = time.perf_counter()
        answer = await self.clients[router].ask(request)
        if len(answer.token_ids) != ANSWER:
            raise RuntimeError(f"an answer of {len(answer.token_ids)} tokens came, not of {ANSWER}")
        return (time.perf_counter() - started) * 1e3, answer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.cascade", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("stages", nargs="+", metavar="SHAPE@GPU", help="two or three, smallest first")
    parser.add_argument("--repeats", type=kinds.count, default=5, help="of every latency")
    parser.add_argument("--concurrencies", type=kinds.counts, default=CONCURRENCIES)
    parser.add_argument(
        "--rounds", type=kinds.count, default=4, help="timed requests of each of those at a time"
    )
    parser.add_argument(
        "--rounds-to-learn",
        type=kinds.count,
        default=4,
        help=f"before them, {LEAST_TO_LEARN} requests at least, for the router to learn from",
    )
    parser.add_argument(
        "--inside", action="store_true", help="stages after the first verify drafts inside vLLM"
    )
    parser.add_argument("--parts", type=_names(PARTS), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument(
        "--asked",
        type=_names(ASKED),
        default=tuple(ASKED),
        help=f"of the throughput, beside always asking the largest: of {','.join(ASKED)}",
    )
    parser.add_argument("--out", type=kinds.output, default=RESULTS / "gpu_cascade.json")
    options = parser.parse_args(arguments)
    names = NAMES if len(options.stages) == len(NAMES) else (NAMES[0], NAMES[-1])
    if len(options.stages) != len(names):
        parser.error(f"{len(options.stages)} stages: give two or three")
    try:
        stages = [GpuStage.read(name, text) for name, text in zip(names, options.stages, strict=True)]
    except ValueError as error:
        parser.error(str(error))
    command = " ".join(
        ["python -m benchmarks.gpu.cascade", *(sys.argv[1:] if arguments is None else arguments)]
    )

    def keep(row: dict[str, Any]) -> None:
        # After every part: what a later one breaks off is not lost.
        keep_row(options.out, row | {"record": record(command)}, _key_of)

    asyncio.run(_measure(stages, options, options.concurrencies, keep))
    sys.stdout.write(f"{options.out}\n")


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Return what reads names from a list with commas."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def _key_of(row: Mapping[str, object]) -> tuple[object, ...]:
    return row["stages"], row["device"], row.get("inside", False)


async def _measure(
    stages: list[GpuStage],
    options: argparse.Namespace,
    concurrencies: tuple[int, ...],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    row: dict[str, Any] = {
        "stages": [
            f"{stage.shape}@{'+'.join(stage.gpus)}" if stage.gpus else stage.shape for stage in stages
        ],
        "inside": options.inside,
        **device.describe(),
        "answer_tokens": ANSWER,
        "prompt_tokens": PROMPT,
    }
    vocabulary = min(SHAPES[stage.shape].vocabulary for stage in stages)
    plan = MeasurePlan() if vocabulary > TINY.highest_id * 40 else TINY
    questions, batch = Questions(plan, block_pairs(vocabulary)), max(concurrencies)
    asked = mixes([stage.name for stage in stages], options.asked)
    baseline: dict[int, dict[str, Any]] = {}
    if options.inside and "throughput" in options.parts:
        # The rates are compared with those of the largest stage alone, whose engine has no proposer.
        async with AsyncExitStack() as stack:
            routers: dict[str, dict[str, Any]] = {"pipelined": {}, "sequential": {}, ALWAYS: {}}
            running, _ = await _start(stack, stages[-1:], batch, questions, routers, inside=False)
            await _warm(running, stages[-1:])
            for concurrency in concurrencies:
                (baseline[concurrency],) = await _throughput(
                    running, {ALWAYS: asked[ALWAYS]}, concurrency, options
                )
    async with AsyncExitStack() as stack:
        routers = {
            **{name: {} for name in asked},
            # Acceptance is set: drafts of which nothing is accepted must not stop the others' verification.
            "pipelined": {"adaptive": False},
            "sequential": {"adaptive": False, "pipelined": False},
        }
        running, row["load_s"] = await _start(stack, stages, batch, questions, routers, inside=options.inside)
        _say("load_s", row["load_s"])
        await _warm(running, stages)
        if "latencies" in options.parts:
            row |= await _latencies(running, [stage.name for stage in stages], options.repeats)
            keep(row)
            _say("latencies", row)
        if "throughput" not in options.parts:
            return
        row["throughput"] = []
        for concurrency in concurrencies:
            row["throughput"] += await _throughput(
                running, asked, concurrency, options, baseline.get(concurrency)
            )
            keep(row)


async def _start(
    stack: AsyncExitStack,
    stages: list[GpuStage],
    batch: int,
    questions: Questions,
    routers: dict[str, dict[str, Any]],
    *,
    inside: bool,
) -> tuple[Running, dict[str, float]]:
    """Start stages, a policy for three of them, and routers; return the seconds of loading.

    routers: their speculation settings by name. inside: stages after the first verify drafts inside vLLM.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    spans = SpanStore()
    receiver, port = await start_server(
        "127.0.0.1:0",
        [
            ServiceRegistration(
                "opentelemetry.proto.collector.trace.v1.TraceService",
                lambda server: collector_grpc.add_TraceServiceServicer_to_server(spans, server),
            )
        ],
    )
    stack.push_async_callback(receiver.stop, 0)
    tracing = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }

    async def start(module: str, settings: dict[str, Any], environment: dict[str, str]) -> str:
        return await stack.enter_async_context(service(module, settings, tracing | environment))

    targets = {}
    for stage in stages:
        model = make_model(stage.shape, folder / stage.name)
        section = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": 2048,
            "max_batched_tokens": 2048,
            "gpu_memory_utilization": SHARES[stage.shape],
            "kv_cache_gib": CACHE_GIB[stage.shape],
            "tensor_parallel": max(len(stage.gpus), 1),
            "verify_inside": inside and stage.name != NAMES[0],
        }
        entry = {
            "name": stage.name,
            "path": str(model),
            "engine": "vllm",
            "max_batch": batch,
            "vllm": section,
        }
        # Loaded by a call: a large model takes longer than a process may take to start.
        environment = {"PREDICTABLE_JUMPS": str(int(stage.name != NAMES[0]))}
        if stage.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(stage.gpus)
        settings = {"models": [entry | {"max_batch": batch, "preload": False}]}
        targets[stage.name] = await start("benchmarks.gpu.predictable", settings, environment)
    loading = await _load(stages, targets)
    policy = ""
    if len(stages) == len(NAMES):
        artifact = str(ROOT / "policy_service" / "policy.zip")
        policy = await start("policy_service", {"artifact": artifact}, {})
    entries = [
        {"name": name, "target": target, "cost": COSTS[name], "timeout_ms": CALL_MS}
        for name, target in targets.items()
    ]
    clients = {}
    for name, speculation in routers.items():
        settings = {
            "stages": entries,
            "static_plan": [stages[-1].name],
            "speculation": speculation,
            "default_deadline_ms": CALL_MS,
            **({"policy": {"target": policy, "timeout_ms": 1000}} if policy else {}),
        }
        address = await start("services.router", settings, {})
        clients[name] = await stack.enter_async_context(AsyncClient(address, timeout_ms=CALL_MS))
    return Running(clients, questions, spans), loading


async def _load(stages: list[GpuStage], targets: dict[str, str]) -> dict[str, float]:
    """Load all at the same time; return the seconds of each.

    The size of every KV cache is set, so that none is taken from what another has not claimed yet.
    """
    found: dict[str, float] = {}
    started = time.perf_counter()

    async def load(stage: GpuStage) -> None:
        await load_model(targets[stage.name])
        found[stage.name] = time.perf_counter() - started

    await asyncio.gather(*(load(stage) for stage in stages))
    return found


async def _warm(running: Running, stages: list[GpuStage]) -> None:
    """Ask what compiles on its first use: every stage alone, every chain, at the largest batch too."""
    names = [stage.name for stage in stages]
    for way in [{"stage": name} for name in names] + [{"chain": chain} for chain in chains(names)]:
        for router in ("pipelined", "sequential"):
            await asyncio.gather(*(running.ask(router, way, share) for share in (*ACCEPTANCES, *ACCEPTANCES)))


def chains(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every pair of stages in order, and all of them."""
    pairs = list(itertools.combinations(names, 2))
    return [*pairs, tuple(names)] if len(names) > 2 else pairs


async def _latencies(running: Running, names: list[str], repeats: int) -> dict[str, Any]:
    """Time every stage alone and every chain at every acceptance, one request at a time, taking turns.

    Acceptance is that of the first stage's draft: the larger ones agree among themselves.
    """
    alone = [("pipelined", (name,), 1.0) for name in names]
    chained = [
        (router, chain, acceptance)
        for router, chain in itertools.product(("pipelined", "sequential"), chains(names))
        for acceptance in (ACCEPTANCES if chain[0] == names[0] else ACCEPTANCES[:1])
    ]
    samples: dict[tuple[str, tuple[str, ...], float], list[tuple[float, Answer]]]
    samples = {key: [] for key in (*alone, *chained)}
    for _ in range(repeats):
        for router, chain, acceptance in samples:
            way = {"stage": chain[0]} if len(chain) == 1 else {"chain": chain}
            samples[router, chain, acceptance].append(await running.ask(router, way, acceptance))
    # Spans come a moment after the answers that they are of.
    await asyncio.sleep(1.0)
    mean = {name: statistics.median(ms for ms, _ in samples["pipelined", (name,), 1.0]) for name in names}
    found = []
    for (router, chain, acceptance), each in samples.items():
        times = [ms for ms, _ in each]
        last = each[-1][1]
        found.append(
            {
                "way": "alone" if len(chain) == 1 else router,
                "chain": list(chain),
                "acceptance": acceptance,
                "p50_ms": statistics.median(times),
                "p95_ms": percentile(times, 0.95),
                "samples": len(times),
                # By the spans: the router has the stages of a chain take turns where it sees a queue.
                "pipelined": sum(running.spans.is_pipelined(answer.trace_id) for _, answer in each),
                "of_the_largest": statistics.median(times) / mean[names[-1]],
                "of_its_last": statistics.median(times) / mean[chain[-1]],
                "accepted_tokens": [record.accepted_tokens for record in last.stages],
                "proposed_tokens": [record.proposed_tokens for record in last.stages],
                "trace": running.spans.timeline(last.trace_id) if acceptance == 1.0 else [],
            }
        )
    return {"latencies": found}


def mixes(
    names: Sequence[str], asked: Collection[str] = tuple(ASKED)
) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """Return what is asked, by name: requests with the acceptance of their drafts, taken in turn.

    Always the largest comes first: the others' rates are shares of its rate.
    """
    small, large = names[0], names[-1]
    escalated = {"chain": (small, large)}
    mixes: dict[str, list[tuple[dict[str, Any], float]]] = {
        ALWAYS: [({"stage": large}, 1.0)],
        "escalated, all accepted": [(escalated, 1.0)],
        "escalated, one in 8 wrong": [(escalated, REPLACED)],
        "escalated, half accepted": [(escalated, 0.5)],
        "escalated, nothing accepted": [(escalated, 0.0)],
        "four of five stop early": [({"stage": small}, 1.0)] * 8 + [(escalated, 1.0), (escalated, 0.5)],
    }
    if len(names) == len(NAMES):
        mixes["the policy decides"] = [({"objective": Objective(preference="balanced")}, 1.0)]
    wanted = {ALWAYS, *(ASKED[name] for name in asked)}
    return {name: mix for name, mix in mixes.items() if name in wanted}


async def _throughput(
    running: Running,
    mixes: dict[str, list[tuple[dict[str, Any], float]]],
    concurrency: int,
    options: argparse.Namespace,
    baseline: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Answers per second by what is asked, with so many requests at a time.

    Every mix has a router of its own, as shipped: what one learns of its drafts is not another's. Requests
    come without a pause, each when an earlier one is answered, and what is timed lies between two answers:
    neither what the router has yet to learn nor an empty stage at the beginning is in it. baseline: the row
    of always asking the largest, if it is measured.
    """
    rows = [baseline] if baseline else []
    for name, mix in mixes.items():
        if baseline and name == ALWAYS:
            continue
        least = max(concurrency * options.rounds, LEAST_ANSWERS)
        count = -(-least // len(mix)) * len(mix)
        learning = max(LEAST_TO_LEARN, concurrency * options.rounds_to_learn) if rows else concurrency
        jobs = itertools.cycle(mix)
        ended: list[tuple[float, float, str, bool]] = []

        async def work(
            name: str = name, jobs: Any = jobs, ended: Any = ended, most: int = learning + count
        ) -> None:
            while len(ended) < most:
                way, acceptance = next(jobs)
                ms, answer = await running.ask(name, way, acceptance)
                ended.append((time.perf_counter(), ms, answer.stage, len(answer.stages) > 1))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        timed = ended[learning : learning + count]
        rate = count / (timed[-1][0] - ended[learning - 1][0])
        times = [ms for _, ms, *_ in timed]
        rows.append(
            {
                "concurrency": concurrency,
                "asked": name,
                "answers_per_s": rate,
                "of_always_the_largest": rate / rows[0]["answers_per_s"] if rows else 1.0,
                "p50_ms": statistics.median(times),
                "p95_ms": percentile(times, 0.95),
                "answers": count,
                "answers_before": learning,
                "answered_by": dict(collections.Counter(stage for _, _, stage, _ in timed)),
                # By more than one stage: with a draft that was verified.
                "with_drafts": sum(has_draft for *_, has_draft in timed),
            }
        )
        _say(f"{name} at {concurrency}", rows[-1])
    return rows


def _say(part: str, figures: Any) -> None:
    sys.stderr.write(f"{part}: {json.dumps(figures, default=str)[:2000]}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
