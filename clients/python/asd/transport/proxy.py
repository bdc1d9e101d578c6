"""Whether gRPC connections go through an HTTP proxy."""

from __future__ import annotations

import os


def proxy_arguments() -> tuple[tuple[str, int], ...]:
    """Return the arguments of a channel by which it takes a proxy only where `grpc_proxy` names one.

    gRPC by itself takes `https_proxy` and `http_proxy` too, which are there for what leaves the network:
    services of one cluster, or of one machine, would call each other through it, or not at all.
    """
    is_asked = bool(os.environ.get("grpc_proxy"))  # noqa: SIM112 - gRPC's own name
    return (("grpc.enable_http_proxy", int(is_asked)),)
