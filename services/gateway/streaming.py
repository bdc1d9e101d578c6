"""Server-sent events. Pure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.gateway.request import SseEvent

# Ends OpenAI's older streams. It is no JSON.
DONE = "[DONE]"


def encode(value: Any) -> bytes:
    """Return a value as JSON. Raises ValueError for a number that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def encode_events(events: Iterable[SseEvent]) -> bytes:
    """Return events as they go over the wire. JSON has no line breaks outside of texts, which escape them."""
    parts = []
    for event in events:
        if event.name:
            parts.append(b"event: " + event.name.encode() + b"\n")
        data = event.data.encode() if isinstance(event.data, str) else encode(event.data)
        parts.append(b"data: " + data + b"\n\n")
    return b"".join(parts)
