"""Services as processes, for benchmarks."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ROOT = Path(__file__).parents[1]
READY_TIMEOUT = 60.0


@asynccontextmanager
async def process(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Run a service; yield its address and its process. environment: added to this process's own."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert child.stdout is not None
        line = (await asyncio.wait_for(child.stdout.readline(), READY_TIMEOUT)).decode().split()
        if line[:1] != ["READY"]:
            raise SystemExit(f"{module} did not start")
        yield line[2], psutil.Process(child.pid)
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()
