"""Draws what the GPU benchmarks found: `python -m benchmarks.gpu.plots` writes docs/results/gpu.png."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.processes import ROOT
from benchmarks.record import RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

_SMALL, _LARGE, _BASE, _LIGHT = "#4c78a8", "#e45756", "#444444", "#c9d3df"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results and draw them."""
    argparse.ArgumentParser(
        prog="benchmarks.gpu.plots", description=(__doc__ or "").partition(":")[0]
    ).parse_args(arguments)
    rows = _read("gpu")
    cascades = _read("gpu_cascade")
    three = next(row for row in cascades if len(row["stages"]) == 3)
    two = next(row for row in cascades if len(row["stages"]) == 2)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    _decoding(axes[0][0], rows)
    _speculation(axes[0][1], rows)
    _timeline(axes[1][0], {"sequential": three, "pipelined": two})
    _throughput(axes[1][1], two)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results" / "gpu.png", dpi=90)
    plt.close(figure)


def _read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def _decoding(axis: Axes, rows: list[dict[str, Any]]) -> None:
    measured = [row for row in rows if "decode_ms_b1" in row]
    for place, row in enumerate(measured):
        axis.bar(place - 0.27, row["research_ms"], 0.26, color=_LIGHT, label="research system" * (not place))
        axis.bar(place, row["decode_ms_b1"], 0.26, color=_SMALL, label="asd, vLLM" * (not place))
        axis.bar(place + 0.27, row["floor_ms"], 0.26, color=_BASE, label="floor" * (not place))
        ratio = row["decode_ms_b1"] / row["floor_ms"]
        axis.text(place, row["decode_ms_b1"] + 1, f"{ratio:.2f} ×", ha="center", fontsize=8)
    names = [f"{row['model']}\n{_card(row)}{_gpus(row)}" for row in measured]
    axis.set_xticks(range(len(measured)), names, fontsize=8)
    axis.set_ylabel("ms per token, batch 1")
    axis.set_title("Decoding; over its bar: times the floor (weights / copy bandwidth)", fontsize=9)
    axis.legend(fontsize=8)


def _speculation(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in (row for row in rows if "H200" in row["device"]):
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


def _timeline(axis: Axes, cascades: dict[str, dict[str, Any]]) -> None:
    names, place = [], 0.0
    for way, cascade in cascades.items():
        found = max(
            (each for each in cascade["latencies"] if each["way"] == way and each["acceptance"] == 1.0),
            key=lambda each: len(each["chain"]),
        )
        shapes = [_shape(each) for each in cascade["stages"]]
        calls = sorted(_stage_calls(found["trace"]), key=lambda span: float(span["end_ms"]))
        for shape, span in zip(shapes, calls, strict=True):
            color = {"13B": _SMALL, "34B": "#72b7b2", "70B": _LARGE}[shape]
            axis.barh(place, span["end_ms"] - span["start_ms"], 0.7, span["start_ms"], color=color)
            names.append((place, f"{shape} {span['name'].rpartition('/')[2]}"))
            place -= 1
        alone = next(each["p50_ms"] for each in cascade["latencies"] if each["chain"] == ["large"])
        text = f"{len(shapes)} stages {way}, {_card(cascade)}; {shapes[-1]} alone: {alone:,.0f} ms"
        axis.text(8, place + len(shapes) + 0.45, text, fontsize=8)
        place -= 1
    axis.set_yticks([each for each, _ in names], [name for _, name in names], fontsize=8)
    axis.set_ylim(place + 0.3, 1)
    axis.set_xlabel("ms")
    axis.set_title("Two traced answers of 64 tokens, all accepted", fontsize=9)


def _gpus(row: dict[str, Any]) -> str:
    return f" × {row['tensor_parallel']}" if row["tensor_parallel"] > 1 else ""


def _card(row: dict[str, Any]) -> str:
    return "H200" if "H200" in row["device"] else "H100"


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
    axis.axhline(1.0, color=_BASE, lw=0.8)
    last = _shape(cascade["stages"][-1])
    axis.set_ylabel(f"answers per second, beside always the {last}", fontsize=9)
    axis.set_title(f"Throughput, {_card(cascade)}s: {', '.join(cascade['stages'])} (model@GPU)", fontsize=9)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
