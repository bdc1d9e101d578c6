"""The commands of `asd`.

Imports at the top are what `asd --help` needs; each command imports the rest when it runs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from services.cli.arguments import CheckedCommand
from services.cli.asking import ask, describe, report
from services.cli.ending import MISUSED
from services.cli.local import demo, models, prepare, pull_model, up
from services.cli.output import json_error, json_text

if TYPE_CHECKING:
    from collections.abc import Sequence

_EPILOG = (
    "Exit codes: 0 success, 1 failure, 2 wrong usage or a refused request, 130 interrupted, "
    "143 terminated (`asd up`: before it serves; 0 after). With --json, a "
    'failure is one JSON object on standard error: {"error": {"code", "message", "field"}}.'
)

# Its base in typer.core lies elsewhere in versions that bring click along.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


class _Commands(TyperGroup):
    """Commands that refuse a wrong command line with JSON where --json is on it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        is_json = standalone_mode and _wants_json(arguments)
        try:
            code = super().main(
                args, prog_name, complete_var, standalone_mode and not is_json, windows_expand_args, **extra
            )
        except _UsageError as error:
            if not is_json:
                raise
            sys.stderr.write(json_text(json_error("INVALID_ARGUMENT", *_usage(error)), sys.stderr.encoding))
            code = MISUSED
        return sys.exit(code or 0) if is_json else code


def _wants_json(arguments: Sequence[str]) -> bool:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(each.partition("=")[0] == "--json" for each in options)


def _usage(error: Any) -> tuple[str, str]:
    """Return what is wrong with a command line, and the option or argument that it is about, or ""."""
    parameter = getattr(error, "param", None)
    if parameter is None and getattr(error, "param_hint", None):
        return error.format_message(), error.param_hint
    if parameter is None:
        return error.message or error.format_message(), ""
    is_option = parameter.param_type_name == "option"
    return error.format_message(), max(parameter.opts, key=len) if is_option else parameter.name


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from services.common.version import VERSION

        typer.echo(f"asd {VERSION}")
        raise typer.Exit


def _asd(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    pass


app = typer.Typer(
    name="asd",
    cls=_Commands,
    help="Adaptive speculative decoding: ask a cascade of language models, or run one on this machine.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.callback()(_asd)
for each in (ask, describe, report, up, demo):
    app.command(cls=CheckedCommand, epilog=_EPILOG)(each)

models_app = typer.Typer(
    help="The models of a cascade on this machine. Alone it lists them.", invoke_without_command=True
)
app.add_typer(models_app, name="models")
models_app.callback(epilog=_EPILOG)(models)
models_app.command(cls=CheckedCommand, epilog=_EPILOG)(prepare)
models_app.command(name="pull", cls=CheckedCommand, epilog=_EPILOG)(pull_model)
