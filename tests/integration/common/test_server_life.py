"""A server from its start to its end: what it tells of itself, and that stopping loses no call."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from asd.errors import Away
from asd.transport.status import from_rpc_error
from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2, stage_pb2, stage_pb2_grpc
from services.common.server import ServiceRegistration, start_server
from tests.integration.common.conftest import CALL_S, PROCESS_S, Health, running
from tests.integration.router.conftest import FakeStage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODELS = Path(__file__).parents[3] / "models"
PROMPT = "Otto has 4 bells. Otto sells 2. How many bells does Otto have now?"
ASK = cascade_pb2.GenerateRequest(prompt="hi")
Step = stage_pb2.VerifyStreamRequest
START = Step(start=stage_pb2.VerifyStreamStart(prompt=PROMPT))
END = Step(end=stage_pb2.DraftEnd(finish_reason=common_pb2.FINISH_REASON_EOS))


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeStage, str]]:
    """A stage that writes three words once its gate opens, and where it listens."""
    stage = FakeStage("small", pause_after=3)
    server, port = await start_server("127.0.0.1:0", [ServiceRegistration(stage.full_name, stage.add)])
    yield stage, f"127.0.0.1:{port}"
    stage.gate.set()
    await server.stop(0)


def call_by_reflection(target: str, service: str, method_name: str, fields: dict[str, Any]) -> Any:
    """Call a method as a client does that has no stubs: all that it knows of the API, the server told it."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert service in database.get_services()
        method = DescriptorPool(database).FindServiceByName(service).methods_by_name[method_name]
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_unary(
            f"/{service}/{method_name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call(request(**fields), timeout=CALL_S)


async def test_reflection_is_enough_to_call_a_service(fake: tuple[FakeStage, str]) -> None:
    async with asyncio.timeout(CALL_S):
        status = await asyncio.to_thread(call_by_reflection, fake[1], "asd.v1.StageService", "Status", {})
    model = status.models[0]
    assert (model.name, model.engine, model.context_length) == ("small", "fake", 512)


async def test_reflection_is_enough_to_ask_for_health(fake: tuple[FakeStage, str]) -> None:
    ask = {"service": "asd.v1.StageService"}
    async with asyncio.timeout(CALL_S):
        answer = await asyncio.to_thread(call_by_reflection, fake[1], "grpc.health.v1.Health", "Check", ask)
    names = type(answer).DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number
    assert names[answer.status].name == "SERVING"


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """Return the error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def closed(target: str) -> None:
    """Wait until nothing listens on an address any more: the drain has begun."""
    host, _, port = target.rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            # It was in the queue as that was closed.
            continue
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stopping_router_finishes_what_it_has_and_takes_nothing_more(
    fake: tuple[FakeStage, str], number: int, tmp_path: Path
) -> None:
    stage, stage_target = fake
    config = {
        "stages": [{"name": "small", "target": stage_target, "cost": 1}],
        "static_plan": ["small"],
        # More than the calls' own limits: only the end of the call under way ends the drain.
        "drain_seconds": 600,
    }
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        router = await stack.enter_async_context(running("services.router", config, tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(router.target))
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        health = Health(channel, "asd.v1.CascadeService")
        assert await health.next() == "SERVING"
        held = stub.Generate(ASK, timeout=CALL_S)
        async with asyncio.timeout(CALL_S):
            await stage.started.wait()
        # A call that has begun, but whose request comes too late.
        late = channel.stream_unary(
            "/asd.v1.CascadeService/Generate",
            request_serializer=cascade_pb2.GenerateRequest.SerializeToString,
            response_deserializer=cascade_pb2.GenerateResponse.FromString,
        )(timeout=CALL_S)
        # One connection keeps the order: when this is answered, the router has the call before.
        await stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_S)

        router.process.send_signal(number)
        assert await health.next() == "NOT_SERVING"
        health.leave()
        await late.write(ASK)
        error = await refused(late)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(error.details())
        # Clients see that it was not begun.
        assert type(from_rpc_error(error)) is Away
        assert (await refused(stub.Generate(ASK, timeout=CALL_S))).code() is grpc.StatusCode.UNAVAILABLE
        assert stage.calls == ["generate"]

        await closed(router.target)
        stage.gate.set()
        assert (await held).text == "one two three"
        code, log = await router.end()
    assert code == 0
    assert "Traceback" not in log


def _stage(drain_seconds: float) -> dict[str, Any]:
    return {"models": [{"name": "small", "path": str(MODELS / "small")}], "drain_seconds": drain_seconds}


async def _hold(stub: Any, timeout_s: float = CALL_S) -> Any:
    """Return a call that the stage works on and that ends when its draft does."""
    call = stub.VerifyStream(timeout=timeout_s)
    await call.write(START)
    assert (await call.read()).HasField("tokens")
    return call


async def _last(call: Any) -> Any:
    """Return the last response of a stream that is read to its end."""
    last = None
    while (response := await call.read()) is not grpc.aio.EOF:
        last = response
    return last


async def test_a_stopping_stage_finishes_what_it_has_and_takes_nothing_more(tmp_path: Path) -> None:
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        stage = await stack.enter_async_context(running("services.stage", _stage(600), tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(stage.target))
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        health = Health(channel, "asd.v1.StageService")
        assert await health.next() == "SERVING"
        held = await _hold(stub)
        late = stub.VerifyStream(timeout=CALL_S)
        status = await stub.Status(stage_pb2.StatusRequest(), timeout=CALL_S)
        assert (status.draining, status.models[0].running_requests) == (False, 1)

        stage.process.send_signal(signal.SIGTERM)
        assert await health.next() == "NOT_SERVING"
        health.leave()
        await late.write(START)
        error = await refused(late.read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(error.details())
        assert type(from_rpc_error(error)) is Away
        new = stub.Generate(stage_pb2.StageServiceGenerateRequest(prompt=PROMPT), timeout=CALL_S)
        assert (await refused(new.read())).code() is grpc.StatusCode.UNAVAILABLE

        await closed(stage.target)
        await held.write(END)
        await held.done_writing()
        assert (await _last(held)).result.text == "4-2=2. Answer: 2"
        code, log = await stage.end()
    assert code == 0
    assert "Traceback" not in log


async def test_a_call_that_does_not_end_holds_the_drain_no_longer_than_allowed(tmp_path: Path) -> None:
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        stage = await stack.enter_async_context(running("services.stage", _stage(0.1), tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(stage.target))
        # Its own deadline does not end it.
        held = await _hold(stage_pb2_grpc.StageServiceStub(channel), 10 * PROCESS_S)
        code, log = await stage.stop(signal.SIGTERM)
        assert code == 0
        assert "Traceback" not in log
        error = await refused(_last(held))
    assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
