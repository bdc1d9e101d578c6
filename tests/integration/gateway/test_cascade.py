"""Calls to the router that are given up."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest

from asd.client import AsyncClient
from asd.values import Request
from services.gateway.cascade import Cascade
from tests.fakes.fake_router import FakeRouter
from tests.limits import CALL_S


@pytest.fixture
def uncollected():
    """Leave memory to reference counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_a_cancelled_stream_leaves_nothing_to_the_collector(uncollected):
    router = FakeRouter()
    router.hold.clear()
    server, port = await router.start()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        cascade = Cascade(client, "", CALL_S * 1000.0, time.monotonic)

        async def listen():
            async with cascade.stream("", [Request("Hi")]) as queue:
                await queue.get()

        task = asyncio.create_task(listen())
        before = asyncio.all_tasks()
        async with asyncio.timeout(CALL_S):
            await router.begun.wait()
            (follower,) = [
                weakref.ref(each) for each in asyncio.all_tasks() - before if "_follow" in str(each)
            ]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await router.idle.wait()
        del task
        assert follower() is None
    await server.stop(0)
