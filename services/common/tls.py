"""TLS between services: certificates from files, read again when they change.

cert-manager and Kubernetes replace the files of a mounted Secret. A server reads them again before the next
handshake, a channel before the next call; connections that are up stay as they are.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Self

import grpc
from pydantic import model_validator

from services.common.settings import Section
from services.common.watched_files import UnusableFile, WatchedFiles


class ServerTls(Section):
    """What a server shows. client_ca_file: clients must show a certificate that this authority signed."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The files by their settings."""
        files = {"tls.cert_file": self.cert_file, "tls.key_file": self.key_file}
        return files | ({"tls.client_ca_file": self.client_ca_file} if self.client_ca_file else {})


class ClientTls(Section):
    """How a client connects. ca_file: authorities that it trusts; none: the system's.

    cert_file, key_file: what it shows of itself, where the server asks. server_name: name that the server's
    certificate must hold; empty: the host of the target.
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

    @property
    def files(self) -> dict[str, Path]:
        """The files by their settings."""
        named = {"tls.ca_file": self.ca_file, "tls.cert_file": self.cert_file, "tls.key_file": self.key_file}
        return {name: file for name, file in named.items() if file is not None}


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Return a server's credentials. Raises UnusableFile, naming file and setting, for files that
    cannot be used."""
    watched = WatchedFiles(tls.files, lambda contents: _server_configuration(tls, contents))

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return watched.value if watched.refresh() else None

    # None, for no change, is missing from types-grpcio.
    return grpc.dynamic_ssl_server_credentials(
        watched.value,
        fetch,  # type: ignore[arg-type]
        require_client_authentication=tls.client_ca_file is not None,
    )


def watched_channel_credentials(tls: ClientTls) -> WatchedFiles[grpc.ChannelCredentials]:
    """Return a client's credentials. Raises UnusableFile, naming file and setting, for files that
    cannot be used."""

    def build(contents: dict[str, bytes]) -> grpc.ChannelCredentials:
        _check_authority("tls.ca_file", tls.ca_file, contents)
        if tls.cert_file is not None and tls.key_file is not None:
            _check_pair(tls.cert_file, tls.key_file)
        return grpc.ssl_channel_credentials(
            contents.get("tls.ca_file"), contents.get("tls.key_file"), contents.get("tls.cert_file")
        )

    return WatchedFiles(tls.files, build)


def _server_configuration(tls: ServerTls, contents: dict[str, bytes]) -> grpc.ServerCertificateConfiguration:
    _check_pair(tls.cert_file, tls.key_file)
    _check_authority("tls.client_ca_file", tls.client_ca_file, contents)
    return grpc.ssl_server_certificate_configuration(
        [(contents["tls.key_file"], contents["tls.cert_file"])], contents.get("tls.client_ca_file")
    )


def _check_pair(cert_file: Path, key_file: Path) -> None:
    """gRPC says nothing of files that it cannot use but on the first connection, in the log."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password it would ask the terminal for one.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except OSError as error:
        if not isinstance(error, ssl.SSLError):
            # Replaced meanwhile.
            raise UnusableFile(f"{cert_file}, {key_file}: {error.strerror or error}") from error
        reason = (
            "the key is not the certificate's"
            if "MISMATCH" in str(error.reason)
            else "not a certificate and its key, in PEM and without a password"
        )
        raise UnusableFile(f"tls.cert_file {cert_file} and tls.key_file {key_file}: {reason}") from error


def _check_authority(setting: str, file: Path | None, contents: dict[str, bytes]) -> None:
    if file is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=contents[setting].decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise UnusableFile(f"{setting} {file}: holds no certificate in PEM") from error
