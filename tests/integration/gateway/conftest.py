"""A gateway on a free port, before a router that answers from a script."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import httpx2
import pytest

from asd.client import AsyncClient
from services.common import telemetry
from services.gateway.app import Gateway
from services.gateway.cascade import Cascade
from services.gateway.instruments import AccessLog, Instruments
from services.gateway.server import listen, make_server
from services.gateway.settings import GatewaySettings
from tests.fakes.fake_router import FakeRouter

# Fixtures.
from tests.integration.local.conftest import cascade_file, start_up, up  # noqa: F401
from tests.limits import CALL_S
from tests.recording import metered, recorded  # noqa: F401


class Running:
    """A gateway that serves, and its router."""

    def __init__(self, app, server, router, port, scheme):
        self.app, self.server, self.router, self.port = app, server, router, port
        self.url = f"{scheme}://127.0.0.1:{port}"

    def client(self, **options):
        """Return an HTTP client of the gateway."""
        return httpx2.AsyncClient(base_url=self.url, timeout=CALL_S, trust_env=False, **options)

    async def post(self, path, body, headers=None):
        """Post JSON over a connection of its own."""
        async with self.client() as client:
            return await client.post(path, json=body, headers=headers)

    async def get(self, path, headers=None):
        """Get a path over a connection of its own."""
        async with self.client() as client:
            return await client.get(path, headers=headers)

    async def connect(self):
        """Return a connection's reader and writer."""
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def serving(target, router=None, **settings):
    """Run a gateway before the router at a target."""
    known = GatewaySettings(
        **{
            "listen": "127.0.0.1:0",
            "router": {"target": target, "timeout_ms": CALL_S * 1000.0},
            "drain_seconds": 0.0,
            **settings,
        }
    )
    listening = listen(known.listen)
    interceptors = telemetry.client_interceptors() or ()
    async with AsyncClient(target, interceptors=interceptors) as client:
        cascade = Cascade(client, target, known.router.timeout_ms, time.monotonic)
        log = AccessLog(is_on=known.access_log)
        app = Gateway(known, cascade, Instruments(), log, lambda: b"metrics 1\n")
        server = make_server(app, known)
        task = asyncio.create_task(server.serve([listening]))
        try:
            scheme = "https" if known.tls else "http"
            yield Running(app, server, router, listening.getsockname()[1], scheme)
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def running(router, **settings):
    """Run a gateway before a router that is started here too."""
    upstream, port = await router.start()
    try:
        async with serving(f"127.0.0.1:{port}", router, **settings) as made:
            yield made
    finally:
        await upstream.stop(0)


@pytest.fixture
async def gateway():
    async with running(FakeRouter()) as made:
        yield made
