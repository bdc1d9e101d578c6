"""Options of the commands that call a service: TLS and a token."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from asd.client import AsyncClient
    from asd.transport.tls import Tls

_PANEL = "Connection"


def _file(variable: str, help_text: str) -> Any:
    return typer.Option(
        envvar=variable, metavar="FILE", dir_okay=False, help=help_text, rich_help_panel=_PANEL
    )


_TLS_OPTIONS = {
    "tls": (
        Annotated[
            bool,
            typer.Option(
                "--tls",
                envvar="ASD_TLS",
                help="Encrypt, and trust the system's authorities. The other --tls options do so too.",
                rich_help_panel=_PANEL,
            ),
        ],
        False,
    ),
    "tls_ca": (
        Annotated[Path | None, _file("ASD_TLS_CA", "Authorities to trust in the system's place (PEM).")],
        None,
    ),
    "tls_cert": (
        Annotated[Path | None, _file("ASD_TLS_CERT", "Certificate to show, where the server asks (PEM).")],
        None,
    ),
    "tls_key": (Annotated[Path | None, _file("ASD_TLS_KEY", "Its key (PEM).")], None),
    "tls_server_name": (
        Annotated[
            str,
            typer.Option(
                envvar="ASD_TLS_SERVER_NAME",
                metavar="NAME",
                help="Name in the server's certificate. Default: the host that is called.",
                rich_help_panel=_PANEL,
            ),
        ],
        "",
    ),
}
_TOKEN_OPTIONS = {
    "token": (
        Annotated[
            str,
            typer.Option(
                envvar="ASD_TOKEN",
                metavar="TOKEN",
                help="Token to show. Others on this machine see a command line; not so a variable or a file.",
                rich_help_panel=_PANEL,
            ),
        ],
        "",
    ),
    "token_file": (Annotated[Path | None, _file("ASD_TOKEN_FILE", "File that holds the token.")], None),
}


# As the client calls its arguments, and as they were typed.
_TLS_ARGUMENTS = {
    "tls.ca_file": "--tls-ca",
    "tls.cert_file": "--tls-cert",
    "tls.key_file": "--tls-key",
    "tls.server_name": "--tls-server-name",
    "leave tls out": "leave the --tls options out",
}


def in_tls_options(message: str) -> str:
    """Return a message about TLS in terms of the options that were typed."""
    for name, option in _TLS_ARGUMENTS.items():
        message = message.replace(name, option)
    return message


@dataclass(frozen=True)
class Connection:
    """How a service is called. Files are read when it is used."""

    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str = ""
    token: str = ""
    token_file: Path | None = None

    def client(self, target: str, timeout_ms: float) -> AsyncClient:
        """Return a client of a router. Raises SettingsError for options that do not go together."""
        from asd.client import AsyncClient
        from services.common import telemetry

        return AsyncClient(
            target,
            timeout_ms=timeout_ms,
            tls=self.client_tls(),
            token=self.read_token(),
            interceptors=telemetry.client_interceptors() or (),
        )

    def client_tls(self) -> Tls | None:
        """Return how to encrypt; None: not at all. Raises SettingsError for half a pair of files."""
        from asd.transport.tls import Tls
        from services.common.settings import SettingsError

        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key belong together: give both or neither")
        if not (self.tls or self.tls_ca or self.tls_cert or self.tls_server_name):
            return None
        return Tls(
            ca_file=self.tls_ca,
            cert_file=self.tls_cert,
            key_file=self.tls_key,
            server_name=self.tls_server_name,
        )

    def read_token(self) -> str:
        """Return the token, or "". Raises SettingsError for what cannot be one, or be read."""
        from asd.transport.token import bearer
        from services.common.settings import SettingsError

        if self.token and self.token_file is not None:
            raise SettingsError(
                "--token and --token-file exclude each other (as do ASD_TOKEN, ASD_TOKEN_FILE)"
            )
        try:
            token = self.token_file.read_text(encoding="utf-8").strip() if self.token_file else self.token
            bearer(token)
        except ValueError as error:
            place = f"--token-file {self.token_file}" if self.token_file else "--token"
            raise SettingsError(f"{place}: a token is one word of printable ASCII without colons") from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SettingsError(f"--token-file {self.token_file} cannot be read: {reason}") from error
        if self.token_file is not None and not token:
            raise SettingsError(f"--token-file {self.token_file} is empty")
        return token


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command options for TLS and a token; it gets them as its argument `connection`."""
    return _with_options(command, _TLS_OPTIONS | _TOKEN_OPTIONS)


def encrypted(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command options for TLS alone; it gets them as its argument `connection`."""
    return _with_options(command, _TLS_OPTIONS)


def _with_options(command: Callable[..., None], options: dict[str, tuple[Any, Any]]) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    own = [each for name, each in signature.parameters.items() if name != "connection"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        command(**values, connection=Connection(**given))

    # Typer reads the options from it.
    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return run
