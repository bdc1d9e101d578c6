"""Running calibration of reported answers, and an alarm on its drift. No gRPC, no protobuf.

The alarm bets against the policy. Each report pays bets on a few alternatives to the predicted probability:
its odds shifted or stretched, or the probability itself moved. A bet pays the likelihood ratio of the
alternative over the nearest tolerated probability. While the policy is calibrated within the tolerance, such
bets are fair or worse. Wealth that falls below its start is reset to it (CUSUM); the mean is taken over the
alternatives. It then reaches `run_length` after `run_length` reports or more on average, and within n reports
with probability n / run_length at most.

Source: Shin, Ramdas and Rinaldo 2024, "E-detectors: a nonparametric framework for sequential change
detection", NEJSDS 2(2), the e-CUSUM of section 2 and its mixtures; Page 1954 for CUSUM. The bets and the
tolerance are ours.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from policy_service.reports import OutcomeReport

logger = logging.getLogger(__name__)

# Slope and offset of the true log-odds over the predicted ones: answers are worse or better than predicted,
# or predictions are over- or underconfident. Chosen.
_LOG_ODDS = ((1.0, -1.0), (1.0, 1.0), (1.0, -2.0), (1.0, 2.0), (0.5, 0.0), (1.5, 0.0))
# Gaps between predicted and true probability, in tolerances: slight drifts, and drifts of predictions so
# confident that a change of log-odds hides them. Chosen.
_GAPS = (-2.0, 2.0, -5.0, 5.0)
# Bins of equal width of p_correct. Chosen.
ECE_BINS = 10
# Smallest probability in log-odds. Chosen: beyond any prediction.
_LEAST_P = 1e-6


@dataclass(frozen=True)
class DriftRule:
    """When a stage's calibration counts as drifted.

    run_length: lower bound on the mean number of reports before a false alarm. tolerance: gap between
    p_correct and the share of right answers that does not count as drift; above 0.
    """

    run_length: float = 10_000.0
    tolerance: float = 0.02


@dataclass(frozen=True)
class StageCalibration:
    """Calibration of a stage's reported answers.

    expected: mean p_correct. observed: share of right answers. reported_calibration_error: over bins of equal
    width; StageFacts.calibration_error is of the calibration prompts. evidence: wealth of the bets; the alarm
    is raised at the rule's run_length. alarm_at: number of the report that raised it; None: no alarm.
    """

    stage: str
    reports: int
    expected: float
    observed: float
    reported_calibration_error: float
    evidence: float
    alarm_at: int | None


class DriftDetector:
    """Bets against the calibration of one stream of predictions."""

    def __init__(self, rule: DriftRule) -> None:
        self._rule = rule
        self._wealth = [1.0] * (len(_LOG_ODDS) + len(_GAPS))
        self.evidence = 1.0

    def add(self, p_correct: float, *, correct: bool) -> bool:
        """Add an outcome. Return whether the evidence suffices for an alarm."""
        tolerance = self._rule.tolerance
        # Alternatives stay within 0 and 1, so nothing is ever divided by 0.
        low, high = p_correct - tolerance, p_correct + tolerance
        log_odds = logit(p_correct)
        alternatives = [sigmoid(slope * log_odds + offset) for slope, offset in _LOG_ODDS]
        alternatives += [min(max(p_correct + gap * tolerance, 0.0), 1.0) for gap in _GAPS]
        for index, alternative in enumerate(alternatives):
            nearest = min(max(alternative, low), high)
            if nearest == alternative:
                ratio = 1.0
            elif correct:
                ratio = alternative / nearest
            else:
                ratio = (1.0 - alternative) / (1.0 - nearest)
            self._wealth[index] = max(self._wealth[index], 1.0) * ratio
        self.evidence = sum(self._wealth) / len(self._wealth)
        return self.evidence >= self._rule.run_length


class RunningCalibration:
    """Predicted and actual shares of right answers, in bins of p_correct."""

    def __init__(self) -> None:
        self._counts = [0] * ECE_BINS
        self._expected = [0.0] * ECE_BINS
        self._right = [0] * ECE_BINS

    def add(self, p_correct: float, *, correct: bool) -> None:
        """Add an outcome."""
        index = min(int(p_correct * ECE_BINS), ECE_BINS - 1)
        self._counts[index] += 1
        self._expected[index] += p_correct
        self._right[index] += correct

    @property
    def count(self) -> int:
        """Number of answers."""
        return sum(self._counts)

    @property
    def expected(self) -> float:
        """Mean p_correct; 0 without answers."""
        return sum(self._expected) / max(self.count, 1)

    @property
    def observed(self) -> float:
        """Share of right answers; 0 without answers."""
        return sum(self._right) / max(self.count, 1)

    @property
    def error(self) -> float:
        """Expected calibration error over bins of equal width. Source: Naeini et al. 2015."""
        gaps = (abs(p - right) for p, right in zip(self._expected, self._right, strict=True))
        return sum(gaps) / max(self.count, 1)


class _Stage:
    """State of one stage under one policy."""

    def __init__(self, name: str, rule: DriftRule) -> None:
        self.name = name
        self.running = RunningCalibration()
        self.detector = DriftDetector(rule)
        self.alarm_at: int | None = None

    def summary(self) -> StageCalibration:
        running = self.running
        return StageCalibration(
            self.name,
            running.count,
            running.expected,
            running.observed,
            running.error,
            self.detector.evidence,
            self.alarm_at,
        )


def log_alarm(version: str, calibration: StageCalibration) -> None:
    """Log that a stage's calibration has drifted."""
    logger.warning(
        "policy %s: the calibration of %s has drifted: %.1f%% of %d reported answers were right, %.1f%% were "
        "predicted to be. Look with `asd-policy drift`, correct with `asd-policy refit`",
        version,
        calibration.stage,
        100 * calibration.observed,
        calibration.reports,
        100 * calibration.expected,
    )


class DriftMonitor:
    """Calibration and alarm per policy version and stage. on_alarm: called once for each; an alarm stays."""

    def __init__(
        self, rule: DriftRule, on_alarm: Callable[[str, StageCalibration], None] = log_alarm
    ) -> None:
        self._rule = rule
        self._on_alarm = on_alarm
        self._stages: dict[str, dict[str, _Stage]] = {}

    def add(self, report: OutcomeReport) -> None:
        """Add a request's first report. Later ones are ignored: a bet that was paid is not taken back."""
        stages = self._stages.setdefault(report.policy_version, {})
        stage = stages.get(report.stage)
        if stage is None:
            stage = stages[report.stage] = _Stage(report.stage, self._rule)
        stage.running.add(report.p_correct, correct=report.correct)
        if stage.alarm_at is not None or not stage.detector.add(report.p_correct, correct=report.correct):
            return
        stage.alarm_at = stage.running.count
        self._on_alarm(report.policy_version, stage.summary())

    def versions(self) -> tuple[str, ...]:
        """Return the policy versions with reports, in the order of their first report."""
        return tuple(self._stages)

    def of(self, version: str) -> tuple[StageCalibration, ...]:
        """Return the calibration of a version's stages; empty without reports."""
        return tuple(stage.summary() for stage in tuple(self._stages.get(version, {}).values()))


def logit(p: float) -> float:
    """Return the log-odds of a probability, which is first clipped away from 0 and 1."""
    inside = min(max(p, _LEAST_P), 1.0 - _LEAST_P)
    return math.log(inside / (1.0 - inside))


def sigmoid(log_odds: float) -> float:
    """Return the probability of log-odds."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(max(log_odds, -700.0))
    return odds / (1.0 + odds)
