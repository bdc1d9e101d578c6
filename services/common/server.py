"""The gRPC server of every asd service: limits, status mapping, health, reflection, drain."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import re
import signal
import socket
import sys
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
import uvloop
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from asd.errors import AsdError, InvalidRequest, Unavailable
from asd.transport.addresses import is_loopback
from asd.transport.channel import MAX_MESSAGE_BYTES
from asd.transport.files import UnusableFile
from asd.transport.status import DETAILS_KEY, status_of
from services.common import telemetry
from services.common.status import public_message, to_rpc_status
from services.common.tls import server_credentials
from services.common.wire import NOT_A_MESSAGE, check_entries, find_invalid_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from services.common.tls import ServerTls

logger = logging.getLogger(__name__)

T = TypeVar("T")

# "host:port"; an IPv6 host stands in brackets. Other forms of gRPC are passed on unchecked.
_ADDRESS = re.compile(r"\[?(?P<host>[^\[\]/]*?)\]?:(?P<port>[^:/\]]*)")
_HIGHEST_PORT = 65_535

# How long late calls still reach the handlers while draining. Most are refused, with a status that every
# client retries. Once it is stopped, gRPC's server (1.85) cancels calls that no handler has, including those
# sent before the client hears of the end. Chosen: shorter than a client's retries, which may use the same
# connection until then.
_LATE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ServiceRegistration:
    """A gRPC service: its full name ("asd.v1.StageService"), and a function that adds it to a server."""

    full_name: str
    add: Callable[[grpc.aio.Server], None]


class CannotListen(Unavailable):
    """The server cannot listen on its address; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """A server's connection options.

    tls: None for plain connections. health_listen: address that serves health alone, without TLS; "": none.
    max_connection_age_ms: after about this time a client is asked to reconnect, and resolves its target
    again; 0: never. max_connection_age_grace_ms: how long calls may then continue; 0: to their end. guard: an
    interceptor that refuses calls, inside the one that maps errors to status.
    """

    tls: ServerTls | None = None
    health_listen: str = ""
    max_connection_age_ms: int = 0
    max_connection_age_grace_ms: int = 0
    guard: grpc.aio.ServerInterceptor | None = None

    def channel_arguments(self) -> list[tuple[str, int]]:
        """Return gRPC's channel arguments for these options."""
        arguments = []
        if self.max_connection_age_ms:
            arguments.append(("grpc.max_connection_age_ms", self.max_connection_age_ms))
        if self.max_connection_age_grace_ms:
            arguments.append(("grpc.max_connection_age_grace_ms", self.max_connection_age_grace_ms))
        return arguments


PLAIN = ServerOptions()


class RunningServer(NamedTuple):
    """A server that listens, and its port."""

    server: grpc.aio.Server
    port: int


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Decodes requests and maps exceptions to status, for unary and streaming calls.

    It decodes instead of gRPC, which reports bytes that are not a message as INTERNAL. It lets cancellations
    and aborts pass. Put it inside the tracing interceptor, so that the span carries the mapped status.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with decoding and mapping around it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        # Handlers of a registered service are the same objects for the server's life.
        cached = self._wrapped.get(method)
        if cached is None or cached[0] is not handler:
            cached = self._wrapped[method] = (handler, _wrap(handler))
        return cached[1]


class ClosingInterceptor(grpc.aio.ServerInterceptor):
    """Closes a streaming handler's generator in its own task when the call ends, for whatever reason.

    gRPC leaves the generator of a cancelled call to the garbage collector, which closes it later and in
    another task. Downstream calls would then linger, and spans could not be detached. Put it outermost.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler; a generator becomes a coroutine that writes."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
        method_handler = _method_handler(handler)

        async def write_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            answer = behavior(request, context)
            if asyncio.iscoroutine(answer):
                await answer
                return
            async with aclosing(answer) as responses:
                async for response in responses:
                    await context.write(response)

        return method_handler(write_stream, handler.request_deserializer, handler.response_serializer)


def run_service(service: Coroutine[Any, Any, T]) -> T:
    """Run a service to its end, on uvloop: a router passes 1.15 x the requests of asyncio's own loop.

    (benchmarks.service throughput, both loops by turns.) Ends the process with one sentence if it cannot
    listen on an address, or cannot use a certificate or a file of tokens.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(service)
        except (CannotListen, UnusableFile) as error:
            raise SystemExit(f"asd: {error.message}") from error


async def serve(
    name: str,
    listen: str,
    services: Sequence[ServiceRegistration],
    *,
    drain_seconds: float,
    on_ready: Callable[[int], None] | None = None,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    options: ServerOptions = PLAIN,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Prints `READY <name> <host>:<port>` on standard output once it serves, and passes the port to on_ready.
    To drain, it reports NOT_SERVING, awaits on_drain (which should refuse new work with Draining), and takes
    late calls for a moment. Then it takes no new connections, and calls in flight have drain_seconds to end.
    A call that no handler has begun by then ends as CANCELLED. Raises CannotListen if it cannot listen on an
    address, UnusableFile if a certificate cannot be used.
    """
    health_servicer = health.aio.HealthServicer()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.guard is not None and options.tls is None and not is_loopback(listen):
        logger.warning("tokens come in over plain connections: set tls, unless something else encrypts them")
    server, port = await start_server(listen, services, health_servicer=health_servicer, options=options)
    probed: grpc.aio.Server | None = None
    spare_the_collector()
    try:
        if options.health_listen:
            probed, _ = await start_health_server(options.health_listen, health_servicer)
        host = listen.rpartition(":")[0]
        sys.stdout.write(f"READY {name} {host}:{port}\n")
        sys.stdout.flush()
        if on_ready is not None:
            on_ready(port)
        await stop.wait()
        logger.info("draining for at most %g s", drain_seconds)
        await health_servicer.enter_graceful_shutdown()
        if on_drain is not None:
            await on_drain()
        await asyncio.sleep(_LATE_SECONDS)
    finally:
        await server.stop(drain_seconds)
        if probed is not None:
            await probed.stop(0)
        await asyncio.to_thread(telemetry.shutdown_telemetry)


def spare_the_collector() -> None:
    """Exempt the objects of start-up from garbage collection, and collect less often.

    A call makes some hundred objects, which reference counts alone free. The default of a collection per 700
    objects took a tenth of a request's processor time (benchmarks.service throughput).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


async def start_server(
    listen: str,
    services: Sequence[ServiceRegistration],
    *,
    health_servicer: health.aio.HealthServicer | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    options: ServerOptions = PLAIN,
) -> RunningServer:
    """Start a server with the services, health and reflection on an address such as "127.0.0.1:0".

    Raises CannotListen if it cannot listen on the address, UnusableFile if a certificate cannot be used.
    """
    credentials = server_credentials(options.tls) if options.tls else None
    guards = [options.guard] if options.guard else []
    server = grpc.aio.server(
        interceptors=[
            ClosingInterceptor(),
            *telemetry.server_interceptors(),
            StatusInterceptor(),
            *guards,
        ],
        options=(
            *options.channel_arguments(),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            # A second process on the same port must fail, not take half of the calls.
            ("grpc.so_reuseport", 0),
            # Clients ping every 30 s (asd.transport.channel), which gRPC's default treats as abuse.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ),
    )
    names = [service.full_name for service in services]
    for service in services:
        service.add(server)
    health_servicer = health_servicer or health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for name in names:
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    _add_reflection([*names, health.SERVICE_NAME], server)
    return await _start(server, listen, credentials, "listen")


async def start_health_server(listen: str, health_servicer: health.aio.HealthServicer) -> RunningServer:
    """Start a plain server with grpc.health.v1 alone, for probes: the kubelet's cannot speak TLS.

    Raises CannotListen if it cannot listen on the address.
    """
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    return await _start(server, listen, None, "health_listen")


async def _start(
    server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None, setting: str
) -> RunningServer:
    check_address(listen, setting)
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise CannotListen(f"cannot listen on {listen}: is the address this machine's?") from error
    await server.start()
    return RunningServer(server, port)


def check_address(listen: str, setting: str) -> None:
    """Raise CannotListen for an address that gRPC would misread, or fail on without an explanation."""
    address = _ADDRESS.fullmatch(listen)
    if ":" not in listen:
        # gRPC would use port 443.
        raise CannotListen(f"cannot listen on {listen}: write HOST:PORT")
    if address is None:
        return
    host, port = address["host"], address["port"]
    # gRPC reads port 99999 as 34463.
    if not port.isascii() or not port.isdigit() or int(port) > _HIGHEST_PORT:
        raise CannotListen(f"cannot listen on {listen}: a port is a number from 0 to {_HIGHEST_PORT}")
    if not int(port):
        return
    try:
        family, *_, found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # gRPC sets it too: connections that are closing do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found)
    except socket.gaierror as error:
        raise CannotListen(f"cannot listen on {listen}: {host}: {error.strerror}") from error
    except OSError as error:
        # Other errors are left to gRPC, which falls back to IPv4 if there is no IPv6.
        if error.errno == errno.EADDRINUSE:
            raise CannotListen(
                f"cannot listen on {listen}: the port is taken: set `{setting}` to another one, or end what "
                "has it"
            ) from error
        if error.errno == errno.EACCES:
            raise CannotListen(
                f"cannot listen on {listen}: no permission: set `{setting}` to a port from 1024 on"
            ) from error


def _add_reflection(names: Sequence[str], server: grpc.aio.Server) -> None:
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)


def _wrap(handler: Any) -> Any:
    decode = handler.request_deserializer
    if handler.response_streaming:
        is_stream = handler.request_streaming
        stream_behavior = handler.stream_stream if is_stream else handler.unary_stream

        async def stream(raw: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                request = _decode_each(decode, raw) if is_stream else _decode(decode, raw)
                answer = stream_behavior(request, context)
                if asyncio.iscoroutine(answer):
                    await answer
                    return
                async with aclosing(answer) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await _abort(error, context)

        return _method_handler(handler)(stream, None, handler.response_serializer)
    unary_behavior = handler.unary_unary

    async def unary(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await unary_behavior(_decode(decode, raw), context)
        except Exception as error:
            await _abort(error, context)

    return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)


def _method_handler(handler: Any) -> Any:
    """Return the function that makes handlers of this kind, answering with a stream."""
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler
    return grpc.unary_stream_rpc_method_handler


async def _decode_each(decode: Callable[[bytes], Any], raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in raws:
        yield _decode(decode, raw)


def _decode(decode: Callable[[bytes], Any], raw: bytes) -> Any:
    """Return the message. A message over the limits is not decoded at all: that would stall all calls."""
    # Generated code passes the message type's FromString.
    descriptor = getattr(getattr(decode, "__self__", None), "DESCRIPTOR", None)
    if descriptor is not None:
        check_entries(raw, descriptor)
    try:
        return decode(raw)
    except DecodeError as error:
        field = "" if descriptor is None else find_invalid_text(raw, descriptor)
        if field:
            raise InvalidRequest(f"{field} is not valid UTF-8", field=field) from error
        raise InvalidRequest(f"{NOT_A_MESSAGE}, or a text in them is not valid UTF-8") from error


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End the call with the error's status; an abort passes."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, AsdError) or type(error) is AsdError:
        logger.error("call failed", exc_info=error)
    await context.abort(
        status_of(error),
        public_message(error),
        ((DETAILS_KEY, to_rpc_status(error).SerializeToString()),),
    )
