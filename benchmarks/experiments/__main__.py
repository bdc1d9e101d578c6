"""Reproduces the research system's grid of experiments: `python -m benchmarks.experiments --out DIRECTORY`.

The policy is replayed over measured outcomes of held-out prompts. Writes experiments.json, tables (CSV),
plots (PNG) and report.html, which opens offline.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.grid import QUALITY_VALUES, TooFewPrompts
from benchmarks.experiments.measure import measure
from benchmarks.experiments.plots import draw_plots
from benchmarks.experiments.report import render_report, verdicts
from benchmarks.experiments.tables import figures, write_tables
from benchmarks.processes import ROOT
from benchmarks.record import record
from policy_service.artifact import load_artifact
from policy_service.document import UnfitArtifact
from policy_service.train.costs import EMBEDDED, UnfitCosts, read_costs
from policy_service.train.dataset import read_dataset
from policy_service.train.outcomes import UnfitOutcomes, file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.experiments.measure import Measured

_console = Console(stderr=True)


def run(
    outcomes: Path, artifact: Path, costs: Path, out: Path, command: str, progress: Callable[[str], None]
) -> Measured:
    """Measure, write every file to a directory, and return the figures.

    Files are whole: they are made beside the directory and moved there at the end. Raises UnfitOutcomes,
    UnfitArtifact, UnfitCosts, TooFewPrompts.
    """
    if not outcomes.exists():
        raise UnfitOutcomes(
            f"{outcomes}: no such file: make it with `python -m models.train outcomes --out models "
            f"--outcomes {outcomes.parent}` (a GPU), or with `asd-policy collect {outcomes} --split "
            "evaluation --prompts 3000` while `make up` runs"
        )
    policy, document, predictor = load_artifact(artifact)
    digest = file_digest(outcomes)
    if digest in {document.train.sha256, document.calibration.sha256}:
        raise UnfitOutcomes(f"{outcomes}: policy {policy.version} was made from this file: use other prompts")
    progress(f"reading {outcomes}, about a minute for 30,000 prompts")
    data = read_dataset(outcomes, read_costs(costs))
    names = tuple(stage.name for stage in policy.stages)
    if names != data.cascade:
        raise UnfitArtifact(
            f"{artifact}: made for the cascade {', '.join(names)}; {outcomes} holds {', '.join(data.cascade)}"
        )
    measured = measure(policy, predictor, data, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made = Path(folder).resolve()
        progress("writing tables")
        write_tables(measured, made)
        source = {"file": outcomes.name, "sha256": digest}
        result = {"outcomes": source, **figures(measured), **record(command)}
        (made / "experiments.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        progress("drawing plots")
        plots = draw_plots(measured, made)
        page = render_report(measured, plots, result)
        (made / "report.html").write_text(page, encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in sorted(made.iterdir()):
            path.replace(out / path.name)
    return measured


def _print_summary(measured: Measured) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    header = ("λ", "right", "cost", "latency, ms", *measured.cascade)
    for name in header:
        table.add_column(name, justify="right")
    for value in QUALITY_VALUES:
        summary = measured.at(value).summary
        table.add_row(
            f"{value:g}",
            f"{summary.accuracy.mean:.2%}",
            f"{summary.cost.mean:.3f}",
            f"{summary.latency_ms.mean:.1f}",
            *(f"{share.mean:.1%}" for share in summary.mix),
        )
    console = Console()
    console.print(table)
    for what, holds, figures_of_it in verdicts(measured):
        console.print(f"{what}: {'yes' if holds else 'NO'} ({figures_of_it})", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--outcomes",
        type=Path,
        default=Path("build/outcomes/evaluation.parquet"),
        help="outcomes of held-out prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--artifact",
        type=Path,
        default=ROOT / "policy_service" / "policy.zip",
        help="directory of the policy (default: the embedded family's)",
    )
    parser.add_argument(
        "--costs", type=Path, default=EMBEDDED, help="costs of the stages (default: the embedded family's)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.experiments", *arguments])
    try:
        with _console.status("starting") as status:
            measured = run(
                options.outcomes, options.artifact, options.costs, options.out, command, status.update
            )
    except KeyboardInterrupt:
        _console.print("stopped: no file is half written")
        return 130
    except (UnfitArtifact, UnfitCosts, UnfitOutcomes, TooFewPrompts, OSError) as error:
        _console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    _print_summary(measured)
    _console.print(f"{options.out / 'report.html'} has it all", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
