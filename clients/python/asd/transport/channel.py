"""gRPC channels to other services, and calls on them that cannot be made without a deadline."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc

from asd.errors import AsdError, Away, BrokenOff, BudgetSpent, Unavailable
from asd.transport.proxy import proxy_arguments
from asd.transport.status import from_rpc_error
from asd.transport.tls import watched_channel_credentials

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

    from asd.transport.files import WatchedFiles
    from asd.transport.patience import Patience
    from asd.transport.tls import TlsFiles

Request = TypeVar("Request")
Response = TypeVar("Response")
Metadata = tuple[tuple[str, str], ...]

# Twice what the router takes from a caller: what it sends on has a draft, and what that shows, beside the
# caller's prompt.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024

# What grpc.aio (1.85) says where a message could not be handed to a call that was over.
_CORE_ERROR = "Internal error from Core"

# What a call of grpc.aio (1.85) ends with: its status; or another kind, where its connection breaks at an
# unhappy moment or its channel is closed.
_FAILURES = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError)

# For how long calls under way keep a connection that no new one takes. Chosen: longer than any deadline; that
# is what ends them.
_LEAVING_SECONDS = 3_600.0

# gRPC retries only what the server has not begun to answer, so nothing is ever computed into one answer
# twice. CANCELLED: see asd.transport.status.
_RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
# A name whose only replica was just replaced is known by its old address for a second or two, until it is
# looked up again. An address that does not answer is given up sooner: its caller may have others.
_RETRY_NAME = _RETRY | {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
}


class _EndWithCaller(grpc.aio.UnaryUnaryClientInterceptor):
    """Ends a unary call that nobody waits for any longer. Put it innermost.

    OpenTelemetry's interceptor (0.66b2) forgets the call below it when its caller is cancelled, so that the
    peer would work on until the deadline. Remove once it cancels that call.
    """

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        call = await continuation(client_call_details, request)
        try:
            await call.code()
        except asyncio.CancelledError:
            _end(call)
            raise
        return call


class _Latest:
    """A method's multicallable on whichever channel is in force."""

    def __init__(self, channel: RotatingChannel, make: Callable[[grpc.aio.Channel], Any]) -> None:
        self._rotating = channel
        self._make = make
        self._channel: grpc.aio.Channel | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        channel = self._rotating.current()
        if channel is not self._channel:
            self._channel, self._method = channel, self._make(channel)
        return self._method(*arguments, **options)


class RotatingChannel(grpc.aio.Channel):
    """A TLS channel whose certificates are read again once their files change.

    A call that begins after that goes over a new connection; calls under way finish on the old one. gRPC's
    Python binding (1.85) has no credentials that do it; remove once it has.
    """

    def __init__(
        self,
        watched: WatchedFiles[grpc.ChannelCredentials],
        connect: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
    ) -> None:
        self._watched = watched
        self._connect = connect
        self._channel = connect(watched.value)
        self._leaving: set[asyncio.Task[None]] = set()

    def current(self) -> grpc.aio.Channel:
        """Return the channel with the certificates of now."""
        if self._watched.refresh():
            leaving = asyncio.create_task(self._channel.close(grace=_LEAVING_SECONDS))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            self._channel = self._connect(self._watched.value)
        return self._channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close it, and what is left of earlier ones."""
        for leaving in self._leaving:
            leaving.cancel()
        await asyncio.gather(self._channel.close(grace), *self._leaving, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the channel in force."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the channel in force has another state."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the channel in force is connected."""
        await self._channel.channel_ready()

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method's multicallable."""
        return _Latest(self, lambda channel: channel.unary_unary(method, *arguments, **options))

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method's multicallable."""
        return _Latest(self, lambda channel: channel.unary_stream(method, *arguments, **options))

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method's multicallable."""
        return _Latest(self, lambda channel: channel.stream_unary(method, *arguments, **options))

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method's multicallable."""
        return _Latest(self, lambda channel: channel.stream_stream(method, *arguments, **options))


def open_channel(
    target: str,
    *,
    retry: bool = True,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    tls: TlsFiles | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """Return a channel to a target such as "127.0.0.1:50061" or "dns:///stage-small:50061". Connects when
    used.

    retry: call again, twice at most, where the peer is UNAVAILABLE, or is stopped and has CANCELLED the call,
    and has sent nothing. What a peer that closes its connection has not taken is called again anyway.
    Replicas behind one name are called in turn. tls: None for a plain connection. A proxy is taken from
    `grpc_proxy` alone (asd.transport.proxy). Close the channel when done. Raises UnusableFile for
    certificates that cannot be used.
    """
    # One filter, however often it is added.
    logging.getLogger("grpc._common").addFilter(_is_news)
    if interceptors:
        interceptors = [*interceptors, _EndWithCaller()]
    options = channel_options(target, retry=retry, max_message_bytes=max_message_bytes, tls=tls)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)

    def connect(credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)

    return RotatingChannel(watched_channel_credentials(tls), connect)


def channel_options(
    target: str, *, retry: bool, max_message_bytes: int, tls: TlsFiles | None
) -> list[tuple[str, Any]]:
    """Return gRPC's arguments of a channel; see open_channel."""
    method: dict[str, object] = {"name": [{}]}
    if retry:
        method["retryPolicy"] = _RETRY_NAME if target.startswith("dns:///") else _RETRY
    service_config = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [method]}
    options: list[tuple[str, Any]] = [
        *proxy_arguments(),
        ("grpc.service_config", json.dumps(service_config)),
        # Even without a policy: with retries off, gRPC fails calls that meet the end of their connection (47
        # of 13,000, measured where connections lived 5 ms; none otherwise).
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # gRPC's default lets a peer that was away for long stay unknown for two minutes after its return.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Also how long an attempt to connect may take. Chosen: a peer that is busy for a moment still shakes
        # hands, and one that is gone without a refusal does not hold callers up, who may have another.
        ("grpc.min_reconnect_backoff_ms", 1_000),
        # gRPC's default finds pods that took over in a rollout after 30 s only: an outage, as measured.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # Channels in one process would otherwise share a connection, and its backoff, with earlier ones.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


async def call_unary(
    method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
    request: Request,
    *,
    timeout_ms: float,
    peer: str = "",
    metadata: Metadata = (),
    patience: Patience | None = None,
) -> Response:
    """Return the answer of a unary call.

    timeout_ms: deadline of the call. peer: what is called, for messages ("stage small at 127.0.0.1:50061").
    metadata: sent with it. patience: says whether a peer that is away is called again until then; None: it is
    not.
    Raises the AsdError that the peer's status stands for; BudgetSpent if timeout_ms is not above 0.
    """
    check_time(timeout_ms, peer)
    until = patience.now() + timeout_ms / 1000.0 if patience else 0.0
    left_ms = timeout_ms
    while True:
        try:
            call = method(request, timeout=left_ms / 1000.0, metadata=metadata or None)
            response = await result_of(call)
        except _FAILURES as error:
            failure = _explained(error, timeout_ms, peer)
            if patience is None or not await _may_repeat(failure, patience, until):
                raise failure from error
            left_ms = (until - patience.now()) * 1000.0
        else:
            if patience:
                patience.there()
            return _read(response, peer)


async def result_of(call: Awaitable[Response]) -> Response:
    """Return the answer of a unary call of grpc.aio; where its caller is cancelled, end the call.

    The call itself is waited for until it has ended. grpc.aio (1.85) never frees what it holds for operations
    whose waiter was cancelled: 0.95 kB of each such call (measured). Await the call alone once it does.
    """
    waiting = asyncio.ensure_future(_wait(call))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not waiting.done():
            # gRPC holds on to the future that it waits for, and so to the task.
            waiting.add_done_callback(_ignore)
            _end(call)
        raise


async def _wait(call: Awaitable[Response]) -> Response:
    return await call


def _ignore(ended: asyncio.Future[Any]) -> None:
    """Take the end of a call that nobody waits for, or asyncio would log it."""
    if not ended.cancelled():
        ended.exception()


def _end(call: Any) -> None:
    """Cancel a call of grpc.aio, but not the task of its own that takes its end; see result_of."""
    core = getattr(call, "_cython_call", None)
    if core is None:
        # It is wrapped by interceptors, of which the innermost one does the same.
        call.cancel()
    elif not core.done():
        core.cancel("cancelled by its caller")


async def call_stream(
    method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
    request: Request,
    *,
    timeout_ms: float,
    peer: str = "",
    metadata: Metadata = (),
    patience: Patience | None = None,
) -> AsyncGenerator[Response, None]:
    """Yield the answers of a streaming call; cancel it when the caller stops. Arguments and errors:
    call_unary; one that has begun to answer is not called again."""
    check_time(timeout_ms, peer)
    until = patience.now() + timeout_ms / 1000.0 if patience else 0.0
    left_ms = timeout_ms
    has_begun = False
    while True:
        call = method(request, timeout=left_ms / 1000.0, metadata=metadata or None)
        try:
            async for response in call:
                if patience and not has_begun:
                    patience.there()
                has_begun = True
                yield _read(response, peer)
        except _FAILURES as error:
            failure = _explained(error, timeout_ms, peer)
            if has_begun or patience is None or not await _may_repeat(failure, patience, until):
                raise failure from error
            left_ms = (until - patience.now()) * 1000.0
        else:
            return
        finally:
            call.cancel()


async def call_exchange(
    method: grpc.aio.StreamStreamMultiCallable[Request, Response],
    requests: AsyncIterator[Request],
    *,
    is_last: Callable[[Response], bool],
    timeout_ms: float,
    peer: str = "",
    hold_s: float = 0.0,
) -> AsyncGenerator[Response, None]:
    """Yield the answers of a call that streams both ways; cancel it when the caller stops.

    is_last: whether an answer completes the call, which the peer may do before it has read every request.
    hold_s: for how long at most what follows the first request is held until the peer answers. Other
    arguments and errors: call_unary; and BrokenOff where the peer ended the call in the midst of sending.
    What it refuses is told if it refuses it while all is held.
    """
    check_time(timeout_ms, peer)
    has_answered = asyncio.Event()
    sent = _held(requests, has_answered, hold_s) if hold_s else requests
    call = method(sent, timeout=timeout_ms / 1000.0)
    is_complete = False
    try:
        async for response in call:
            has_answered.set()
            is_complete = is_last(_read(response, peer))
            yield response
    except _FAILURES as error:
        if isinstance(error, grpc.aio.AioRpcError) and _could_not_send(error):
            # The peer had ended the call, and how is lost: grpc.aio puts this in the place of its status.
            if is_complete:
                return
            raise BrokenOff(f"{peer or 'the service'} broke the call off") from error
        raise _explained(error, timeout_ms, peer) from error
    finally:
        call.cancel()


async def _held(
    requests: AsyncIterator[Request], until: asyncio.Event, hold_s: float
) -> AsyncIterator[Request]:
    """Yield a request; the others once something has happened, or after a while."""
    is_first = True
    async for request in requests:
        yield request
        if is_first:
            is_first = False
            with suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), hold_s)


async def _may_repeat(failure: AsdError, patience: Patience, until: float) -> bool:
    """Return whether a call that failed before it was answered is made again, having waited for its time."""
    patience.failed(failure)
    return isinstance(failure, Away) and await patience.wait(until)


def _could_not_send(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _CORE_ERROR


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a line of gRPC's log says what no error does: bytes that are no message become one."""
    return "deserializing message" not in record.getMessage()


def _read(response: Response, peer: str) -> Response:
    """Return a response. Raises Unavailable for None, which grpc.aio has for bytes that are no message."""
    if response is None:
        raise Unavailable(f"{peer or 'the service'} sent an answer that cannot be read")
    return response


def _explained(error: BaseException, timeout_ms: float, peer: str) -> AsdError:
    """Return what a call ended with, as an AsdError. Raises the cancellation of its caller."""
    if not isinstance(error, grpc.RpcError):
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
            raise error
        # Where it is cancelled, it is not by its caller: something could not be sent, or its channel closed.
        return Unavailable(f"{peer or 'the service'}: the call broke off ({str(error) or 'cancelled'})")
    failure = from_rpc_error(error, peer=peer)
    if isinstance(failure, BudgetSpent):
        return BudgetSpent(f"{peer or 'the service'} did not finish within {timeout_ms:.0f} ms")
    return failure


def check_time(timeout_ms: float, peer: str) -> None:
    """Raise BudgetSpent where no time is left for a call."""
    if not timeout_ms > 0:
        raise BudgetSpent(f"no time left to call {peer or 'the service'}")
