"""Settings of the gateway."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from services.common.settings import Requests, Section, ServiceSettings, Target, service_config
from services.common.tls import ClientTls, ServerTls

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# Largest body that may be allowed. Chosen: a request of the contract's 4 MiB with every character escaped.
_MOST_BODY_BYTES = 64 << 20
# Chosen: more than a pod has.
_MOST_BUFFERED_BYTES = 64 << 30


class RouterPeer(Section):
    """Address of the router, and the deadline of one request."""

    target: Target
    timeout_ms: Milliseconds = 60_000.0
    tls: ClientTls | None = None


class GatewaySettings(ServiceSettings):
    """Settings of the asd gateway."""

    model_config = service_config("ASD_GATEWAY_")

    listen: str = "127.0.0.1:8000"
    router: RouterPeer
    tls: ServerTls | None = None
    # Address of Prometheus' /metrics alone, beside the one among the other paths. Empty: none.
    metrics_listen: str = ""
    # A larger body is refused. Chosen: twice the contract's limit of a request, for JSON's escapes.
    max_body_bytes: int = Field(default=8 << 20, ge=1, le=_MOST_BODY_BYTES)
    # Bodies in memory at once, of all requests; more are refused. Chosen: a body takes up to six times
    # its size, and all fit into the chart's memory limit.
    max_buffered_bytes: int = Field(default=64 << 20, ge=1, le=_MOST_BUFFERED_BYTES)
    # For reading a request's head, and again for its body.
    read_timeout_ms: Milliseconds = 30_000.0
    # A connection whose client takes nothing of an answer for so long is closed.
    write_timeout_ms: Milliseconds = 60_000.0
    # A connection without a request is closed after this time.
    idle_timeout_ms: Milliseconds = 75_000.0
    # A stream that has nothing to send for so long sends an empty chunk, so that proxies keep it open.
    keep_alive_ms: Milliseconds = 15_000.0
    # Requests in flight at once.
    max_concurrent: Requests = 1024
    # One line of JSON for each request, on standard error, without prompts and tokens.
    access_log: bool = False
    drain_seconds: float = Field(default=10.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ValueError("max_buffered_bytes must be at least max_body_bytes")
        return self
