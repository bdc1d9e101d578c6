"""What bounds a stage: its memory, its queue, a model's context. Each as the settings say, and over gRPC."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest

from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from services.common.server import ServiceRegistration, start_server
from services.stage.__main__ import build
from services.stage.settings import StageSettings
from tests.integration.stage.conftest import engine
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.stage.model_pool import ModelPool

MODELS = Path(__file__).parents[3] / "models"
Generate = stage_pb2.StageServiceGenerateRequest
Step = stage_pb2.VerifyStreamRequest
START = Step(start=stage_pb2.VerifyStreamStart(prompt="True or false? 3 plus 22 is more than 24."))
END = Step(end=stage_pb2.DraftEnd(finish_reason=common_pb2.FINISH_REASON_EOS))


class Built(NamedTuple):
    """A stage as its settings build it, and a stub to call it."""

    stub: Any
    pool: ModelPool


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Return a function that serves copies of the small model, by name, under further settings."""
    async with AsyncExitStack() as stack:

        async def serve(*names: str, model: dict[str, int] | None = None, **settings: int) -> Built:
            entries = [{"name": name, "path": MODELS / "small", **(model or {})} for name in names]
            pool, servicer = build(StageSettings(models=entries, **settings))  # type: ignore[arg-type]
            for each in pool.engines.values():
                stack.push_async_callback(each.unload)
            registration = ServiceRegistration(
                "asd.v1.StageService",
                lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
            )
            server, port = await start_server("127.0.0.1:0", [registration])
            stack.push_async_callback(server.stop, 0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            return Built(stage_pb2_grpc.StageServiceStub(channel), pool)

        yield serve


async def hold(stub: Any, model: str = "", caller: int = 0) -> Any:
    """Return a call that a model works on, and that ends when END is written to it."""
    call = stub.VerifyStream(timeout=CALL_S)
    start = stage_pb2.VerifyStreamStart(prompt=START.start.prompt, model=model, caller=caller)
    await call.write(Step(start=start))
    assert (await call.read()).HasField("tokens")
    return call


async def hold_all(stub: Any) -> list[Any]:
    """Return calls that hold every lane of a model with max_lanes 1: eight may wait for a draft."""
    return [await hold(stub) for _ in range(8)]


async def release(call: Any) -> stage_pb2.StageResult:
    """Return what a held call ends with."""
    await call.write(END)
    await call.done_writing()
    last = stage_pb2.VerifyStreamResponse()
    while (response := await call.read()) is not grpc.aio.EOF:
        last = response
    return last.result


async def result(call: Any) -> stage_pb2.StageResult:
    """Return what a call ends with."""
    responses = [response async for response in call]
    return responses[-1].result  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["small", "medium", "large", "foreign"])
def test_a_models_memory_is_that_of_its_weights_and_caches(name: str) -> None:
    with (MODELS / name / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    weights = sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
    config = json.loads((MODELS / name / "config.json").read_text())
    # Key and value, float32, of every layer and position.
    cache = 8 * config["num_hidden_layers"] * config["max_position_embeddings"]
    cache *= config["num_key_value_heads"] * config["head_dim"]
    plain, pooled = engine(name, cached_sequences=0).status(), engine(name, cached_sequences=4).status()
    assert plain.parameters == weights
    # Weights are float32 in memory; the embeddings may be there twice. Cosines and sines of every position.
    embeddings = config["vocab_size"] * config["hidden_size"]
    turns = 4 * config["max_position_embeddings"] * config["head_dim"]
    assert 4 * weights + turns <= plain.memory_bytes <= 4 * (weights + embeddings) + turns
    assert pooled.memory_bytes - plain.memory_bytes == 4 * cache


# The small model takes 6 MiB, so two fit in 13 MiB.
TWO_FIT = 13


async def test_the_memory_budget_of_the_settings_holds(start: Callable[..., Any]) -> None:
    stage = await start("a", "b", "c", memory_budget_mb=TWO_FIT)
    async with asyncio.timeout(CALL_S):
        outcomes = [await stage.stub.Load(stage_pb2.LoadRequest(model=name)) for name in "abc"]
        assert [list(outcome.unloaded_models) for outcome in outcomes] == [[], [], ["a"]]
        status = await stage.stub.Status(stage_pb2.StatusRequest())
    assert status.memory_budget_bytes == 13 * 1024 * 1024
    loaded = [model.name for model in status.models if model.state == stage_pb2.MODEL_STATE_READY]
    assert loaded == ["b", "c"]
    assert status.memory_used_bytes == sum(outcome.memory_bytes for outcome in outcomes[1:])
    assert 5.5 < status.memory_used_bytes / 2**21 < 6.5


async def test_a_model_is_as_recently_used_as_its_last_call_ended(start: Callable[..., Any]) -> None:
    stage = await start("a", "b", "c", memory_budget_mb=TWO_FIT)
    async with asyncio.timeout(CALL_S):
        held = await hold(stage.stub, "a")
        await result(stage.stub.Generate(Generate(prompt="True or false? 3 is more than 2.", model="b")))
        await release(held)
        loaded = await stage.stub.Load(stage_pb2.LoadRequest(model="c"))
    assert loaded.unloaded_models == ["b"]


async def test_an_answer_says_how_many_calls_of_others_are_under_way(start: Callable[..., Any]) -> None:
    """Whichever model they use: they share the machine."""
    stage = await start("a", "b")
    draft = common_pb2.Draft(text="Answer: yes", finish_reason=common_pb2.FINISH_REASON_EOS)
    async with asyncio.timeout(CALL_S):
        held = [await hold(stage.stub, "a", caller) for caller in (7, 7, 8, 0, 0)]
        ask = {"prompt": "True or false? 3 is more than 2.", "model": "b"}
        for caller, others in ((7, 3), (8, 4), (9, 5), (0, 5)):
            own = await result(stage.stub.Generate(Generate(**ask, caller=caller)))
            assert own.others_under_way == others
            verify = stage_pb2.VerifyRequest(draft=draft, **ask, caller=caller)
            assert (await result(stage.stub.Verify(verify))).others_under_way == others
        assert [(await release(call)).others_under_way for call in held] == [3, 3, 2, 1, 0]


async def test_a_queue_holds_as_many_as_the_settings_say(start: Callable[..., Any]) -> None:
    stage = await start("a", model={"max_lanes": 1}, max_queue=2)
    async with asyncio.timeout(CALL_S):
        held = await hold_all(stage.stub)
        asks = [asyncio.ensure_future(result(stage.stub.Generate(Generate(prompt="hi")))) for _ in range(4)]
        # Nothing can be answered while the slots are held: what ends was refused.
        waiting: set[asyncio.Future[Any]] = set(asks)
        refused: set[asyncio.Future[Any]] = set()
        while len(refused) < 2:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refused |= done
        for ask in refused:
            error = ask.exception()
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 requests wait" in str(error.details())
        status = await stage.stub.Status(stage_pb2.StatusRequest())
        assert status.models[0].queued_requests == 2
        await asyncio.gather(*map(release, held))
        texts = {(await ask).text for ask in waiting}
    assert len(waiting) == 2
    assert texts == {(await result(stage.stub.Generate(Generate(prompt="hi"), timeout=CALL_S))).text}
