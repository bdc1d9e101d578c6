"""Plots of what was measured, as PNG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

from benchmarks.experiments.grid import GROUPS, QUALITY_VALUES, fixed_way, policy_way
from suites import LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.experiments.grid import ExperimentSummary
    from benchmarks.experiments.measure import CurveMark, Measured, Reliability
    from benchmarks.stats import Interval

mpl.use("Agg")
from matplotlib import pyplot as plt

_DPI = 90
# Okabe and Ito's colours, told apart by the colour-blind; stages also differ in lightness and hatching,
# values of quality in their markers.
_STAGE_COLOURS = ("#56b4e9", "#e69f00", "#2f3e6b")
_STAGE_HATCHES = ("", "///", "")
_VALUE_STYLES = tuple(
    zip(
        ("#56b4e9", "#009e73", "#d55e00", "#4b2e83"),
        ("o", "s", "^", "D"),
        (":", "-.", "--", "-"),
        strict=True,
    )
)
_POLICY, _THRESHOLD, _ORACLE, _GREY = "#0072b2", "#d55e00", "#009e73", "#555555"
_ACCURACIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


def draw_plots(measured: Measured, directory: Path) -> dict[str, Path]:
    """Write every plot to a directory; return the files by what they show."""
    plots: dict[str, Callable[[Measured], Any]] = {
        "pareto": _draw_pareto,
        "lambda": _draw_response,
        "stages": _draw_stages,
        "levels": _draw_levels,
        "reliability": _draw_reliability,
    }
    paths = {}
    for name, draw in plots.items():
        figure = draw(measured)
        paths[name] = directory / f"{name}.png"
        # No software version inside: the same measurement gives the same file.
        figure.savefig(paths[name], dpi=_DPI, metadata={"Software": None})
        plt.close(figure)
    return paths


def _draw_pareto(measured: Measured) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    for axis, metric, label in (
        (axes[0], "cost", "mean cost per prompt, units (log)"),
        (axes[1], "latency_ms", "mean latency per prompt, ms (log)"),
    ):

        def x(points: Sequence[CurveMark], metric: str = metric) -> list[float]:
            return [getattr(point, metric) for point in points]

        axis.plot(
            x(measured.thresholds),
            _errors(measured.thresholds),
            "--",
            color=_THRESHOLD,
            label="best fixed thresholds, by hindsight",
        )
        axis.plot(x(measured.curve), _errors(measured.curve), "-", color=_POLICY, label="policy, any λ")
        for value, (colour, marker, _) in zip(QUALITY_VALUES, _VALUE_STYLES, strict=True):
            summary = measured.at(value).summary
            axis.plot(
                getattr(summary, metric).mean,
                1 - summary.accuracy.mean,
                marker,
                color=colour,
                markeredgecolor="black",
                markersize=9,
                linestyle="none",
                label=f"policy, λ = {value:g}",
                zorder=4,
            )
        axis.plot(
            x(measured.preferences),
            _errors(measured.preferences),
            "x",
            color="black",
            markersize=9,
            markeredgewidth=2,
            label="policy, preferences: " + ", ".join(each.name for each in measured.preferences),
            zorder=5,
        )
        axis.plot(
            x(measured.fixed),
            _errors(measured.fixed),
            "s",
            color=_GREY,
            markersize=8,
            label="one stage alone",
        )
        for place, point in enumerate(measured.fixed):
            # Beside the first stage, before those between, above the last: clear of the curves.
            offset, side = ((9, -5), "left") if place == 0 else ((-9, 1), "right")
            if place == len(measured.fixed) - 1:
                offset = (0, 10)
            axis.annotate(
                point.name,
                (getattr(point, metric), 1 - point.accuracy),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                color=_GREY,
            )
        axis.plot(
            x([measured.oracle]),
            _errors([measured.oracle]),
            "*",
            color=_ORACLE,
            markeredgecolor="black",
            markersize=15,
            linestyle="none",
            label="oracle, which knows the outcomes",
        )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axis.set_xlabel(label)
        _finish(axis)
    axes[0].set_yscale("log")
    axes[0].invert_yaxis()
    axes[0].set_yticks([1 - each for each in _ACCURACIES], [f"{each:.1%}" for each in _ACCURACIES])
    axes[0].set_yticks([], minor=True)
    axes[0].set_ylabel("right answers")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _errors(points: Sequence[CurveMark]) -> list[float]:
    """Return shares of wrong answers, which a log axis spreads where right ones crowd below 1."""
    return [1 - point.accuracy for point in points]


def _draw_response(measured: Measured) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    values = [value * measured.unit for value in QUALITY_VALUES]
    curve = [point for point in measured.curve if point.quality_value and point.quality_value <= 1000]
    x = [point.quality_value for point in curve]
    summaries = [measured.at(value).summary for value in QUALITY_VALUES]
    largest = measured.fixed[-1]
    for axis, metric, label in (
        (axes[0, 0], "accuracy", "right answers"),
        (axes[0, 1], "cost", "mean cost, units"),
        (axes[1, 0], "latency_ms", "mean latency, ms"),
    ):
        axis.plot(x, [getattr(point, metric) for point in curve], "-", color=_POLICY, label="policy")
        _draw_intervals(axis, values, [getattr(each, metric) for each in summaries])
        axis.axhline(getattr(largest, metric), color=_GREY, linestyle="--", label=largest.name)
        axis.set_ylabel(label)
        if metric == "accuracy":
            axis.legend(frameon=False, loc="lower right")
        else:
            axis.set_ylim(bottom=0)
    axes[0, 0].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    shares = np.array([point.mix for point in curve]).T
    axes[1, 1].stackplot(x, shares, colors=_STAGE_COLOURS[: len(shares)], labels=measured.cascade)
    axes[1, 1].set(ylabel="answers by stage", ylim=(0, 1))
    axes[1, 1].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    axes[1, 1].legend(loc="lower left", framealpha=0.9)
    for axis in axes.flat:
        axis.set_xscale("log")
        for value in values:
            axis.axvline(value, color="#999999", linewidth=0.8, linestyle=":")
        axis.margins(x=0)
        _finish(axis)
    for axis in axes[0]:
        for value, multiple in zip(values, QUALITY_VALUES, strict=True):
            axis.annotate(
                f"{multiple:g}",
                (value, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
            )
    for axis in axes[1]:
        axis.set_xlabel(f"λ in cost units (log); above the plots, in answers of {measured.cascade[-1]}")
        axis.set_xticks(
            ticks := [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], [f"{each:g}" for each in ticks]
        )
        axis.set_xticks([], minor=True)
    return figure


def _draw_intervals(axis: Any, x: Sequence[float], intervals: Sequence[Interval]) -> None:
    means = [each.mean for each in intervals]
    below = [each.mean - each.low for each in intervals]
    above = [each.high - each.mean for each in intervals]
    axis.errorbar(
        x,
        means,
        yerr=(below, above),
        fmt="o",
        color="black",
        capsize=4,
        markersize=5,
        label="the grid: mean and 95% interval",
    )


def _draw_stages(measured: Measured) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True, sharey=True, layout="constrained")
    for axis, value in zip(axes.flat, QUALITY_VALUES, strict=True):
        summaries = _by_level(measured, value)
        base = np.zeros(len(LEVELS))
        for place, stage in enumerate(measured.cascade):
            shares = np.array([summary.mix[place].mean for summary in summaries])
            axis.bar(
                LEVELS,
                shares,
                0.86,
                bottom=base,
                color=_STAGE_COLOURS[place % len(_STAGE_COLOURS)],
                hatch=_STAGE_HATCHES[place % len(_STAGE_HATCHES)],
                edgecolor="white",
                linewidth=0.5,
                label=stage,
            )
            base += shares
        mix = measured.at(value).summary.mix
        of_all = ", ".join(
            f"{stage} {share.mean:.0%}" for stage, share in zip(measured.cascade, mix, strict=True)
        )
        axis.set_title(f"λ = {value:g}: {of_all} of all", loc="left", fontsize=11)
        axis.set_xticks(LEVELS)
        axis.set(ylim=(0, 1), xlim=(0.4, len(LEVELS) + 0.6))
        axis.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
        _finish(axis, grid=False)
    for axis in axes[1]:
        axis.set_xlabel("complexity level")
    for axis in axes[:, 0]:
        axis.set_ylabel("answers by stage")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_levels(measured: Measured) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    for axis, metric, label in (
        (axes[0], "accuracy", "right answers"),
        (axes[1], "cost", "mean cost, units"),
        (axes[2], "latency_ms", "mean latency, ms"),
    ):
        for value, (colour, marker, line) in zip(QUALITY_VALUES, _VALUE_STYLES, strict=True):
            intervals = [getattr(summary, metric) for summary in _by_level(measured, value)]
            axis.plot(
                LEVELS,
                [each.mean for each in intervals],
                line,
                marker=marker,
                markersize=4,
                color=colour,
                label=f"λ = {value:g}",
            )
            axis.fill_between(
                LEVELS,
                [each.low for each in intervals],
                [each.high for each in intervals],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        largest = fixed_way(measured.cascade[-1])
        for group, levels in GROUPS.items():
            mean = getattr(measured.by_group[group][largest].summary, metric).mean
            axis.plot(
                (levels[0] - 0.4, levels[-1] + 0.4),
                (mean, mean),
                color=_GREY,
                linewidth=2,
                label=f"always {measured.cascade[-1]}, by group" if group == "simple" else None,
            )
        axis.set_xticks(LEVELS[::2])
        axis.set(xlabel="complexity level", title=label)
        axis.title.set_fontsize(11)
        _finish(axis)
    axes[0].yaxis.set_major_locator(mpl.ticker.MultipleLocator(0.05))
    axes[0].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _by_level(measured: Measured, value: float) -> list[ExperimentSummary]:
    way = policy_way(value)
    return [result.summary for result in measured.results if result.experiment.way == way]


def _draw_reliability(measured: Measured) -> Any:
    columns = 4
    rows = math.ceil((len(measured.reliability) + 1) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 3 * rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis, view in zip(axes.flat, measured.reliability, strict=False):
        _draw_view(axis, view)
    for axis in axes.flat[len(measured.reliability) :]:
        axis.axis("off")
    for axis in axes.flat[len(measured.reliability) - columns : len(measured.reliability)]:
        axis.tick_params(labelbottom=True)
    axes.flat[len(measured.reliability)].text(
        0.05,
        0.95,
        "Axes are log-odds, so that\n1% and 99% get as much room.\n\n"
        "CurveMark: a bin of equally many\nprompts. Bar: 95% interval of\nits right answers (Clopper and\n"
        "Pearson). Line: as predicted.\n\nECE: calibration error.\nR²: variance explained.",
        transform=axes.flat[len(measured.reliability)].transAxes,
        va="top",
        fontsize=9,
    )
    figure.supxlabel("predicted share of right answers", fontsize=11)
    figure.supylabel("right answers", fontsize=11)
    return figure


def _draw_view(axis: Any, view: Reliability) -> None:
    lowest, highest = 0.0015, 0.99995
    predicted = np.clip([each.predicted for each in view.bins], lowest, highest)
    observed = np.clip([each.observed for each in view.bins], lowest, highest)
    low = np.clip([each.low for each in view.bins], lowest, highest)
    high = np.clip([each.high for each in view.bins], lowest, highest)
    axis.plot((lowest, highest), (lowest, highest), color="#999999", linewidth=1)
    axis.errorbar(
        predicted,
        observed,
        yerr=(observed - low, high - observed),
        fmt="o",
        color=_POLICY,
        markersize=4,
        elinewidth=1.2,
        capsize=2,
    )
    axis.set_xscale("logit")
    axis.set_yscale("logit")
    ticks = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
    labels = ["1%", "10%", "50%", "90%", "99%", "99.9%"]
    axis.set_xticks(ticks, labels, fontsize=8)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_yticks([], minor=True)
    axis.set(xlim=(lowest, highest), ylim=(lowest, highest))
    axis.set_title(view.view, loc="left", fontsize=10)
    axis.text(
        0.97,
        0.05,
        f"ECE {view.calibration_error:.4f}\nR² {view.r2:.2f}\nAUROC {view.auroc:.3f}",
        transform=axis.transAxes,
        ha="right",
        fontsize=9,
    )
    _finish(axis)


def _finish(axis: Any, *, grid: bool = True) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
