"""Blocking channels and calls with a deadline; asd.transport.channel has those for asyncio."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

import grpc

from asd.errors import AsdError, Away, BudgetSpent, PreconditionFailed
from asd.transport.channel import MAX_MESSAGE_BYTES, Metadata, channel_options, check_time
from asd.transport.status import from_rpc_error, has_details
from asd.transport.tls import TlsFiles, watched_channel_credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from asd.transport.patience import Patience

Request = TypeVar("Request")
Response = TypeVar("Response")
Stub = TypeVar("Stub")

CLOSED = "this client is closed: make another one"


class BlockingChannel:
    """A channel that threads may share. Certificates are read again once their files change.

    New calls then use a new connection; calls in flight finish on the old one. Raises UnusableFile for
    certificates that cannot be used.
    """

    def __init__(self, target: str, tls: TlsFiles | None) -> None:
        self._target = target
        self._options = channel_options(target, retry=True, max_message_bytes=MAX_MESSAGE_BYTES, tls=tls)
        self._watched = watched_channel_credentials(tls) if tls is not None else None
        self._lock = threading.Lock()
        self._is_closed = False
        self._channel = self._connect()

    def stub(self, kind: Callable[[grpc.Channel], Stub]) -> Stub:
        """Return a stub over a connection with the current certificates.

        Raises PreconditionFailed once the channel is closed: gRPC (1.85) crashes where a stub is made of a
        closed channel.
        """
        with self._lock:
            if self._is_closed:
                raise PreconditionFailed(CLOSED)
            if self._watched is not None and self._watched.refresh():
                # The old channel is not closed: calls in flight still use it.
                self._channel = self._connect()
            return kind(self._channel)

    def close(self) -> None:
        """Close it; calls in flight end."""
        with self._lock:
            self._is_closed = True
            self._channel.close()

    def _connect(self) -> grpc.Channel:
        if self._watched is None:
            return grpc.insecure_channel(self._target, options=self._options)
        return grpc.secure_channel(self._target, self._watched.value, options=self._options)


def call_unary(
    method: grpc.UnaryUnaryMultiCallable[Request, Response],
    request: Request,
    *,
    timeout_ms: float,
    peer: str,
    metadata: Metadata,
    patience: Patience,
) -> Response:
    """Return the answer of a unary call; see asd.transport.channel.call_unary."""
    check_time(timeout_ms, peer)
    until = patience.now() + timeout_ms / 1000.0
    while True:
        try:
            response = method(request, timeout=until - patience.now(), metadata=metadata or None)
        except ValueError as error:
            raise _closed(error) from error
        except grpc.RpcError as error:
            _wait_or_raise(error, patience, until, timeout_ms, peer)
        else:
            patience.there()
            return response


def call_stream(
    method: grpc.UnaryStreamMultiCallable[Request, Response],
    request: Request,
    *,
    timeout_ms: float,
    peer: str,
    metadata: Metadata,
    patience: Patience,
) -> Generator[Response, None, None]:
    """Yield the answers of a streaming call; see asd.transport.channel.call_stream."""
    check_time(timeout_ms, peer)
    until = patience.now() + timeout_ms / 1000.0
    has_begun = False
    while True:
        try:
            call = method(request, timeout=until - patience.now(), metadata=metadata or None)
        except ValueError as error:
            raise _closed(error) from error
        try:
            for response in call:
                has_begun = True
                patience.there()
                yield response
        except grpc.RpcError as error:
            if has_begun:
                raise _explained(error, timeout_ms, peer) from error
            _wait_or_raise(error, patience, until, timeout_ms, peer)
        else:
            return
        finally:
            call.cancel()


def is_told(error: BaseException | None) -> bool:
    """Return whether a failed call ended with a status that its server sent.

    The channel's state would tell, but gRPC (1.85) watches it in a thread that keeps the program from ending.
    """
    if not isinstance(error, grpc.RpcError):
        return False
    # A stopped server sends CANCELLED, without further details.
    return error.code() is grpc.StatusCode.CANCELLED or has_details(error)


def _wait_or_raise(
    error: grpc.RpcError, patience: Patience, until: float, timeout_ms: float, peer: str
) -> None:
    """Wait if an unanswered call should be repeated; otherwise raise its error."""
    failure = _explained(error, timeout_ms, peer)
    patience.failed(failure)
    pause_s = patience.pause_s(until) if isinstance(failure, Away) else None
    if pause_s is None:
        raise failure from error
    time.sleep(pause_s)


def _closed(error: ValueError) -> Exception:
    """Return what to raise if gRPC refuses to call: its only reason is a channel that a thread has closed."""
    return PreconditionFailed(CLOSED) if "closed channel" in str(error) else error


def _explained(error: grpc.RpcError, timeout_ms: float, peer: str) -> AsdError:
    failure = from_rpc_error(error, peer=peer)
    if isinstance(failure, BudgetSpent):
        return BudgetSpent(f"{peer} did not finish within {timeout_ms:.0f} ms")
    return failure
