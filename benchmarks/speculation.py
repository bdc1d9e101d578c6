"""The rule about drafts in simulated time, beside always verifying and never drafting.

    python -m benchmarks.speculation

A drafter of a 13B's or a 34B's speed before a 70B (benchmarks/simulation.py), 1 to 64 requests at a time,
shares of accepted tokens from 0 to 1, chains and escalations, one router and four. `learnt`: tokens per
second after max(40, 4 x at a time) requests, over as many, as a share of the better one of the two ways;
`kept`: the same after 500 more, over 1,000, with the first seed. `falling`: one router at 64, 8 and 1 at a
time, as benchmarks/gpu/cascade.py measures it, beside never drafting. Writes
benchmarks/results/speculation.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from typing import TYPE_CHECKING, Any

from benchmarks import arguments as kinds
from benchmarks.record import write_result
from benchmarks.simulation import ClosedLoop, Workload
from services.router.planning.draft_selection import DraftSelection

if TYPE_CHECKING:
    from collections.abc import Sequence

AT_A_TIME = (1, 2, 4, 8, 16, 32, 64)
ACCEPTED = (0.0, 0.25, 0.5, 0.75, 1.0)
# Shares drawn for each request, where a drafter is right on some prompts only.
MIXED = ((0.0, 0.5), (0.0, 1.0), (0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0))
ROUTERS = (1, 4)
# Answers to learn from and timed ones, per request at a time, as in benchmarks/gpu/cascade.py.
LEARNING, TIMED = 5, 4
LATER, KEPT = 500, 1_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.speculation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=kinds.count, default=2)
    options = parser.parse_args(arguments)
    workloads = {
        "chains": [Workload(drafter, (share,)) for drafter, share in _drafts()],
        "escalations": [Workload(drafter, (share,), has_draft=True) for drafter, share in _drafts()],
        "lengths of 32 to 96": [Workload(drafter, (share,), (32, 96)) for drafter, share in _drafts()],
        "mixed shares": [
            Workload(drafter, shares, (32, 96)) for drafter in ("13b", "34b") for shares in MIXED
        ],
    }
    figures = {
        name: {f"{routers} routers": _summary(each, routers, options.seeds) for routers in ROUTERS}
        for name, each in workloads.items()
    }
    figures["falling"] = {str(share): _falling(share) for share in (1.0, 0.5, 0.0)}
    command = " ".join(
        ["python -m benchmarks.speculation", *(sys.argv[1:] if arguments is None else arguments)]
    )
    sys.stdout.write(f"{write_result('speculation', command, figures)}\n")


def _drafts() -> list[tuple[str, float]]:
    return list(itertools.product(("13b", "34b"), ACCEPTED))


def _summary(workloads: Sequence[Workload], routers: int, seeds: int) -> dict[str, Any]:
    """Return the worst cells and the mean, over seeds."""
    learnt, kept = [], []
    for workload, at_a_time in itertools.product(workloads, AT_A_TIME):
        few = max(40, 4 * at_a_time)
        best = max(_way(workload, at_a_time, never=never) for never in (True, False))
        for seed in range(seeds):
            loop = ClosedLoop(workload, routers=routers, seed=seed)
            loop.answers(at_a_time, few)
            share = loop.answers(at_a_time, few) / best
            learnt.append((share, f"{workload.drafter} {workload.shares} at {at_a_time}, seed {seed}"))
            if seed == 0:
                loop.answers(at_a_time, LATER)
                kept.append(loop.answers(at_a_time, KEPT) / best)
    return {
        "cells": len(learnt),
        "learnt_worst": round(min(learnt)[0], 3),
        "learnt_worst_cell": min(learnt)[1],
        "learnt_mean": round(statistics.mean(share for share, _ in learnt), 3),
        "learnt_below_0.9": sum(share < 0.9 for share, _ in learnt),
        "kept_worst": round(min(kept), 3),
        "kept_mean": round(statistics.mean(kept), 3),
    }


def _way(workload: Workload, at_a_time: int, *, never: bool) -> float:
    """Return the tokens per second of never drafting or of always verifying."""
    loop = ClosedLoop(workload, lambda clock: DraftSelection(clock, enabled=False), never=never)
    loop.answers(at_a_time, max(40, 4 * at_a_time))
    return loop.answers(at_a_time, 20 * at_a_time + 200)


def _falling(share: float) -> dict[str, float]:
    """Return the rate beside never drafting at 64, at 8 and at 1 at a time, one after the other."""
    found: dict[str, float] = {}
    loops = [ClosedLoop(Workload("13b", (share,)), never=never) for never in (False, True)]
    for at_a_time in (64, 8, 1):
        rates = []
        for loop in loops:
            loop.answers(at_a_time, max(40, LEARNING * at_a_time))
            rates.append(loop.answers(at_a_time, max(TIMED * at_a_time, 10)))
            loop.drain()
        found[str(at_a_time)] = round(rates[0] / rates[1], 2)
    return found


if __name__ == "__main__":
    main()
