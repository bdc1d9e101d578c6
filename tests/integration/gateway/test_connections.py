"""The gateway's listening socket."""

from __future__ import annotations

import socket

from services.gateway.server import listen


def test_no_part_of_a_stream_waits_for_the_one_before() -> None:
    with listen("127.0.0.1:0") as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
