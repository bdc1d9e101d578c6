"""The one table from gRPC status to HTTP, and errors in each API's own form. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """An error over HTTP: its status, OpenAI's `type` and `code`, Anthropic's `type`."""

    http: int
    openai_type: str
    openai_code: str
    anthropic_type: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

# By the names of gRPC's codes. Beside them what HTTP alone has.
TABLE: dict[str, Row] = {
    "INVALID_ARGUMENT": Row(400, _INVALID, "invalid_value", _INVALID),
    "OUT_OF_RANGE": Row(400, _INVALID, "invalid_value", _INVALID),
    # A model or a cascade that is set up wrongly: the operator's to mend.
    "FAILED_PRECONDITION": Row(503, _SERVER, "failed_precondition", "api_error"),
    "UNAUTHENTICATED": Row(401, _INVALID, "invalid_api_key", "authentication_error"),
    "PERMISSION_DENIED": Row(403, _INVALID, "permission_denied", "permission_error"),
    "NOT_FOUND": Row(404, _INVALID, "not_found", "not_found_error"),
    "ALREADY_EXISTS": Row(409, _INVALID, "conflict", _INVALID),
    "ABORTED": Row(409, _INVALID, "conflict", _INVALID),
    "RESOURCE_EXHAUSTED": Row(429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    "CANCELLED": Row(499, _INVALID, "cancelled", _INVALID),
    "OK": Row(500, _SERVER, "internal_error", "api_error"),
    "UNKNOWN": Row(500, _SERVER, "internal_error", "api_error"),
    "INTERNAL": Row(500, _SERVER, "internal_error", "api_error"),
    "DATA_LOSS": Row(500, _SERVER, "internal_error", "api_error"),
    "UNIMPLEMENTED": Row(501, _SERVER, "not_implemented", "api_error"),
    "UNAVAILABLE": Row(503, _SERVER, "service_unavailable", "overloaded_error"),
    "DEADLINE_EXCEEDED": Row(504, _SERVER, "timeout", "timeout_error"),
    # A kind of FAILED_PRECONDITION: a model's template or tokenizer fails on this input.
    "INPUT_FAILED": Row(400, _INVALID, "failed_precondition", _INVALID),
    "MALFORMED_HTTP": Row(400, _INVALID, "malformed_request", _INVALID),
    "BODY_NOT_JSON": Row(400, _INVALID, "invalid_json", _INVALID),
    "NO_SUCH_PATH": Row(404, _INVALID, "unknown_url", "not_found_error"),
    "METHOD_NOT_ALLOWED": Row(405, _INVALID, "method_not_allowed", _INVALID),
    "BODY_TOO_SLOW": Row(408, _INVALID, "request_timeout", _INVALID),
    "BODY_TOO_LARGE": Row(413, _INVALID, "request_too_large", "request_too_large"),
    "NOT_JSON_TYPE": Row(415, _INVALID, "unsupported_media_type", _INVALID),
}


@dataclass(frozen=True)
class Problem:
    """An error for a caller. kind: its row of TABLE. param: the parameter at fault in the API's words, or "".

    retry_after_s: when the same request may succeed; None: not known.
    """

    kind: str
    message: str
    param: str = ""
    retry_after_s: float | None = None

    @property
    def row(self) -> Row:
        """Its row of the table."""
        return TABLE.get(self.kind, TABLE["UNKNOWN"])


def openai_body(problem: Problem) -> dict[str, Any]:
    """Return the body of an error in OpenAI's form."""
    row = problem.row
    code = "model_not_found" if row.http == 404 and problem.param == "model" else row.openai_code
    return {
        "error": {
            "message": problem.message,
            "type": row.openai_type,
            "param": problem.param or None,
            "code": code,
        }
    }


def anthropic_body(problem: Problem) -> dict[str, Any]:
    """Return the body of an error in Anthropic's form, whose messages begin with the parameter."""
    message = problem.message
    if problem.param and not message.startswith(problem.param):
        message = f"{problem.param}: {message}"
    error = {"type": problem.row.anthropic_type, "message": message}
    if problem.param:
        error["param"] = problem.param
    return {"type": "error", "error": error}


def retry_headers(problem: Problem) -> list[tuple[bytes, bytes]]:
    """Return when to ask again: `Retry-After`, and in milliseconds for the SDKs, which read both."""
    if problem.retry_after_s is None:
        return []
    seconds = max(math.ceil(problem.retry_after_s), 1)
    milliseconds = max(math.ceil(problem.retry_after_s * 1000.0), 1)
    return [
        (b"retry-after", str(seconds).encode()),
        (b"retry-after-ms", str(milliseconds).encode()),
    ]
