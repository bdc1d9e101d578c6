"""The options that several commands have: their checks, and what completes them."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from services.cli.arguments import number
from services.common.addresses import check_target

DEFAULT_TARGET = "127.0.0.1:50050"
# A day. gRPC cannot tell a time far above it from none.
_LONGEST_TIMEOUT_MS = 86_400_000


class PreferenceOption(StrEnum):
    """As the contract's Preference."""

    FASTEST = "fastest"
    BALANCED = "balanced"
    BEST = "best"


def check_target_option(target: str | None) -> str | None:
    """Refuse what is no HOST:PORT."""
    if target is not None:
        try:
            check_target(target)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return target


def stages_of(file: Path) -> list[str]:
    """Return the names of a cascade file's stages for completion; nothing where it cannot be used."""
    from services.common.settings import SettingsError
    from services.local.cascade_file import CascadeFile

    with suppress(SettingsError):
        return [stage.name for stage in CascadeFile.load(file).stages]
    return []


def complete_stage(incomplete: str) -> list[str]:
    """Return the names of stages that begin so."""
    from services.local.cascade_file import EMBEDDED

    return [name for name in stages_of(EMBEDDED) if name.startswith(incomplete)]


def complete_process(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of processes of `asd up` that begin so."""
    from services.local.cascade_file import EMBEDDED, GATEWAY, POLICY, ROUTER

    names = (ROUTER, POLICY, GATEWAY, *stages_of(context.params.get("cascade") or EMBEDDED))
    return [name for name in names if name.startswith(incomplete)]


TargetOption = Annotated[
    str,
    typer.Option(
        envvar="ASD_TARGET",
        metavar="HOST:PORT",
        callback=check_target_option,
        help="The router of a cascade.",
    ),
]
CascadeOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Cascade to run (YAML). Default: the embedded family.", dir_okay=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
TimeoutOption = Annotated[
    float,
    typer.Option(
        parser=number(1, _LONGEST_TIMEOUT_MS),
        metavar="FLOAT",
        help="Deadline of a call, in milliseconds; a day at most.",
    ),
]
PreferenceChoice = Annotated[
    PreferenceOption | None,
    typer.Option(help="What matters: speed or quality. Default: balanced.", show_default=False),
]


def is_typed(context: typer.Context, name: str) -> bool:
    """Return whether a parameter is on the command line, and not from a variable or a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
