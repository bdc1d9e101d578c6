"""Parts of HTTP that all paths of the gateway share: headers, tokens, bodies and answers."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asd.errors import AsdError, Overloaded, Unauthenticated
from asd.transport.files import DamagedFile
from asd.transport.token import TOKEN
from services.common.documents import parse_json
from services.gateway.errors import Problem
from services.gateway.streaming import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from starlette.types import Receive, Scope, Send

JSON = b"application/json"
# Values in a body. Chosen: several times what 4096 messages in parts have; to read so many takes some 50 ms.
_MOST_VALUES = 100_000
# Bodies over the limit are still read up to so many times the limit, so that their callers read the answer
# and not a broken connection. Chosen.
_READ_ON = 8


class HttpError(AsdError):
    """An error that only HTTP has. closes: whether the connection cannot be used again."""

    def __init__(self, kind: str, message: str, *, closes: bool = False, allow: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(kind, self.message)
        self.closes = closes
        self.allow = allow


class CallerGone(Exception):  # noqa: N818 - it ends a request, and is no error
    """The caller has closed the connection."""


class Incoming:
    """A request's body, in parts, whose caller may be watched meanwhile."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Any] = deque()

    async def __call__(self) -> Any:
        """Return the next part, as ASGI has it."""
        return self._kept.popleft() if self._kept else await self._receive()

    async def is_closed(self) -> bool:
        """Wait for the connection's end. Return False if a body that goes on comes first: it is not read."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return True
            self._kept.append(message)
            if message.get("more_body", False):
                return False


class Room:
    """Bytes of bodies that may be in memory at once, of all requests."""

    def __init__(self, most_bytes: int, retry_s: float) -> None:
        self._free = most_bytes
        self._retry_s = retry_s

    @contextmanager
    def taken(self) -> Iterator[Callable[[int], None]]:
        """Yield what takes bytes until the block is left. It raises Overloaded if they are not free."""
        total = 0

        def take(count: int) -> None:
            nonlocal total
            if count > self._free:
                raise Overloaded(
                    "the gateway has no room for the body now (max_buffered_bytes): call again",
                    retry_after_s=self._retry_s,
                )
            self._free -= count
            total += count

        try:
            yield take
        finally:
            self._free += total


class Headers:
    """A request's headers, as text by their lower-case names. Repeated ones stand in order."""

    def __init__(self, scope: Scope) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            self._values.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1").strip())

    def all(self, name: str) -> list[str]:
        """Return the values of a header."""
        return self._values.get(name, [])

    def get(self, name: str) -> str:
        """Return the first value of a header; "" if it is absent."""
        return self._values.get(name, [""])[0]

    def carrier(self) -> dict[str, str]:
        """Return the headers that continue a trace."""
        return {name: self.get(name) for name in ("traceparent", "tracestate") if name in self._values}

    def beginning_with(self, prefix: str) -> dict[str, str]:
        """Return the headers of a prefix. Raises InvalidRequest for one that is there twice and differs."""
        from services.gateway.request import invalid

        found = {}
        for name, values in self._values.items():
            if name.startswith(prefix):
                if len(set(values)) > 1:
                    raise invalid(name, "is there twice, with values that clash: send it once")
                found[name] = values[0]
        return found


def token_of(headers: Headers, *, takes_api_key: bool) -> str:
    """Return the caller's token; "" if it sends none. No message has a part of it.

    takes_api_key: whether `x-api-key` has it too. Raises Unauthenticated if it is malformed, or given twice
    with different values.
    """
    tokens = []
    for value in headers.all("authorization"):
        scheme, _, token = value.partition(" ")
        # Some clients send the scheme alone where they were given no key.
        if scheme.lower() == "bearer" and not token.strip():
            continue
        if scheme.lower() != "bearer" or not TOKEN.fullmatch(token.strip()):
            raise Unauthenticated("the header 'authorization' must read 'Bearer TOKEN'")
        tokens.append(token.strip())
    if takes_api_key:
        for value in filter(None, headers.all("x-api-key")):
            if not TOKEN.fullmatch(value):
                raise Unauthenticated("the header 'x-api-key' must hold a token")
            tokens.append(value)
    if len(set(tokens)) > 1:
        raise Unauthenticated("the request has two tokens, which differ: send one")
    return tokens[0] if tokens else ""


async def read_json(
    headers: Headers, receive: Receive, take: Callable[[int], None], *, most_bytes: int, timeout_s: float
) -> dict[str, Any]:
    """Return the JSON object of a request's body. take: see Room.

    Raises HttpError if it is of another type, too large, too slow or no such object; Overloaded; CallerGone
    if the connection was closed.
    """
    _check_type(headers)
    try:
        async with asyncio.timeout(timeout_s):
            content = await _read(headers, receive, take, most_bytes)
    except TimeoutError as error:
        raise HttpError(
            "BODY_TOO_SLOW", f"the body was not there after {timeout_s:g} s", closes=True
        ) from error
    try:
        value = parse_json(content, "the body", most_values=_MOST_VALUES)
    except DamagedFile as error:
        raise HttpError("BODY_NOT_JSON", error.message) from error
    if not isinstance(value, dict):
        raise HttpError("BODY_NOT_JSON", "the body must be a JSON object")
    return value


def _check_type(headers: Headers) -> None:
    kind, _, parameters = headers.get("content-type").lower().partition(";")
    if kind.strip() != JSON.decode():
        raise HttpError("NOT_JSON_TYPE", "the header 'content-type' must be application/json", closes=True)
    charset = parameters.partition("charset=")[2].strip(' "')
    if charset not in {"", "utf-8", "utf8"}:
        raise HttpError("NOT_JSON_TYPE", "the body must be in UTF-8", closes=True)
    if headers.get("content-encoding").lower() not in {"", "identity"}:
        raise HttpError("NOT_JSON_TYPE", "the body must not be compressed", closes=True)


async def _read(headers: Headers, receive: Receive, take: Callable[[int], None], most_bytes: int) -> bytes:
    length = headers.get("content-length")
    too_large = f"the body has more than {most_bytes} bytes, the most that is taken"
    if length.isdigit() and int(length) > most_bytes and headers.get("expect"):
        # Nothing has been sent yet.
        raise HttpError("BODY_TOO_LARGE", too_large, closes=True)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerGone
        part = message.get("body", b"")
        size += len(part)
        if size > most_bytes:
            parts.clear()
        elif part:
            take(len(part))
            parts.append(part)
        is_last = not message.get("more_body", False)
        if size > most_bytes and (is_last or size > most_bytes * _READ_ON):
            raise HttpError("BODY_TOO_LARGE", too_large, closes=not is_last)
        if is_last:
            return b"".join(parts)


async def respond(
    send: Send,
    status: int,
    body: Any,
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    content_type: bytes = JSON,
    closes: bool = False,
) -> None:
    """Send a whole answer: a JSON value, or bytes as they are."""
    content = body if isinstance(body, bytes) else encode(body)
    fields = [(b"content-type", content_type), (b"content-length", str(len(content)).encode()), *headers]
    if closes:
        fields.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content})
