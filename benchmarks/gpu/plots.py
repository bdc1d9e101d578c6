"""Draws what the GPU benchmarks found: `python -m benchmarks.gpu.plots` writes docs/results/gpu.png."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.processes import ROOT
from benchmarks.record import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALL, _LARGE, _BASE, _LIGHT = "#4c78a8", "#e45756", "#444444", "#c9d3df"


def main() -> None:
    """Read the results and draw them."""
    rows = _read("gpu")
    cascade = _read("gpu_cascade")[0]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    _decoding(axes[0][0], rows)
    _speculation(axes[0][1], rows)
    _timeline(axes[1][0], cascade)
    _throughput(axes[1][1], cascade)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results" / "gpu.png", dpi=90)
    plt.close(figure)


def _read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def _decoding(axis: Axes, rows: list[dict[str, Any]]) -> None:
    measured = [row for row in rows if "decode_ms_b1" in row and row["tensor_parallel"] == 1]
    for place, row in enumerate(measured):
        axis.bar(place - 0.27, row["research_ms"], 0.26, color=_LIGHT, label="research system" * (not place))
        axis.bar(place, row["decode_ms_b1"], 0.26, color=_SMALL, label="asd, vLLM" * (not place))
        axis.bar(place + 0.27, row["floor_ms"], 0.26, color=_BASE, label="floor" * (not place))
        ratio = row["decode_ms_b1"] / row["floor_ms"]
        axis.text(place, row["decode_ms_b1"] + 1, f"{ratio:.2f} ×", ha="center", fontsize=8)
    names = [f"{row['model']}\n{'H200' if 'H200' in row['device'] else 'H100'}" for row in measured]
    axis.set_xticks(range(len(measured)), names, fontsize=8)
    axis.set_ylabel("ms per token, batch 1")
    axis.set_title("Decoding; over its bar: times the floor (weights / copy bandwidth)", fontsize=9)
    axis.legend(fontsize=8)


def _speculation(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for batch in (1, 8, 64):
            points = [
                (each["acceptance"], each["speedup"])
                for each in row.get("speculation", ())
                if each["batch"] == batch and each["draft_tokens"] == 64
            ]
            if points:
                color = _LARGE if row["model"] == "70b" else _SMALL
                style = {1: "-", 8: "--", 64: ":"}[batch]
                label = f"{row['model']}, {batch} at a time"
                axis.plot(*zip(*points, strict=True), style, color=color, marker="o", ms=3, label=label)
    axis.axhline(1.0, color=_BASE, lw=0.8)
    axis.set_yscale("log")
    axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axis.set_xlabel("share of a 64-token draft that is accepted")
    axis.set_ylabel("times as fast as writing it")
    axis.set_title("Verify and go on, beside plain decoding (H200)", fontsize=9)
    axis.legend(fontsize=8)


def _timeline(axis: Axes, cascade: dict[str, Any]) -> None:
    shapes = dict(
        zip(("small", "medium", "large"), (_shape(each) for each in cascade["stages"]), strict=False)
    )
    wanted = (("sequential", ["small", "medium", "large"]), ("pipelined", ["small", "large"]))
    names, place = [], 0.0
    for way, chain in wanted:
        (found,) = (
            each
            for each in cascade["latencies"]
            if (each["way"], each["chain"], each["acceptance"]) == (way, chain, 1.0)
        )
        calls = sorted(_stage_calls(found["trace"]), key=lambda span: float(span["end_ms"]))
        for name, span in zip(chain, calls, strict=True):
            color = {"small": _SMALL, "medium": "#72b7b2", "large": _LARGE}[name]
            axis.barh(place, span["end_ms"] - span["start_ms"], 0.7, span["start_ms"], color=color)
            method = span["name"].rpartition("/")[2]
            names.append((place, f"{shapes[name]} {method}"))
            place -= 1
        place -= 0.5
    axis.set_yticks([each for each, _ in names], [name for _, name in names], fontsize=8)
    alone = next(each["p50_ms"] for each in cascade["latencies"] if each["chain"] == ["large"])
    axis.set_xlabel("ms")
    axis.set_title(f"Two traced answers of 64 tokens, all accepted; 70B alone: {alone:.0f} ms", fontsize=9)


def _shape(stage: str) -> str:
    return stage.partition("@")[0].upper()


def _stage_calls(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        span
        for span in trace
        if span["service"] == "asd-stage" and span["name"].startswith("/asd.v1.StageService/")
    ]


def _throughput(axis: Axes, cascade: dict[str, Any]) -> None:
    asked = list(dict.fromkeys(each["asked"] for each in cascade["throughput"]))
    for number, name in enumerate(asked):
        points = [
            (each["concurrency"], each["of_always_the_largest"])
            for each in cascade["throughput"]
            if each["asked"] == name
        ]
        color = _BASE if not number else f"C{number - 1}"
        axis.plot(*zip(*points, strict=True), color=color, marker="o", ms=3, label=name)
    axis.set_xscale("log", base=2)
    ticks = sorted({each["concurrency"] for each in cascade["throughput"]})
    axis.set_xticks(ticks, [str(each) for each in ticks])
    axis.set_xlabel("requests at a time")
    axis.set_ylabel("answers per second, times always the 70B's")
    axis.set_title(f"{cascade['device']}: {', '.join(cascade['stages'])} (model@GPU)", fontsize=9)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
