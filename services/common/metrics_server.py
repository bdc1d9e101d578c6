"""Serves /metrics on the same addresses as gRPC.

prometheus_client's own server listens on one address family only: a pod with an IPv6 address served gRPC on
0.0.0.0:50050 and no metrics on 0.0.0.0:9464. It also resolves its own address, which takes seconds if no
name server answers.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_ALL = {"", "0.0.0.0", "::"}  # noqa: S104
# Errors of a system without IPv6, or with IPv6 switched off.
_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


def serve_registry(registry: CollectorRegistry, host: str, port: int) -> None:
    """Serve a registry's metrics in a thread of its own, for as long as the process lives.

    host: "", "0.0.0.0" or "::" stands for every address of IPv4 and IPv6. Raises OSError or OverflowError if
    it cannot listen on the address.
    """
    listening = listen_on(host, port)
    server = ThreadingWSGIServer(("", 0), _Quiet, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    server.server_name, server.server_port = host, listening.getsockname()[1]
    server.setup_environ()
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def listen_on(host: str, port: int) -> socket.socket:
    """Return a listening socket; see serve_registry. Its connections send every part of an answer at once."""
    listening = _listening(host, port)
    # asyncio sets it only for sockets that it makes itself. Without it, each part of a stream waits until the
    # caller has acknowledged the one before, 40 ms or more. Connections inherit it.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _listening(host: str, port: int) -> socket.socket:
    if host in _ALL and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
    address = "0.0.0.0" if host in _ALL else host  # noqa: S104
    family, *_, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((str(found[0]), port), family=family)


class _Quiet(WSGIRequestHandler):
    """A request handler without a log."""

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base's name
        """Do nothing."""
