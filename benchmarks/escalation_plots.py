"""Plots of what benchmarks.escalation measured: `python -m benchmarks.escalation_plots`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from benchmarks.processes import ROOT
from benchmarks.record import RESULTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

mpl.use("Agg")
from matplotlib import pyplot as plt

PAIRS = ("small-medium", "small-large", "medium-large")
COLOURS = dict(zip(PAIRS, ("#3b7dd8", "#d8543b", "#4a9d5b"), strict=True))
WAYS = ("all on", "pipelining off", "pipelining, resync and prefix reuse off")


def draw_plots(figures: Mapping[str, Any], directory: Path) -> None:
    """Write the plots as PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    _draw_lengths(axes[0, 0], figures["chains"])
    _draw_levels(axes[0, 1], figures["chains"])
    _draw_latencies(axes[1, 0], figures)
    _draw_tolerance(axes[1, 1], figures["tolerance"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(directory / "escalation.png", dpi=90)
    plt.close(figure)


def _draw_lengths(axis: Any, chains: Mapping[str, Any]) -> None:
    most = 48
    for pair in PAIRS:
        lengths = chains[f"pipelining off: {pair}"]["accept_lengths"]
        total = sum(lengths.values())
        shares = [0.0] * (most + 1)
        for length, count in lengths.items():
            shares[min(int(length), most)] += count / total
        axis.step(range(most + 1), shares, where="mid", color=COLOURS[pair], label=pair)
    axis.set(
        xlabel="accept length (tokens emitted by a pass that scored a proposal)", ylabel="share of passes"
    )
    axis.set_title("Accept lengths", loc="left")
    axis.legend(frameon=False)


def _draw_levels(axis: Any, chains: Mapping[str, Any]) -> None:
    for pair in PAIRS:
        rates = chains[f"pipelining off: {pair}"]["acceptance_rate_by_level"]
        axis.plot(
            [int(level) for level in rates], list(rates.values()), "o-", color=COLOURS[pair], label=pair
        )
    axis.set(xlabel="complexity level", ylabel="acceptance rate", ylim=(0, 1.02))
    axis.set_title("Acceptance by complexity", loc="left")
    axis.legend(frameon=False)


def _draw_latencies(axis: Any, figures: Mapping[str, Any]) -> None:
    chains, largest = figures["chains"], figures["alone"]["large"]["latency_ms"]["mean"]
    width = 0.26
    shades = ("#1f4e8c", "#3b7dd8", "#9dc1ee")
    names = (*PAIRS, "small-medium-large")
    for index, way in enumerate(WAYS):
        heights = [chains[f"{way}: {name}"]["latency_ms"]["mean"] for name in names]
        places = [place + (index - 1) * width for place in range(len(names))]
        axis.bar(places, heights, width, color=shades[index], label=way)
    axis.axhline(largest, color="#444", linestyle="--")
    axis.annotate("large alone", (len(names) - 0.5, largest), ha="right", va="bottom", color="#444")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set(ylabel="mean latency, ms", ylim=(0, largest * 1.25))
    axis.set_title("Exact answers of every chain", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_tolerance(axis: Any, curves: Mapping[str, Any]) -> None:
    for pair in PAIRS:
        points = curves[pair]
        # A threshold of 1 keeps what EXACT keeps.
        thresholds = [1.0 if name == "exact" else float(name) for name in points]
        passes = [point["target_passes"] / points["exact"]["target_passes"] for point in points.values()]
        accuracies = [point["accuracy"] for point in points.values()]
        axis.plot(thresholds, accuracies, "o-", color=COLOURS[pair], label=f"{pair}: accuracy")
        axis.plot(thresholds, passes, "x:", color=COLOURS[pair], label=f"{pair}: passes, of EXACT's")
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.set(xlabel="threshold (1: EXACT)", ylim=(0.5, 1.04))
    axis.set_title("EXACT and TOLERANT(threshold)", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)


if __name__ == "__main__":
    draw_plots(json.loads((RESULTS / "escalation.json").read_text()), ROOT / "docs" / "results")
