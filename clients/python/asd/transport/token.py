"""Tokens that callers of the router show: `authorization: Bearer TOKEN`."""

from __future__ import annotations

import re

METADATA_KEY = "authorization"
# What gRPC carries as metadata, without the space that would end a token and the colon that ends a name.
TOKEN = re.compile(r"[\x21-\x39\x3b-\x7e]+")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that shows a token; none for "". Raises ValueError for what cannot be one."""
    if not token:
        return ()
    if not TOKEN.fullmatch(token):
        raise ValueError("a token is printable ASCII without spaces and colons")
    return ((METADATA_KEY, f"Bearer {token}"),)
