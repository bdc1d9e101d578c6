"""Channels to other services, with traced calls; asd.transport makes the calls themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.transport import channel
from asd.transport.channel import MAX_MESSAGE_BYTES
from services.common import telemetry

if TYPE_CHECKING:
    import grpc

    from asd.transport.tls import TlsFiles


def open_channel(
    target: str,
    *,
    retry: bool = True,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    tls: TlsFiles | None = None,
) -> grpc.aio.Channel:
    """Return a channel whose calls are traced if tracing is on; see asd.transport.channel."""
    return channel.open_channel(
        target,
        retry=retry,
        max_message_bytes=max_message_bytes,
        tls=tls,
        interceptors=telemetry.client_interceptors() or (),
    )
