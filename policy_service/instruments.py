"""The policy service's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common import telemetry
from services.common.telemetry import Attributes, Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Observation

    from policy_service.drift import StageCalibration

    Read = Callable[[StageCalibration], float]


class PolicyInstruments:
    """The policy service's OpenTelemetry instruments. Build it after telemetry is set up."""

    def __init__(self) -> None:
        self._meter = telemetry.meter()
        self._shadow = self._meter.create_counter(
            Metrics.SHADOW_DECISIONS,
            unit="{decision}",
            description="decisions offered to the shadow policy, by what became of them",
        )

    def watch_calibration(self, calibration: Callable[[], Iterable[StageCalibration]]) -> None:
        """Export the calibration of the policy in force. calibration: is called at each export."""

        def gauge(name: str, unit: str, description: str, read: Read) -> None:
            def observe(_: CallbackOptions) -> Iterable[Observation]:
                return [
                    telemetry.observation(read(each), {Attributes.STAGE_NAME: each.stage})
                    for each in calibration()
                ]

            self._meter.create_observable_gauge(name, [observe], unit, description)

        gauge(
            Metrics.REPORTS,
            "{report}",
            "requests that were reported of the policy in force",
            lambda each: each.reports,
        )
        gauge(
            Metrics.REPORTED_P_CORRECT,
            "1",
            "mean predicted P(correct) of reported answers",
            lambda each: each.expected,
        )
        gauge(
            Metrics.REPORTED_ACCURACY,
            "1",
            "share of right answers among reported ones",
            lambda each: each.observed,
        )
        gauge(
            Metrics.REPORTED_ECE,
            "1",
            "expected calibration error of reported answers",
            lambda each: each.reported_calibration_error,
        )
        gauge(
            Metrics.DRIFT_EVIDENCE,
            "1",
            "evidence that a stage's calibration has drifted",
            lambda each: each.evidence,
        )
        gauge(
            Metrics.DRIFT_ALARM,
            "1",
            "1 where a stage's calibration has drifted, else 0",
            lambda each: float(each.alarm_at is not None),
        )

    def shadow_compared(self, step: str, stage: str, *, agrees: bool) -> None:
        """The shadow policy was compared. stage: the judged one; for a plan, the live policy's first one."""
        self._shadow.add(
            1,
            {
                Attributes.SHADOW_OUTCOME: "agreed" if agrees else "differed",
                Attributes.PLAN_STEP: step,
                Attributes.STAGE_NAME: stage,
            },
        )

    def shadow_dropped(self) -> None:
        """A decision was not passed to the shadow policy: its queue was full."""
        self._shadow.add(1, {Attributes.SHADOW_OUTCOME: "dropped"})

    def shadow_failed(self) -> None:
        """The shadow policy failed."""
        self._shadow.add(1, {Attributes.SHADOW_OUTCOME: "failed"})
