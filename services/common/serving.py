"""Settings of every service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.common.server import ServerOptions
from services.common.settings import Section, ServiceSettings
from services.common.tls import ServerTls

# gRPC holds milliseconds in a 32-bit number: at most 24 days.
Milliseconds = Annotated[int, Field(ge=0, lt=2**31)]


class GrpcSettings(Section):
    """Options of the server's connections, as in services.common.server.ServerOptions."""

    max_connection_age_ms: Milliseconds = 0
    max_connection_age_grace_ms: Milliseconds = 0


class ServerSettings(ServiceSettings):
    """Base of the settings of a process that serves gRPC.

    health_listen: address that serves health alone, without TLS, for probes. metrics_listen: address of
    Prometheus' /metrics. Empty: none.
    """

    tls: ServerTls | None = None
    health_listen: str = ""
    metrics_listen: str = ""
    grpc: GrpcSettings = GrpcSettings()

    def server_options(self) -> ServerOptions:
        """Return the server's connection options."""
        return ServerOptions(
            self.tls,
            self.health_listen,
            self.grpc.max_connection_age_ms,
            self.grpc.max_connection_age_grace_ms,
        )
