"""Scales idle stages to zero, and activates wanted ones. No gRPC, no protobuf."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from asd.errors import AsdError, NotFound, PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.scaler.cluster import Cluster, Scale, StageIdleness

logger = logging.getLogger(__name__)


class SleepState(Enum):
    """Whether a stage has replicas that answer."""

    UNKNOWN = "unknown"
    AWAKE = "awake"
    WAKING = "waking"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a stage is scaled down, and to how many replicas it is activated.

    It is scaled down to min_replicas after idle_seconds without use, but not within min_awake_seconds of its
    activation or of becoming ready. It is also scaled down if no replica becomes ready in give_up_seconds.
    """

    stage: str
    deployment: str
    idle_seconds: float
    wake_replicas: int
    min_awake_seconds: float
    give_up_seconds: float
    min_replicas: int = 0


@dataclass(slots=True)
class StageView:
    """A stage's last known state. idle_ms: None: unknown."""

    stage: str
    wanted: int = 0
    ready: int = 0
    idle_ms: float | None = None
    is_known: bool = False
    autoscaler: str = ""
    error: str = ""

    @property
    def state(self) -> SleepState:
        """Whether it has replicas that answer."""
        if not self.is_known:
            return SleepState.UNKNOWN
        # Replicas that are shutting down finish their calls, but take no new ones.
        if self.ready and self.wanted:
            return SleepState.AWAKE
        return SleepState.WAKING if self.wanted else SleepState.ASLEEP


@dataclass(slots=True)
class _Kept:
    rule: Rule
    view: StageView
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    # Times at which it became ready and was last activated.
    ready_since: float | None = None
    woken: float | None = None
    # Time since when replicas are wanted but none is ready; and the message of a wait that was given up.
    waiting_since: float | None = None
    given_up: str = ""

    def may_sleep(self, now: float) -> bool:
        """Return whether it has been idle and ready for long enough."""
        rule, view = self.rule, self.view
        if view.idle_ms is None or view.idle_ms < rule.idle_seconds * 1000.0 or self.ready_since is None:
            return False
        since = self.ready_since if self.woken is None else max(self.ready_since, self.woken)
        return now - since >= rule.min_awake_seconds

    def is_hopeless(self, now: float) -> bool:
        """Return whether no replica became ready in time: they hold resources that others could use."""
        return self.waiting_since is not None and now - self.waiting_since >= self.rule.give_up_seconds


class IdleScaler:
    """Scales stages by their rules. A stage with an autoscaler of its own is left alone.

    clock: monotonic seconds. on_scaled: is called with a stage and "wake", "sleep" or "give_up".
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        cluster: Cluster,
        usage: StageIdleness,
        clock: Callable[[], float],
        on_scaled: Callable[[str, str], None] = lambda stage, direction: None,
    ) -> None:
        self._kept = {rule.stage: _Kept(rule, StageView(rule.stage)) for rule in rules}
        self._cluster = cluster
        self._usage = usage
        self._clock = clock
        self._on_scaled = on_scaled

    def views(self) -> list[StageView]:
        """Return the last known state of each stage, in the order of the rules."""
        return [kept.view for kept in self._kept.values()]

    async def update(self) -> None:
        """Read the state of every stage, and scale down those that may sleep."""
        await asyncio.gather(*(self._update(kept) for kept in self._kept.values()))

    async def wake(self, stage: str) -> StageView:
        """Activate a stage, and keep it active for a while; return its state.

        Raises NotFound for a stage that is not managed, PreconditionFailed for one that an autoscaler scales,
        and the errors of the cluster.
        """
        kept = self._kept.get(stage)
        if kept is None:
            known = ", ".join(self._kept)
            raise NotFound(f"stage {stage!r} is not managed: choose one of {known}", field="stage")
        async with kept.changing:
            await self._look(kept)
            if kept.view.autoscaler:
                raise PreconditionFailed(
                    f"stage {stage} is scaled by {kept.view.autoscaler}, not by the manager"
                )
            kept.woken = self._clock()
            kept.given_up = ""
            if kept.view.wanted < kept.rule.wake_replicas:
                await self._scale(kept, kept.rule.wake_replicas, "wake")
            return kept.view

    async def _update(self, kept: _Kept) -> None:
        async with kept.changing:
            try:
                await self._look(kept)
                view, rule = kept.view, kept.rule
                view.idle_ms = None
                if view.state is SleepState.AWAKE and not view.autoscaler:
                    view.idle_ms = await self._usage.idle_ms(rule.stage, view.ready)
                    if view.wanted > rule.min_replicas and kept.may_sleep(self._clock()):
                        await self._scale(kept, rule.min_replicas, "sleep")
                elif (
                    not view.autoscaler
                    and view.wanted > rule.min_replicas
                    and kept.is_hopeless(self._clock())
                ):
                    await self._give_up(kept)
            except AsdError as error:
                if error.message != kept.view.error:
                    logger.warning("stage %s: %s", kept.rule.stage, error.message)
                kept.view.error = error.message
            else:
                kept.view.error = kept.given_up

    async def _give_up(self, kept: _Kept) -> None:
        """Scale down replicas that do not become ready. The next request for the stage activates it again."""
        rule = kept.rule
        await self._scale(kept, rule.min_replicas, "give_up")
        kept.given_up = (
            f"taken down: no replica became ready within {rule.give_up_seconds:g} seconds; see why with "
            f"kubectl describe of deployment {rule.deployment} and of its pods when it is woken next"
        )
        logger.warning("stage %s: %s", rule.stage, kept.given_up)

    async def _look(self, kept: _Kept) -> None:
        """Read a stage's replicas. If that fails, the state is unknown, and this raises AsdError."""
        view, rule = kept.view, kept.rule
        try:
            scale = (await self._cluster.read([rule.deployment])).get(rule.deployment)
            if scale is None:
                raise PreconditionFailed(f"there is no deployment {rule.deployment}")
        except AsdError:
            view.is_known = False
            raise
        self._note(kept, scale)

    def _note(self, kept: _Kept, scale: Scale) -> None:
        view = kept.view
        if scale.autoscaler and scale.autoscaler != view.autoscaler:
            logger.warning(
                "stage %s is scaled by %s: the manager leaves it alone", view.stage, scale.autoscaler
            )
        view.wanted, view.ready, view.autoscaler = scale.wanted, scale.ready, scale.autoscaler
        view.is_known = True
        if not scale.ready:
            kept.ready_since = None
        elif kept.ready_since is None:
            kept.ready_since = self._clock()
            kept.given_up = ""
        if scale.ready or not scale.wanted:
            kept.waiting_since = None
        elif kept.waiting_since is None:
            kept.waiting_since = self._clock()

    async def _scale(self, kept: _Kept, replicas: int, direction: str) -> None:
        await self._cluster.scale(kept.rule.deployment, replicas)
        logger.info(
            "%s: stage %s from %d to %d replicas", direction, kept.view.stage, kept.view.wanted, replicas
        )
        kept.view.wanted = replicas
        # The wait for replicas starts anew.
        kept.waiting_since = None
        self._on_scaled(kept.view.stage, direction)
