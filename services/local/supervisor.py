"""Runs the services of a cascade as child processes: starts them together, restarts and drains them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import sys
import time
from collections import deque
from typing import IO, TYPE_CHECKING, Self

import yaml

from asd.client import AsyncClient
from asd.errors import AsdError, BudgetSpent, Unavailable
from asd.visible import one_line
from services.common.disks import cannot_write, replace_file
from services.local.cascade_file import GATEWAY, HOST, POLICY, ROUTER, Ports

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from services.local.cascade_file import Service

# Timeout of a start. A new model is first prepared: seconds for the embedded family, minutes for a large one.
_READY_SECONDS = 300.0
_DELAYS_S = (0.25, 10.0)
# A service that served for this long restarts with the first delay again.
_STABLE_S = 30.0
# How long to wait until the router reaches a restarted service; timeout of one Describe call, and the pause
# between two. Chosen: the router's channels reconnect at least every second.
_REACH_SECONDS = 10.0
_DESCRIBE_SECONDS = 2.0
_REACH_PAUSE_S = 0.05
# Lines of the log that the error of a failed start quotes: the log itself is removed.
_LOG_LINES = 40
# Characters of a log's line in a line about a start. Chosen: what a person reads.
_MOST_OF_LINE = 160
# Advice for a full disk: logs and settings are in the directory of temporary files.
_ELSEWHERE = "set TMPDIR to another folder"
_LOSS = "go on without what it prints"
# Below the range of outgoing ports, so that no connection of ours takes a port that we chose.
_FREE_PORTS = range(20_000, 32_000)


class LaunchError(Exception):
    """A service cannot be started; the message says which, why, and what to change."""


class Supervisor:
    """Services as child processes, from `async with` to its end.

    Entering starts all of them at once, but the gateway after the router, and returns when each one serves. A
    service that crashes is restarted, with a longer delay after each failure; its return is announced once
    the router can reach it. Leaving drains the gateway, then the router, so that requests in flight can
    finish, and then the other services. A process that does not end within `grace_seconds` is killed. If this
    process is killed, its children notice and drain.

    directory: for logs and configuration. say: takes a line about an event, for people.
    Entering raises LaunchError if a port is taken or a service does not start; no child is left then.
    """

    def __init__(
        self,
        services: Sequence[Service],
        directory: Path,
        *,
        say: Callable[[str], None],
        grace_seconds: float = 12.0,
    ) -> None:
        routers = [service for service in services if service.name == ROUTER]
        reach = Reach(routers[0].address) if routers else _reached
        self.children = tuple(Child(service, directory, say, reach) for service in services)
        self._grace_seconds = grace_seconds
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def has_crashed(self) -> bool:
        """Whether a child has ever crashed."""
        return any(child.crashes for child in self.children)

    async def __aenter__(self) -> Self:
        for child in self.children:
            _check_port(child.service)
        try:
            async with asyncio.TaskGroup() as group:
                starting = {
                    child.service.name: group.create_task(child.start())
                    for child in self.children
                    if child.service.name != GATEWAY
                }
                for child in self.children:
                    if child.service.name == GATEWAY:
                        # A channel that failed once waits before it connects again.
                        if ROUTER in starting:
                            await starting[ROUTER]
                        await child.start()
        except BaseExceptionGroup as errors:
            await self._stop()
            raise errors.exceptions[0] from None
        except BaseException:
            await self._stop()
            raise
        self._keepers = [asyncio.create_task(child.keep()) for child in self.children]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._stop()

    def kill(self) -> None:
        """End all children at once, without draining."""
        for child in self.children:
            child.kill()

    async def _stop(self) -> None:
        rest = {child.service.name for child in self.children} - {GATEWAY, ROUTER}
        for turn in ({GATEWAY}, {ROUTER}, rest):
            stopping = [child for child in self.children if child.service.name in turn]
            await asyncio.gather(*(child.stop(self._grace_seconds) for child in stopping))


class Child:
    """One service's process, and the file that its output goes to.

    reach: waits until the router can reach the service of a name. delays_s: the first and the longest delay
    of a restart. serves: whether the process does.
    """

    def __init__(
        self,
        service: Service,
        directory: Path,
        say: Callable[[str], None],
        reach: Callable[[str], Awaitable[None]] | None = None,
        delays_s: tuple[float, float] = _DELAYS_S,
    ) -> None:
        self._reach = reach or _reached
        self._delays_s = delays_s
        self.service = service
        self.log = directory / f"{service.name}.log"
        self.crashes = 0
        self.serves = False
        self._config = directory / f"{service.name}.yaml"
        self._say = say
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Id of the current or last process; 0 before the first start."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start the process and return when it serves.

        Raises LaunchError if it ends before that, takes too long, or serves at another address.
        """
        with self._prepared() as log:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Python would look for modules in the current directory first.
                "-P",
                "-m",
                "services.local.child",
                self.service.module,
                "--config",
                str(self._config),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                # Only the parent gets Ctrl-C; it drains the children in order.
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(_READY_SECONDS):
                address = await self._read_ready(process)
        except TimeoutError:
            self.kill()
            await process.communicate()
            raise LaunchError(self._explain(f"does not serve after {_READY_SECONDS:g} s")) from None
        if address is None:
            await process.communicate()
            raise LaunchError(self._explain(_ending(process)))
        if address != self.service.address:
            raise LaunchError(
                f"{self.service.name} listens on {address} instead of {self.service.address}: unset the "
                "ASD_*_LISTEN variable"
            )
        self.serves = True

    def waiting_line(self, seconds: float) -> str:
        """Return a line about a start that has taken so long, with the last line of the log."""
        if not self.pid:
            return f"{self.service.name} waits for {ROUTER}"
        # A progress bar rewrites its line.
        last = one_line(self._log_end(1).splitlines()[-1], _MOST_OF_LINE)
        return f"{self.service.name} starts, {seconds:.0f} s so far (log: {self.log}): {last}"

    async def keep(self) -> None:
        """Restart the process whenever it ends, until cancelled."""
        first_delay_s, longest_delay_s = self._delays_s
        delay_s = first_delay_s
        is_return = False
        while True:
            started = time.monotonic()
            process = self._running()
            announcing = asyncio.create_task(self._announce(process)) if self.serves and is_return else None
            try:
                await self._forward_output(process)
                await process.wait()
            finally:
                if announcing is not None:
                    announcing.cancel()
                    await asyncio.gather(announcing, return_exceptions=True)
            self.crashes += 1
            # A process that exits with 0 was asked to end and has drained: that is no crash.
            was_asked = self.serves and process.returncode == 0
            self.serves = False
            if was_asked or time.monotonic() - started > _STABLE_S:
                delay_s = first_delay_s
            self._say(
                f"{self.service.name} (process {process.pid}) {_ending(process)}; starting it again in "
                f"{delay_s:g} s (log: {self.log})"
            )
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, longest_delay_s)
            is_return = True
            # A failed start is a process that ended; the next turn reports it.
            with contextlib.suppress(LaunchError):
                await self.start()

    async def _announce(self, process: asyncio.subprocess.Process) -> None:
        """Announce that the service is back once the router reaches it."""
        await self._reach(self.service.name)
        self._say(f"{self.service.name} (process {process.pid}) serves again at {self.service.address}")

    async def stop(self, grace_seconds: float) -> None:
        """Let the process drain and end; kill it if that takes too long."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(grace_seconds):
                await process.communicate()
        except TimeoutError:
            self._say(
                f"{self.service.name} (process {process.pid}) did not end in {grace_seconds:g} s: killed"
            )
            self.kill()
            await process.communicate()

    def kill(self) -> None:
        """End the process at once, if it runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("start the process first")
        return self._process

    async def _read_ready(self, process: asyncio.subprocess.Process) -> str | None:
        """Return the address of the READY line; None if the output ends without one."""
        output = _output(process)
        while line := await output.readline():
            words = line.decode(errors="replace").split()
            if words[:1] == ["READY"] and len(words) == 3:
                return words[2]
        return None

    async def _forward_output(self, process: asyncio.subprocess.Process) -> None:
        """Append what the process prints to its log until it closes its output."""
        output = _output(process)
        is_lost = False
        while chunk := await output.read(65_536):
            try:
                with self.log.open("ab") as log:
                    log.write(chunk)
            except OSError as error:
                # Continue to read: otherwise the process would block on its output.
                if not is_lost:
                    self._say(f"{self.service.name}: {cannot_write(self.log, error, _LOSS).message}")
                is_lost = True
            else:
                is_lost = False

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[IO[bytes]]:
        """Write the service's settings if that has not been done, and open its log."""
        try:
            if not self._config.exists():
                # Written once, so that a restart does not need space on the disk.
                replace_file(self._config, yaml.safe_dump(self.service.config, sort_keys=False))
            log = self.log.open("ab")
        except OSError as error:
            raise LaunchError(cannot_write(self._config.parent, error, _ELSEWHERE).message) from error
        with log:
            yield log

    def _explain(self, what: str) -> str:
        return f"{self.service.name} {what}. The end of its log:\n{self._log_end(_LOG_LINES)}"

    def _log_end(self, lines: int) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=lines)).rstrip() or "(its log is empty)"


class Reach:
    """Waits until a router reaches a service again: the router reconnects with pauses.

    It gives up after _REACH_SECONDS: a router that is down, or requires a token, cannot be asked.
    """

    def __init__(self, router: str) -> None:
        self._router = router

    async def __call__(self, name: str) -> None:
        """Wait for the service of a name; the gateway is not the router's to reach."""
        if name == GATEWAY:
            return
        with contextlib.suppress(AsdError, TimeoutError):
            async with (
                asyncio.timeout(_REACH_SECONDS),
                AsyncClient(self._router, timeout_ms=_DESCRIBE_SECONDS * 1e3) as cascade,
            ):
                # The router has no event for it.
                while not await self._is_reached(cascade, name):  # noqa: ASYNC110
                    await asyncio.sleep(_REACH_PAUSE_S)

    @staticmethod
    async def _is_reached(cascade: AsyncClient, name: str) -> bool:
        try:
            description = await cascade.describe()
        except (Unavailable, BudgetSpent):
            return False
        if name == POLICY:
            return description.policy is not None
        return name == ROUTER or any(each.available for each in description.stages if each.stage == name)


async def _reached(_: str) -> None:
    """Return at once: there is no router to ask."""


def free_ports(stages: int) -> Ports:
    """Return ports that nobody listens on now. stages: of the cascade.

    Raises LaunchError if none are found.
    """
    for _ in range(100):
        ports = Ports.from_base(_FREE_PORTS.start + secrets.randbelow(len(_FREE_PORTS) - 200), stages)
        if all(_bind_error(port) is None for port in (ports.router, ports.policy, *ports.stages)):
            return ports
    raise LaunchError("no free ports: name some with `asd up --port-base`, and use `--target`")


def _check_port(service: Service) -> None:
    error = _bind_error(service.port)
    if error is not None:
        remedy = "move all ports with --port-base"
        if service.name == GATEWAY:
            remedy = "choose another port with --gateway-port, or leave the gateway out with --no-gateway"
        raise LaunchError(
            f"port {service.port}, for {service.name}, cannot be used ({error}): stop what listens there, or "
            f"{remedy}"
        )


def _bind_error(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return None


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdout


def _ending(process: asyncio.subprocess.Process) -> str:
    code = process.returncode or 0
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
