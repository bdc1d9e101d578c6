"""Services as processes, for benchmarks."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil
import yaml

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ROOT = Path(__file__).parents[1]
READY_TIMEOUT = 60.0


@asynccontextmanager
async def process(
    module: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    errors: IO[str] | None = None,
    folder: Path = ROOT,
) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Run a service; yield its address and its process.

    environment: added to this process's own. errors: takes what it logs; None: this process's standard error.
    folder: where it runs.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=errors,
        cwd=folder,
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


@asynccontextmanager
async def service(
    module: str, settings: Mapping[str, object], environment: Mapping[str, str] | None = None
) -> AsyncIterator[str]:
    """Run a service with these settings, on a port that it chooses; yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.yaml")
        file.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **settings}), encoding="utf-8")
        async with process(module, "--config", str(file), environment=environment) as (address, _):
            yield address


@asynccontextmanager
async def embedded_cascade(port_base: int = 21050, cascade: Path | None = None) -> AsyncIterator[str]:
    """Run `asd up` without its gateway; yield its router's address. cascade: in place of the embedded one."""
    options = ["--json", "--no-gateway", "--port-base", str(port_base)]
    if cascade is not None:
        options += ["--cascade", str(cascade)]
    command = [sys.executable, "-m", "services.cli", "up", *options]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout is not None
        await asyncio.wait_for(child.stdout.readuntil(b"\n"), READY_TIMEOUT)
        yield f"127.0.0.1:{port_base}"
    finally:
        child.terminate()
        await child.wait()
