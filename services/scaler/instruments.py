"""The manager's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common import telemetry
from services.common.telemetry import Attributes, Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Observation

    from services.scaler.idle_scaler import StageView


class ScalerInstruments:
    """The manager's OpenTelemetry instruments. Build it after telemetry is set up."""

    def __init__(self) -> None:
        self._meter = telemetry.meter()
        self._scalings = self._meter.create_counter(
            Metrics.MANAGER_SCALINGS,
            unit="{scaling}",
            description="times a stage was woken, put to sleep or given up",
        )

    def scaled(self, stage: str, direction: str) -> None:
        """A stage's replicas were set. direction: "wake", "sleep" or "give_up"."""
        self._scalings.add(1, {Attributes.STAGE_NAME: stage, Attributes.SCALING: direction})

    def watch(self, views: Callable[[], Iterable[StageView]]) -> None:
        """Export the stages' replicas. views: is called at each export."""

        def gauge(name: str, description: str, read: Callable[[StageView], int]) -> None:
            def observe(_: CallbackOptions) -> Iterable[Observation]:
                return [
                    telemetry.observation(read(each), {Attributes.STAGE_NAME: each.stage})
                    for each in views()
                    if each.is_known
                ]

            self._meter.create_observable_gauge(name, [observe], "{replica}", description)

        gauge(Metrics.MANAGED_WANTED, "replicas of a managed stage that are wanted", lambda each: each.wanted)
        gauge(Metrics.MANAGED_READY, "replicas of a managed stage that are ready", lambda each: each.ready)
