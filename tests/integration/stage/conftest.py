"""Engines and stage servers over the committed models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest

from asd.v1 import stage_pb2_grpc
from services.common.server import ServiceRegistration, start_server
from services.stage.onnx_engine import OnnxEngine, OnnxOptions
from services.stage.residency import Residency
from services.stage.servicer import StageServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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


class Stage(NamedTuple):
    """A running stage server and a stub to call it."""

    stub: stage_pb2_grpc.StageServiceAsyncStub
    channel: grpc.aio.Channel
    servicer: StageServicer


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    engines = {name: engine(name, max_queue=4) for name in ("small", "medium")}
    residency = Residency(engines, "small")
    await residency.load("small")
    servicer = StageServicer(residency)
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
