"""The gateway's HTTP server: uvicorn, with the limits, the TLS and the drain of asd's other services."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import sys
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from asd.transport.files import WatchedFiles
from asd.transport.tls import check_authority, check_pair
from services.common.metrics_server import listen_on
from services.common.server import CannotListen, check_address, spare_the_collector
from services.gateway.errors import Problem
from services.gateway.streaming import encode

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from services.common.tls import ServerTls
    from services.gateway.app import Gateway
    from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# Most bytes of a request's line and headers, and of what follows a chunked body. Chosen: room for tokens and
# trace headers, many times over.
MOST_HEAD_BYTES = 64 << 10
# Most bytes and requests that a caller may send before the answer to an earlier request. Chosen.
_MOST_AHEAD_BYTES = 64 << 10
_MOST_AHEAD = 16
# Connections for each request that may be in flight. Chosen: callers keep idle ones.
_CONNECTIONS_PER_REQUEST = 4
# How long late requests are refused with a status while draining, as in services.common.server.
_LATE_SECONDS = 0.1
# Time for the errors of requests that a drain has ended to reach their callers. Chosen.
_LAST_WORDS_S = 1.0


def protocol(gateway: Gateway, settings: GatewaySettings) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with bounds that it lacks, and with the gateway's own errors.

    Without a request that is being answered, a connection always has a timer.
    """
    read_s = settings.read_timeout_ms / 1000.0
    most_connections = settings.max_concurrent * _CONNECTIONS_PER_REQUEST

    class BoundedProtocol(HttpToolsProtocol):
        """A connection."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._in_head = False
            # Bytes since the last head, or part of a body, was whole: what the parser may hold.
            self._held_bytes = 0
            # The request that is being answered, and what has come behind it.
            self._running: RequestResponseCycle | None = None
            self._ahead = bytearray()
            self._read_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most_connections:
                transport.abort()
            self._wait(read_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(None)
            self.resume_writing()
            self._ahead.clear()
            self.pipeline.clear()
            # uvicorn tells the newest request alone.
            if self._running is not None and not self._running.response_complete:
                self._running.disconnected = True
                self._running.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._running is not None and not self._running.more_body:
                # It waits here, and not in the socket: there, the connection's end would wait behind it.
                self._ahead += data
                if len(self._ahead) > _MOST_AHEAD_BYTES:
                    self.transport.abort()
                return
            if self._held_bytes > MOST_HEAD_BYTES:
                self.send_400_response("the request's head is too large")
                return
            # The last part may have a body behind the head.
            self._held_bytes += len(data)
            if self._running is None and self._read_timer is None:
                self._wait(read_s)
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._held_bytes, self._in_head = 0, True
            if self._running is None:
                self._wait(read_s)

        def on_header(self, name: bytes, value: bytes) -> None:
            # Fields behind a chunked body are no headers.
            if self._in_head:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._held_bytes, self._in_head = 0, False
            self._wait(None)
            super().on_headers_complete()
            if self._running is None:
                self._running = self.cycle
            elif len(self.pipeline) > _MOST_AHEAD:
                self.transport.abort()

        def on_body(self, body: bytes) -> None:
            self._held_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            if self._running is None:
                # The rest of a body whose request was answered early.
                self._wait(self.timeout_keep_alive)

        def on_response_complete(self) -> None:
            self._running = self.pipeline[-1][0] if self.pipeline else None
            super().on_response_complete()
            if self._ahead:
                self.loop.call_soon(self._go_on)

        def send_400_response(self, msg: str) -> None:
            running = self._running
            if running is not None and (running.response_started or not running.more_body):
                # An answer here would be taken for a part of the running one.
                self.transport.abort()
                return
            problem = Problem("MALFORMED_HTTP", msg)
            body = encode(gateway.error_of(getattr(self, "url", b"").decode("latin-1"), problem))
            head = (
                f"HTTP/1.1 {problem.row.http} Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_timer is None:
                seconds = settings.write_timeout_ms / 1000.0
                self._write_timer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None
            super().resume_writing()

        def _go_on(self) -> None:
            data = bytes(self._ahead)
            self._ahead.clear()
            if data and not self.transport.is_closing():
                self.data_received(data)

        def _wait(self, seconds: float | None) -> None:
            """Close the connection after a time in place of the one before. None: do not."""
            if self._read_timer is not None:
                self._read_timer.cancel()
            self._read_timer = (
                None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
            )

    return BoundedProtocol


class HttpServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to this module and ends requests when a drain runs out."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_seconds: float) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_seconds = drain_seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests in flight, and end those that are late with an error."""
        late = asyncio.get_running_loop().call_later(self._drain_seconds, self._gateway.end)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


def make_server(gateway: Gateway, settings: GatewaySettings) -> HttpServer:
    """Return a server of the gateway. Raises UnusableFile for certificates that cannot be used."""
    config = uvicorn.Config(
        gateway,
        http=protocol(gateway, settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # uvicorn's type is whole seconds, and its code takes any.
        timeout_keep_alive=settings.idle_timeout_ms / 1000.0,  # type: ignore[arg-type]
        timeout_graceful_shutdown=settings.drain_seconds + _LAST_WORDS_S,  # type: ignore[arg-type]
    )
    # Its lines are about callers' faults, which anybody can cause; ours are in the access log.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config.load()
    config.ssl = tls_context(settings.tls) if settings.tls else None
    return HttpServer(config, gateway, settings.drain_seconds)


def tls_context(tls: ServerTls) -> ssl.SSLContext:
    """Return TLS of a server, whose files are read again before a handshake if they have changed.

    Raises UnusableFile, naming file and setting, for an unusable file.
    """
    watched = WatchedFiles(tls.files, lambda contents: _context(tls, contents))

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, old: ssl.SSLContext) -> None:
        watched.refresh()
        connection.context = watched.value

    first = _context(tls, {name: file.read_bytes() for name, file in tls.files.items()})
    first.sni_callback = choose
    return first


def _context(tls: ServerTls, contents: dict[str, bytes]) -> ssl.SSLContext:
    check_pair(tls.cert_file, tls.key_file)
    check_authority("tls.client_ca_file", tls.client_ca_file, contents)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    made.load_cert_chain(tls.cert_file, tls.key_file)
    if tls.client_ca_file:
        made.load_verify_locations(cadata=contents["tls.client_ca_file"].decode("ascii"))
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def listen(address: str) -> socket.socket:
    """Return a socket that listens on an address such as "127.0.0.1:8000". Raises CannotListen."""
    check_address(address, "listen")
    host, _, port = address.rpartition(":")
    try:
        return listen_on(host.strip("[]"), int(port))
    except OSError as error:
        raise CannotListen(f"cannot listen on {address}: {error.strerror or error}") from error


async def serve(gateway: Gateway, settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Prints `READY gateway <host>:<port>` on standard output once it serves. To drain, it refuses new requests,
    and requests in flight have drain_seconds to end. Raises CannotListen or UnusableFile.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = make_server(gateway, settings)
    listening = listen(settings.listen)
    spare_the_collector()
    serving = asyncio.create_task(server.serve([listening]))
    host, port = settings.listen.rpartition(":")[0], listening.getsockname()[1]
    sys.stdout.write(f"READY gateway {host}:{port}\n")
    sys.stdout.flush()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    logger.info("draining for at most %g s", settings.drain_seconds)
    gateway.drain()
    await asyncio.sleep(_LATE_SECONDS)
    server.should_exit = True
    await serving
