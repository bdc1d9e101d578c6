"""Stages that are scaled to zero: which ones are, how they are activated, and the wait for a replica."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from asd.errors import AsdError, BudgetSpent
from asd.transport.channel import call_unary
from asd.v1 import manager_pb2, manager_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import grpc

    from services.router.domain import Stage

logger = logging.getLogger(__name__)

# Least time between two requests to activate a stage. Chosen: replicas take longer to start.
WAKE_SECONDS = 3.0
# How long the manager's last answer holds while it does not answer. Chosen.
TRUSTED_SECONDS = 30.0


class Replicated(Protocol):
    """Finds a stage's replicas."""

    async def find(self) -> bool:
        """Look for replicas now; return whether there is one."""

    def forget(self) -> None:
        """Drop all known replicas."""


class StageManager(Protocol):
    """Calls the manager. Every call raises the AsdError of its status."""

    async def awake(self) -> Mapping[str, bool]:
        """Return whether a replica is ready, by the name of the managed stage."""

    async def wake(self, stage: str) -> None:
        """Have a stage get replicas."""


class AlwaysActive:
    """The activator of a cascade whose stages always have replicas."""

    scaled_to_zero: frozenset[int] = frozenset()

    def activate(self, stage: Stage) -> None:
        """Do nothing: the stage has a replica."""

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        """Return at once."""


class Activation:
    """Follows which stages are scaled to zero. Run `follow` in a task.

    stages: every stage with the finder of its replicas. clock: monotonic seconds. poll_ms: between two polls
    of the manager.
    """

    def __init__(
        self,
        stages: Sequence[tuple[Stage, Replicated]],
        manager: StageManager,
        clock: Callable[[], float],
        poll_ms: float,
    ) -> None:
        self._stages = tuple(stages)
        self._manager = manager
        self._clock = clock
        self._poll_s = poll_ms / 1000.0
        self.scaled_to_zero: frozenset[int] = frozenset()
        self._heard = clock()
        self._problem = ""
        self._woken: dict[int, float] = {}
        self._wake_problems: dict[int, str] = {}
        self._waking: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        """Poll the manager until cancelled."""
        try:
            while True:
                try:
                    await self.update()
                except Exception:
                    # Polling must go on, or requests would wait for a stage for ever.
                    logger.exception("cannot tell which stages sleep")
                await asyncio.sleep(self._poll_s)
        finally:
            for task in self._waking:
                task.cancel()

    async def update(self) -> None:
        """Ask the manager once which stages are scaled to zero."""
        try:
            awake = await self._manager.awake()
        except AsdError as error:
            if error.message != self._problem:
                logger.warning("%s; stages are not woken meanwhile", error.message)
            self._problem = error.message
            if self._clock() - self._heard >= TRUSTED_SECONDS:
                self._set(())
            return
        self._problem = ""
        self._heard = self._clock()
        asleep = []
        for stage, replicas in self._stages:
            if stage.name not in awake:
                continue
            if not awake[stage.name]:
                if stage.index not in self.scaled_to_zero:
                    replicas.forget()
                asleep.append(stage.index)
            elif stage.index in self.scaled_to_zero and not await replicas.find():
                # A replica is ready, but the stage's name does not resolve to it yet.
                asleep.append(stage.index)
        self._set(asleep)

    def activate(self, stage: Stage) -> None:
        """Have the manager activate a stage, in the background. At most once per WAKE_SECONDS."""
        now = self._clock()
        if now - self._woken.get(stage.index, -WAKE_SECONDS) < WAKE_SECONDS:
            return
        self._woken[stage.index] = now
        task = asyncio.create_task(self._wake(stage))
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        """Activate a stage and wait for it. Raises BudgetSpent if it has no replica in time."""
        try:
            async with asyncio.timeout(max(timeout_ms, 0.0) / 1000.0):
                while stage.index in self.scaled_to_zero:
                    self.activate(stage)
                    await self._changed.wait()
        except TimeoutError as error:
            problem = self._wake_problems.get(stage.index) or self._problem
            because = f" ({problem})" if problem else ""
            raise BudgetSpent(
                f"{stage} sleeps and was not awake within {timeout_ms:.0f} ms{because}: ask again later, "
                "or with a later deadline"
            ) from error

    async def _wake(self, stage: Stage) -> None:
        try:
            await self._manager.wake(stage.name)
        except AsdError as error:
            logger.warning("%s cannot be woken: %s", stage, error.message)
            self._wake_problems[stage.index] = error.message
        else:
            self._wake_problems.pop(stage.index, None)

    def _set(self, asleep: Collection[int]) -> None:
        self.scaled_to_zero = frozenset(asleep)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class GrpcManager:
    """Calls the manager. timeout_ms: of each call."""

    def __init__(self, target: str, channel: grpc.aio.Channel, timeout_ms: float) -> None:
        self._peer = f"the manager at {target}"
        self._timeout_ms = timeout_ms
        stub = manager_pb2_grpc.ManagerServiceStub(channel)
        self._status = stub.Status
        self._wake = stub.Wake

    async def awake(self) -> dict[str, bool]:
        """Return whether a replica is ready, by the name of the managed stage.

        A stage whose state is unknown is left out.
        """
        status = await call_unary(
            self._status,
            manager_pb2.ManagerServiceStatusRequest(),
            timeout_ms=self._timeout_ms,
            peer=self._peer,
        )
        return {
            each.stage: each.state == manager_pb2.SLEEP_STATE_AWAKE
            for each in status.stages
            if each.state != manager_pb2.SLEEP_STATE_UNSPECIFIED
        }

    async def wake(self, stage: str) -> None:
        """Have a stage get replicas."""
        message = manager_pb2.WakeRequest(stage=stage)
        await call_unary(self._wake, message, timeout_ms=self._timeout_ms, peer=self._peer)
