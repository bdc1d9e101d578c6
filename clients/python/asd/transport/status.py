"""The one table from asd's errors to gRPC status codes, and the way back from a failed call."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError

from asd.errors import (
    AsdError,
    Away,
    BrokenOff,
    BudgetSpent,
    ConversationRefused,
    InputFailed,
    InvalidRequest,
    ModelRefusal,
    NotFound,
    Overloaded,
    PreconditionFailed,
    PromptTooLong,
    QueueFull,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from asd.transport import google_rpc_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

# Most specific first. A test fails when an AsdError has no row of its own.
STATUS_TABLE: tuple[tuple[type[AsdError], grpc.StatusCode], ...] = (
    (PromptTooLong, grpc.StatusCode.INVALID_ARGUMENT),
    (ConversationRefused, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelRefusal, grpc.StatusCode.INVALID_ARGUMENT),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (InputFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (PreconditionFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Away, grpc.StatusCode.UNAVAILABLE),
    (BrokenOff, grpc.StatusCode.UNAVAILABLE),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (BudgetSpent, grpc.StatusCode.DEADLINE_EXCEEDED),
    (AsdError, grpc.StatusCode.INTERNAL),
)

# Errors that share a code and are told apart by the reason in a google.rpc.ErrorInfo.
REASONS: dict[type[AsdError], str] = {
    PromptTooLong: "PROMPT_TOO_LONG",
    ConversationRefused: "CONVERSATION_REFUSED",
    ModelRefusal: "MODEL_REFUSAL",
    InputFailed: "INPUT_FAILED",
    QueueFull: "QUEUE_FULL",
    Overloaded: "OVERLOADED",
}
# A service that is about to end says so. To its caller it is away.
DRAINING = "DRAINING"
_ERROR_OF_REASON = {reason: error for error, reason in REASONS.items()} | {DRAINING: Away}
# Whose reasons they are: the domain of the ErrorInfo.
ERROR_DOMAIN = "asd.v1"

DETAILS_KEY = "grpc-status-details-bin"

# What gRPC core (1.85) says of a request over the size limit, whichever side refuses it.
_TOO_LARGE = re.compile(r"(?:CLIENT: Sent|SERVER: Received) message larger than max \((\d+) vs\. (\d+)\)")

# What gRPC core (1.85) says of a stream that its peer did not end with a status: cut, reset, or no HTTP/2.
# The whole text, since a message that a service wrote may quote any part of it.
_BROKEN = re.compile(
    r"Stream removed \(.*\)"
    r"|RST_STREAM \(.*\)|Received RST_STREAM with error code \d+"
    r"|Failed parsing HTTP/2(?: \(.*\))?",
    re.DOTALL,
)

_ERROR_OF_CODE: dict[grpc.StatusCode, type[AsdError]] = {
    **{code: error for error, code in STATUS_TABLE},
    # A server that is stopped (gRPC 1.85) cancels calls that it has not yet handed to a handler, and those
    # that come until the client hears of it. Our own cancellation never arrives as an RpcError.
    grpc.StatusCode.CANCELLED: Away,
}

# In the place of what gRPC says where nobody else says anything.
_WORDS = {"CANCELLED": "it is shutting down"}


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code that an exception is reported with."""
    for kind, code in STATUS_TABLE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def from_rpc_error(error: grpc.RpcError, *, peer: str = "") -> AsdError:
    """Return the AsdError that a failed call stands for.

    peer: what was called ("stage small at 127.0.0.1:50061"), put before the message unless that is about the
    caller's own input.
    """
    details = _details_of(error)
    kind = _ERROR_OF_CODE.get(error.code(), AsdError)
    told = _ERROR_OF_REASON.get(_reason_of(details), kind)
    if kind is Unavailable and details is None:
        # Without details, gRPC says it and not the service: it was not reached, or its connection ended.
        kind = Away
    elif issubclass(told, kind):
        # A reason says more of a code, never another one.
        kind = told
    message = error.details() or error.code().name
    if details is None and kind is not BudgetSpent and _BROKEN.fullmatch(message):
        # The transport has made the code up: INTERNAL and UNKNOWN among others. A service sends details.
        kind = Away
    message = _WORDS.get(message, message)
    if too_large := _TOO_LARGE.fullmatch(message):
        size, most = too_large.groups()
        message = (
            f"the request has {size} bytes, and {most} are the most that a message may have: shorten the "
            "prompt or the conversation, or split the batch"
        )
    if peer and not issubclass(kind, InvalidRequest):
        message = f"{peer}: {message}"
    return kind(message, field=_field_of(details), retry_after_s=_delay_of(details))


def _details_of(error: grpc.RpcError) -> google_rpc_pb2.Status | None:
    """Return what a service says beside code and message in a failed call's trailing metadata."""
    for key, value in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return google_rpc_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _reason_of(status: google_rpc_pb2.Status | None) -> str:
    """Return the reason that a failed call's details name, or ""."""
    info = _find(status, google_rpc_pb2.ErrorInfo())
    return str(info.reason) if info is not None and info.domain == ERROR_DOMAIN else ""


def _field_of(status: google_rpc_pb2.Status | None) -> str:
    """Return the field that a failed call's details name, or ""."""
    bad_request = _find(status, google_rpc_pb2.BadRequest())
    if bad_request is None or not bad_request.field_violations:
        return ""
    return str(bad_request.field_violations[0].field)


def _delay_of(status: google_rpc_pb2.Status | None) -> float | None:
    """Return after how many seconds a failed call's details say to call again; None: they do not say."""
    retry = _find(status, google_rpc_pb2.RetryInfo())
    # A message of another service may hold anything.
    return max(float(retry.retry_delay.ToNanoseconds()) / 1e9, 0.0) if retry is not None else None


def _find(status: google_rpc_pb2.Status | None, detail: Any) -> Any:
    """Return a detail of a status, read into the message that is given; None where there is none."""
    wanted = f"/google.rpc.{detail.DESCRIPTOR.name}"
    for each in status.details if status else ():
        if each.type_url.endswith(wanted):
            try:
                detail.ParseFromString(each.value)
            except DecodeError:
                return None
            return detail
    return None
