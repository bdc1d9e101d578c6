"""Asks a cascade at an even pace and writes a line of JSON for every request. Runs in a pod.

A request is sent when its time has come, whether earlier ones are answered or not, so that a stand-still is
seen in every request that it held up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from pathlib import Path

import suites
from asd.client import AsyncClient
from asd.errors import AsdError
from asd.values import Request


def _say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def _reach(cascade: AsyncClient) -> None:
    """Return once the cascade answers: a cluster's names may be seconds behind its pods."""
    while True:
        with contextlib.suppress(AsdError):
            await cascade.ask(Request("9 plus 10?"))
            return
        await asyncio.sleep(0.2)


async def _ask(cascade: AsyncClient, prompt: str) -> None:
    at = time.time()
    started = time.monotonic()
    stage = error = trace_id = ""
    try:
        answer = await cascade.ask(Request(prompt))
        stage, trace_id = answer.stage, answer.trace_id
    except AsdError as failure:
        error = f"{type(failure).__name__}: {failure.message}"
    _say(at=at, ms=(time.monotonic() - started) * 1000.0, stage=stage, error=error, trace_id=trace_id)


async def _run(options: argparse.Namespace) -> None:
    prompts = [task.prompt for task in suites.split("evaluation", 500, seed=0)]
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    async with AsyncClient(options.target, timeout_ms=options.timeout_ms) as cascade:
        await _reach(cascade)
        _say(started=True)
        under_way: set[asyncio.Task[None]] = set()
        first = time.monotonic()
        sent = 0
        while not end.is_set() and (
            sent < options.requests or (options.until and not options.until.exists())
        ):
            pause = first + sent / options.rate - time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), max(pause, 0.0))
                break
            task = asyncio.create_task(_ask(cascade, prompts[sent % len(prompts)]))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            sent += 1
        await asyncio.gather(*under_way)
    _say(finished=sent)


def main() -> None:
    """Ask."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True)
    parser.add_argument("--requests", type=int, required=True, help="at least so many")
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--until", type=Path, help="go on until this file is there")
    parser.add_argument("--timeout-ms", type=float, default=30_000.0)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
