"""TLS of a client: certificates from files, read again when they change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from asd.transport.files import UnusableFile, WatchedFiles


class TlsFiles(Protocol):
    """The TLS settings of a client; see Tls."""

    @property
    def ca_file(self) -> Path | None:
        """Authorities that it trusts."""

    @property
    def cert_file(self) -> Path | None:
        """The client's own certificate."""

    @property
    def key_file(self) -> Path | None:
        """The key of cert_file."""

    @property
    def server_name(self) -> str:
        """Name in the server's certificate."""


@dataclass(frozen=True)
class Tls:
    """TLS of a client. ca_file: authorities that it trusts; None: the system's.

    cert_file, key_file: its own certificate, if the server asks for one. server_name: name that the server's
    certificate must contain; "": the host of the target. Files are in PEM, and read again when they change; a
    path may be a string.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        for name in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both or neither")


def watched_channel_credentials(tls: TlsFiles) -> WatchedFiles[grpc.ChannelCredentials]:
    """Return a client's credentials. Raises UnusableFile, naming file and setting, for an unusable file."""

    files = {"tls.ca_file": tls.ca_file, "tls.cert_file": tls.cert_file, "tls.key_file": tls.key_file}
    named = {name: file for name, file in files.items() if file is not None}

    def build(contents: dict[str, bytes]) -> grpc.ChannelCredentials:
        check_authority("tls.ca_file", tls.ca_file, contents)
        if tls.cert_file is not None and tls.key_file is not None:
            check_pair(tls.cert_file, tls.key_file)
        return grpc.ssl_channel_credentials(
            contents.get("tls.ca_file"), contents.get("tls.key_file"), contents.get("tls.cert_file")
        )

    return WatchedFiles(named, build)


def check_pair(cert_file: Path, key_file: Path) -> None:
    """Raise UnusableFile for a certificate and key that cannot be used together.

    gRPC reports unusable files only at the first connection, in its log.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, it would ask for one on the terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except OSError as error:
        if not isinstance(error, ssl.SSLError):
            # A file was replaced meanwhile.
            raise UnusableFile(f"{cert_file}, {key_file}: {error.strerror or error}") from error
        reason = (
            "the key is not the certificate's"
            if "MISMATCH" in str(error.reason)
            else "not a certificate and its key, in PEM and without a password"
        )
        raise UnusableFile(f"tls.cert_file {cert_file} and tls.key_file {key_file}: {reason}") from error


def check_authority(setting: str, file: Path | None, contents: dict[str, bytes]) -> None:
    """Raise UnusableFile if a file of authorities has no certificate."""
    if file is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=contents[setting].decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise UnusableFile(f"{setting} {file}: holds no certificate in PEM") from error
