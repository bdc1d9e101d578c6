"""Stages sleep when nobody has used them for long enough, and never else; they wake when they are asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from asd.errors import AsdError, NotFound, PreconditionFailed, Unavailable
from services.scaler.cluster import Scale
from services.scaler.idle_scaler import IdleScaler, Rule, SleepState
from services.scaler.settings import ScalerSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

RULE = Rule(
    "large", "asd-large", idle_seconds=300, wake_replicas=2, min_awake_seconds=60, give_up_seconds=900
)


class Cluster:
    """Deployments that get ready when a test says so."""

    def __init__(self, wanted: int = 2, ready: int = 2) -> None:
        self.scales = {"asd-large": Scale(wanted, ready)}
        self.set: list[int] = []
        self.error: AsdError | None = None
        # Set: a call of scale waits for it.
        self.gate: asyncio.Event | None = None

    async def read(self, deployments: Sequence[str]) -> dict[str, Scale]:
        if self.error is not None:
            raise self.error
        return {name: self.scales[name] for name in deployments if name in self.scales}

    async def scale(self, deployment: str, replicas: int) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.set.append(replicas)
        self.scales[deployment] = replace(self.scales[deployment], wanted=replicas)

    def have(self, wanted: int, ready: int, autoscaler: str = "") -> None:
        self.scales["asd-large"] = Scale(wanted, ready, autoscaler)


class World:
    """The idle scaler of one stage. idle_s: what its replicas say; None: not all of them answer."""

    def __init__(self, rule: Rule = RULE, wanted: int = 2, ready: int = 2) -> None:
        self.now = 1000.0
        self.idle_s: float | None = 0.0
        self.asked_of: list[int] = []
        self.scalings: list[tuple[str, str]] = []
        self.cluster = Cluster(wanted, ready)
        self.scaler = IdleScaler(
            [rule], self.cluster, self, lambda: self.now, lambda *scaling: self.scalings.append(scaling)
        )

    async def idle_ms(self, stage: str, replicas: int) -> float | None:
        assert stage == "large"
        self.asked_of.append(replicas)
        return None if self.idle_s is None else self.idle_s * 1000.0

    async def after(self, seconds: float, idle_s: float | None) -> list[int]:
        """Let time pass and look; return what replicas were set since the start."""
        self.now += seconds
        self.idle_s = idle_s
        await self.scaler.update()
        return self.cluster.set

    @property
    def state(self) -> SleepState:
        (view,) = self.scaler.views()
        return view.state


async def test_a_stage_sleeps_once_it_was_idle_for_long_enough() -> None:
    w = World()
    assert await w.after(0, 0.0) == []
    assert await w.after(299.9, 299.9) == []
    assert w.state is SleepState.AWAKE
    assert await w.after(0.1, 300.0) == [0]
    assert w.scalings == [("large", "sleep")]
    # Its replicas still end, and nothing more is to be asked of them.
    assert w.state is SleepState.ASLEEP
    w.cluster.have(0, 0)
    assert await w.after(1000, None) == [0]
    assert w.state is SleepState.ASLEEP


async def test_it_does_not_sleep_before_it_was_awake_for_long_enough() -> None:
    """The clock of a manager that was started anew starts when it first sees the stage."""
    w = World()
    assert await w.after(0, 5000.0) == []
    assert await w.after(59.9, 5000.0) == []
    assert await w.after(0.1, 5000.0) == [0]


async def test_the_time_that_it_is_awake_begins_anew_where_its_replicas_fail() -> None:
    w = World()
    await w.after(0, 5000.0)
    w.cluster.have(2, 0)
    await w.after(30, None)
    w.cluster.have(2, 2)
    assert await w.after(30, 5000.0) == []
    assert await w.after(59.9, 5000.0) == []
    assert await w.after(0.1, 5000.0) == [0]


@pytest.mark.parametrize("idle_s", [0.0, 299.0, None])
async def test_it_does_not_sleep_while_it_is_used_or_does_not_say(idle_s: float | None) -> None:
    w = World()
    await w.after(0, idle_s)
    assert await w.after(10_000, idle_s) == []
    assert w.state is SleepState.AWAKE


async def test_it_never_has_less_than_its_least_replicas() -> None:
    w = World(replace(RULE, min_replicas=1))
    await w.after(0, 5000.0)
    assert await w.after(60, 5000.0) == [1]
    w.cluster.have(1, 1)
    assert await w.after(10_000, 20_000.0) == [1]
    assert w.state is SleepState.AWAKE


async def test_waking_gives_it_its_replicas_and_keeps_it_awake() -> None:
    w = World(wanted=0, ready=0)
    await w.after(0, None)
    assert w.state is SleepState.ASLEEP
    assert (await w.scaler.wake("large")).state is SleepState.WAKING
    assert w.cluster.set == [2]
    await w.after(1, None)
    assert w.state is SleepState.WAKING
    # Nobody is asked how idle it is before it is there.
    assert w.asked_of == []
    w.cluster.have(2, 1)
    await w.after(1, 0.0)
    assert w.state is SleepState.AWAKE
    assert w.asked_of == [1]
    assert await w.after(59, 5000.0) == [2]
    assert await w.after(1, 5000.0) == [2, 0]
    assert w.scalings == [("large", "wake"), ("large", "sleep")]


async def test_waking_what_is_awake_only_keeps_it_so() -> None:
    w = World()
    await w.after(0, 0.0)
    w.now += 290
    assert (await w.scaler.wake("large")).state is SleepState.AWAKE
    assert w.cluster.set == []
    assert await w.after(59.9, 5000.0) == []
    assert await w.after(0.1, 5000.0) == [0]


async def test_a_stage_that_somebody_gave_more_replicas_keeps_them_when_woken() -> None:
    w = World(wanted=5, ready=0)
    await w.scaler.wake("large")
    assert w.cluster.set == []


async def test_a_stage_that_is_being_put_to_sleep_is_woken_after_that() -> None:
    w = World()
    await w.after(0, 5000.0)
    w.cluster.gate = asyncio.Event()
    w.now += 60
    sleeping = asyncio.create_task(w.scaler.update())
    await asyncio.sleep(0)
    waking = asyncio.create_task(w.scaler.wake("large"))
    await asyncio.sleep(0)
    w.cluster.gate.set()
    await asyncio.gather(sleeping, waking)
    assert w.cluster.set == [0, 2]


async def test_replicas_that_never_become_ready_are_taken_down_and_that_is_said() -> None:
    w = World(wanted=0, ready=0)
    await w.scaler.wake("large")
    await w.after(0, None)
    # Who goes on asking for it does not begin the wait anew.
    w.now += 500
    await w.scaler.wake("large")
    assert await w.after(399.9, None) == [2]
    assert await w.after(0.1, None) == [2, 0]
    assert w.scalings == [("large", "wake"), ("large", "give_up")]
    (view,) = w.scaler.views()
    assert view.state is SleepState.ASLEEP
    assert await w.after(10, None) == [2, 0]
    assert "within 900 seconds" in view.error


async def test_a_stage_that_was_given_up_is_woken_again_and_has_its_whole_time() -> None:
    w = World(wanted=2, ready=0)
    await w.after(0, None)
    assert await w.after(900, None) == [0]
    await w.scaler.wake("large")
    await w.after(0, None)
    (view,) = w.scaler.views()
    assert (view.state, view.error) == (SleepState.WAKING, "")
    assert await w.after(899.9, None) == [0, 2]
    w.cluster.have(2, 1)
    assert await w.after(0.1, 0.0) == [0, 2]
    assert w.state is SleepState.AWAKE
    # Replicas that were lost are waited for as long, from then on.
    w.cluster.have(2, 0)
    assert await w.after(500, None) == [0, 2]
    assert await w.after(899.9, None) == [0, 2]
    assert await w.after(0.1, None) == [0, 2, 0]


async def test_giving_up_leaves_the_least_replicas_and_what_something_else_scales() -> None:
    w = World(replace(RULE, min_replicas=1), wanted=2, ready=0)
    await w.after(0, None)
    assert await w.after(900, None) == [1]
    assert await w.after(10_000, None) == [1]
    w = World(wanted=2, ready=0)
    w.cluster.have(2, 0, "horizontalpodautoscaler asd-large")
    await w.after(0, None)
    assert await w.after(10_000, None) == []


async def test_what_something_else_scales_is_left_alone() -> None:
    w = World()
    w.cluster.have(2, 2, "horizontalpodautoscaler asd-large")
    await w.after(0, 5000.0)
    assert await w.after(10_000, 5000.0) == []
    assert w.asked_of == []
    with pytest.raises(PreconditionFailed, match="horizontalpodautoscaler asd-large"):
        await w.scaler.wake("large")
    assert w.cluster.set == []


async def test_a_cluster_that_is_away_leaves_the_state_unknown() -> None:
    w = World()
    await w.after(0, 0.0)
    w.cluster.error = Unavailable("no API")
    assert await w.after(10_000, 5000.0) == []
    (view,) = w.scaler.views()
    assert (view.state, view.error) == (SleepState.UNKNOWN, "no API")
    with pytest.raises(Unavailable):
        await w.scaler.wake("large")
    w.cluster.error = None
    await w.after(0, 0.0)
    (view,) = w.scaler.views()
    assert (view.state, view.error) == (SleepState.AWAKE, "")


async def test_a_deployment_that_is_not_there_is_said() -> None:
    w = World()
    w.cluster.scales.clear()
    await w.after(0, 0.0)
    (view,) = w.scaler.views()
    assert view.state is SleepState.UNKNOWN
    assert "asd-large" in view.error


async def test_only_a_managed_stage_is_woken() -> None:
    with pytest.raises(NotFound, match="large"):
        await World().scaler.wake("small")


STAGE = {"name": "large", "deployment": "asd-large", "target": "dns:///asd-large:50061"}


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([STAGE, {**STAGE, "deployment": "other"}], "two have the same name"),
        ([STAGE, {**STAGE, "name": "other"}], "two have the same deployment"),
        ([{**STAGE, "min_replicas": 2}], "min_replicas is above wake_replicas"),
        ([{**STAGE, "idle_seconds": 0}], "greater than 0"),
        ([{**STAGE, "give_up_seconds": 0}], "greater than 0"),
        ([], "at least 1 item"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stages: list[dict[str, object]], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ScalerSettings(stages=stages)  # type: ignore[arg-type]
