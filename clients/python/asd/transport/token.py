"""Bearer tokens: callers of the router send `authorization: Bearer TOKEN`."""

from __future__ import annotations

import re

METADATA_KEY = "authorization"
# Characters that gRPC metadata can carry, without the space (it ends a token) and the colon (it ends a name).
TOKEN = re.compile(r"[\x21-\x39\x3b-\x7e]+")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata with a token; empty for "". Raises ValueError for a malformed token."""
    if not token:
        return ()
    if not TOKEN.fullmatch(token):
        raise ValueError("a token is printable ASCII without spaces and colons")
    return ((METADATA_KEY, f"Bearer {token}"),)
