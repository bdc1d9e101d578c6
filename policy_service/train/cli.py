"""The `asd-policy` command: outcomes to policies."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from policy_service.train import lifecycle
from policy_service.train.console import finite, number_table, result_console
from policy_service.train.costs import EMBEDDED, UnfitCosts
from policy_service.train.faults import UnfitOutcomes, say_why
from services.cli.arguments import CheckedCommand
from services.cli.connecting import Connection, encrypted, in_tls_options
from services.common.extras import explain_lacking, missing_of
from services.common.privacy import report_nothing
from services.common.terminal import LiteralConsole, prepare_streams

if TYPE_CHECKING:
    from collections.abc import Sequence


FAILED, MISUSED, INTERRUPTED = 1, 2, 130


class _PolicyCommands(TyperGroup):
    """Commands of which an interrupted one ends with its code; typer's own differs between its versions."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_PolicyCommands,
    help="Make and measure policies: collect outcomes of a cascade, fit a policy to them, evaluate it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 success, 1 failure, 2 wrong usage or a refused request, 130 interrupted.",
)
errors = LiteralConsole(stderr=True)

_EMBEDDED_ARTIFACT = Path(__file__).resolve().parents[1] / "policy.zip"
# Below, what is fitted and calibrated says little of other prompts. Chosen.
FEW_PROMPTS = 1000

# Where `asd up` serves the embedded family.
EMBEDDED_STAGES = ["small=127.0.0.1:50061", "medium=127.0.0.1:50062", "large=127.0.0.1:50063"]

Costs = Annotated[Path, typer.Option(help="Costs and times of the stages (YAML).")]
Outcomes = Annotated[Path, typer.Argument(help="Outcomes (Parquet), as `collect` writes them.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from services.common.version import VERSION

        typer.echo(f"asd-policy {VERSION}")
        raise typer.Exit


@app.callback()
def _asd_policy(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    pass


@app.command(cls=CheckedCommand)
def fit(
    train: Outcomes,
    calibration: Annotated[Path, typer.Argument(help="Outcomes of other prompts, to calibrate on.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to write, such as policy.zip. A policy there is replaced."),
    ],
    costs: Costs = EMBEDDED,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the trees.")] = 0,
) -> None:
    """Fit a policy to outcomes and write its artifact.

    Killed at any moment, it leaves the policy that was there.
    """
    _check_extra()
    from policy_service.store import check_output
    from policy_service.train.costs import read_costs
    from policy_service.train.dataset import read_dataset
    from policy_service.train.fit import InputFile, fit_policy
    from policy_service.train.outcomes import check_disjoint

    console = result_console()
    check_output(output)
    stages = read_costs(costs)
    check_disjoint(train, calibration)
    inputs = []
    for path, purpose in ((train, "fit to"), (calibration, "calibrate on")):
        with console.status(f"reading {path}"):
            inputs.append(InputFile(path, read_dataset(path, stages)))
        prompts = len(inputs[-1].data)
        console.print(f"{path}: {prompts} prompts", soft_wrap=True, markup=False)
        if prompts < FEW_PROMPTS:
            _say(
                f"warning: {prompts} prompts are few to {purpose}: collect {FEW_PROMPTS:,} or more", "yellow"
            )
    with console.status("fitting") as status:
        document = fit_policy(inputs[0], inputs[1], stages, output, seed, status.update)
    console.print(f"policy {document.policy_version} is in {output}", soft_wrap=True, markup=False)


@app.command(cls=CheckedCommand)
def evaluate(
    outcomes: Outcomes,
    artifact: Annotated[
        Path, typer.Option(help="A policy or a store.", show_default="the embedded family's")
    ] = _EMBEDDED_ARTIFACT,
    costs: Costs = EMBEDDED,
    quality_value: Annotated[
        list[float] | None,
        typer.Option("--lambda", help="Values of quality. Default: 0.5, 1, 2, 5."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a policy on outcomes that it was not made from, beside fixed stages, a threshold, an oracle."""
    _check_extra()
    from asd.errors import InvalidRequest
    from policy_service.artifact import load_artifact
    from policy_service.store import artifact_in
    from policy_service.train.costs import read_costs
    from policy_service.train.dataset import read_dataset
    from policy_service.train.evaluate import evaluate_policy
    from policy_service.train.outcomes import file_digest
    from policy_service.train.tables import comparisons_table, lines_table, predictions_table

    if any(not math.isfinite(value) or value < 0 for value in quality_value or ()):
        raise InvalidRequest("--lambda must be a number of 0 or more", field="lambda")
    policy, document, predictor = load_artifact(artifact_in(artifact))
    if file_digest(outcomes) in {document.train.sha256, document.calibration.sha256}:
        raise UnfitOutcomes(f"{outcomes}: policy {policy.version} was made from this file: use other prompts")
    data = read_dataset(outcomes, read_costs(costs))
    evaluation = evaluate_policy(policy, predictor, data, quality_value or [0.5, 1.0, 2.0, 5.0])
    if as_json:
        typer.echo(json.dumps(finite(dataclasses.asdict(evaluation)), indent=2))
        return
    console = result_console()
    console.print(lines_table(evaluation, data.cascade))
    console.print(comparisons_table(evaluation.comparisons))
    console.print(predictions_table(evaluation.predictions))


@app.command(cls=CheckedCommand)
def price(
    artifact: Annotated[
        Path, typer.Option(help="A policy or a store.", show_default="the embedded family's")
    ] = _EMBEDDED_ARTIFACT,
    mean_cost: Annotated[
        float | None, typer.Option(min=1e-6, max=1e9, help="Mean cost of a request, at most.")
    ] = None,
    mean_latency_ms: Annotated[
        float | None, typer.Option(min=1e-6, max=1e9, help="Mean latency, at most.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of right answers, at least.")
    ] = None,
) -> None:
    """Say which lambda keeps a mean over requests: give exactly one of the three."""
    _check_extra()
    from asd.errors import InvalidRequest
    from policy_service.artifact import load_artifact
    from policy_service.domain import UnmeetableBudget
    from policy_service.store import artifact_in

    if [mean_cost, mean_latency_ms, min_accuracy].count(None) != 2:
        raise InvalidRequest("give exactly one of --mean-cost, --mean-latency-ms and --min-accuracy")
    if any(value is not None and math.isnan(value) for value in (mean_cost, mean_latency_ms, min_accuracy)):
        raise InvalidRequest("NaN is no budget: give a number")
    policy = load_artifact(artifact_in(artifact)).policy
    try:
        value = policy.quality_value_for(
            mean_cost=mean_cost, mean_latency_ms=mean_latency_ms, min_accuracy=min_accuracy
        )
    except UnmeetableBudget as error:
        raise InvalidRequest(str(error)) from error
    typer.echo(f"{value:.4g}")


@app.command(cls=CheckedCommand)
def compare(
    train: Outcomes,
    held_out: Annotated[Path, typer.Argument(help="Outcomes of other prompts, to judge on.")],
    costs: Costs = EMBEDDED,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of trees and neural network.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit every kind of predictor to the same outcomes and judge them on others; `fit` takes the trees."""
    _check_extra()
    from policy_service.train.compare import compare_predictors
    from policy_service.train.costs import read_costs
    from policy_service.train.dataset import read_dataset
    from policy_service.train.outcomes import check_disjoint

    console = result_console()
    stages = read_costs(costs)
    check_disjoint(train, held_out)
    with errors.status("reading") as status:
        data = [read_dataset(path, stages) for path in (train, held_out)]
        scores = compare_predictors(data[0], data[1], seed, status.update)
    if as_json:
        typer.echo(json.dumps(finite([dataclasses.asdict(score) for score in scores]), indent=2))
        return
    headings = ("log loss", "Brier", "R²", "AUROC", "ECE")
    table = number_table(
        f"fitted to {len(data[0])} prompts, judged on {len(data[1])} others", ("", *headings)
    )
    for score in scores:
        numbers = (score.log_loss, score.brier, score.r2, score.auroc, score.calibration_error)
        table.add_row(f"{score.view}: {score.kind}", *(f"{number:.3f}" for number in numbers))
    console.print(table)


@app.command(cls=CheckedCommand)
@encrypted
def collect(
    output: Annotated[Path, typer.Argument(help="File to write, or to go on with (Parquet).")],
    stage: Annotated[
        list[str],
        typer.Option(
            help="A stage as NAME=HOST:PORT, or NAME=HOST:PORT,HOST:PORT with several replicas; repeat it, "
            "smallest first. Default: those of `asd up`.",
            metavar="NAME=TARGET[,TARGET]",
        ),
    ] = EMBEDDED_STAGES,
    split: Annotated[
        str, typer.Option(help="Split of the suites: train, calibration, evaluation.")
    ] = "train",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 1000,
    conversations: Annotated[int, typer.Option(min=0, help="Further ones that are second turns.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the prompts.")] = 0,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts under way at once. With more than there are replicas, latencies include waiting.",
            show_default="one per replica",
        ),
    ] = None,
    timeout_ms: Annotated[
        float, typer.Option(min=1, max=86_400_000, help="Deadline of one stage call; a day at most.")
    ] = 60_000,
    *,
    connection: Connection,
) -> None:
    """Run every stage on prompts of the suites: its own answer, and how it verifies earlier stages' drafts.

    Interrupt it at any time: the same command goes on where it stopped.

    Latencies are those of fresh prompts: where a stage took tokens of a prompt from its prefix cache, as it
    does to verify a draft for a prompt that it has just answered, none is kept, and `fit --costs` stands in.
    Stages with `cached_sequences: 0` have every call measured.
    """
    # Before hours of collecting for a fit that cannot run.
    _check_extra()
    import asyncio

    from asd.client import encryption_advice
    from asd.errors import Unavailable
    from policy_service.train.collect import CollectOptions, collect_outcomes, parse_targets

    targets = parse_targets(stage)
    at_once = concurrency or min(map(len, targets.values()))
    tls = connection.client_tls()
    options = CollectOptions(output, targets, split, prompts, conversations, seed, at_once, timeout_ms, tls)
    try:
        asyncio.run(collect_outcomes(options, result_console()))
    except KeyboardInterrupt:
        _say("stopped: the same command goes on from here", "yellow")
        raise typer.Exit(130) from None
    except Unavailable as error:
        advice = encryption_advice(error.message, is_encrypted=tls is not None)
        if not advice:
            raise
        raise Unavailable(f"{error.message.partition(':')[0]} {in_tls_options(advice)}") from error


def _check_extra() -> None:
    missing = missing_of("policy-train")
    if missing:
        _say(f"asd-policy: {explain_lacking(missing, ['policy-train'])}", "red")
        raise typer.Exit(FAILED)


def _say(line: str, style: str) -> None:
    errors.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


lifecycle.register(app)


def main() -> None:
    """Run the command; every expected error is one sentence and a code: 2 where the command line is wrong."""
    report_nothing()
    from asd.errors import AsdError
    from services.common.settings import SettingsError

    prepare_streams()
    try:
        _check_moved(sys.argv[1:])
        app()
    except (UnfitCosts, UnfitOutcomes, AsdError, SettingsError, OSError) as error:
        _fail(error)
    except Exception as error:
        # Its module needs pydantic, which a command that raises it has found.
        from policy_service.document import UnfitArtifact

        if not isinstance(error, UnfitArtifact):
            raise
        _fail(error)


def _check_moved(arguments: Sequence[str]) -> None:
    """Refuse what 0.1 had in this command. To be removed with 0.3."""
    from asd.errors import InvalidRequest

    if arguments[:1] == ["evaluate"] and any(each.startswith("--outcomes") for each in arguments):
        raise InvalidRequest(
            "--outcomes: published outcomes of real models are measured in a checkout, with `python -m "
            "benchmarks.routing FILE --ladder SMALL,LARGE`"
        )


def _fail(error: Exception) -> NoReturn:
    from asd.errors import InvalidRequest, NotFound
    from services.common.disks import explain, is_full
    from services.common.settings import SettingsError

    message = in_tls_options(str(error))
    if isinstance(error, OSError) and is_full(error):
        message = explain(error)
    elif isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {say_why(error)}"
    _say(f"asd-policy: {message}", "red")
    is_misused = isinstance(error, InvalidRequest | NotFound | SettingsError)
    raise SystemExit(MISUSED if is_misused else FAILED) from error
