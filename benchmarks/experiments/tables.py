"""The figures as rows: for CSV files and for the report."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from benchmarks.experiments.grid import GROUPS, QUALITY_VALUES, policy_way
from benchmarks.stats import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.experiments.grid import ExperimentResult
    from benchmarks.experiments.measure import CurveMark, Measured
    from benchmarks.stats import Interval

Row = dict[str, object]

METRICS = ("accuracy", "cost", "latency_ms", "early_stop_share")


def write_tables(measured: Measured, directory: Path) -> None:
    """Write every table as CSV."""
    cascade = measured.cascade
    tables = {
        "experiments": [experiment_row(result, cascade) for result in measured.results],
        "runs": run_rows(measured.results, cascade),
        "lambda": [experiment_row(measured.at(value), cascade) for value in QUALITY_VALUES],
        "lambda_by_group": [
            experiment_row(by_way[policy_way(value)], cascade)
            for by_way in measured.by_group.values()
            for value in QUALITY_VALUES
        ],
        "lambda_in_cost_units": point_rows(measured.raw, cascade),
        "bounds": point_rows(
            [*measured.preferences, *measured.fixed, measured.oracle, *measured.thresholds], cascade
        ),
        "reliability": reliability_rows(measured),
    }
    for name, rows in tables.items():
        with (directory / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def experiment_row(result: ExperimentResult, cascade: Sequence[str]) -> Row:
    """Return an experiment as means over its runs and their intervals."""
    summary = result.summary
    row: Row = {
        "experiment": result.experiment.name,
        "runs": len(result.samples),
        "prompts": sum(sample.prompts for sample in result.samples),
    }
    for metric in METRICS:
        row |= _interval_columns(metric, getattr(summary, metric))
    for stage, share in zip(cascade, summary.mix, strict=True):
        row |= _interval_columns(f"share_{stage}", share)
    return row


def run_rows(results: Sequence[ExperimentResult], cascade: Sequence[str]) -> list[Row]:
    """Return every run of experiments."""
    return [
        {
            "experiment": result.experiment.name,
            "seed": sample.seed,
            "prompts": sample.prompts,
            **{metric: round(getattr(sample, metric), 5) for metric in METRICS},
            **{f"share_{name}": round(share, 5) for name, share in zip(cascade, sample.mix, strict=True)},
        }
        for result in results
        for sample in result.samples
    ]


def point_rows(points: Sequence[CurveMark], cascade: Sequence[str]) -> list[Row]:
    """Return ways of answering all prompts."""
    return [
        {
            "way": point.name,
            "lambda_cost_units": point.quality_value,
            **{metric: round(getattr(point, metric), 5) for metric in METRICS},
            **{f"share_{name}": round(share, 5) for name, share in zip(cascade, point.mix, strict=True)},
        }
        for point in points
    ]


def reliability_rows(measured: Measured) -> list[Row]:
    """Return every bin of every view."""
    return [
        {
            "view": view.view,
            "prompts": each.prompts,
            "predicted": round(each.predicted, 6),
            "observed": round(each.observed, 6),
            "low": round(each.low, 6),
            "high": round(each.high, 6),
        }
        for view in measured.reliability
        for each in view.bins
    ]


def figures(measured: Measured) -> Row:
    """Return what experiments.json holds of the measurement: checks, experiments with runs, and the rest."""
    cascade = measured.cascade
    response = measured.response
    return {
        "policy_version": measured.policy_version,
        "cascade": cascade,
        "prompts": measured.prompts,
        "lambda_unit": {"answers_of": cascade[-1], "cost_units": measured.unit},
        "confidence": CONFIDENCE,
        "groups": GROUPS,
        "cost_non_decreasing": response.is_non_decreasing("cost"),
        "accuracy_non_decreasing": response.is_non_decreasing("accuracy"),
        "distinct_mixes": response.is_distinct,
        "smallest_mix_distance": round(response.smallest_distance, 5),
        "seeds_with_a_fall": response.runs_that_fall,
        "levels_with_a_fall": {
            level: [
                f"{fall.metric} from lambda {fall.low_value:g} to {fall.high_value:g}: "
                f"{fall.before:.5f} to {fall.after:.5f}, "
                f"{'beyond' if fall.is_beyond_chance else 'within'} chance"
                for fall in own.falls
            ]
            for level, own in measured.response_by_level.items()
            if own.falls
        },
        "lambda": [experiment_row(measured.at(value), cascade) for value in QUALITY_VALUES],
        "lambda_in_cost_units": point_rows(measured.raw, cascade),
        "preferences": point_rows(measured.preferences, cascade),
        "fixed": point_rows(measured.fixed, cascade),
        "oracle": point_rows([measured.oracle], cascade)[0],
        "reliability": [
            {
                "view": view.view,
                "r2": round(view.r2, 5),
                "auroc": round(view.auroc, 5),
                "calibration_error": round(view.calibration_error, 5),
            }
            for view in measured.reliability
        ],
        "experiments": [
            {**experiment_row(result, cascade), "by_run": run_rows([result], cascade)}
            for result in measured.results
        ],
    }


def _interval_columns(name: str, interval: Interval) -> Row:
    return {
        name: round(interval.mean, 5),
        f"{name}_low": round(interval.low, 5),
        f"{name}_high": round(interval.high, 5),
    }
