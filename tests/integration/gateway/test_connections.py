"""The gateway's connections: what callers may do with them, and what ends them."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from services.gateway.server import MOST_HEAD_BYTES, listen
from tests.fakes.fake_router import FakeRouter
from tests.integration.gateway.conftest import running
from tests.integration.gateway.test_gateway import CHAT, HELLO, MESSAGES, raw, read_answer, rest_of
from tests.limits import CALL_S

BODY = json.dumps(HELLO).encode()
CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    f"{len(BODY):x}\r\n"
).encode() + BODY
# Longer than any test takes.
NEVER_MS = 1_000.0 * 100 * CALL_S
# Bytes that no test's connection can take without an end.
ENDLESS = 64


def test_no_part_of_a_stream_waits_for_the_one_before() -> None:
    with listen("127.0.0.1:0") as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def ended(reader, writer, part, most=ENDLESS):
    """Send a part again and again until the connection ends; return whether it did."""
    try:
        async with asyncio.timeout(CALL_S):
            for _ in range(most):
                writer.write(part)
                await writer.drain()
            return not await reader.read()
    except ConnectionError:
        return True
    except TimeoutError:
        return False


async def test_fields_behind_a_chunked_body_are_no_headers():
    router = FakeRouter()
    router.token = "right"
    async with running(router) as gateway:
        reader, writer = await gateway.connect()
        writer.write(CHUNKED + b"\r\n0\r\nauthorization: Bearer right\r\n\r\n")
        assert (await read_answer(reader))[0] == 401
        writer.close()


async def test_fields_behind_a_body_without_end_are_refused():
    async with running(FakeRouter(), read_timeout_ms=NEVER_MS) as gateway:
        reader, writer = await gateway.connect()
        writer.write(CHUNKED + b"\r\n0\r\n")
        writer.write(b"x-a: aaaaaaaaaaaaaa\r\n" * MOST_HEAD_BYTES)
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (400, "close")
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_connection_ends_the_call_though_another_request_waits(gateway, stream):
    router = gateway.router
    router.hold.clear()
    first = raw(body=json.dumps(HELLO | {"stream": stream}).encode())
    # In the same packet, and in a later one.
    for behind in (b"", raw(body=BODY)):
        _, writer = await gateway.connect()
        writer.write(first + behind)
        async with asyncio.timeout(CALL_S):
            await router.begun.wait()
            writer.write(raw(body=BODY))
            writer.close()
            await router.idle.wait()
        router.begun.clear()
    assert len(router.requests) == 2


async def test_requests_in_several_packets_are_answered_in_order(gateway):
    gateway.router.hold.clear()
    reader, writer = await gateway.connect()
    second = raw(body=json.dumps({"model": "asd"}).encode())
    writer.write(raw(body=BODY) + second[:50])
    await gateway.router.begun.wait()
    for part in (second[50:], raw(body=BODY)[:9], raw(body=BODY)[9:]):
        writer.write(part)
        await writer.drain()
    gateway.router.hold.set()
    assert [(await read_answer(reader))[0] for _ in range(3)] == [200, 400, 200]
    writer.close()


@pytest.mark.parametrize("part", [b"x" * MOST_HEAD_BYTES, b"GET /healthz HTTP/1.1\r\n\r\n" * 4096])
async def test_a_caller_may_not_send_without_end_before_its_answer(part):
    async with running(FakeRouter(), read_timeout_ms=NEVER_MS) as gateway:
        gateway.router.hold.clear()
        reader, writer = await gateway.connect()
        writer.write(raw(body=BODY))
        await gateway.router.begun.wait()
        assert await ended(reader, writer, part)
        async with asyncio.timeout(CALL_S):
            await gateway.router.idle.wait()
        writer.close()


@pytest.mark.parametrize(
    ("request_", "more"),
    [
        (raw("/healthz", method="GET"), b"\r\n"),
        (raw("/healthz", method="GET"), b"GET /heal"),
        (b"GET /made-up HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n", b"x"),
    ],
)
async def test_a_connection_without_a_request_ends_whatever_comes(request_, more):
    async with running(FakeRouter(), read_timeout_ms=50.0, idle_timeout_ms=NEVER_MS) as gateway:
        reader, writer = await gateway.connect()
        writer.write(request_)
        await read_answer(reader)
        writer.write(more)
        assert await rest_of(reader) == b""
        writer.close()


@pytest.mark.parametrize("length", [0, 1])
async def test_an_idle_connection_ends(length):
    async with running(FakeRouter(), idle_timeout_ms=50.0, read_timeout_ms=NEVER_MS) as gateway:
        reader, writer = await gateway.connect()
        writer.write(f"GET /made-up HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode())
        await read_answer(reader)
        # The rest of a body is no request.
        writer.write(b"x" * length)
        assert await rest_of(reader) == b""
        writer.close()


async def test_a_caller_that_takes_nothing_is_let_go():
    async with running(FakeRouter(), write_timeout_ms=50.0) as gateway:
        gateway.router.words = ["word " * 10_000] * 1_000
        _, writer = await gateway.connect()
        writer.transport.pause_reading()
        writer.write(raw(body=json.dumps(HELLO | {"stream": True}).encode()))
        async with asyncio.timeout(CALL_S):
            await gateway.router.begun.wait()
            await gateway.router.idle.wait()
        assert not gateway.router.has_sent_all
        writer.close()


async def test_there_are_no_more_connections_than_serve_the_requests():
    async with running(FakeRouter(), max_concurrent=1, read_timeout_ms=NEVER_MS) as gateway:
        connections = [await gateway.connect() for _ in range(ENDLESS)]
        assert await rest_of(connections[-1][0]) == b""
        reader, writer = connections[0]
        writer.write(raw("/healthz", method="GET"))
        assert (await read_answer(reader))[0] == 200
        for _, writer in connections:
            writer.close()


@pytest.mark.parametrize(
    ("head", "names_type"),
    [
        (b"NONSENSE\r\n\r\n", False),
        (f"POST {CHAT} HTTP/1.1\r\nno colon\r\n\r\n".encode(), False),
        (f"POST {MESSAGES}?beta=true HTTP/1.1\r\nno colon\r\n\r\n".encode(), True),
    ],
)
async def test_malformed_http_has_the_apis_error(gateway, head, names_type):
    reader, writer = await gateway.connect()
    writer.write(head)
    status, headers, body = await read_answer(reader)
    assert (status, headers["connection"]) == (400, "close")
    error = json.loads(body)
    assert ("type" in error, error["error"]["type"]) == (names_type, "invalid_request_error")
    writer.close()


async def test_nonsense_behind_a_request_is_no_part_of_its_answer(gateway):
    gateway.router.hold.clear()
    gateway.router.words_first = 1
    reader, writer = await gateway.connect()
    writer.write(raw(body=json.dumps(HELLO | {"stream": True}).encode()) + b"NONSENSE\r\n\r\n")
    assert b"400" not in await rest_of(reader)
    writer.close()
