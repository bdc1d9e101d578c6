"""Requests to a cascade whose processes are asked to end, one after another, and started again meanwhile.

`python -m tests.integration.local.disruption` measures it: `--victims router,small` says which processes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from asd.client import AsyncClient
from asd.errors import AsdError
from asd.values import Answer, Request
from services.local.cascade_file import HOST, ROUTER, Service
from services.local.supervisor import Supervisor, free_ports
from tests.fakes import quick_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STAGES = ("small", "medium", "large")
REQUESTS = 2000
ENDS = 50
TEXT = "".join(quick_stage.WORDS)
# Where the quick stage's module lies: children are started without this folder on their path.
PATH = str(Path(quick_stage.__file__).parent)
AT_ONCE = 12
# Of a call: far more than a process takes to come back, on a busy machine too.
TIMEOUT_MS = 60_000.0
_PROMPT = "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"
# With a fixed stage, by the static plan, and with a chain.
_KINDS: tuple[Callable[[str], Request], ...] = (
    lambda stage: Request(_PROMPT, stage=stage),
    lambda _: Request(_PROMPT),
    lambda _: Request(_PROMPT, chain=STAGES),
)


def services() -> list[Service]:
    """Return a router and three quick stages, on free ports."""
    ports = free_ports(len(STAGES))
    stages = [
        {"name": name, "target": f"{HOST}:{port}", "cost": 1.0 + place}
        for place, (name, port) in enumerate(zip(STAGES, ports.stages, strict=True))
    ]
    config = {
        "listen": f"{HOST}:{ports.router}",
        "stages": stages,
        "static_plan": ["small", "medium"],
        "drain_seconds": 10.0,
    }
    return [
        Service(ROUTER, "services.router", config, ports.router),
        *(
            Service(name, "quick_stage", {"listen": f"{HOST}:{port}", "drain_seconds": 10.0}, port)
            for name, port in zip(STAGES, ports.stages, strict=True)
        ),
    ]


@dataclass
class Disturbed:
    """What became of the requests, and how often which process was asked to end."""

    answered: int = 0
    failures: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)


async def disturb(
    folder: Path, *, requests: int, ends: int, victims: Sequence[str], seed: int = 0
) -> Disturbed:
    """Send requests, some at a time, and SIGTERM to processes that serve; return what became of them.

    One process is asked to end each time a further share of the requests is over.
    """
    outcome = Disturbed()
    rng = random.Random(seed)
    serving: set[str] = set(victims)
    changed = asyncio.Event()

    def say(line: str) -> None:
        if "serves again" in line:
            serving.add(line.partition(" ")[0])
            changed.set()

    chosen = services()
    async with (
        Supervisor(chosen, folder, say=say) as supervisor,
        AsyncClient(chosen[0].address, timeout_ms=TIMEOUT_MS) as cascade,
    ):
        children = {child.service.name: child for child in supervisor.children}
        numbers = iter(range(requests))
        over = 0

        async def end_one() -> None:
            while not serving:
                changed.clear()
                await changed.wait()
            victim = rng.choice(sorted(serving))
            serving.discard(victim)
            outcome.ended[victim] += 1
            os.kill(children[victim].pid, signal.SIGTERM)

        async def work() -> None:
            nonlocal over
            for number in numbers:
                problem = await _ask(cascade, number)
                if problem:
                    outcome.failures.append(problem)
                else:
                    outcome.answered += 1
                over += 1
                if over * ends // requests > (over - 1) * ends // requests:
                    await end_one()

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return outcome


async def _ask(cascade: AsyncClient, number: int) -> str:
    """Return what is wrong with the answer to a request, or ""."""
    request = _KINDS[number // 3 % 3](STAGES[number % 3])
    try:
        if number % 2:
            answer = await cascade.ask(request)
        else:
            answer = await _streamed(cascade, request)
    except AsdError as error:
        return f"{request.stage or request.chain}: {type(error).__name__}: {error.message}"
    return "" if answer.text == TEXT else f"{request.stage or request.chain} answered {answer.text!r}"


async def _streamed(cascade: AsyncClient, request: Request) -> Answer:
    async with aclosing(cascade.stream(request)) as events:
        async for event in events:
            if isinstance(event, Answer):
                return event
    raise AssertionError("a stream without an answer")


def main() -> None:
    """Print what became of the requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--ends", type=int, default=ENDS, help="SIGTERMs")
    parser.add_argument("--victims", default=",".join(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = PATH
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(
            disturb(
                Path(folder),
                requests=options.requests,
                ends=options.ends,
                victims=options.victims.split(","),
                seed=options.seed,
            )
        )
    lines = [
        f"{outcome.answered} answered, {len(outcome.failures)} failed, {outcome.ended.total()} SIGTERMs "
        f"{dict(outcome.ended)}, {time.monotonic() - started:.0f} s",
        *(f"{count} {failure}" for failure, count in Counter(outcome.failures).most_common(20)),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
