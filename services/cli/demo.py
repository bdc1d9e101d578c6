"""Asks a cascade graded questions, and its largest stage the same ones, and compares the two."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import suites
from asd.values import Objective, Request
from services.common.stats import percentile

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from asd.client import AsyncClient
    from asd.values import Answer

EXAMPLE_PROMPTS = (
    "Max has 9 beads. Max finds 10 more. How many beads does Max have now?",
    "What is Statnor known for? A) iron B) lamps C) grain",
    "True or false? 3 plus 22 is more than 24.",
)
"""Questions of the suites that fit on a command line."""
EXAMPLE_PROMPT = EXAMPLE_PROMPTS[0]

# One task of each suite at each level.
ROUND = len(suites.SUITES) * len(suites.LEVELS)


@dataclass(frozen=True)
class DemoAnswer:
    """One answer to a graded question. latency_ms: from the call to the whole answer, seen by the client."""

    text: str
    is_right: bool
    stage: str
    stage_index: int
    p_correct: float | None
    latency_ms: float
    cost: float
    plan_source: str
    policy_version: str


@dataclass(frozen=True)
class DemoRow:
    """One question, answered by the cascade and by its largest stage."""

    suite: str
    level: int
    prompt: str
    wanted: str
    cascade: DemoAnswer
    largest: DemoAnswer


@dataclass(frozen=True)
class DemoSummary:
    """Means over the questions; costs in cost units. early_stop_share: answered before the last stage.

    speedup: latency_largest_ms / latency_ms. stage_shares: share of the answers by answering stage.
    """

    prompts: int
    accuracy: float
    accuracy_largest: float
    latency_ms: float
    latency_largest_ms: float
    latency_p95_ms: float
    latency_largest_p95_ms: float
    cost: float
    cost_largest: float
    early_stop_share: float
    speedup: float
    stage_shares: dict[str, float]
    largest_stage: str
    plan_sources: tuple[str, ...]
    policy_version: str


def choose_tasks(count: int, seed: int = 0) -> list[suites.Task]:
    """Return tasks of the demo split, each suite and level as often; a rest is drawn at random."""
    rounds = math.ceil(count / ROUND)
    tasks = list(suites.split("demo", rounds * ROUND, seed))
    whole, last = tasks[: (rounds - 1) * ROUND], tasks[(rounds - 1) * ROUND :]
    drawn = random.Random(seed).sample(range(ROUND), count - len(whole))  # noqa: S311 - a choice of examples
    return whole + [last[index] for index in sorted(drawn)]


async def ask_both_ways(
    cascade: AsyncClient, tasks: Sequence[suites.Task], objective: Objective
) -> AsyncGenerator[DemoRow, None]:
    """Yield each task's outcomes, one request at a time.

    The two ways take turns at going first, since the second finds the prompt in the stages' prefix caches.
    Every stage answers and verifies once before the first task, unmeasured. Raises as AsyncClient.
    """
    stages = [stage.stage for stage in (await cascade.describe()).stages]
    largest = stages[-1]
    for stage in (*stages, ""):
        await cascade.ask(Request(EXAMPLE_PROMPT, objective=objective, stage=stage))
    if len(stages) > 1:
        await cascade.ask(Request(EXAMPLE_PROMPT, chain=tuple(stages)))
    for task, cascade_first in zip(tasks, itertools.cycle((True, False)), strict=False):
        outcomes = {}
        for stage in ("", largest) if cascade_first else (largest, ""):
            outcomes[stage] = await _ask(cascade, task, objective, stage)
        yield DemoRow(task.suite, task.level, task.prompt, task.answer, outcomes[""], outcomes[largest])


async def _ask(cascade: AsyncClient, task: suites.Task, objective: Objective, stage: str) -> DemoAnswer:
    started = time.perf_counter()
    answer: Answer = await cascade.ask(Request(task.prompt, objective=objective, stage=stage))
    latency_ms = (time.perf_counter() - started) * 1000.0
    return DemoAnswer(
        answer.text,
        suites.grade(task, answer.text),
        answer.stage,
        answer.stage_index,
        answer.p_correct,
        latency_ms,
        answer.cost,
        answer.plan_source,
        answer.policy_version,
    )


def summarise(rows: Sequence[DemoRow]) -> DemoSummary:
    """Return the means over one or more rows."""
    cascade, largest = [row.cascade for row in rows], [row.largest for row in rows]
    last_index = largest[0].stage_index
    latency_ms, latency_largest_ms = (
        statistics.fmean(each.latency_ms for each in outcomes) for outcomes in (cascade, largest)
    )
    answering = [each.stage for each in cascade]
    return DemoSummary(
        prompts=len(rows),
        accuracy=statistics.fmean(each.is_right for each in cascade),
        accuracy_largest=statistics.fmean(each.is_right for each in largest),
        latency_ms=latency_ms,
        latency_largest_ms=latency_largest_ms,
        latency_p95_ms=percentile([each.latency_ms for each in cascade], 0.95),
        latency_largest_p95_ms=percentile([each.latency_ms for each in largest], 0.95),
        cost=statistics.fmean(each.cost for each in cascade),
        cost_largest=statistics.fmean(each.cost for each in largest),
        early_stop_share=statistics.fmean(each.stage_index < last_index for each in cascade),
        speedup=latency_largest_ms / latency_ms,
        stage_shares={
            stage: answering.count(stage) / len(rows)
            for stage in sorted(set(answering), key=lambda name: -answering.count(name))
        },
        largest_stage=largest[0].stage,
        plan_sources=tuple(sorted({each.plan_source for each in cascade})),
        policy_version=next((each.policy_version for each in cascade if each.policy_version), ""),
    )
