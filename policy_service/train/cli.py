"""The `asd-policy` command: outcomes to policies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from policy_service.artifact import UnfitArtifact
from policy_service.train.costs import EMBEDDED, UnfitCosts
from policy_service.train.outcomes import UnfitOutcomes

app = typer.Typer(
    help="Make and measure policies: collect outcomes of a cascade, fit a policy to them, evaluate it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

# Where `asd up` serves the embedded family.
EMBEDDED_STAGES = ["small=127.0.0.1:50061", "medium=127.0.0.1:50062", "large=127.0.0.1:50063"]

Costs = Annotated[Path, typer.Option(help="Costs and times of the stages (YAML).")]
Outcomes = Annotated[Path, typer.Argument(help="Outcomes (.jsonl.gz), as `collect` writes them.")]


@app.command()
def fit(
    train: Outcomes,
    calibration: Annotated[Path, typer.Argument(help="Outcomes of other prompts, to calibrate on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the artifact.")],
    costs: Costs = EMBEDDED,
    seed: Annotated[int, typer.Option(help="Seed of the trees.")] = 0,
) -> None:
    """Fit a policy to outcomes and write its artifact."""
    from policy_service.train.costs import read_costs
    from policy_service.train.dataset import read_dataset
    from policy_service.train.fit import InputFile, fit_policy
    from policy_service.train.outcomes import check_disjoint

    stages = read_costs(costs)
    check_disjoint(train, calibration)
    inputs = []
    for path in (train, calibration):
        with console.status(f"reading {path}"):
            inputs.append(InputFile(path, read_dataset(path, stages)))
        console.print(f"{path}: {len(inputs[-1].data)} prompts")
    with console.status("fitting") as status:
        document = fit_policy(inputs[0], inputs[1], stages, output, seed, status.update)
    console.print(f"policy {document.policy_version} is in {output}")


@app.command()
def evaluate(
    outcomes: Outcomes,
    artifact: Annotated[Path, typer.Option(help="Directory of the policy.")] = Path(
        "policy_service/artifact"
    ),
    costs: Costs = EMBEDDED,
    quality_value: Annotated[
        list[float] | None, typer.Option("--lambda", help="Further values of quality, cost units.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a policy on outcomes that it was not made from, beside fixed stages, a threshold, an oracle."""
    from policy_service.artifact import load_policy, load_predictor
    from policy_service.train.costs import read_costs
    from policy_service.train.dataset import read_dataset
    from policy_service.train.evaluate import evaluate_policy
    from policy_service.train.outcomes import file_digest

    policy, document = load_policy(artifact)
    if file_digest(outcomes) in {document.train.sha256, document.calibration.sha256}:
        raise UnfitOutcomes(f"{outcomes}: policy {policy.version} was made from this file: use other prompts")
    data = read_dataset(outcomes, read_costs(costs))
    predictor = load_predictor(artifact, document)
    evaluation = evaluate_policy(policy, predictor, data, quality_value or [0.5, 1.0, 2.0, 5.0])
    if as_json:
        print(json.dumps(dataclasses.asdict(evaluation), indent=2))  # noqa: T201
        return
    table = Table(title=f"policy {evaluation.policy_version} on {evaluation.prompts} prompts")
    headings = ("", "accuracy", "of the last stage's", "cost", "latency ms", "early stops", *data.cascade)
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for line in evaluation.lines:
        table.add_row(
            line.name,
            f"{line.accuracy:.2%}",
            f"{line.accuracy_ratio:.2%}",
            f"{line.cost:.2f}",
            f"{line.latency_ms:.1f}",
            f"{line.early_stop_share:.1%}",
            *(f"{share:.1%}" for share in line.mix),
        )
    console.print(table)
    table = Table(title="P(correct) of the judged answer")
    for heading in ("answer of", "R²", "AUROC", "ECE", "Brier"):
        table.add_column(heading, justify="left" if heading == "answer of" else "right")
    for each in evaluation.predictions:
        numbers = (each.r2, each.auroc, each.calibration_error, each.brier)
        table.add_row(each.view, *(f"{number:.3f}" for number in numbers))
    console.print(table)


@app.command()
def collect(
    output: Annotated[Path, typer.Argument(help="File to write, or to go on with (.jsonl.gz).")],
    stage: Annotated[
        list[str],
        typer.Option(
            help="A stage as NAME=HOST:PORT; repeat it, smallest first. Default: those of `asd up`.",
            metavar="NAME=TARGET",
        ),
    ] = EMBEDDED_STAGES,
    split: Annotated[
        str, typer.Option(help="Split of the suites: train, calibration, evaluation.")
    ] = "train",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts under way at once.")] = 4,
    timeout_ms: Annotated[float, typer.Option(min=1, help="Deadline of one stage call.")] = 60_000,
) -> None:
    """Run every stage on prompts of the suites: its own answer, and how it verifies earlier stages' drafts.

    Interrupt it at any time: the same command goes on where it stopped.
    """
    import asyncio

    from policy_service.train.collect import CollectOptions, collect_outcomes, parse_targets

    options = CollectOptions(output, parse_targets(stage), split, prompts, seed, concurrency, timeout_ms)
    asyncio.run(collect_outcomes(options, console))


def main() -> None:
    """Run the command; every expected error is one sentence and exit status 1."""
    from services.common.errors import AsdError

    try:
        app()
    except (UnfitArtifact, UnfitCosts, UnfitOutcomes, AsdError, OSError) as error:
        errors.print(f"asd-policy: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise SystemExit(130) from None
