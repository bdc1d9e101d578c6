"""gRPC channels to other services, and calls on them that cannot be made without a deadline."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from services.common import telemetry
from services.common.errors import AsdError, BudgetSpent, Unavailable
from services.common.server import MAX_MESSAGE_BYTES
from services.common.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

Request = TypeVar("Request")
Response = TypeVar("Response")

# What grpc.aio (1.85) says where a message could not be handed to a call that was over.
_CORE_ERROR = "Internal error from Core"

# gRPC retries only what the server has not begun to answer, so nothing is ever computed into one answer
# twice.
_RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
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
            call.cancel()
            raise
        return call


def open_channel(
    target: str, *, retry: bool = True, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """Return a channel to a target such as "127.0.0.1:50061" or "dns:///stage-small:50061". Connects when
    used.

    retry: call again, twice at most, where the peer is UNAVAILABLE and has sent nothing. Replicas behind one
    name are called in turn. Close the channel when done.
    """
    interceptors = telemetry.client_interceptors()
    if interceptors:
        interceptors.append(_EndWithCaller())
    method: dict[str, object] = {"name": [{}]}
    if retry:
        method["retryPolicy"] = _RETRY
    service_config = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [method]}
    return grpc.aio.insecure_channel(
        target,
        options=(
            ("grpc.service_config", json.dumps(service_config)),
            ("grpc.enable_retries", int(retry)),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # gRPC's default lets a peer that was away for long stay unknown for two minutes after its return.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # Channels in one process would otherwise share a connection, and its backoff, with earlier ones.
            ("grpc.use_local_subchannel_pool", 1),
        ),
        interceptors=interceptors,
    )


async def call_unary(
    method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
    request: Request,
    *,
    timeout_ms: float,
    peer: str = "",
) -> Response:
    """Return the answer of a unary call.

    timeout_ms: deadline of the call. peer: what is called, for messages ("stage small at 127.0.0.1:50061").
    Raises the AsdError that the peer's status stands for; BudgetSpent if timeout_ms is not above 0.
    """
    _check_time(timeout_ms, peer)
    try:
        return await method(request, timeout=timeout_ms / 1000.0)
    except grpc.RpcError as error:
        raise _explained(error, timeout_ms, peer) from error


async def call_stream(
    method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
    request: Request,
    *,
    timeout_ms: float,
    peer: str = "",
) -> AsyncGenerator[Response, None]:
    """Yield the answers of a streaming call; cancel it when the caller stops. Arguments and errors:
    call_unary."""
    _check_time(timeout_ms, peer)
    call = method(request, timeout=timeout_ms / 1000.0)
    try:
        async for response in call:
            yield response
    except grpc.RpcError as error:
        raise _explained(error, timeout_ms, peer) from error
    finally:
        call.cancel()


async def call_exchange(
    method: grpc.aio.StreamStreamMultiCallable[Request, Response],
    requests: AsyncIterator[Request],
    *,
    is_last: Callable[[Response], bool],
    timeout_ms: float,
    peer: str = "",
) -> AsyncGenerator[Response, None]:
    """Yield the answers of a call that streams both ways; cancel it when the caller stops.

    is_last: whether an answer completes the call, which the peer may do before it has read every request.
    Other arguments and errors: call_unary.
    """
    _check_time(timeout_ms, peer)
    call = method(requests, timeout=timeout_ms / 1000.0)
    is_complete = False
    try:
        async for response in call:
            is_complete = is_last(response)
            yield response
    except grpc.aio.AioRpcError as error:
        if _could_not_send(error):
            # The peer had ended the call, and how is lost: grpc.aio puts this in the place of its status.
            if is_complete:
                return
            raise Unavailable(f"{peer or 'the service'} broke the call off") from error
        raise _explained(error, timeout_ms, peer) from error
    finally:
        call.cancel()


def _could_not_send(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _CORE_ERROR


def _explained(error: grpc.RpcError, timeout_ms: float, peer: str) -> AsdError:
    failure = from_rpc_error(error, peer=peer)
    if isinstance(failure, BudgetSpent):
        return BudgetSpent(f"{peer or 'the service'} did not finish within {timeout_ms:.0f} ms")
    return failure


def _check_time(timeout_ms: float, peer: str) -> None:
    if not timeout_ms > 0:
        raise BudgetSpent(f"no time left to call {peer or 'the service'}")
