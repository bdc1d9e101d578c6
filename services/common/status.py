"""Reports errors to callers: the status of a failed call, with its details."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from asd.errors import AsdError
from asd.transport import status
from asd.transport.status import ERROR_DOMAIN, status_of
from services.common.errors import Draining

STATUS_TABLE = ((Draining, grpc.StatusCode.UNAVAILABLE), *status.STATUS_TABLE)
REASONS = {**status.REASONS, Draining: status.DRAINING}

INTERNAL_TEXT = "internal error; the service's log has the details"
# gRPC refuses more than 8 KiB of trailing metadata by default, and the message is in it twice.
MAX_MESSAGE_CHARS = 1000


def public_message(error: BaseException) -> str:
    """Return the text that a caller may read; a fixed one for anything but an AsdError."""
    text = error.message if isinstance(error, AsdError) else INTERNAL_TEXT
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def to_rpc_status(error: BaseException) -> status_pb2.Status:
    """Return the google.rpc.Status of an exception.

    It has a BadRequest if a field is at fault, an ErrorInfo if the code alone is ambiguous, and a RetryInfo
    if it is known when the request may succeed.
    """
    message = public_message(error)
    answer = status_pb2.Status(code=status_of(error).value[0], message=message)
    field = error.field if isinstance(error, AsdError) else ""
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        answer.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    reason = REASONS.get(type(error)) if isinstance(error, AsdError) else None
    if reason:
        answer.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    retry_after_s = error.retry_after_s if isinstance(error, AsdError) else None
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(retry_after_s * 1e9))
        answer.details.add().Pack(retry)
    return answer
