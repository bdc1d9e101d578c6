"""Bearer tokens: callers of the router send `authorization: Bearer TOKEN`."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from asd.errors import Unauthenticated
from asd.transport.files import UnusableFile, WatchedFiles
from asd.transport.token import METADATA_KEY, TOKEN
from services.common.settings import Section

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_SETTING = "auth.tokens_file"
_SCHEME = "bearer "
# Methods that need no token: health probes and reflection.
_OPEN = ("/grpc.health.", "/grpc.reflection.")

MISSING = (
    "this cascade wants a token: send it as metadata 'authorization: Bearer TOKEN' "
    "(asd: --token-file, ASD_TOKEN)"
)
WRONG = "this cascade does not know the token: ask for a valid one whoever runs it"
MALFORMED = "the metadata 'authorization' must read 'Bearer TOKEN'"


class AuthSettings(Section):
    """Who may call. tokens_file: one token per line, or name:token; `#` begins a comment line."""

    tokens_file: Path


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token as Unauthenticated; health and reflection are open.

    The file is read again when it changes. Put it innermost, inside the interceptor that maps errors to
    status. Raises UnusableFile if the file cannot be used at start-up.
    """

    def __init__(self, settings: AuthSettings) -> None:
        file = settings.tokens_file
        self._tokens = WatchedFiles(
            {_SETTING: file}, lambda contents: _digests(contents[_SETTING], f"{_SETTING} {file}")
        )
        if not self._tokens.value:
            raise UnusableFile(f"{_SETTING} {settings.tokens_file} holds no token: put one on a line")
        # Each is made once: the outer interceptors cache handlers by identity.
        self._refusals = {message: _refusal(message) for message in (MISSING, WRONG, MALFORMED)}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, or one that refuses."""
        if handler_call_details.method.startswith(_OPEN):
            return await continuation(handler_call_details)
        problem = self._problem(handler_call_details.invocation_metadata)
        return self._refusals[problem] if problem else await continuation(handler_call_details)

    def _problem(self, metadata: Any) -> str:
        values = [value for key, value in metadata or () if key == METADATA_KEY]
        if not values:
            return MISSING
        value = values[0]
        if not isinstance(value, str) or value[: len(_SCHEME)].lower() != _SCHEME:
            return MALFORMED
        self._tokens.refresh()
        digest = _digest(value[len(_SCHEME) :].strip())
        # Every token is compared in constant time, so that timing reveals none of them.
        known = [hmac.compare_digest(digest, each) for each in self._tokens.value]
        return "" if any(known) else WRONG


def _digests(content: bytes, where: str) -> tuple[bytes, ...]:
    """Return the digests of a file's tokens. Raises UnusableFile for a line without a token."""
    digests = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, rest = text.partition(":")
        token = (rest if colon else name).strip()
        if not TOKEN.fullmatch(token):
            # The message never quotes the line: it may hold a token.
            raise UnusableFile(
                f"{where}: line {number} is no token: printable ASCII without spaces and colons, after name: "
                "or alone"
            )
        digests.append(_digest(token))
    return tuple(digests)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _refusal(message: str) -> Any:
    async def refuse(requests: Any, context: Any) -> None:
        raise Unauthenticated(message)

    # A stream handler refuses any kind of method: it answers before a request has come.
    return grpc.stream_stream_rpc_method_handler(refuse, None, None)
