"""Services as processes of their own, and their health."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

# A fixture.
from tests.integration.router.conftest import world  # noqa: F401
from tests.limits import CALL_S, PROCESS_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import grpc


class Running(NamedTuple):
    """A service's process that said READY, and where it serves."""

    process: Process
    target: str

    async def stop(self, number: int) -> tuple[int, str]:
        """Send a signal, wait for the end, and return the exit code and what the process logged."""
        self.process.send_signal(number)
        return await self.end()

    async def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what the process logged."""
        async with asyncio.timeout(PROCESS_S):
            _, log = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, log.decode()


@asynccontextmanager
async def running(module: str, config: dict[str, Any], folder: Path) -> AsyncIterator[Running]:
    """Run `python -m MODULE` with a configuration, on a free port, until the block ends."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **config}))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "--config", str(file)), stdout=PIPE, stderr=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PROCESS_S):
            words = (await process.stdout.readline()).decode().split()
        assert words[:1] == ["READY"], words
        yield Running(process, words[-1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Health:
    """What a service says of its health, as it changes."""

    def __init__(self, channel: grpc.aio.Channel, service: str) -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=CALL_S)

    async def next(self) -> str:
        """Return the next state's name."""
        response = await self._call.read()
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def leave(self) -> None:
        """Stop watching: a server that drains waits for its watchers as for every call."""
        self._call.cancel()
