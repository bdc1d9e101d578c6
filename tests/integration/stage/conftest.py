"""Engines and stage servers over the committed models."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import weakref
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import onnxruntime_genai
import pytest

from asd.v1 import stage_pb2_grpc
from services.common.server import ServiceRegistration, start_server
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.model_pool import ModelPool
from services.stage.servicer import StageServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ROOT = Path(__file__).parents[3]


class Reference(NamedTuple):
    """What transformers writes: one list of ids per prompt and model."""

    prompts: list[str]
    outputs: dict[str, list[list[int]]]


@pytest.fixture(scope="session")
def reference() -> Reference:
    with gzip.open(ROOT / "tests" / "data" / "reference.json.gz", "rt") as file:
        content: dict[str, Any] = json.load(file)
    return Reference(content["prompts"], content["outputs"])


def engine(name: str, **options: int) -> OnnxEngine:
    return OnnxEngine(name, ROOT / "models" / name, OnnxOptions(**options))


class LiveGenerators:
    """The library's generators that exist, each with a KV cache. Put it in the library's place of them."""

    def __init__(self) -> None:
        self._make = onnxruntime_genai.Generator
        # Models' threads make them and let them go.
        self._lock = threading.RLock()
        self._alive = 0
        self._on_end: Callable[[], object] | None = None
        self.made = 0

    def __call__(self, *args: Any) -> Any:
        generator = self._make(*args)
        with self._lock:
            self._alive += 1
            self.made += 1
        weakref.finalize(generator, self._ended).atexit = False
        return generator

    async def sink_to(self, most: int) -> None:
        """Return once no more are alive: a model's thread lets them go after its caller has left."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._on_end = lambda: loop.call_soon_threadsafe(ended.set)
        try:
            while self._alive > most:
                await ended.wait()
                ended.clear()
        finally:
            with self._lock:
                self._on_end = None

    def _ended(self) -> None:
        with self._lock:
            self._alive -= 1
            if self._on_end is not None:
                self._on_end()


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> LiveGenerators:
    live = LiveGenerators()
    monkeypatch.setattr(onnxruntime_genai, "Generator", live)
    return live


class Stage(NamedTuple):
    """A running stage server and a stub to call it."""

    stub: stage_pb2_grpc.StageServiceAsyncStub
    channel: grpc.aio.Channel
    servicer: StageServicer


@asynccontextmanager
async def serving(engines: dict[str, Any]) -> AsyncIterator[Stage]:
    """Serve models over gRPC; the one named small is loaded."""
    pool = ModelPool(engines, "small")
    await pool.load("small")
    servicer = StageServicer(pool)
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Stage(stage_pb2_grpc.StageServiceStub(channel), channel, servicer)  # type: ignore[arg-type]
    finally:
        await server.stop(None)
        for each in engines.values():
            await each.unload()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with serving({name: engine(name, max_queue=4) for name in ("small", "medium")}) as found:
        yield found
