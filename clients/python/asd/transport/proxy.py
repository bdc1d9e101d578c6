"""Whether gRPC connections go through an HTTP proxy."""

from __future__ import annotations

import os


def proxy_arguments() -> tuple[tuple[str, int], ...]:
    """Return channel arguments that allow a proxy only if `grpc_proxy` names one.

    By default, gRPC also reads `https_proxy` and `http_proxy`. Those are for traffic that leaves the network:
    services of one cluster or machine would call each other through the proxy, or fail to.
    """
    is_asked = bool(os.environ.get("grpc_proxy"))  # noqa: SIM112 - gRPC's own name
    return (("grpc.enable_http_proxy", int(is_asked)),)
