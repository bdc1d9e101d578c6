"""`asd-policy`: what is refused at once, and tables that keep their numbers."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from typer.testing import CliRunner

from policy_service.train import cli
from policy_service.train.cli import app
from policy_service.train.console import finite
from policy_service.train.evaluate import Comparison, Evaluation, Line, Prediction
from policy_service.train.tables import lines_table, predictions_table
from services.common.version import VERSION
from tests.unit.policy.test_fit import record, write

if TYPE_CHECKING:
    from pathlib import Path

_RUNNER = CliRunner()
_CASCADE = ("small", "medium", "large")
_LINES = (
    Line("always large", 1.0, 1.0, 8.8, 1118.75, 0.0, (0.0, 0.0, 1.0)),
    Line("best fixed threshold at balanced's accuracy", 0.99, 0.9911, 12.34, 43.21, 0.783, (1.0, 0.0, 0.0)),
)
_PREDICTIONS = (
    Prediction("small, from the prompt alone", 0.61, 0.912, 0.011, 0.082),
    Prediction("large, verified from medium", 0.0, float("nan"), 0.003, 0.0),
)
_COMPARISONS = (Comparison("balanced (lambda 7.8)", 7.8, 4.31, 4.27, 0.04, -0.01, 0.09),)
_SHARES = {"always large": 0.0, "best fixed threshold at balanced's accuracy": -0.55}
_EVALUATION = Evaluation("v7", 5000, _LINES, _PREDICTIONS, _COMPARISONS, (), _SHARES)


@pytest.mark.parametrize("missing", ["scipy", "sklearn", "onnx", "pyarrow"])
@pytest.mark.parametrize(
    "arguments", [["collect", "o.gz"], ["fit", "a.gz", "b.gz", "-o", "policy"], ["evaluate", "o.gz"]]
)
def test_without_its_extra_a_command_says_at_once_what_installs_it(arguments, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    result = _RUNNER.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr == (
        f"asd-policy: {missing} is not installed: install 'asd-cascade[policy-train]', in a checkout "
        "./clients/python '.[policy-train]'\n"
    )


def _main(monkeypatch, capsys, *arguments: str) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", ["asd-policy", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate"], ["fit", "--output", "policy"]])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"hello", "not a file of outcomes, or truncated"),
        (b"", "not a file of outcomes, or truncated"),
    ],
)
def test_a_file_that_is_none_of_outcomes_is_named(command, content, reason, tmp_path, monkeypatch, capsys):
    # Wider than any terminal: an error is one line.
    file = tmp_path / ("o" * 200)
    if content is not None:
        file.write_bytes(content)
    files = [str(file)] * (2 if command[0] == "fit" else 1)
    assert _main(monkeypatch, capsys, *command, *files) == (1, f"asd-policy: {file}: {reason}\n")


def test_the_default_artifact_does_not_depend_on_the_directory(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "o.gz", [])
    monkeypatch.chdir(tmp_path)
    code, errors = _main(monkeypatch, capsys, "evaluate", str(file))
    # The policy was found, and is another cascade's.
    assert code == 1
    assert "no policy" not in errors
    assert str(file) in errors


def test_version():
    assert _RUNNER.invoke(app, ["--version"]).output == f"asd-policy {VERSION}\n"


def _printed(table, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def test_no_number_is_cut_in_eighty_columns():
    text = _printed(lines_table(_EVALUATION, _CASCADE), 80)
    assert "…" not in text
    for number in ("100.00%", "99.11%", "12.34", "1118.8", "43.2", "78.3%", "100.0%"):
        assert number in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_not_defined_is_a_dash_in_tables_and_null_in_json():
    row = _printed(predictions_table(_PREDICTIONS), 80).splitlines()[-2]
    assert row.split()[-4:] == ["0.000", "–", "0.003", "0.000"]
    assert json.dumps(finite({"a": (1.5, float("nan"), "x"), "b": [float("inf")]})) == (
        '{"a": [1.5, null, "x"], "b": [null]}'
    )


def test_few_prompts_are_warned_of(tmp_path: Path, monkeypatch):
    import random

    from policy_service.train import fit

    rng = random.Random(0)
    files = [str(write(tmp_path / f"{n}.gz", [record(rng) for _ in range(n)])) for n in (3, 4)]
    costs = tmp_path / "costs.yaml"
    costs.write_text("stages: [{name: small, cost: 1}, {name: large, cost: 5}]")

    class _Made:
        policy_version = "v8"

    monkeypatch.setattr(fit, "fit_policy", lambda *_: _Made())
    arguments = ["fit", *files, "--costs", str(costs), "--output", "policy"]
    result = _RUNNER.invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "warning: 3 prompts are few to fit to: collect 1,000 or more",
        "warning: 4 prompts are few to calibrate on: collect 1,000 or more",
    ]
    monkeypatch.setattr(cli, "FEW_PROMPTS", 4)
    assert _RUNNER.invoke(app, arguments).stderr.count("few to fit") == 1


@pytest.mark.parametrize("budget", ["--mean-cost=2.5", "--mean-latency-ms=20", "--min-accuracy=0.97"])
def test_a_mean_over_requests_has_its_lambda(budget):
    result = _RUNNER.invoke(app, ["price", budget])
    assert result.exit_code == 0
    assert 1.0 < float(result.output) < 50.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of"),
        (["--mean-cost", "3", "--min-accuracy", "0.9"], "give exactly one of"),
        (["--mean-cost", "0.5"], "the least mean cost is 1.6"),
    ],
)
def test_a_mean_that_cannot_be_kept_says_what_can(arguments, message, monkeypatch, capsys):
    code, errors = _main(monkeypatch, capsys, "price", *arguments)
    assert code == 2
    assert message in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "a", "b", "-o", "p", "--seed", "-1"],
        ["compare", "a", "b", "--seed", str(2**32)],
        ["price", "--min-accuracy", "95"],
        ["price", "--mean-cost", "-1"],
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    result = _RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert "than or e" in result.stderr


def test_a_predictor_needs_right_and_wrong_answers(tmp_path, monkeypatch, capsys):
    import random

    rng = random.Random(1)
    files = []
    for name in ("a", "b"):
        rows = [record(rng) for _ in range(30)]
        for row in rows:
            row["stages"]["small"]["correct"] = True  # type: ignore[index]
        files.append(str(write(tmp_path / name, rows)))
    costs = tmp_path / "costs.yaml"
    costs.write_text("stages: [{name: small, cost: 1}, {name: large, cost: 5}]")
    code, message = _main(monkeypatch, capsys, "compare", *files, "--costs", str(costs))
    assert code == 1
    assert "small is always" in message


def test_costs_that_are_no_text_are_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "costs.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    outcomes = write(tmp_path / "o", [])
    code, message = _main(monkeypatch, capsys, "evaluate", str(outcomes), "--costs", str(file))
    assert code == 1
    assert f"{file}: not YAML" in message


@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_a_lambda_that_is_no_value_is_refused(value, monkeypatch, capsys):
    code, message = _main(monkeypatch, capsys, "evaluate", "o.parquet", "--lambda", value)
    assert code == 2
    assert "--lambda must be" in message


def test_published_outcomes_are_measured_by_another_command(monkeypatch, capsys):
    code, message = _main(monkeypatch, capsys, "evaluate", "--outcomes", "a.csv.gz", "--ladder", "a,b")
    assert code == 2
    assert "`python -m benchmarks.routing FILE --ladder SMALL,LARGE`" in message


def test_a_collection_that_is_interrupted_says_how_it_goes_on(tmp_path, monkeypatch):
    async def interrupted(options, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("policy_service.train.collect.collect_outcomes", interrupted)
    result = _RUNNER.invoke(app, ["collect", str(tmp_path / "o.parquet")])
    assert (result.exit_code, result.stderr) == (130, "stopped: the same command goes on from here\n")


@pytest.mark.parametrize(("arguments", "expected"), [([], 2), (["--concurrency", "7"], 7)])
def test_by_default_as_many_prompts_are_under_way_as_have_replicas_of_their_own(
    arguments, expected, tmp_path, monkeypatch
):
    asked = []

    async def collect(options, console):
        asked.append(options)

    monkeypatch.setattr("policy_service.train.collect.collect_outcomes", collect)
    stages = ["--stage", "small=a:1,b:1,c:1", "--stage", "large=d:1,e:1"]
    result = _RUNNER.invoke(app, ["collect", str(tmp_path / "o.parquet"), *stages, *arguments])
    assert result.exit_code == 0
    assert [each.concurrency for each in asked] == [expected]
    assert asked[0].targets == {"small": ("a:1", "b:1", "c:1"), "large": ("d:1", "e:1")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["collect", "o.parquet", "--stage", ""], "--stage"),
        (["rollback", "store", "--to", ""], "--to"),
        (["versions", ""], "store"),
        (["rollback", "store", "--to", "\udcff"], "--to"),
    ],
)
def test_a_text_that_is_empty_or_no_text_is_refused_by_its_option(arguments, named):
    result = _RUNNER.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"'{named}'" in result.stderr.lower()
