"""How a command's work runs and ends: its event loop, its message and its exit code."""

from __future__ import annotations

import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from services.cli.arguments import in_options, option_of
from services.cli.connecting import in_tls_options
from services.cli.interrupts import INTERRUPTED, Unwinding
from services.cli.output import json_error, json_text
from services.common.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

FAILED, MISUSED = 1, 2


def run_command(
    work: Callable[[], Coroutine[Any, Any, None] | None],
    *,
    as_json: bool = False,
    shows_result: bool = False,
    is_service: bool = False,
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Do a command's work, in an event loop where it is a coroutine; end with a message and a code if it
    fails.

    shows_result: whether the work is in vain where standard output is closed.
    is_service: whether SIGTERM is how the work ends well, once it serves.
    options: from fields of the contract to what was typed.
    """
    import asyncio

    from asd.errors import AsdError
    from services.common import telemetry
    from services.common.settings import SettingsError
    from services.local.running import Signalled
    from services.local.supervisor import LaunchError

    try:
        if shows_result and sys.__stdout__ is None:
            raise AsdError("standard output is closed, so the result would be lost: leave it open")
        _set_up_telemetry()
        runner = asyncio.Runner()
        # Made before Ctrl-C unwinds: half a loop cannot be closed.
        runner.get_loop()
        with Unwinding(), runner:
            coroutine = work()
            if coroutine is not None:
                try:
                    runner.run(coroutine)
                finally:
                    coroutine.close()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Signalled as signalled:
        ends_well = is_service and signalled.has_served and not signalled.is_interrupt
        raise typer.Exit(0 if ends_well else signalled.code) from None
    except BrokenPipeError:
        # Whoever reads our output has seen enough; typer ends quietly.
        raise
    except (AsdError, SettingsError, LaunchError, OSError) as error:
        _fail(error, as_json=as_json, options=options)
    finally:
        telemetry.shutdown_telemetry()


def _set_up_telemetry() -> None:
    from services.common import telemetry
    from services.common.settings import SettingsError

    try:
        telemetry.setup_telemetry("asd-client")
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _fail(error: Exception, *, as_json: bool, options: Mapping[str, str]) -> NoReturn:
    from asd.errors import AsdError, InvalidRequest, NotFound
    from asd.transport.status import status_of
    from services.common.settings import SettingsError

    is_misuse = isinstance(error, InvalidRequest | NotFound | SettingsError)
    field = error.field if isinstance(error, AsdError) else ""
    message = in_options(_explain(error), field, options)
    option = option_of(field, options)
    if as_json:
        if isinstance(error, AsdError):
            code = status_of(error).name
        else:
            code = "INVALID_ARGUMENT" if is_misuse else "FAILED_PRECONDITION"
        failure = json_error(code, message, option or field)
        if isinstance(error, AsdError) and error.retry_after_s is not None:
            failure["error"]["retry_after_s"] = error.retry_after_s
        sys.stderr.write(json_text(failure, sys.stderr.encoding))
    else:
        sys.stderr.write(
            f"asd: {visible(message)}{visible(f' (field {field})') if field and not option else ''}\n"
        )
    raise typer.Exit(MISUSED if is_misuse else FAILED)


def _explain(error: Exception) -> str:
    from asd.errors import Away
    from services.common.disks import explain

    if isinstance(error, OSError):
        return explain(error)
    advice = ": start one with `asd up`, or name another with --target" if isinstance(error, Away) else ""
    return in_tls_options(str(error)) + advice
