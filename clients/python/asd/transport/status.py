"""The one table from asd's errors to gRPC status codes, and back from a failed call to an error."""

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

# The most specific class comes first. A test fails if an AsdError has no row of its own.
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
# Reason of a service that is shutting down. Its caller sees Away.
DRAINING = "DRAINING"
_ERROR_OF_REASON = {reason: error for error, reason in REASONS.items()} | {DRAINING: Away}
# Domain of the ErrorInfo.
ERROR_DOMAIN = "asd.v1"

DETAILS_KEY = "grpc-status-details-bin"

# gRPC core's message (1.85) for a request over the size limit, from either side.
_TOO_LARGE = re.compile(r"(?:CLIENT: Sent|SERVER: Received) message larger than max \((\d+) vs\. (\d+)\)")

# gRPC core's messages (1.85) for a stream without a final status: cut, reset, or no HTTP/2. They must match
# the whole text, since a service's own message may quote any part of it.
_BROKEN = re.compile(
    r"Stream removed \(.*\)"
    r"|RST_STREAM \(.*\)|Received RST_STREAM with error code \d+"
    r"|Failed parsing HTTP/2(?: \(.*\))?",
    re.DOTALL,
)

_ERROR_OF_CODE: dict[grpc.StatusCode, type[AsdError]] = {
    **{code: error for error, code in STATUS_TABLE},
    # A stopped server (gRPC 1.85) cancels calls that no handler has yet, and those that arrive until the
    # client hears of the stop. Our own cancellation never arrives as an RpcError.
    grpc.StatusCode.CANCELLED: Away,
}

# Replacements for gRPC's own text.
_WORDS = {"CANCELLED": "it is shutting down"}


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code of an exception."""
    for kind, code in STATUS_TABLE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def from_rpc_error(error: grpc.RpcError, *, peer: str = "") -> AsdError:
    """Return the AsdError of a failed call.

    peer: name of the service ("stage small at 127.0.0.1:50061"). It precedes the message, unless the message
    is about the caller's own input.
    """
    details = _details_of(error)
    kind = _ERROR_OF_CODE.get(error.code(), AsdError)
    told = _ERROR_OF_REASON.get(_reason_of(details), kind)
    if kind is Unavailable and details is None:
        # Without details, the status is gRPC's and not the service's: it was unreachable, or the connection
        # ended.
        kind = Away
    elif issubclass(told, kind):
        # A reason refines a code and never changes it.
        kind = told
    message = error.details() or error.code().name
    if details is None and kind is not BudgetSpent and _BROKEN.fullmatch(message):
        # The transport made this code up (INTERNAL, UNKNOWN and others): a service would send details.
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


def has_details(error: grpc.RpcError) -> bool:
    """Return whether a failed call ended with a status that a service sent, rather than the transport."""
    return _details_of(error) is not None


def _details_of(error: grpc.RpcError) -> google_rpc_pb2.Status | None:
    """Return the google.rpc.Status in a failed call's trailing metadata; None if there is none."""
    for key, value in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return google_rpc_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _reason_of(status: google_rpc_pb2.Status | None) -> str:
    """Return the reason in a status, or ""."""
    info = _find(status, google_rpc_pb2.ErrorInfo())
    return str(info.reason) if info is not None and info.domain == ERROR_DOMAIN else ""


def _field_of(status: google_rpc_pb2.Status | None) -> str:
    """Return the field in a status, or ""."""
    bad_request = _find(status, google_rpc_pb2.BadRequest())
    if bad_request is None or not bad_request.field_violations:
        return ""
    return str(bad_request.field_violations[0].field)


def _delay_of(status: google_rpc_pb2.Status | None) -> float | None:
    """Return the retry delay in a status, in seconds; None if there is none."""
    retry = _find(status, google_rpc_pb2.RetryInfo())
    # Another service's message may have any value.
    return max(float(retry.retry_delay.ToNanoseconds()) / 1e9, 0.0) if retry is not None else None


def _find(status: google_rpc_pb2.Status | None, detail: Any) -> Any:
    """Return a detail of a status, read into the given message; None if there is none."""
    wanted = f"/google.rpc.{detail.DESCRIPTOR.name}"
    for each in status.details if status else ():
        if each.type_url.endswith(wanted):
            try:
                detail.ParseFromString(each.value)
            except DecodeError:
                return None
            return detail
    return None
