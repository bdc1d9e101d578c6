"""gRPC channels to other services, and calls that require a deadline."""

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

# Twice the router's limit for a caller's request: a stage's request also has a draft and its evidence.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024

# grpc.aio's message (1.85) if a message could not be sent because the call had ended.
_CORE_ERROR = "Internal error from Core"

# Errors that end a call of grpc.aio (1.85): its status, or another kind if the connection breaks at an
# unlucky moment or the channel is closed.
_FAILURES = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError)

# How long calls in flight keep a connection that new calls no longer use. Chosen: longer than any deadline,
# which ends them.
_LEAVING_SECONDS = 3_600.0

# gRPC retries a call only if the server has not begun to answer, so no answer contains a part twice.
# CANCELLED: see asd.transport.status.
_RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
# If a name's only replica was just replaced, the old address stays in use for a second or two, until the next
# look-up. A fixed address that does not answer is given up sooner: its caller may have other ones.
_RETRY_NAME = _RETRY | {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
}


class _EndWithCaller(grpc.aio.UnaryUnaryClientInterceptor):
    """Ends a unary call whose caller was cancelled. Put it innermost.

    OpenTelemetry's interceptor (0.66b2) drops the inner call when its caller is cancelled, so the peer would
    continue until the deadline. Remove this once it cancels that call.
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
    """A method's multicallable on the current channel."""

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

    New calls then use a new connection; calls in flight finish on the old one. gRPC's Python binding (1.85)
    has no credentials that do this; remove it once it has.
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
        """Return the channel with the current certificates."""
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
        """Close it and the earlier channels that are still open."""
        for leaving in self._leaving:
            leaving.cancel()
        await asyncio.gather(self._channel.close(grace), *self._leaving, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the current channel."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the current channel has another state."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the current channel is connected."""
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

    retry: repeat a call, twice at most, if the peer is UNAVAILABLE, or was stopped and has CANCELLED the
    call, and has sent nothing. Calls that a peer had not taken when it closed the connection are always
    repeated. Replicas behind one name are called in turn. tls: None for a plain connection. A proxy is taken
    from `grpc_proxy` alone (asd.transport.proxy). Close the channel when done. Raises UnusableFile for
    certificates that cannot be used.
    """
    # Adding the same filter again has no effect.
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
        # Set even without a retry policy: with retries off, gRPC fails calls whose connection just ended (47
        # of 13,000, measured with connections of 5 ms; none otherwise).
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # With gRPC's default, a peer that was away for long is not reconnected to for up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # This is also the timeout of a connection attempt. Chosen: long enough for a peer that is briefly
        # busy, and short enough that callers soon turn to another one if a peer is gone without a refusal.
        ("grpc.min_reconnect_backoff_ms", 1_000),
        # With gRPC's default, new pods of a rollout are found only after 30 s: an outage, as measured.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # Otherwise a channel would share a connection, and its back-off, with earlier ones of the process.
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

    timeout_ms: of the call. peer: name for messages ("stage small at 127.0.0.1:50061"). metadata: sent with
    it. patience: decides whether an unavailable peer is called again within the timeout; None: it is not.
    Raises the AsdError of the peer's status; BudgetSpent if timeout_ms is not above 0.
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
    """Return the answer of a unary call of grpc.aio; if its caller is cancelled, end the call.

    A task waits for the call to its end, because grpc.aio (1.85) never frees the memory of an operation whose
    waiter was cancelled: 0.95 kB per call (measured). Await the call directly once it does.
    """
    waiting = asyncio.ensure_future(_wait(call))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not waiting.done():
            # gRPC keeps the future that it waits for, and therefore the task, alive.
            waiting.add_done_callback(_ignore)
            _end(call)
        raise


async def _wait(call: Awaitable[Response]) -> Response:
    return await call


def _ignore(ended: asyncio.Future[Any]) -> None:
    """Retrieve the error of a call that nobody waits for, or asyncio would log it."""
    if not ended.cancelled():
        ended.exception()


def _end(call: Any) -> None:
    """Cancel a call of grpc.aio, but not the inner task that waits for its end; see result_of."""
    core = getattr(call, "_cython_call", None)
    if core is None:
        # Interceptors wrap the call; the innermost one does the same.
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
    """Yield the answers of a streaming call; cancel it when the caller stops.

    Arguments and errors: see call_unary. A call that has begun to answer is not repeated.
    """
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

    is_last: whether an answer completes the call. The peer may send it before it has read every request.
    hold_s: how long requests after the first are held back until the peer answers; a refusal in that time
    keeps its reason. Other arguments and errors: see call_unary. Also raises BrokenOff if the peer ended the
    call while requests were being sent.
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
            # The peer had ended the call. Its status is lost: grpc.aio raises this instead.
            if is_complete:
                return
            raise BrokenOff(f"{peer or 'the service'} broke the call off") from error
        raise _explained(error, timeout_ms, peer) from error
    finally:
        call.cancel()


async def _held(
    requests: AsyncIterator[Request], until: asyncio.Event, hold_s: float
) -> AsyncIterator[Request]:
    """Yield the first request at once, and the rest after an event or hold_s seconds."""
    is_first = True
    async for request in requests:
        yield request
        if is_first:
            is_first = False
            with suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), hold_s)


async def _may_repeat(failure: AsdError, patience: Patience, until: float) -> bool:
    """Return whether to repeat an unanswered call, after the pause before it."""
    patience.failed(failure)
    return isinstance(failure, Away) and await patience.wait(until)


def _could_not_send(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _CORE_ERROR


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether to log a line of gRPC's: not if an error reports the same, as for undecodable bytes."""
    return "deserializing message" not in record.getMessage()


def _read(response: Response, peer: str) -> Response:
    """Return a response. Raises Unavailable for None, which grpc.aio returns for undecodable bytes."""
    if response is None:
        raise Unavailable(f"{peer or 'the service'} sent an answer that cannot be read")
    return response


def _explained(error: BaseException, timeout_ms: float, peer: str) -> AsdError:
    """Return a call's error as an AsdError. Raises it if it is the cancellation of the caller."""
    if not isinstance(error, grpc.RpcError):
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
            try:
                raise error
            finally:
                # Both refer to this frame. A cycle would keep the call's frames until a collection.
                del error, task
        # This cancellation is not the caller's: a message could not be sent, or the channel was closed.
        return Unavailable(f"{peer or 'the service'}: the call broke off ({str(error) or 'cancelled'})")
    failure = from_rpc_error(error, peer=peer)
    if isinstance(failure, BudgetSpent):
        return BudgetSpent(f"{peer or 'the service'} did not finish within {timeout_ms:.0f} ms")
    return failure


def check_time(timeout_ms: float, peer: str) -> None:
    """Raise BudgetSpent if no time is left for a call."""
    if not timeout_ms > 0:
        raise BudgetSpent(f"no time left to call {peer or 'the service'}")
