"""The gateway's HTTP server: uvicorn, with the limits, the TLS and the drain of asd's other services."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import sys
from typing import TYPE_CHECKING, Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from asd.transport.files import WatchedFiles
from asd.transport.tls import check_authority, check_pair
from services.common.metrics_server import listen_on
from services.common.server import CannotListen, check_address, spare_the_collector

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from services.common.tls import ServerTls
    from services.gateway.app import Gateway
    from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# Most bytes of a request's line and headers. Chosen: room for tokens and trace headers, many times over.
MOST_HEAD_BYTES = 64 << 10
# How long late requests are refused with a status while draining, as in services.common.server.
_LATE_SECONDS = 0.1


def protocol(settings: GatewaySettings) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with bounds that it lacks: on a request's head, and on stuck callers."""

    class BoundedProtocol(HttpToolsProtocol):
        """A connection."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._head_bytes = 0
            self._in_head = False
            self._head_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            self.resume_writing()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                if self._head_bytes > MOST_HEAD_BYTES:
                    self.send_400_response("The request's head is too large.")
                    return
                # The last part may have a body behind the head.
                self._head_bytes += len(data)
            try:
                self._parse(data)
            except httptools.HttpParserError as error:
                self.send_400_response(f"the request is not valid HTTP: {error}")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._head_timer is None:
                self._wait_for_head()
            self._head_bytes, self._in_head = 0, True

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                # The parser stops behind the head: see _parse.
                return
            self._head_is_there()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.parser.should_upgrade():
                super().on_message_complete()

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

        def _parse(self, data: bytes) -> None:
            """Parse a part of what the caller sends. Raises HttpParserError if it is not HTTP.

            Wishes for another protocol are ignored. The parser takes such a request for one without a body,
            so a new parser reads the head again without the wish, and then the body.
            """
            self._unset_keepalive_if_required()
            rest = memoryview(data)
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    rest = rest[upgrade.args[0] :]
                self._repeat_head()

        def _repeat_head(self) -> None:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                raise httptools.HttpParserError("there are no tunnels here")
            lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
            lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            # As uvicorn has it: without it, a request behind the last one of a connection is an error.
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

        def _wait_for_head(self) -> None:
            seconds = settings.read_timeout_ms / 1000.0
            self._head_timer = self.loop.call_later(seconds, self.transport.abort)

        def _head_is_there(self) -> None:
            self._in_head = False
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedProtocol


class HttpServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to this module."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def make_server(gateway: Gateway, settings: GatewaySettings) -> HttpServer:
    """Return a server of the gateway. Raises UnusableFile for certificates that cannot be used."""
    config = uvicorn.Config(
        gateway,
        http=protocol(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # uvicorn's type is whole seconds, and its code takes any.
        timeout_keep_alive=settings.idle_timeout_ms / 1000.0,  # type: ignore[arg-type]
        timeout_graceful_shutdown=settings.drain_seconds,  # type: ignore[arg-type]
    )
    # Its lines are about callers' faults, which anybody can cause; ours are in the access log.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config.load()
    config.ssl = tls_context(settings.tls) if settings.tls else None
    return HttpServer(config)


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
