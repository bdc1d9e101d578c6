"""Ctrl-C at every point of a command: code 130, and no traceback. The command's own process sends the signal,
where it is to hit."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from services.local import running
from tests.limits import PROCESS_S

_START = """
import atexit, os, signal, sys
from services.cli.__main__ import main

# Also where the tests run in the background, and so with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
"""


def _run(code: str, *arguments: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-c", _START + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PROCESS_S,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize("command", ["up", "demo"])
@pytest.mark.parametrize(
    "module",
    ["services.cli.commands", "typer", "asyncio", "services.local.supervisor", "services.local.running"],
)
def test_while_something_is_imported(module, command):
    code = f"""
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            interrupt()

sys.meta_path.insert(0, Finder())
main()
"""
    # If nothing interrupts it, it ends here.
    assert _run(code, command, "--cascade", "/no/such.yaml") == (130, "")


def test_while_the_loop_is_made():
    code = """
from asyncio.selector_events import BaseSelectorEventLoop

make = BaseSelectorEventLoop.__init__

def interrupted(loop, *arguments):
    interrupt()
    make(loop, *arguments)

BaseSelectorEventLoop.__init__ = interrupted
main()
"""
    assert _run(code, "describe") == (130, "")


def test_while_it_works_it_unwinds():
    code = """
import types

def read(path):
    try:
        interrupt()
    finally:
        print("cleaned up", file=sys.stderr)

sys.modules["services.stage.engines.onnx.export"] = types.SimpleNamespace(read_shape=read)
main()
"""
    assert _run(code, "models") == (130, "cleaned up\n")


def test_while_it_ends():
    code = """
from services.common import telemetry
telemetry.shutdown_telemetry = interrupt
main()
"""
    assert _run(code, "models") == (130, "")


def test_after_its_end_the_code_stands():
    # What is registered first runs last.
    assert _run("atexit.register(interrupt)\nmain()", "--version") == (0, "")


def test_a_command_in_the_background_is_left_alone():
    code = """
import types

def read(path):
    interrupt()
    return types.SimpleNamespace(parameters=1)

signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.modules["services.stage.engines.onnx.export"] = types.SimpleNamespace(read_shape=read)
main()
"""
    assert _run(code, "models") == (0, "")


class _Supervisor:
    def __init__(self) -> None:
        self.killed = 0

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def _hang_up_as_before():
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hang_up_as_before")
@pytest.mark.parametrize("is_ignored", [False, True])
async def test_a_terminal_that_closes_ends_a_cascade_unless_nohup_said_otherwise(is_ignored):
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    supervisor, lines = _Supervisor(), []

    async def work() -> list[int]:
        received = running.cancel_on_signals(supervisor, lines.append)
        try:
            signal.raise_signal(signal.SIGHUP)
            # Signals reach the loop through a pipe.
            async with asyncio.timeout(0 if is_ignored else 60):
                await asyncio.Event().wait()
        except (asyncio.CancelledError, TimeoutError):
            return received
        raise AssertionError

    received = await asyncio.create_task(work())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.remove_signal_handler(number)
    assert (received, lines) == (([], []) if is_ignored else ([signal.SIGHUP], ["stopping …"]))
    assert supervisor.killed == 0
