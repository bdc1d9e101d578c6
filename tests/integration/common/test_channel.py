"""A channel calls again where nothing was answered, and nowhere else; it spreads calls over replicas."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import struct
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from asd.errors import AsdError, BrokenOff, BudgetSpent, InvalidRequest, ResourceExhausted, Unavailable
from asd.transport.channel import call_exchange, call_stream, call_unary
from asd.transport.patience import Patience
from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from services.common.channel import open_channel
from services.common.errors import Draining
from services.common.server import ServiceRegistration, start_server
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Connect = Callable[..., Any]

ASK = stage_pb2.StatusRequest()
WRITE = stage_pb2.StageServiceGenerateRequest(prompt="hi")


@dataclass
class Flaky(stage_pb2_grpc.StageServiceServicer):
    """Fails a number of times, then answers; a stream sends so many tokens before it fails.

    error: None to cancel the call.
    """

    failures: int = 0
    error: AsdError | None = field(default_factory=lambda: Unavailable("going away"))
    sent_before: int = 0
    calls: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def Status(self, request: object, context: Any) -> stage_pb2.StatusResponse:  # noqa: N802
        await self._attempt(context)
        return stage_pb2.StatusResponse(version=f"attempt {self.calls}")

    async def Generate(  # noqa: N802
        self, request: object, context: Any
    ) -> AsyncIterator[stage_pb2.StageServiceGenerateResponse]:
        token = stage_pb2.StageServiceGenerateResponse(tokens=common_pb2.TokenChunk(text="a"))
        for _ in range(self.sent_before):
            yield token
        await self._attempt(context)
        try:
            # A caller may leave before the server asks for the next answer: then the yield ends.
            yield token
            await self.gate.wait()
        finally:
            self.left.set()

    async def _attempt(self, context: Any) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            if self.error is None:
                # As a server that is stopped ends calls that no handler has.
                await context.abort(grpc.StatusCode.CANCELLED)
            raise self.error

    def add(self, server: grpc.aio.Server) -> None:
        stage_pb2_grpc.add_StageServiceServicer_to_server(self, server)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Return a function that serves fakes and returns a stub over one channel to all of them."""
    async with AsyncExitStack() as stack:

        async def start(*fakes: Flaky, **options: Any) -> Any:
            ports = []
            for fake in fakes:
                server, port = await start_server(
                    "127.0.0.1:0", [ServiceRegistration("asd.v1.StageService", fake.add)]
                )
                stack.push_async_callback(server.stop, 0)
                ports.append(port)
            target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
            channel = await stack.enter_async_context(open_channel(target, **options))
            return stage_pb2_grpc.StageServiceStub(channel)

        yield start


async def status(stub: Any) -> str:
    return (await call_unary(stub.Status, ASK, timeout_ms=CALL_S * 1e3)).version  # type: ignore[no-any-return]


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_a_call_is_answered_after_two_refusals_at_most(connect: Connect, failures: int) -> None:
    fake = Flaky(failures)
    assert await status(await connect(fake)) == f"attempt {failures + 1}"


async def test_a_call_that_a_stopping_server_cancels_is_called_again(connect: Connect) -> None:
    fake = Flaky(failures=2, error=None)
    assert await status(await connect(fake)) == "attempt 3"


def patience(*, was_there: bool) -> Patience:
    async def pass_by(_: float) -> None:
        """Nothing takes time."""

    patient = Patience(sleep=pass_by)
    if was_there:
        patient.there()
    return patient


@pytest.mark.parametrize("error", [None, Draining("shutting down")])
async def test_a_peer_that_was_there_is_called_until_it_is_back(
    connect: Connect, error: AsdError | None
) -> None:
    fake, patient = Flaky(failures=9, error=error), patience(was_there=True)
    stub = await connect(fake, retry=False)
    answer = await call_unary(stub.Status, ASK, timeout_ms=CALL_S * 1e3, patience=patient)
    assert answer.version == "attempt 10"
    fake.failures = 19
    stream = call_stream(stub.Generate, WRITE, timeout_ms=CALL_S * 1e3, patience=patient)
    assert (await anext(stream)).tokens.text == "a"
    assert fake.calls == 20
    await stream.aclose()


@pytest.mark.parametrize(
    "error", [Unavailable("a stage is away"), InvalidRequest("no"), ResourceExhausted("")]
)
async def test_what_a_peer_says_itself_is_told_at_once(connect: Connect, error: AsdError) -> None:
    fake = Flaky(failures=1, error=error)
    stub = await connect(fake, retry=False)
    with pytest.raises(type(error)):
        await call_unary(stub.Status, ASK, timeout_ms=CALL_S * 1e3, patience=patience(was_there=True))
    assert fake.calls == 1


async def test_a_peer_that_was_never_there_is_told_at_once(connect: Connect) -> None:
    fake = Flaky(failures=1, error=Draining("shutting down"))
    stub = await connect(fake, retry=False)
    with pytest.raises(Unavailable, match="shutting down"):
        await call_unary(stub.Status, ASK, timeout_ms=CALL_S * 1e3, patience=patience(was_there=False))
    assert fake.calls == 1


async def test_a_stream_that_has_begun_is_not_made_again_whatever_the_patience(connect: Connect) -> None:
    fake, patient = Flaky(failures=1, error=None, sent_before=1), patience(was_there=True)
    stub = await connect(fake, retry=False)
    stream = call_stream(stub.Generate, WRITE, timeout_ms=CALL_S * 1e3, patience=patient)
    assert (await anext(stream)).tokens.text == "a"
    with pytest.raises(Unavailable, match="shutting down"):
        await anext(stream)
    assert fake.calls == 1


async def test_three_refusals_are_the_end(connect: Connect) -> None:
    fake = Flaky(failures=3)
    with pytest.raises(Unavailable, match="going away"):
        await status(await connect(fake))
    assert fake.calls == 3


async def test_a_stream_that_has_begun_nothing_is_called_again(connect: Connect) -> None:
    fake = Flaky(failures=2)
    stream = call_stream((await connect(fake)).Generate, WRITE, timeout_ms=CALL_S * 1e3)
    assert (await anext(stream)).tokens.text == "a"
    assert fake.calls == 3
    await stream.aclose()


async def test_a_stream_that_has_sent_a_token_is_not_called_again(connect: Connect) -> None:
    fake = Flaky(failures=1, sent_before=1)
    stream = call_stream((await connect(fake)).Generate, WRITE, timeout_ms=CALL_S * 1e3)
    assert (await anext(stream)).tokens.text == "a"
    with pytest.raises(Unavailable, match="going away"):
        await anext(stream)
    assert fake.calls == 1


async def test_a_channel_without_retries_calls_once(connect: Connect) -> None:
    fake = Flaky(failures=1)
    with pytest.raises(Unavailable):
        await status(await connect(fake, retry=False))
    assert fake.calls == 1


async def test_only_a_peer_that_is_away_is_called_again(connect: Connect) -> None:
    fake = Flaky(failures=1, error=ResourceExhausted("full"))
    with pytest.raises(ResourceExhausted, match="full"):
        await status(await connect(fake))
    assert fake.calls == 1


async def test_calls_go_to_all_replicas_of_a_name(connect: Connect) -> None:
    fakes = Flaky(), Flaky()
    stub = await connect(*fakes)
    async with asyncio.timeout(CALL_S):
        # The second connection may come later than the first answers.
        while not all(fake.calls for fake in fakes):
            await status(stub)
    before = [fake.calls for fake in fakes]
    for _ in range(10):
        await status(stub)
    assert [fake.calls - calls for fake, calls in zip(fakes, before, strict=True)] == [5, 5]


async def test_a_stream_that_its_caller_leaves_ends_at_the_peer(connect: Connect) -> None:
    fake = Flaky()
    stream = call_stream((await connect(fake)).Generate, WRITE, timeout_ms=CALL_S * 1e3)
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(CALL_S):
        await fake.left.wait()


@pytest.mark.parametrize("timeout_ms", [0.0, -1.0, float("nan")])
async def test_no_call_is_made_without_time(connect: Connect, timeout_ms: float) -> None:
    fake = Flaky()
    stub = await connect(fake)
    with pytest.raises(BudgetSpent, match="no time left"):
        await call_unary(stub.Status, ASK, timeout_ms=timeout_ms, peer="stage small")
    with pytest.raises(BudgetSpent, match="no time left"):
        await anext(call_stream(stub.Generate, WRITE, timeout_ms=timeout_ms, peer="stage small"))
    assert fake.calls == 0


@dataclass
class Hasty(Flaky):
    """Ends a call before it has read what the caller still sends, with its result where it has one."""

    has_result: bool = True
    refusal: AsdError | None = None

    async def VerifyStream(  # noqa: N802
        self, requests: AsyncIterator[stage_pb2.VerifyStreamRequest], context: object
    ) -> AsyncIterator[stage_pb2.VerifyResponse]:
        await anext(requests)
        if self.refusal is not None:
            raise self.refusal
        if self.has_result:
            yield stage_pb2.VerifyResponse(result=stage_pb2.StageResult(text="whole"))


async def exchange(stub: Any, hold_s: float = 0.0) -> list[str]:
    async def requests() -> AsyncIterator[stage_pb2.VerifyStreamRequest]:
        for _ in range(40):
            yield stage_pb2.VerifyStreamRequest()
            await asyncio.sleep(0)

    answers = call_exchange(
        stub.VerifyStream,
        requests(),
        is_last=lambda response: response.HasField("result"),
        timeout_ms=CALL_S * 1e3,
        hold_s=hold_s,
    )
    return [response.result.text async for response in answers]


async def test_a_refusal_that_comes_while_requests_are_held_is_told(connect: Connect) -> None:
    stub = await connect(Hasty(refusal=ResourceExhausted("256 wait")))
    for _ in range(200):
        with pytest.raises(ResourceExhausted, match="256 wait"):
            await exchange(stub, hold_s=5.0)


async def test_an_answer_that_ends_before_its_draft_is_whole(connect: Connect) -> None:
    # Where a message meets a call that is over is chance: one call in four, as measured.
    stub = await connect(Hasty())
    for _ in range(200):
        assert await exchange(stub) == ["whole"]


async def test_a_call_that_ends_without_a_result_never_looks_like_a_fault_here(connect: Connect) -> None:
    stub = await connect(Hasty(has_result=False))
    for _ in range(200):
        try:
            assert await exchange(stub) == []
        except BrokenOff as error:
            assert "broke" in str(error)  # noqa: PT017


# Connections that break, and answers that are none.


def frame(kind: int, flags: int, content: bytes) -> bytes:
    """Return an HTTP/2 frame of a connection's first call."""
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", 1) + content


def reset(code: int) -> bytes:
    """Return a frame that resets the call."""
    return frame(3, 0, struct.pack(">I", code))


# What comes in the midst of the answer; None: nothing, and the connection is cut instead.
BREAKS = {
    "cut": None,
    # NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, CANCEL and ENHANCE_YOUR_CALM.
    **{f"reset {code}": reset(code) for code in (0, 1, 2, 8, 11)},
    "no headers": frame(1, 5, b"\xff\xff\xff"),
}


class Wire:
    """A connection between client and server, into which a test can put what it likes, or cut it.

    hold_s: for how long it keeps the client's first bytes, unless the client gives up meanwhile. Close it
    when done.
    """

    def __init__(self, hold_s: float = 0.0) -> None:
        self._hold_s = hold_s
        self._to_clients: list[asyncio.StreamWriter] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.given_up = 0

    async def open(self, port: int) -> int:
        """Forward to a port; return the port to call instead."""
        self._server = await asyncio.start_server(
            lambda reader, writer: self._begin(port, reader, writer), "127.0.0.1", 0
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Cut what is left, and wait until all of it is closed."""
        if self._server is not None:
            # asyncio (3.11) leaks a connection that was accepted but not yet begun when its server closes.
            # Stop accepting first; what was accepted has begun after these turns of the loop.
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(5):
                await asyncio.sleep(0)
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def break_off(self, raw: bytes | None) -> None:
        """Put bytes into what the client reads, or cut the connection."""
        for writer in self._to_clients:
            if raw is None:
                writer.transport.abort()
            else:
                writer.write(raw)

    def _begin(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self._tasks.add(asyncio.create_task(self._forward(port, reader, writer)))

    async def _forward(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held = b""
        if self._hold_s:
            held = await reader.read(65_536)
            with suppress(TimeoutError):
                while more := await asyncio.wait_for(reader.read(65_536), self._hold_s):
                    held += more
                self.given_up += 1
                return
        there, back = await asyncio.open_connection("127.0.0.1", port)
        back.write(held)
        self._writers.append(back)
        self._to_clients.append(writer)
        await asyncio.gather(_pump(reader, back), _pump(there, writer), return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
    finally:
        writer.close()


@dataclass
class Hesitant(Flaky):
    """Waits in the midst of every call, having told that it has begun."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def Status(self, request: object, context: object) -> stage_pb2.StatusResponse:  # noqa: N802
        self.begun.set()
        await self.gate.wait()
        return stage_pb2.StatusResponse()

    async def VerifyStream(  # noqa: N802
        self, requests: AsyncIterator[stage_pb2.VerifyStreamRequest], context: object
    ) -> AsyncIterator[stage_pb2.VerifyStreamResponse]:
        yield stage_pb2.VerifyStreamResponse()
        async for _ in requests:
            await self.gate.wait()


async def call_all(stub: Any, kind: str, begun: Callable[[], None]) -> None:
    """Make a call of a kind, to its end. begun: called once an answer has come, if one is to come first."""
    if kind == "unary":
        await call_unary(stub.Status, ASK, timeout_ms=CALL_S * 1e3, peer="stage small")
        return

    async def requests() -> AsyncIterator[stage_pb2.VerifyStreamRequest]:
        yield stage_pb2.VerifyStreamRequest()
        await asyncio.Event().wait()

    if kind == "stream":
        answers: Any = call_stream(stub.Generate, WRITE, timeout_ms=CALL_S * 1e3, peer="stage small")
    else:
        answers = call_exchange(
            stub.VerifyStream,
            requests(),
            is_last=lambda response: response.HasField("result"),
            timeout_ms=CALL_S * 1e3,
            peer="stage small",
        )
    async for _ in answers:
        begun()


async def test_a_peer_that_is_busy_as_it_is_connected_to_is_waited_for() -> None:
    fake, wire = Flaky(), Wire(hold_s=0.3)
    server, port = await start_server("127.0.0.1:0", [ServiceRegistration("asd.v1.StageService", fake.add)])
    wire_port = await wire.open(port)
    try:
        async with open_channel(f"127.0.0.1:{wire_port}", retry=False) as channel:
            stub = stage_pb2_grpc.StageServiceStub(channel)
            await call_unary(stub.Status, ASK, timeout_ms=CALL_S * 1e3)
        assert (fake.calls, wire.given_up) == (1, 0)
    finally:
        await wire.close()
        await server.stop(None)


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("kind", ["unary", "stream", "exchange"])
async def test_a_call_whose_connection_breaks_finds_its_peer_unavailable(kind: str, name: str) -> None:
    fake, wire = Hesitant(), Wire()
    server, port = await start_server("127.0.0.1:0", [ServiceRegistration("asd.v1.StageService", fake.add)])
    wire_port = await wire.open(port)
    try:
        async with open_channel(f"127.0.0.1:{wire_port}", retry=False) as channel:
            # On a busy machine the first attempt to connect may fail.
            await asyncio.wait_for(channel.channel_ready(), CALL_S)
            stub = stage_pb2_grpc.StageServiceStub(channel)
            call = asyncio.create_task(call_all(stub, kind, fake.begun.set))
            await asyncio.wait_for(fake.begun.wait(), CALL_S)
            wire.break_off(BREAKS[name])
            with pytest.raises(Unavailable) as caught:
                await call
            assert "stage small" in caught.value.message
    finally:
        await wire.close()
        fake.gate.set()
        await server.stop(0)


@pytest.mark.parametrize("kind", ["unary", "stream", "exchange"])
async def test_an_answer_that_cannot_be_read_is_as_none_and_fills_no_log(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def unary(request: bytes, context: object) -> bytes:
        return b"no message"

    async def stream(request: object, context: object) -> AsyncIterator[bytes]:
        yield b"no message"

    handlers = {
        "Status": grpc.unary_unary_rpc_method_handler(unary),
        "Generate": grpc.unary_stream_rpc_method_handler(stream),
        "VerifyStream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("asd.v1.StageService", handlers),)  # type: ignore[no-untyped-call]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(Unavailable, match="cannot be read"):
                await call_all(stage_pb2_grpc.StageServiceStub(channel), kind, lambda: None)
    finally:
        await server.stop(0)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("kind", ["unary", "stream", "exchange"])
async def test_a_call_whose_channel_is_closed_finds_its_peer_unavailable(kind: str) -> None:
    fake = Hesitant()
    server, port = await start_server("127.0.0.1:0", [ServiceRegistration("asd.v1.StageService", fake.add)])
    try:
        channel = open_channel(f"127.0.0.1:{port}", retry=False)
        await asyncio.wait_for(channel.channel_ready(), CALL_S)
        call = asyncio.create_task(call_all(stage_pb2_grpc.StageServiceStub(channel), kind, fake.begun.set))
        await asyncio.wait_for(fake.begun.wait(), CALL_S)
        await channel.close()
        with pytest.raises(Unavailable, match="stage small"):
            await call
    finally:
        fake.gate.set()
        await server.stop(0)


@pytest.mark.parametrize("kind", ["unary", "stream", "exchange"])
async def test_a_caller_that_leaves_is_cancelled_and_not_told_of_its_peer(kind: str) -> None:
    fake = Hesitant()
    server, port = await start_server("127.0.0.1:0", [ServiceRegistration("asd.v1.StageService", fake.add)])
    try:
        async with open_channel(f"127.0.0.1:{port}", retry=False) as channel:
            await asyncio.wait_for(channel.channel_ready(), CALL_S)
            stub = stage_pb2_grpc.StageServiceStub(channel)
            call = asyncio.create_task(call_all(stub, kind, fake.begun.set))
            await asyncio.wait_for(fake.begun.wait(), CALL_S)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
    finally:
        fake.gate.set()
        await server.stop(0)


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def allocated_bytes() -> int:
    """Return what is allocated outside of Python's own pools; skip where the C library does not say."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("the C library has no mallinfo2")
    mallinfo.restype = _Mallinfo
    gc.collect()
    return int(mallinfo().uordblks)


async def test_calls_whose_callers_go_away_leave_nothing_behind() -> None:
    class Silent(stage_pb2_grpc.StageServiceServicer):
        async def Status(self, request: object, context: Any) -> stage_pb2.StatusResponse:  # noqa: N802
            await asyncio.Event().wait()
            raise AssertionError

    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(Silent(), server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)

        async def leave(calls: int) -> None:
            for _ in range(calls):
                call = asyncio.create_task(call_unary(stub.Status, ASK, timeout_ms=20_000))
                await asyncio.sleep(0.001)
                call.cancel()
                with suppress(asyncio.CancelledError):
                    await call

        await leave(200)
        before = allocated_bytes()
        await leave(600)
        # 570 kB where gRPC is not let to end them.
        assert allocated_bytes() - before < 200_000
    await server.stop(None)
