"""The gateway's connections."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from services.gateway.server import listen
from tests.fakes.fake_router import TEXT
from tests.integration.gateway.test_gateway import HELLO, raw, read_answer
from tests.limits import CALL_S

HIDDEN = raw("/healthz", method="GET")


def test_no_part_of_a_stream_waits_for_the_one_before() -> None:
    with listen("127.0.0.1:0") as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
@pytest.mark.parametrize("writes", [1, 2, 3])
async def test_an_upgrade_is_ignored_and_the_body_is_no_request(gateway, protocol, writes):
    headers = (f"upgrade: {protocol}", "connection: upgrade, http2-settings", "http2-settings: AAMA")
    reader, writer = await gateway.connect()
    for body, status in ((json.dumps(HELLO).encode(), 200), (HIDDEN, 400)):
        request = raw(body=body, headers=headers)
        end_of_head = request.index(b"\r\n\r\n") + 4
        cuts = {1: [], 2: [end_of_head], 3: [20, end_of_head + 9]}[writes]
        for start, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
            writer.write(request[start:end])
            # Parts of one write may come together: an answer between them keeps them apart.
            other_reader, other = await gateway.connect()
            other.write(HIDDEN)
            await read_answer(other_reader)
            other.close()
        answered, _, content = await read_answer(reader)
        assert answered == status
        assert (TEXT in content.decode()) == (status == 200)
    # Nothing of the bodies was taken for a request: the next answer is the next request's.
    writer.write(raw(body=json.dumps(HELLO).encode(), headers=headers) * 2)
    for _ in range(2):
        assert TEXT in (await read_answer(reader))[2].decode()
    writer.close()


async def test_a_tunnel_is_refused(gateway):
    reader, writer = await gateway.connect()
    writer.write(b"CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n" + HIDDEN)
    async with asyncio.timeout(CALL_S):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    writer.close()
