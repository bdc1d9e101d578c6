"""TLS between services: certificates from files, read again when they change.

cert-manager and Kubernetes replace the files of a mounted Secret. A server reads them again before the next
handshake, a channel before the next call; connections that are up stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import grpc
from pydantic import model_validator

from asd.transport.files import WatchedFiles
from asd.transport.tls import check_authority, check_pair
from services.common.settings import Section


class ServerTls(Section):
    """TLS of a server. client_ca_file: clients must present a certificate that this authority signed."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The files by their settings."""
        files = {"tls.cert_file": self.cert_file, "tls.key_file": self.key_file}
        return files | ({"tls.client_ca_file": self.client_ca_file} if self.client_ca_file else {})


class ClientTls(Section):
    """TLS of a client. ca_file: authorities that it trusts; none: the system's.

    cert_file, key_file: its own certificate, if the server asks for one. server_name: name that the server's
    certificate must contain; empty: the host of the target.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both or neither")
        return self


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Return a server's credentials. Raises UnusableFile, naming file and setting, for an unusable file."""
    watched = WatchedFiles(tls.files, lambda contents: _server_configuration(tls, contents))

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return watched.value if watched.refresh() else None

    # None, for no change, is missing from types-grpcio.
    return grpc.dynamic_ssl_server_credentials(
        watched.value,
        fetch,  # type: ignore[arg-type]
        require_client_authentication=tls.client_ca_file is not None,
    )


def _server_configuration(tls: ServerTls, contents: dict[str, bytes]) -> grpc.ServerCertificateConfiguration:
    check_pair(tls.cert_file, tls.key_file)
    check_authority("tls.client_ca_file", tls.client_ca_file, contents)
    return grpc.ssl_server_certificate_configuration(
        [(contents["tls.key_file"], contents["tls.cert_file"])], contents.get("tls.client_ca_file")
    )
