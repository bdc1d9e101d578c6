"""Measures speculative escalation on this machine: `python -m benchmarks.escalation`.

Real services over gRPC. For each prompt every way of answering takes its turn, so that what the machine does
besides falls on all of them. Writes benchmarks/results/escalation.json and plots into docs/results.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from asd.client import AsyncClient
from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from asd.values import Acceptance, Committed, Message, Objective, Request
from benchmarks.escalation_plots import draw_plots
from benchmarks.processes import ROOT, process, service
from benchmarks.random_stage import random_text
from benchmarks.record import update_result, write_result
from policy_service.train.scores import area_under_roc
from services.common.channel import open_channel
from services.common.server import run_service
from services.common.stats import percentile
from suites import Task, grade, split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from asd.values import Answer, StageRecord

Way = TypeVar("Way")
NAMES = ("small", "medium", "large")
COSTS = {"small": 1.6, "medium": 4.2, "large": 8.8}
PAIRS = (("small", "medium"), ("small", "large"), ("medium", "large"))
CHAINS = (*PAIRS, NAMES)
THRESHOLDS = (0.5, 0.2, 0.1, 0.03, 0.01)
CALL_TIMEOUT = 60.0
# Prompts that one way of answering takes before the next one's turn: more than a stage keeps in its prefix
# cache, so that no way finds a prompt warmed by another one.
BLOCK = 8
# Ways of answering, by what is switched off.
ALL_ON, SEQUENTIAL, NO_RESYNC, NO_REUSE = "all on", "pipelining off", "resync off", "prefix reuse off"
BARE = "pipelining, resync and prefix reuse off"
NO_PREFILL, NO_ABANDON, NOT_ADAPTIVE = "prefill-ahead off", "early abandon off", "adaptive off"
# Where the policy decides, instead of a chain.
POLICY: tuple[str, ...] = ()
# Of a conversation.
TURNS = 3
_console = Console(stderr=True)


@dataclass(frozen=True)
class Routers:
    """Addresses of the routers, by what is switched off, and of the stages."""

    routers: dict[str, str]
    stages: dict[str, str]


@asynccontextmanager
async def running(*, with_policy: bool = True) -> AsyncIterator[Routers]:
    """Run a set of stages with everything on, and sets with parts switched off; a router per way."""
    async with AsyncExitStack() as stack:

        async def start(module: str, settings: dict[str, object]) -> str:
            return await stack.enter_async_context(service(module, settings))

        sets: dict[str, dict[str, object]] = {
            ALL_ON: {},
            NO_RESYNC: {"resync": False},
            NO_REUSE: {"cached_sequences": 0},
            BARE: {"resync": False, "cached_sequences": 0},
        }
        stages = {
            way: {
                name: await start(
                    "services.stage",
                    {"models": [{"name": name, "path": str(ROOT / "models" / name), **part}]},
                )
                for name in NAMES
            }
            for way, part in sets.items()
        }
        noise, _ = await stack.enter_async_context(process("benchmarks.random_stage", "127.0.0.1:0"))
        artifact = str(ROOT / "policy_service" / "policy.zip")
        policy = await start("policy_service", {"artifact": artifact}) if with_policy else ""

        async def router(stages: dict[str, str], **speculation: bool) -> str:
            has_policy = with_policy and tuple(stages) == NAMES
            return await start(
                "services.router",
                {
                    "stages": [
                        {"name": each, "target": target, "cost": COSTS.get(each, 1.0)}
                        for each, target in stages.items()
                    ],
                    "static_plan": ["large"],
                    "speculation": speculation,
                    **({"policy": {"target": policy, "timeout_ms": 1000}} if has_policy else {}),
                },
            )

        random_first = {"random": noise, "large": stages[ALL_ON]["large"]}
        yield Routers(
            {
                ALL_ON: await router(stages[ALL_ON]),
                SEQUENTIAL: await router(stages[ALL_ON], pipelined=False),
                NO_RESYNC: await router(stages[NO_RESYNC]),
                NO_REUSE: await router(stages[NO_REUSE]),
                BARE: await router(stages[BARE], pipelined=False),
                NO_PREFILL: await router(stages[ALL_ON], prefill_ahead=False),
                NO_ABANDON: await router(stages[ALL_ON], early_abandon=False),
                NOT_ADAPTIVE: await router(stages[ALL_ON], adaptive=False),
                "random drafts": await router(random_first),
                "random drafts, sequential": await router(random_first, pipelined=False),
                "random drafts, not adaptive": await router(random_first, pipelined=False, adaptive=False),
            },
            stages[ALL_ON],
        )


def in_turns(tasks: Sequence[Task], ways: Iterable[Way], description: str) -> Iterator[tuple[int, Task, Way]]:
    """Yield every task with every way, in blocks that take turns in random order."""
    rng = random.Random(0)
    turns = list(ways)
    for start in track(range(0, len(tasks), BLOCK), description, console=_console):
        rng.shuffle(turns)
        for way in turns:
            for index in range(start, min(start + BLOCK, len(tasks))):
                yield index, tasks[index], way


class Clients:
    """Clients of the routers. ask: one request, its answer and the caller's latency in ms."""

    def __init__(self, routers: Routers, stack: AsyncExitStack) -> None:
        self._routers = routers
        self._stack = stack
        self._clients: dict[str, AsyncClient] = {}

    async def ask(self, router: str, request: Request) -> tuple[Answer, float]:
        """Return the answer and the caller's latency."""
        client = await self.client(router)
        started = time.perf_counter()
        answer = await client.ask(request)
        return answer, (time.perf_counter() - started) * 1000.0

    async def client(self, router: str) -> AsyncClient:
        """Return the client of a router."""
        if router not in self._clients:
            target = self._routers.routers[router]
            self._clients[router] = await self._stack.enter_async_context(AsyncClient(target))
        return self._clients[router]


@dataclass
class Samples:
    """What one way of answering gave, prompt by prompt."""

    latencies_ms: list[float]
    costs: list[float]
    records: list[tuple[StageRecord, ...]]
    answers: list[Answer] = field(default_factory=list)


async def measure_exact(clients: Clients, tasks: Sequence[Task]) -> dict[str, object]:
    """Time of every pair and chain beside every stage alone, and whether their answers are equal."""
    singles = [(ALL_ON, (name,)) for name in NAMES]
    ways = [(router, chain) for router in (ALL_ON, SEQUENTIAL, BARE) for chain in CHAINS]
    runs = {way: Samples([], [], []) for way in (*singles, *ways)}
    tokens: dict[tuple[str, tuple[str, ...]], list[tuple[int, ...]]] = collections.defaultdict(list)
    for _, task, (router, chain) in in_turns(tasks, runs, "exact"):
        fixed = Request(task.prompt, stage=chain[0])
        request = fixed if len(chain) == 1 else Request(task.prompt, chain=chain)
        answer, ms = await clients.ask(router, request)
        tokens[router, chain].append(answer.token_ids)
        samples = runs[router, chain]
        samples.latencies_ms.append(ms)
        samples.costs.append(answer.cost)
        samples.records.append(answer.stages)
    mismatches: collections.Counter[str] = collections.Counter()
    for router, chain in ways:
        pairs = zip(tokens[router, chain], tokens[ALL_ON, chain[-1:]], strict=True)
        mismatches[f"{router}: {'-'.join(chain)}"] = sum(ours != theirs for ours, theirs in pairs)
    alone = {name: runs.pop((ALL_ON, (name,))) for name in NAMES}
    return _summarise_exact(tasks, alone, runs, mismatches)


def _summarise_exact(
    tasks: Sequence[Task],
    alone: dict[str, Samples],
    runs: dict[tuple[str, tuple[str, ...]], Samples],
    mismatches: collections.Counter[str],
) -> dict[str, object]:
    largest_ms = statistics.mean(alone["large"].latencies_ms)
    chains = {}
    for (router, chain), samples in runs.items():
        target = alone[chain[-1]]
        last = [records[-1] for records in samples.records]
        plain = [records[-1] for records in target.records]
        emitted = sum(record.completion_tokens + 1 for record in last)
        passes = sum(record.forward_passes for record in last)
        plain_passes = sum(record.forward_passes for record in plain)
        proposed = sum(record.proposed_tokens for record in last)
        regenerating = statistics.mean(_regenerating(samples, target))
        lengths = collections.Counter(length for record in last for length in record.accept_lengths)
        by_level = collections.defaultdict(list)
        for task, record in zip(tasks, last, strict=True):
            by_level[task.level].append((record.accepted_tokens, record.proposed_tokens))
        mean_ms = statistics.mean(samples.latencies_ms)
        chains[f"{router}: {'-'.join(chain)}"] = {
            "acceptance_rate": round(sum(r.accepted_tokens for r in last) / max(proposed, 1), 4),
            "passes_per_token": round(passes / emitted, 4),
            "passes_per_token_ratio": round(plain_passes / passes, 3),
            "latency_ms": _latency(samples.latencies_ms),
            # Pipelined, drafting and verifying share the time: there is nothing to put in its place.
            "speedup_over_regenerating": None if router == ALL_ON else round(regenerating / mean_ms, 3),
            "speedup_over_largest": round(largest_ms / mean_ms, 3),
            "cost": round(statistics.mean(samples.costs), 3),
            "latency_ms_by_level": _by_level(tasks, samples.latencies_ms),
            "cost_by_level": _by_level(tasks, samples.costs),
            "accept_lengths": {str(length): lengths[length] for length in sorted(lengths)},
            "acceptance_rate_by_level": {
                str(level): round(sum(a for a, _ in pairs) / max(sum(p for _, p in pairs), 1), 4)
                for level, pairs in sorted(by_level.items())
            },
        }
    # An escalated request: the three pairs together, one after the other as the policy has them.
    passes = regenerated = verified = wanted = 0.0
    for pair in PAIRS:
        target, samples = alone[pair[1]], runs[SEQUENTIAL, pair]
        wanted += sum(records[-1].forward_passes for records in target.records)
        passes += sum(records[-1].forward_passes for records in samples.records)
        regenerated += sum(_regenerating(samples, target))
        verified += sum(samples.latencies_ms)
    return {
        "exact_prompts": len(tasks),
        "exact_mismatches": sum(mismatches.values()),
        "exact_mismatches_by_way": dict(mismatches),
        "passes_per_token_ratio": round(wanted / passes, 3),
        "escalated_speedup": round(regenerated / verified, 3),
        "exact_speedup": chains[f"{ALL_ON}: small-large"]["speedup_over_largest"],
        "chains": chains,
        "alone": {
            name: {
                "latency_ms": _latency(samples.latencies_ms),
                "latency_ms_by_level": _by_level(tasks, samples.latencies_ms),
                "cost": round(statistics.mean(samples.costs), 3),
                "accuracy": round(
                    statistics.mean(
                        grade(task, records[-1].text)
                        for task, records in zip(tasks, samples.records, strict=True)
                    ),
                    4,
                ),
            }
            for name, samples in alone.items()
        },
    }


def _regenerating(samples: Samples, target: Samples) -> list[float]:
    """Return the latencies of a chain that throws its drafts away, in ms.

    As the chain was measured, with the target's own answer in place of its verification.
    """
    return [
        ms - records[-1].latency_ms + own[-1].latency_ms
        for ms, records, own in zip(samples.latencies_ms, samples.records, target.records, strict=True)
    ]


def _by_level(tasks: Sequence[Task], values: Sequence[float]) -> dict[str, float]:
    levels = collections.defaultdict(list)
    for task, value in zip(tasks, values, strict=True):
        levels[task.level].append(value)
    return {str(level): round(statistics.mean(each), 3) for level, each in sorted(levels.items())}


def _latency(values: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p95": 0.95}
    return {
        "mean": round(statistics.mean(values), 2),
        **{name: round(percentile(values, share), 2) for name, share in shares.items()},
    }


async def measure_tolerance(clients: Clients, tasks: Sequence[Task]) -> dict[str, object]:
    """EXACT beside TOLERANT at several thresholds: passes, time and quality."""
    rules = {"exact": None, **{f"{t:g}": Acceptance("tolerant", t) for t in THRESHOLDS}}
    curves = {}
    for pair in PAIRS:
        rows: dict[str, list[tuple[float, int, bool]]] = {name: [] for name in rules}
        for _, task, name in in_turns(tasks, rules, f"tolerance {'-'.join(pair)}"):
            request = Request(task.prompt, chain=pair, acceptance=rules[name])
            answer, ms = await clients.ask(SEQUENTIAL, request)
            rows[name].append((ms, answer.stages[-1].forward_passes, grade(task, answer.text)))
        curves["-".join(pair)] = {
            name: {
                "latency_ms": round(statistics.mean(ms for ms, _, _ in values), 2),
                "target_passes": round(statistics.mean(passes for _, passes, _ in values), 2),
                "accuracy": round(statistics.mean(right for _, _, right in values), 4),
            }
            for name, values in rows.items()
        }
    return {"tolerance": curves, "tolerance_prompts": len(tasks)}


async def measure_first_commit(clients: Clients, tasks: Sequence[Task]) -> dict[str, object]:
    """Time to the first committed token: the first stage alone, and chains with pipelining on and off."""
    ways = {
        "small alone": (ALL_ON, {"stage": "small"}),
        "large alone": (ALL_ON, {"stage": "large"}),
        "small-medium": (ALL_ON, {"chain": ("small", "medium")}),
        "small-large": (ALL_ON, {"chain": ("small", "large")}),
        "small-large, pipelining off": (SEQUENTIAL, {"chain": ("small", "large")}),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _, task, name in in_turns(tasks, ways, "first commit"):
        router, options = ways[name]
        client = await clients.client(router)
        request = Request(task.prompt, **options)  # type: ignore[arg-type]
        is_first = True
        started = time.perf_counter()
        async with aclosing(client.stream(request)) as events:
            async for event in events:
                if isinstance(event, Committed) and is_first:
                    is_first = False
                    times[name].append((time.perf_counter() - started) * 1000.0)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "first_commit_ratio": round(medians["small-large"] / medians["small alone"], 3),
        "first_commit_ratio_small_medium": round(medians["small-medium"] / medians["small alone"], 3),
        "first_commit_ms": {name: _latency(values) for name, values in times.items()},
        "first_commit_prompts": len(tasks),
    }


async def measure_adversarial(
    clients: Clients, stages: dict[str, str], tasks: Sequence[Task]
) -> dict[str, object]:
    """Random drafts: the whole system, and one verification, beside the largest stage alone."""
    ways = {
        "alone": ("random drafts", {"stage": "large"}),
        "adaptive": ("random drafts", {"chain": ("random", "large")}),
        "adaptive, sequential": ("random drafts, sequential", {"chain": ("random", "large")}),
        "not adaptive": ("random drafts, not adaptive", {"chain": ("random", "large")}),
    }
    times: dict[str, list[float]] = {name: [] for name in [*ways, "stage alone", "stage verifies"]}
    rng = random.Random(0)
    async with open_channel(stages["large"]) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)
        drafts = [
            common_pb2.Draft(text=random_text(rng), finish_reason=common_pb2.FINISH_REASON_EOS) for _ in tasks
        ]
        for index, task, name in in_turns(tasks, times, "random drafts"):
            started = time.perf_counter()
            if name in ways:
                router, options = ways[name]
                await clients.ask(router, Request(task.prompt, **options))  # type: ignore[arg-type]
            elif name == "stage verifies":
                verify = stage_pb2.VerifyRequest(prompt=task.prompt, draft=drafts[index])
                async for _ in stub.Verify(verify, timeout=CALL_TIMEOUT):
                    pass
            else:
                generate = stage_pb2.StageServiceGenerateRequest(prompt=task.prompt)
                async for _ in stub.Generate(generate, timeout=CALL_TIMEOUT):
                    pass
            times[name].append((time.perf_counter() - started) * 1000.0)
    means = {name: statistics.mean(values) for name, values in times.items()}
    return {
        "adversarial_slowdown": round(
            max(means["adaptive"], means["adaptive, sequential"]) / means["alone"], 4
        ),
        "adversarial_slowdown_not_adaptive": round(means["not adaptive"] / means["alone"], 4),
        "adversarial_slowdown_of_a_verification": round(means["stage verifies"] / means["stage alone"], 4),
        "adversarial_ms": {name: _latency(values) for name, values in times.items()},
        "adversarial_prompts": len(tasks),
    }


async def measure_policy_parts(clients: Clients, tasks: Sequence[Task]) -> dict[str, object]:
    """What the policy decides, with prefill-ahead and early abandon switched off in turn."""
    ways = (ALL_ON, NO_PREFILL, NO_ABANDON)
    rows: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in (*ways, "always large")}
    for _, task, name in in_turns(tasks, rows, "policy"):
        objective = Objective(preference="best")
        largest = Request(task.prompt, stage="large")
        request = largest if name == "always large" else Request(task.prompt, objective=objective)
        answer, ms = await clients.ask(ALL_ON if name == "always large" else name, request)
        rows[name].append((ms, answer.cost, grade(task, answer.text)))
    return {
        "policy_parts": {
            name: {
                "latency_ms": _latency([ms for ms, _, _ in values]),
                "cost": round(statistics.mean(cost for _, cost, _ in values), 3),
                "accuracy": round(statistics.mean(right for _, _, right in values), 4),
            }
            for name, values in rows.items()
        },
        "policy_parts_prompts": len(tasks),
    }


async def measure_exactness(tasks: Sequence[Task], side_by_side: int) -> dict[str, object]:
    """Whether every pair and chain, and what the policy decides, answers as the answering stage alone does.

    With every part switched off in turn. Time plays no part: so many cascades answer side by side.
    """
    mismatches: collections.Counter[str] = collections.Counter()
    with Progress(*Progress.get_default_columns(), console=_console) as progress:
        bar = progress.add_task("exactness", total=len(tasks))

        async def work(part: Sequence[Task]) -> None:
            async with running() as routers, AsyncExitStack() as stack:
                clients = Clients(routers, stack)
                for task in part:
                    mismatches.update(await _differences(clients, task))
                    progress.advance(bar)

        async with asyncio.TaskGroup() as group:
            for place in range(side_by_side):
                group.create_task(work(tasks[place::side_by_side]))
    return {
        "exactness_prompts": len(tasks),
        "exactness_answers": len(tasks) * len(mismatches),
        "exactness_mismatches": mismatches.total(),
        "exactness_mismatches_by_way": dict(mismatches),
    }


async def _differences(clients: Clients, task: Task) -> dict[str, int]:
    """Return by way whether its tokens differ from those of the stage alone that gave the answer."""
    alone = {}
    for name in NAMES:
        answer, _ = await clients.ask(BARE, Request(task.prompt, stage=name))
        alone[name] = answer.token_ids
    differences = {}
    for router in (ALL_ON, SEQUENTIAL, NO_RESYNC, NO_REUSE, BARE):
        for chain in CHAINS:
            answer, _ = await clients.ask(router, Request(task.prompt, chain=chain))
            differences[f"{router}: {'-'.join(chain)}"] = int(answer.token_ids != alone[chain[-1]])
    for router in (ALL_ON, SEQUENTIAL, NO_RESYNC, NO_REUSE, NO_PREFILL, NO_ABANDON, NOT_ADAPTIVE):
        request = Request(task.prompt, objective=Objective(preference="best"))
        answer, _ = await clients.ask(router, request)
        differences[f"{router}: policy"] = int(answer.token_ids != alone[answer.stage])
    return differences


async def measure_conversations(clients: Clients, tasks: Sequence[Task]) -> dict[str, object]:
    """Conversations of several turns, with reuse of what the turns before left in the prefix caches."""
    sessions = [tasks[start : start + TURNS] for start in range(0, len(tasks) - TURNS + 1, TURNS)]
    routes: dict[str, dict[str, object]] = {"large": {"stage": "large"}, "small-large": {"chain": CHAINS[1]}}
    ways = [(router, route) for router in (ALL_ON, NO_REUSE) for route in routes]
    later: dict[tuple[str, str], Samples] = {way: Samples([], [], []) for way in ways}
    rng = random.Random(0)
    for number, session in enumerate(track(sessions, "conversations", console=_console)):
        rng.shuffle(ways)
        for router, route in ways:
            turns: list[Message] = []
            for place, task in enumerate(session):
                turns.append(Message("user", task.prompt))
                key = f"{number}-{route}"
                request = Request(tuple(turns), session_id=key, **routes[route])  # type: ignore[arg-type]
                answer, ms = await clients.ask(router, request)
                turns.append(Message("assistant", answer.text))
                if place:
                    samples = later[router, route]
                    samples.latencies_ms.append(ms)
                    samples.records.append(answer.stages)
                    samples.answers.append(answer)
    figures: dict[str, object] = {}
    for route in routes:
        reused, anew = later[ALL_ON, route], later[NO_REUSE, route]
        last = [records[-1] for records in reused.records]
        figures[route] = {
            "hit_rate": round(
                sum(each.cached_prompt_tokens for each in last) / sum(each.prompt_tokens for each in last), 4
            ),
            "latency_ms": {ALL_ON: _latency(reused.latencies_ms), NO_REUSE: _latency(anew.latencies_ms)},
            "prefill_ms": {
                name: _latency([records[-1].prefill_ms for records in samples.records])
                for name, samples in ((ALL_ON, reused), (NO_REUSE, anew))
            },
            "speedup": round(statistics.mean(anew.latencies_ms) / statistics.mean(reused.latencies_ms), 3),
            "mismatches": sum(
                ours.token_ids != theirs.token_ids
                for ours, theirs in zip(reused.answers, anew.answers, strict=True)
            ),
        }
    return {"conversations": figures, "conversations_later_turns": len(later[ways[0]].answers)}


async def measure_evidence(stages: dict[str, str], tasks: Sequence[Task]) -> dict[str, object]:
    """How well single features tell whether a draft is right: its own, and what a verification shows."""
    async with AsyncExitStack() as stack:
        stubs = {
            name: stage_pb2_grpc.StageServiceStub(await stack.enter_async_context(open_channel(target)))
            for name, target in stages.items()
        }
        features: dict[str, list[float]] = collections.defaultdict(list)
        draft_right: list[bool] = []
        target_right: dict[str, list[bool]] = collections.defaultdict(list)
        for task in track(tasks, "evidence", console=_console):
            logprobs, margins, result = await _generate(stubs["small"], task.prompt)
            draft_right.append(grade(task, result.text))
            features["draft: least log-probability"].append(min(logprobs, default=0.0))
            features["draft: mean log-probability"].append(float(np.mean(logprobs or [0.0])))
            features["draft: mean top-2 margin"].append(float(np.mean(margins or [0.0])))
            draft = common_pb2.Draft(
                text=result.text,
                token_ids=result.token_ids,
                tokenizer_fingerprint=result.tokenizer_fingerprint,
                finish_reason=result.finish_reason,
            )
            for name in ("medium", "large"):
                check, answer = await _verify(stubs[name], task.prompt, draft)
                target_right[name].append(grade(task, answer.text))
                proposed = max(check.proposed_tokens, 1)
                features[f"{name}: accepted share"].append(check.accepted_tokens / proposed)
                features[f"{name}: place of the first reject"].append(
                    check.accepted_tokens if check.accepted_tokens < proposed else 1e6
                )
                features[f"{name}: greatest rank of a reject"].append(-max(check.ranks, default=0))
                features[f"{name}: least target log-probability"].append(
                    min(check.target_logprobs, default=0.0)
                )
    return {
        "evidence_auroc_draft_right": {
            name: round(area_under_roc(np.array(values), np.array(draft_right)), 4)
            for name, values in features.items()
        },
        "evidence_auroc_target_right": {
            target: {
                name: round(area_under_roc(np.array(values), np.array(right)), 4)
                for name, values in features.items()
                if name.startswith(("draft", target))
            }
            for target, right in target_right.items()
        },
        "evidence_prompts": len(tasks),
    }


async def _generate(
    stub: stage_pb2_grpc.StageServiceAsyncStub, prompt: str
) -> tuple[list[float], list[float], stage_pb2.StageResult]:
    logprobs: list[float] = []
    margins: list[float] = []
    result = stage_pb2.StageResult()
    request = stage_pb2.StageServiceGenerateRequest(prompt=prompt)
    async for response in stub.Generate(request, timeout=CALL_TIMEOUT):
        logprobs += response.tokens.logprobs
        margins += response.tokens.top2_margins
        if response.HasField("result"):
            result = response.result
    return logprobs, margins, result


async def _verify(
    stub: stage_pb2_grpc.StageServiceAsyncStub, prompt: str, draft: common_pb2.Draft
) -> tuple[stage_pb2.Verification, stage_pb2.StageResult]:
    check, result = stage_pb2.Verification(), stage_pb2.StageResult()
    request = stage_pb2.VerifyRequest(prompt=prompt, draft=draft)
    async for response in stub.Verify(request, timeout=CALL_TIMEOUT):
        if response.HasField("verification"):
            check = response.verification
        elif response.HasField("result"):
            result = response.result
    return check, result


MEASUREMENTS = (
    "exact",
    "tolerance",
    "first_commit",
    "adversarial",
    "policy_parts",
    "evidence",
    "conversations",
    "exactness",
)


async def measure(names: Iterable[str], share: float, side_by_side: int) -> dict[str, object]:
    """Run measurements one after the other; return all figures.

    share: of the prompts. side_by_side: cascades that answer where time is not measured.
    """
    tasks = list(split("evaluation", max(round(2000 * share), 4)))
    few = tasks[: max(round(200 * share), 4)]
    figures: dict[str, object] = {}
    async with running() as routers, AsyncExitStack() as stack:
        clients = Clients(routers, stack)
        runs = {
            "exact": lambda: measure_exact(clients, tasks),
            "tolerance": lambda: measure_tolerance(clients, few),
            "first_commit": lambda: measure_first_commit(clients, few),
            "adversarial": lambda: measure_adversarial(clients, routers.stages, few),
            "policy_parts": lambda: measure_policy_parts(clients, few),
            "evidence": lambda: measure_evidence(routers.stages, tasks),
            "conversations": lambda: measure_conversations(clients, tasks[: 3 * len(few)]),
            "exactness": lambda: measure_exactness(tasks, side_by_side),
        }
        # Warm every model: the first pass of each pays for memory.
        for router in routers.routers:
            for _ in range(3):
                await clients.ask(router, Request(tasks[0].prompt, stage="large"))
        for name in names:
            started = time.perf_counter()
            figures |= await runs[name]()
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Measure what was asked for; a full run is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.escalation", description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=[*MEASUREMENTS, []], help="print these alone, keep nothing"
    )
    parser.add_argument("--keep", action="store_true", help="with names: replace older figures")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts; below 1 nothing is kept")
    parser.add_argument(
        "--side-by-side", type=int, default=2, help="cascades at work where time is not measured (exactness)"
    )
    options = parser.parse_args()
    figures = run_service(measure(options.only or MEASUREMENTS, options.share, options.side_by_side))
    print(json.dumps(figures, indent=2))
    if not options.only and options.share >= 1.0:
        print(write_result("escalation", "make bench-escalation", figures), file=sys.stderr)
        draw_plots(figures, ROOT / "docs" / "results")
    elif options.keep and options.share >= 1.0:
        command = f"python -m benchmarks.escalation {' '.join(options.only)} --keep"
        print(update_result("escalation", command, figures), file=sys.stderr)


if __name__ == "__main__":
    main()
