"""Draws cost against accuracy: `python -m benchmarks.frontier` writes docs/results/cost-accuracy.png.

It reads the tables of `make experiments` and measures nothing itself.
"""

from __future__ import annotations

import argparse
import csv
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

_TABLES = ROOT / "docs" / "results" / "experiments"
_PLOT = ROOT / "docs" / "results" / "cost-accuracy.png"
# Okabe and Ito's colours, as in benchmarks/experiments/plots.py.
_POLICY, _THRESHOLD, _GREY = "#0072b2", "#d55e00", "#555555"
_PREFERENCES = ("fastest", "balanced", "best")
# In points, from the marker: clear of both curves.
_LABEL_OFFSETS = {
    "fastest": (-10, 0),
    "balanced": (-10, -3),
    "best": (-4, 9),
    "always small": (10, -4),
    "always medium": (10, -4),
    "always large": (-10, -4),
}

# Mean cost and share of right answers, by the name of the operating point.
Points = dict[str, tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the tables and draw them."""
    argparse.ArgumentParser(
        prog="benchmarks.frontier", description=(__doc__ or "").partition(":")[0]
    ).parse_args(arguments)
    bounds = _read("bounds")
    figure, axis = plt.subplots(figsize=(7.6, 3.9), layout="constrained")
    thresholds = {name: point for name, point in bounds.items() if name.startswith("threshold ")}
    _curve(axis, thresholds, _THRESHOLD, "--", "fixed thresholds, the best in hindsight")
    preferences = {name: bounds[name] for name in _PREFERENCES}
    _curve(axis, {**_read("lambda_in_cost_units"), **preferences}, _POLICY, "-", "asd's policy")
    _mark(axis, preferences, "o", _POLICY)
    _mark(axis, {name: point for name, point in bounds.items() if name.startswith("always ")}, "s", _GREY)
    axis.set_xlabel("mean cost of an answer (large alone: 8.8)")
    axis.set_ylabel("right answers")
    axis.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
    axis.set_ylim(0.6, 1.02)
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False)
    # No software version inside: the same tables give the same file.
    figure.savefig(_PLOT, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _read(name: str) -> Points:
    with (_TABLES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return {row["way"]: (float(row["cost"]), float(row["accuracy"])) for row in csv.DictReader(file)}


def _curve(axis: Axes, points: Points, colour: str, style: str, label: str) -> None:
    costs, accuracies = zip(*sorted(points.values()), strict=True)
    axis.plot(costs, accuracies, style, color=colour, label=label)


def _mark(axis: Axes, points: Points, marker: str, colour: str) -> None:
    for name, point in points.items():
        axis.plot(*point, marker, color=colour, markersize=7)
        x, y = _LABEL_OFFSETS[name]
        axis.annotate(
            name,
            point,
            xytext=(x, y),
            textcoords="offset points",
            ha="left" if x > 0 else "right",
            va="center_baseline",
            color=colour,
        )


if __name__ == "__main__":
    main()
