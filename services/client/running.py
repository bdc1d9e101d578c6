"""A cascade that a command runs: its processes, their logs, and what signals do to them."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.client.cascade_file import services_of
from services.client.launcher import LaunchError, Supervisor
from services.common.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import Console

    from services.client.cascade_file import CascadeFile, Ports

# Children get this long to drain, and a little more to end, before they are killed.
_DRAIN_SECONDS = 10.0
_GRACE_SECONDS = 12.0


class Signalled(Exception):  # noqa: N818 - not an error: somebody wants the command to end
    """SIGINT or SIGTERM ended the work, and the processes with it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.is_interrupt = number == signal.SIGINT


@asynccontextmanager
async def running(
    cascade: CascadeFile, ports: Ports, notes: Console, *, only: str | None = None
) -> AsyncIterator[Supervisor]:
    """Run a cascade's processes, or only one of them, while the body runs.

    The first SIGINT or SIGTERM cancels the body and drains the processes, a second one kills them; Signalled
    is raised then. Logs lie in a temporary directory that is kept if a process failed. Raises SettingsError
    for an unknown `only`, and LaunchError if a process does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="asd-"))
    services = services_of(cascade, ports, directory, drain_seconds=_DRAIN_SECONDS)
    chosen = [service for service in services if only in {None, service.name}]

    def say(line: str) -> None:
        notes.print(line, markup=False, soft_wrap=True)

    supervisor = Supervisor(chosen, directory, say=say, grace_seconds=_GRACE_SECONDS)
    received = _cancel_on_signals(supervisor, notes)
    keep_logs = False
    try:
        if not chosen:
            names = ", ".join(service.name for service in services)
            raise SettingsError(f"--only {only}: this cascade has {names}")
        with notes.status(f"starting {', '.join(child.service.name for child in supervisor.children)} …"):
            await supervisor.__aenter__()
        try:
            yield supervisor
        finally:
            await supervisor.__aexit__(None, None, None)
    except LaunchError:
        keep_logs = any(child.log.exists() for child in supervisor.children)
        raise
    except asyncio.CancelledError:
        if received:
            raise Signalled(received[0]) from None
        raise
    finally:
        if not keep_logs and not supervisor.has_crashed:
            shutil.rmtree(directory, ignore_errors=True)


def _cancel_on_signals(supervisor: Supervisor, notes: Console) -> list[int]:
    """Let signals cancel the task that runs now, then kill; return the list that they are put into."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            supervisor.kill()
        elif task is not None:
            notes.print("stopping …", style="dim")
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return received
