"""The drift alarm: one step by hand, its false alarms and its delay by simulation, what it keeps apart."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from dataclasses import asdict
from statistics import fmean, median
from typing import TYPE_CHECKING

import pytest

from asd.errors import ResourceExhausted
from policy_service.drift import DriftDetector, DriftMonitor, DriftRule, RunningCalibration
from policy_service.reports import (
    OutcomeReport,
    Receipt,
    ReportLog,
    first_reports,
    last_reports,
    read_reports,
)
from tests.fakes.full_disk import filling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Shapes of the beta distribution of p_correct: spread, mostly sure, and as sure as a largest stage.
SHAPES = [(2.0, 1.0), (8.0, 1.0), (60.0, 1.0)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


def alarm_after(
    seed: int,
    reports: int,
    shape: tuple[float, float],
    truth: Callable[[float, int], float],
    rule: DriftRule,
) -> int | None:
    """Return how many reports an alarm took. truth: P(correct), of the predicted one and a report's index."""
    rng = random.Random(seed)
    detector = DriftDetector(rule)
    for index in range(reports):
        p_correct = rng.betavariate(*shape)
        if detector.add(p_correct, correct=rng.random() < truth(p_correct, index)):
            return index + 1
    return None


def report(request_id: str, *, correct: bool, at: float = 0.0, **fields: object) -> OutcomeReport:
    given = {"stage": "small", "p_correct": 0.9, "policy_version": "v1"}
    return OutcomeReport(request_id, correct=correct, reported_at=at, **{**given, **fields})  # type: ignore[arg-type]


def test_one_report_pays_the_bets_as_calculated_by_hand():
    detector = DriftDetector(DriftRule(tolerance=0.1))
    assert not detector.add(0.5, correct=False)
    # Against 0.4 below and 0.6 above. Log-odds 0 shifted by -1, 1, -2 and 2: 0.26894, 0.73106, 0.11920,
    # 0.88080; stretching 0 leaves it, so these two are no bets; 2 and 5 tolerances off: 0.3, 0.7, 0.0, 1.0.
    paid = (0.73106 / 0.6, 0.26894 / 0.4, 0.88080 / 0.6, 0.11920 / 0.4, 0.7 / 0.6, 0.3 / 0.4, 1 / 0.6, 0.0)
    assert detector.evidence == pytest.approx((sum(paid) + 2) / 10, rel=1e-4)
    assert not detector.add(0.5, correct=True)
    # What was lost does not count: a bet that went below 1 starts at 1 again.
    then = (0.26894 / 0.4, 0.73106 / 0.6, 0.11920 / 0.4, 0.88080 / 0.6, 0.3 / 0.4, 0.7 / 0.6, 0.0, 1 / 0.6)
    wealth = [max(before, 1.0) * ratio for before, ratio in zip(paid, then, strict=True)]
    assert detector.evidence == pytest.approx((sum(wealth) + 2) / 10, rel=1e-4)


@each_shape
def test_false_alarms_are_as_rare_as_promised_up_to_the_tolerance(shape):
    rule, reports, runs = DriftRule(run_length=2000, tolerance=0.03), 400, 60
    for shift in (-0.03, 0.0, 0.03):
        alarms = [
            alarm_after(seed, reports, shape, lambda p, _, shift=shift: min(max(p + shift, 0), 1), rule)
            for seed in range(runs)
        ]
        share = sum(alarm is not None for alarm in alarms) / runs
        assert share <= reports / rule.run_length, shift


def test_the_bound_rejects_a_rule_that_bets_inside_its_tolerance():
    """The stream of the test above, five points off, with a detector that tolerates almost nothing."""
    rule, reports, runs = DriftRule(run_length=2000, tolerance=0.001), 400, 30
    alarms = [
        alarm_after(seed, reports, (8.0, 1.0), lambda p, _: max(p - 0.06, 0), rule) for seed in range(runs)
    ]
    assert sum(alarm is not None for alarm in alarms) / runs > reports / rule.run_length


def test_the_mean_run_length_is_kept():
    # Almost no tolerance, so that calibrated predictions are the hardest case.
    rule, longest = DriftRule(run_length=20, tolerance=1e-4), 2000
    lengths = [alarm_after(seed, longest, (2.0, 1.0), lambda p, _: p, rule) for seed in range(40)]
    # A run that ended without an alarm counts for less than its length.
    assert fmean(length or longest for length in lengths) >= rule.run_length
    assert any(lengths)


@pytest.mark.parametrize(
    ("name", "shape", "logit_shift", "slope", "typical"),
    [
        ("all worse", (2.0, 1.0), -1.0, 1.0, 300),
        ("all worse, mostly sure", (8.0, 1.0), -1.0, 1.0, 300),
        ("all better", (2.0, 1.0), 1.0, 1.0, 350),
        ("too sure", (8.0, 1.0), 0.0, 0.5, 300),
        ("too sure of a largest stage", (60.0, 1.0), 0.0, 0.5, 400),
        ("so sure that odds hide it", (20000.0, 1.0), 0.0, 0.2, 200),
    ],
)
def test_a_drift_is_found_soon(name, shape, logit_shift, slope, typical):
    calibrated = 300

    def truth(p: float, index: int) -> float:
        if index < calibrated:
            return p
        log_odds = slope * math.log(p / (1 - p)) + logit_shift
        return 1 / (1 + math.exp(-log_odds))

    alarms = [alarm_after(seed, 3000, shape, truth, DriftRule()) for seed in range(15)]
    assert all(alarm is not None and alarm > calibrated for alarm in alarms), alarms
    assert median(alarm - calibrated for alarm in alarms if alarm) < typical


@pytest.mark.parametrize("p_correct", [0.0, 1.0])
def test_certain_predictions_that_are_wrong_raise_an_alarm_and_right_ones_never(p_correct):
    detector = DriftDetector(DriftRule())
    for _ in range(500):
        assert not detector.add(p_correct, correct=p_correct == 1.0)
    assert any(detector.add(p_correct, correct=p_correct == 0.0) for _ in range(20))


def test_running_calibration_by_hand():
    running = RunningCalibration()
    for p_correct, correct in ((0.95, True), (0.95, False), (0.15, False), (1.0, True), (0.05, False)):
        running.add(p_correct, correct=correct)
    assert running.count == 5
    assert running.expected == pytest.approx(3.10 / 5)
    assert running.observed == pytest.approx(2 / 5)
    # Bins 0.9 to 1: |2.90 - 2|; 0.1 to 0.2: 0.15; 0 to 0.1: 0.05.
    assert running.error == pytest.approx((0.90 + 0.15 + 0.05) / 5)


def test_an_alarm_is_logged_once_and_stays_with_its_stage_and_version(caplog):
    monitor = DriftMonitor(DriftRule())
    with caplog.at_level(logging.WARNING):
        for index in range(200):
            monitor.add(report(f"a{index}", correct=False))
            monitor.add(report(f"b{index}", correct=index % 10 != 0, stage="large"))
            monitor.add(report(f"c{index}", correct=index % 10 != 0, policy_version="v2"))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.index("v1") < said.index("small") < said.index("0.0%") < said.index("90.0%")
    small, large = monitor.of("v1")
    assert small.alarm_at is not None
    assert small.alarm_at < 20
    assert (small.reports, small.observed) == (200, 0.0)
    assert (large.reports, large.alarm_at, large.observed) == (200, None, pytest.approx(0.9))
    assert [each.alarm_at for each in monitor.of("v2")] == [None]
    assert monitor.of("v3") == ()
    assert monitor.versions() == ("v1", "v2")


async def test_the_first_report_of_a_request_counts_also_after_a_restart(tmp_path: Path):
    monitor, path = DriftMonitor(DriftRule()), tmp_path / "reports.jsonl"
    log = ReportLog(path, monitor.add)
    for name, correct in (("a", True), ("b", True), ("a", False)):
        await log.add(report(name, correct=correct))
    again = DriftMonitor(DriftRule())
    ReportLog(path, again.add)
    for each in (monitor, again):
        (stage,) = each.of("v1")
        assert (stage.reports, stage.observed) == (2, 1.0)


def test_first_and_last_reports_go_by_their_time():
    kept = [
        report("a", correct=True, at=3.0),
        report("b", correct=True, at=2.0),
        report("a", correct=False, at=1.0),
        report("a", correct=True, at=0.0, policy_version="v2"),
    ]
    assert [(each.policy_version, each.request_id, each.reported_at) for each in first_reports(kept)] == [
        ("v2", "a", 0.0),
        ("v1", "a", 1.0),
        ("v1", "b", 2.0),
    ]
    assert {each.reported_at for each in last_reports(kept)} == {0.0, 2.0, 3.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"p_correct": float("nan")},
        {"p_correct": 2},
        {"p_correct": "1"},
        {"p_correct": True},
        {"reported_at": False},
        {"correct": "no"},
        {"stage": None},
        {"further": 1},
    ],
)
def test_lines_that_are_no_reports_are_skipped_and_counted(wrong, tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    good = asdict(report("b", correct=True))
    path.write_text(f"{json.dumps({**good, **wrong})}\n[1]\n{json.dumps(good)}\n")
    assert [each.request_id for each in read_reports(path)] == ["b"]
    (told,) = caplog.records
    assert told.args == (path, 2, 1)


async def test_of_many_requests_the_latest_are_known_and_all_are_counted(tmp_path: Path):
    log = ReportLog(tmp_path / "r.jsonl", known=10)
    for number in range(1000):
        receipt = await log.add(report(str(number), correct=True))
    assert receipt.reports == 1000
    assert (await log.add(report("995", correct=False))).reported_before
    assert not (await log.add(report("5", correct=True))).reported_before


async def test_a_full_disk_refuses_reports_and_loses_none_that_it_took(tmp_path: Path, caplog):
    path, full = tmp_path / "r.jsonl", [False]
    log = ReportLog(path, opened=lambda path: filling(path, full))
    await log.add(report("a", correct=True))
    full[0] = True
    for name in "bcd":
        with pytest.raises(ResourceExhausted, match=re.escape(str(path))):
            await log.add(report(name, correct=True))
    full[0] = False
    # What was refused counts as not reported.
    assert await log.add(report("b", correct=True)) == Receipt(2, reported_before=False)
    assert [each.request_id for each in read_reports(path)] == ["a", "b"]
    assert [each.levelname for each in caplog.records] == ["ERROR", "WARNING"]
