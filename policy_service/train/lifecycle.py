"""Commands of `asd-policy` for a policy in service: versions, refitting, drift, shadow."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from asd.errors import InvalidRequest, NotFound, PreconditionFailed
from policy_service.train.console import number_table, result_console, warn
from policy_service.train.faults import UnfitOutcomes
from services.cli.arguments import CheckedCommand
from services.common.extras import explain_lacking, missing_of
from services.common.line_log import parse_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.table import Table

    from policy_service.reports import OutcomeReport
    from policy_service.shadow import ShadowRecord
    from policy_service.train.refit import StageRefit

T = TypeVar("T")

Store = Annotated[Path, typer.Argument(help="Directory of the versions.")]
Reports = Annotated[list[Path], typer.Argument(help="Files of reports, as policy services write them.")]


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for command in (versions, publish, rollback, refit, drift, shadow, add_family):
        app.command(cls=CheckedCommand)(command)


def versions(store: Store) -> None:
    """List the versions of a store and which one is in force."""
    _check_extra("policy")
    from policy_service.store import PolicyStore, UnfitStore

    headings = ("version", "parent", "calibration\nprompts", "in force since", "")
    table = number_table(f"policies in {store}", headings, texts=2)
    kept = PolicyStore(store)
    listed = kept.versions()
    for each in listed:
        since = (
            "" if each.since is None else datetime.fromtimestamp(each.since, UTC).isoformat(" ", "seconds")
        )
        mark = " *" if each.is_current else ""
        state = "damaged" if each.problem else ""
        table.add_row(each.version + mark, each.parent, f"{each.prompts or '–'}", since, state)
    result_console().print(table)
    for each in listed:
        if each.problem:
            warn(f"{each.version} is damaged: {each.problem}. Publishing it again mends it")
    try:
        kept.current()
    except UnfitStore as error:
        warn(f"none is in force: {error}")


def publish(
    artifact: Annotated[Path, typer.Argument(help="The policy, as `fit` writes it, or another store.")],
    store: Store,
) -> None:
    """Copy a policy into a store and put it into force. Services that read the store follow by themselves."""
    _check_extra("policy")
    from policy_service.artifact import artifact_file
    from policy_service.store import PolicyStore, artifact_in

    source = artifact_in(artifact)
    document = PolicyStore(store).publish(source)
    if artifact_file(source).is_dir():
        _print(f"{source} has the form of 0.1, which is read until 0.3: the store holds it as one file")
    _print(f"policy {document.policy_version} is in force in {store}")


def rollback(
    store: Store,
    to: Annotated[
        str | None, typer.Option(help="A version of the store.", show_default="the one before")
    ] = None,
) -> None:
    """Put the version before the present one back into force."""
    _check_extra("policy")
    from policy_service.store import PolicyStore

    versions = PolicyStore(store)
    names = versions.names()
    if to is not None and names and to not in names:
        raise NotFound(f"{store} holds no version {to!r}: choose one of {', '.join(names)}", field="to")
    _print(f"policy {versions.rollback(to)} is in force in {store}")


def refit(
    store: Store,
    reports: Annotated[list[Path], typer.Option(help="A file of reports; repeat it for several.")],
    publish: Annotated[bool, typer.Option("--publish", help="Put the refitted policy into force.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the refitted policy here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the halves.")] = 0,
) -> None:
    """Refit the calibration of the policy in force to reports of its answers, and show what that changes."""
    _check_extra("policy-train")
    from policy_service.artifact import read_artifact
    from policy_service.store import PolicyStore, artifact_in, check_output, write_artifact
    from policy_service.train.refit import fit_corrections, refit_artifact

    versions = PolicyStore(store)
    versions.current()
    parent = read_artifact(artifact_in(store))
    if output is not None:
        check_output(output)
    document = parent.document
    stages = [stage.name for stage in document.stages]
    refits = fit_corrections(_read(reports), document.policy_version, stages, seed)
    console = result_console()
    console.print(_refit_table(document.policy_version, refits))
    if not any(each.correction for each in refits):
        _print(f"policy {document.policy_version} stays: no correction lowers the log loss beyond doubt")
        return
    if output is None and not publish:
        _print("nothing was written: --publish puts the refitted policy into force, --output writes it")
        return
    refitted = refit_artifact(parent, refits)
    version = refitted.document.policy_version
    if output is not None:
        write_artifact(refitted, output)
        _print(f"policy {version} is in {output}")
    if publish:
        versions.put_into_force(refitted)
        _print(f"policy {version} is in force in {store}, after {document.policy_version}")


def drift(
    reports: Reports,
    run_length: Annotated[
        float, typer.Option(min=2, help="Mean reports of a stage before a false alarm, at least.")
    ] = 10_000,
    tolerance: Annotated[
        float, typer.Option(min=0.001, max=0.499, help="Gap between predicted and right that is no drift.")
    ] = 0.02,
) -> None:
    """Show how reported answers turned out beside what was predicted, and where an alarm would have been."""
    from policy_service.drift import DriftMonitor, DriftRule
    from policy_service.reports import first_reports

    # The table shows alarms.
    monitor = DriftMonitor(DriftRule(run_length, tolerance), on_alarm=lambda *_: None)
    for report in first_reports(_read(reports)):
        monitor.add(report)
    numbers = ("reports", "predicted", "right", "ECE", "evidence", "drifted at\nreport")
    table = number_table(
        f"calibration; alarm at evidence {run_length:g}", ("policy", "stage", *numbers), texts=2
    )
    if not monitor.versions():
        _print("nothing was reported yet")
        return
    for version in monitor.versions():
        for each in monitor.of(version):
            table.add_row(
                version,
                each.stage,
                str(each.reports),
                f"{each.expected:.2%}",
                f"{each.observed:.2%}",
                f"{each.reported_calibration_error:.4f}",
                f"{each.evidence:.3g}",
                "no" if each.alarm_at is None else str(each.alarm_at),
            )
    result_console().print(table)


def shadow(
    file: Annotated[Path, typer.Argument(help="What a policy service wrote to shadow_path.")],
) -> None:
    """Show where a shadow policy would have done otherwise than the live one, and what that would change."""
    _check_extra("policy")
    from policy_service.shadow import parse_shadow

    records = _read_lines(file, parse_shadow, "record of a shadow, as a policy service writes to shadow_path")
    pairs = Counter((each.live_version, each.shadow_version) for each in records)
    for (live, candidate), count in pairs.items():
        of_pair = [each for each in records if (each.live_version, each.shadow_version) == (live, candidate)]
        result_console().print(_shadow_table(f"{candidate} beside {live}: {count} records", of_pair))
    if not records:
        _print(f"{file} holds no records")


def add_family(
    artifact: Annotated[Path, typer.Argument(help="The policy; its models stay as they are.")],
    train: Annotated[
        Path | None, typer.Argument(help="Outcomes that it was fitted to (Parquet).", show_default=False)
    ] = None,
    calibration: Annotated[
        Path | None, typer.Argument(help="Outcomes that it was calibrated on.", show_default=False)
    ] = None,
    suites: Annotated[
        bool, typer.Option("--suites", help="It was fitted to the suites: take prompts of theirs.")
    ] = False,
    prompts: Annotated[
        int, typer.Option(min=400, help="With --suites: how many; a third as many to choose a threshold by.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="With --suites: seed of the prompts.")] = 0,
) -> None:
    """Teach a policy what its prompts look like, so that it predicts nothing for unlike ones.

    Nothing is fitted anew, and outcomes are read for their prompts alone. `fit` does the same for new
    policies.
    """
    _check_extra("policy-train")
    from policy_service.artifact import Artifact, read_artifact
    from policy_service.store import UnfitStore, is_store, write_artifact
    from policy_service.train.family import suite_prompts, with_family
    from policy_service.train.outcomes import read_prompt_texts

    if suites == (train is not None) or (train is None) != (calibration is None):
        raise InvalidRequest(
            "give the files of outcomes that it was fitted to and calibrated on, or --suites"
        )
    if is_store(artifact):
        raise UnfitStore(
            f"{artifact} is a store of versions, which do not change: give an artifact, and publish it then"
        )
    given = read_artifact(artifact)
    if train is not None and calibration is not None:
        texts = [list(read_prompt_texts(path)) for path in (train, calibration)]
    else:
        texts = [suite_prompts("train", prompts, seed), suite_prompts("calibration", prompts // 3, seed)]
    document = with_family(given.document, texts[0], texts[1])
    write_artifact(Artifact(document, given.models), artifact)
    assert document.family is not None
    _print(
        f"policy {document.policy_version} is in {artifact}: prompts above a novelty of "
        f"{document.family.threshold:g} are unlike the {len(texts[0])} that it knows"
    )


def _refit_table(version: str, refits: Iterable[StageRefit]) -> Table:
    numbers = (
        "reports",
        "ECE\nbefore",
        "ECE\nafter",
        "log loss\nbefore",
        "log loss\nafter",
        "slope",
        "offset",
    )
    table = number_table(
        f"policy {version} on reports that each half was not fitted to", ("stage", *numbers, "")
    )
    for each in refits:
        row = [each.stage, str(each.reports)]
        row += (
            [f"{value:.4f}" for value in (*each.error, *each.loss)] if each.error and each.loss else ["–"] * 4
        )
        correction = each.correction
        row += [f"{correction.slope:.3f}", f"{correction.offset:+.3f}"] if correction else ["–"] * 2
        table.add_row(*row, each.reason and f"stays: {each.reason}")
    return table


def _shadow_table(title: str, records: Sequence[ShadowRecord]) -> Table:
    changes = ("quality\nby live", "quality\nby shadow", "cost\nby live", "cost\nby shadow")
    table = number_table(title, ("step", "stage", "records", "agree", *changes), texts=2)
    groups: dict[tuple[str, str], list[ShadowRecord]] = {}
    for each in records:
        groups.setdefault((each.step, each.judged_stage), []).append(each)
    for (step, stage), group in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        table.add_row(
            step,
            stage,
            str(len(group)),
            f"{fmean(each.agrees for each in group):.1%}",
            _mean_change(each.quality_change_by_live for each in group),
            _mean_change(each.quality_change_by_shadow for each in group),
            f"{fmean(each.cost_change_by_live for each in group):+.3f}",
            f"{fmean(each.cost_change_by_shadow for each in group):+.3f}",
        )
    return table


def _mean_change(changes: Iterable[float | None]) -> str:
    """Return the mean over the records with a prediction."""
    known = [change for change in changes if change is not None]
    return f"{fmean(known):+.4f}" if known else "–"


def _read(files: Iterable[Path]) -> list[OutcomeReport]:
    from policy_service.reports import parse_report

    what = "report, as a policy service writes to reports_path"
    return [report for file in files for report in _read_lines(file, parse_report, what)]


def _read_lines(file: Path, parse: Callable[[str], T], what: str) -> list[T]:
    """Return the parsed lines of a file; damaged lines are counted in one warning.

    Raises OSError, and UnfitOutcomes if all lines are damaged.
    """
    damage: list[tuple[int, int]] = []
    kept = list(parse_lines(file, parse, lambda *found: damage.append(found), is_pipe_fine=True))
    for count, first in damage:
        if not kept:
            raise UnfitOutcomes(f"{file}: no line is a {what}: give such a file")
        warn(f"{file}: {count} damaged lines skipped, first line {first}: no {what}; {len(kept)} are read")
    return kept


def _print(line: str) -> None:
    result_console().print(line, soft_wrap=True, markup=False, highlight=False)


def _check_extra(extra: str) -> None:
    missing = missing_of(extra)
    if missing:
        raise PreconditionFailed(explain_lacking(missing, [extra]))
