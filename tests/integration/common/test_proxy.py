"""An HTTP proxy is for what leaves the network: asd's own connections take one only where gRPC is told to."""

from __future__ import annotations

import ast
import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from asd.errors import AsdError
from asd.transport.channel import call_unary
from services.common.channel import open_channel
from services.common.server import start_server
from tests.integration.common.conftest import CALL_S, PROCESS_S
from tests.integration.common.test_otlp import receiver  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.common.test_otlp import Receiver

ROOT = Path(__file__).parents[3]
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy")
CHECK = health_pb2.HealthCheckRequest()


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, asyncio.Future[str]]]:
    """Run a proxy that refuses; yield its address, and what is first asked of it."""
    asked: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).decode().strip()
        if not asked.done():
            asked.set_result(line)
        writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", asked


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of proxies."""
    for variable in VARIABLES:
        for each in (variable, variable.upper()):
            monkeypatch.delenv(each, raising=False)
    return monkeypatch


async def check(port: int) -> None:
    async with open_channel(f"127.0.0.1:{port}", retry=False) as channel:
        await call_unary(health_pb2_grpc.HealthStub(channel).Check, CHECK, timeout_ms=CALL_S * 1e3)


async def test_a_channel_passes_the_proxies_of_the_environment_by(environment: pytest.MonkeyPatch) -> None:
    server, port = await start_server("127.0.0.1:0", [])
    async with proxy() as (address, asked):
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            environment.setenv(variable, address)
        await check(port)
        assert not asked.done()
    await server.stop(0)


async def test_a_channel_takes_the_proxy_that_grpc_is_told(environment: pytest.MonkeyPatch) -> None:
    server, port = await start_server("127.0.0.1:0", [])
    async with proxy() as (address, asked):
        environment.setenv("grpc_proxy", address)
        with pytest.raises(AsdError):
            await check(port)
        assert await asked == f"CONNECT 127.0.0.1:{port} HTTP/1.1"
    await server.stop(0)


async def test_telemetry_passes_them_by_as_well(
    environment: pytest.MonkeyPatch,
    receiver: Receiver,  # noqa: F811 - the fixture
) -> None:
    async with proxy() as (address, asked):
        for variable in ("http_proxy", "https_proxy"):
            environment.setenv(variable, address)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.monitoring.exported", "otlp"), cwd=ROOT
        )
        async with asyncio.timeout(PROCESS_S):
            assert await process.wait() == 0
        assert not asked.done()
    assert receiver.metrics["asd-all"]
    assert receiver.spans["asd-all"]


def test_nothing_else_opens_a_channel() -> None:
    """What does would take a proxy of the environment."""
    found = set()
    for folder in ("clients", "services", "policy_service", "benchmarks", "k8s", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            if names & {"insecure_channel", "secure_channel"}:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {f"clients/python/asd/transport/{name}.py" for name in ("blocking", "channel")}
