# ruff: noqa: ASYNC110 - what happens by itself is awaited by asking again
"""Stages that sleep: what the manager says is followed, and waking is asked for no more often than needed."""

from __future__ import annotations

import asyncio

import pytest

from asd.errors import AsdError, BudgetSpent, Unavailable
from services.router.clients.activation import TRUSTED_SECONDS, WAKE_SECONDS, Activation
from services.router.domain import Stage
from tests.limits import CALL_S

SMALL, LARGE = Stage("small", 0, 1.0, 1000.0), Stage("large", 1, 9.0, 1000.0)
LONG_MS = 20_000.0


class Manager:
    """Says what it is told to, and keeps what it was asked."""

    def __init__(self, **awake: bool) -> None:
        self.says = awake
        self.error: AsdError | None = None
        self.wake_error: AsdError | None = None
        self.woken: list[str] = []
        self.asked = asyncio.Event()
        self.failed = asyncio.Event()

    async def awake(self) -> dict[str, bool]:
        if self.error is not None:
            self.failed.set()
            raise self.error
        return dict(self.says)

    async def wake(self, stage: str) -> None:
        self.woken.append(stage)
        self.asked.set()
        if self.wake_error is not None:
            raise self.wake_error


class Name:
    """A stage's name, with replicas behind it or not."""

    def __init__(self) -> None:
        self.has_replicas = True
        self.forgotten = 0

    async def find(self) -> bool:
        return self.has_replicas

    def forget(self) -> None:
        self.forgotten += 1


class World:
    def __init__(self, **awake: bool) -> None:
        self.now = 0.0
        self.manager = Manager(**awake)
        self.names = Name(), Name()
        stages = list(zip((SMALL, LARGE), self.names, strict=True))
        self.waking = Activation(stages, self.manager, lambda: self.now, poll_ms=1.0)


async def settled() -> None:
    """Let tasks that were started go on until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_the_manager_says_is_followed() -> None:
    w = World(small=True, large=False)
    assert w.waking.scaled_to_zero == frozenset()
    await w.waking.update()
    assert w.waking.scaled_to_zero == {1}
    # Its addresses lead nowhere any more; once is enough.
    await w.waking.update()
    assert [name.forgotten for name in w.names] == [0, 1]
    w.manager.says = {"small": False, "large": True}
    await w.waking.update()
    assert w.waking.scaled_to_zero == {0}


async def test_a_stage_that_is_not_managed_never_sleeps() -> None:
    w = World(large=False)
    await w.waking.update()
    assert w.waking.scaled_to_zero == {1}


async def test_a_stage_sleeps_until_its_name_has_an_address() -> None:
    w = World(large=False)
    await w.waking.update()
    w.manager.says["large"] = True
    w.names[1].has_replicas = False
    await w.waking.update()
    assert w.waking.scaled_to_zero == {1}
    w.names[1].has_replicas = True
    await w.waking.update()
    assert w.waking.scaled_to_zero == frozenset()


async def test_a_manager_that_is_away_is_believed_for_a_while() -> None:
    w = World(large=False)
    await w.waking.update()
    w.manager.error = Unavailable("gone")
    w.now += TRUSTED_SECONDS - 0.1
    await w.waking.update()
    assert w.waking.scaled_to_zero == {1}
    w.now += 0.1
    await w.waking.update()
    assert w.waking.scaled_to_zero == frozenset()


async def test_waking_is_asked_for_once_in_a_while_and_for_each_stage() -> None:
    w = World(small=False, large=False)
    await w.waking.update()
    for _ in range(3):
        w.waking.activate(LARGE)
    w.waking.activate(SMALL)
    await settled()
    assert w.manager.woken == ["large", "small"]
    w.now += WAKE_SECONDS
    w.waking.activate(LARGE)
    await settled()
    assert w.manager.woken == ["large", "small", "large"]


async def test_who_waits_goes_on_when_the_stage_is_awake() -> None:
    w = World(large=False)
    await w.waking.update()
    waiting = asyncio.create_task(w.waking.until_active(LARGE, LONG_MS))
    await w.manager.asked.wait()
    await w.waking.update()
    await settled()
    assert not waiting.done()
    w.manager.says["large"] = True
    await w.waking.update()
    await asyncio.wait_for(waiting, CALL_S)
    assert w.manager.woken == ["large"]


async def test_a_stage_that_is_awake_is_not_waited_for() -> None:
    w = World(large=True)
    await w.waking.update()
    await w.waking.until_active(LARGE, 0.0)
    assert w.manager.woken == []


async def test_who_waits_in_vain_is_told_what_hinders() -> None:
    w = World(large=False)
    await w.waking.update()
    with pytest.raises(BudgetSpent, match="stage large"):
        await w.waking.until_active(LARGE, 0.0)
    w.now += WAKE_SECONDS
    w.manager.wake_error = Unavailable("the Kubernetes API cannot be reached")
    w.waking.activate(LARGE)
    await settled()
    with pytest.raises(BudgetSpent, match="Kubernetes"):
        await w.waking.until_active(LARGE, 0.0)


async def test_waking_that_failed_is_tried_again_while_somebody_waits() -> None:
    w = World(large=False)
    w.manager.wake_error = Unavailable("busy")
    await w.waking.update()
    waiting = asyncio.create_task(w.waking.until_active(LARGE, LONG_MS))
    await w.manager.asked.wait()
    w.manager.asked.clear()
    w.now += WAKE_SECONDS
    await w.waking.update()
    await asyncio.wait_for(w.manager.asked.wait(), CALL_S)
    w.manager.says["large"] = True
    await w.waking.update()
    await asyncio.wait_for(waiting, CALL_S)
    assert w.manager.woken == ["large", "large"]


async def test_following_asks_until_it_is_stopped() -> None:
    w = World(large=False)
    following = asyncio.create_task(w.waking.follow())
    async with asyncio.timeout(CALL_S):
        while w.waking.scaled_to_zero != {1}:
            await asyncio.sleep(0)
        w.manager.says["large"] = True
        while w.waking.scaled_to_zero:
            await asyncio.sleep(0)
        # A fault in between is not the end of it.
        w.manager.error = ValueError("a fault")  # type: ignore[assignment]
        await w.manager.failed.wait()
        w.manager.error, w.manager.says["large"] = None, False
        while not w.waking.scaled_to_zero:
            await asyncio.sleep(0)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
