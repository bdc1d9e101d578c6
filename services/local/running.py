"""Runs a cascade for a command: its processes, their logs, and the handling of signals."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from asd.errors import PreconditionFailed
from services.common.extras import check_extras, missing_of
from services.common.settings import SettingsError
from services.local.cascade_file import GATEWAY, POLICY, services_of
from services.local.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from rich.console import Console

    from services.local.cascade_file import CascadeFile, Ports

# How long children may drain. They get a little more to end, before they are killed.
_DRAIN_SECONDS = 10.0
_GRACE_SECONDS = 12.0
# Chosen: often enough to show that a start goes on, seldom enough to read. A large model takes minutes.
TELL_EVERY_S = 15.0
_EXTRA_OF_ENGINE = {"onnx": "stage", "vllm": "vllm", "tensorrt_llm": "tensorrt-llm"}


class Signalled(Exception):  # noqa: N818 - not an error: somebody wants the command to end
    """SIGINT, SIGTERM or SIGHUP ended the command and its processes.

    code: a shell's exit code for the signal. has_served: whether all processes had started to serve.
    """

    def __init__(self, number: int, *, has_served: bool) -> None:
        super().__init__(f"ended by signal {number}")
        self.code = 128 + number
        self.is_interrupt = number == signal.SIGINT
        self.has_served = has_served


@asynccontextmanager
async def running(
    cascade: CascadeFile,
    ports: Ports,
    notes: Console,
    *,
    only: str | None = None,
    tell_every_s: float | None = TELL_EVERY_S,
) -> AsyncIterator[Supervisor]:
    """Run a cascade's processes, or only one of them, while the body runs.

    The first SIGINT, SIGTERM or SIGHUP (of a terminal that closes) cancels the body and drains the processes,
    a second one kills them; both raise Signalled. Logs are in a temporary directory, which is removed unless
    a process crashed after the start: the error of a failed start quotes the end of its log. tell_every_s:
    pause between lines about what is still starting; None: no such lines. Raises
    SettingsError for an unknown `only` and for a stage named like one of the gateway's models,
    PreconditionFailed if a process needs a package that is not installed, and LaunchError if a process does
    not start.
    """
    _check_installed(cascade, only, has_gateway=ports.gateway is not None)

    def say(line: str) -> None:
        # A closed terminal must not prevent the draining of processes.
        with suppress(OSError):
            notes.print(line, markup=False, soft_wrap=True)

    supervisors: list[Supervisor] = []
    has_served = False
    # Handle signals before there is anything to clean up.
    received = cancel_on_signals(supervisors, say)
    directory = Path(tempfile.mkdtemp(prefix="asd-"))
    try:
        services = services_of(cascade, ports, directory, drain_seconds=_DRAIN_SECONDS)
        chosen = [service for service in services if only in {None, service.name}]
        supervisor = Supervisor(chosen, directory, say=say, grace_seconds=_GRACE_SECONDS)
        supervisors.append(supervisor)
        if not chosen:
            names = ", ".join(service.name for service in services)
            raise SettingsError(f"--only {only}: this cascade has {names}")
        with notes.status(f"starting {', '.join(child.service.name for child in supervisor.children)} …"):
            telling = asyncio.create_task(_tell_waiting(supervisor, say, tell_every_s))
            try:
                await supervisor.__aenter__()
            finally:
                telling.cancel()
        has_served = True
        try:
            yield supervisor
        finally:
            await supervisor.__aexit__(None, None, None)
    except (asyncio.CancelledError, OSError):
        # A closed terminal raises OSError.
        if received:
            raise Signalled(received[0], has_served=has_served) from None
        raise
    finally:
        if any(each.has_crashed for each in supervisors):
            say(f"the logs are kept in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


async def _tell_waiting(supervisor: Supervisor, say: Callable[[str], None], every_s: float | None) -> None:
    """Say from time to time which processes do not serve yet."""
    if every_s is None:
        return
    started = time.monotonic()
    while True:
        await asyncio.sleep(every_s)
        for child in supervisor.children:
            if not child.serves:
                say(child.waiting_line(time.monotonic() - started))


def _check_installed(cascade: CascadeFile, only: str | None, *, has_gateway: bool) -> None:
    """Raise PreconditionFailed, with what to install, if a process lacks a package."""
    extras = [_EXTRA_OF_ENGINE[stage.engine] for stage in cascade.stages if only in {None, stage.name}]
    if cascade.policy is not None and only in {None, POLICY}:
        extras.append("policy")
    if has_gateway and only in {None, GATEWAY}:
        extras.append("gateway")
    try:
        check_extras(extras)
    except PreconditionFailed as error:
        if only is None and has_gateway and missing_of("gateway"):
            raise PreconditionFailed(f"{error.message}; --no-gateway starts the rest without HTTP") from error
        raise


def cancel_on_signals(supervisors: Sequence[Supervisor], say: Callable[[str], None]) -> list[int]:
    """Let the first signal cancel the current task and the second kill; return the list of signals."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            for supervisor in supervisors:
                supervisor.kill()
        elif task is not None:
            task.cancel()
            say("stopping …")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup lets a command outlive its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)
    return received
