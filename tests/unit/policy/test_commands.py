"""`asd-policy` given what cannot be: exit codes, one sentence that says what to change, and nothing lost."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from policy_service.reports import OutcomeReport
from policy_service.shadow import ShadowRecord
from policy_service.store import PolicyStore
from policy_service.train import cli
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.outcomes import check_disjoint, read_prompts, read_rows
from tests.unit.policy.test_fit import record, write
from tests.unit.policy.tiny_policy import change_file, files_of, make_artifact

EMBEDDED = Path(cli.__file__).parents[1] / "policy.zip"
REPORT = OutcomeReport("r", "small", 0.9, "v1", correct=True, reported_at=1.0)
RECORD = ShadowRecord(1.0, "r", "t", "plan", "", "v1", "v2", "small", "small", 0.9, 0.8, 0.0, 0.0, 0.0, 0.0)


class Ran:
    """What a command printed and its exit code."""

    def __init__(self, code: object, out: str, errors: str) -> None:
        self.code, self.out, self.errors = code, out, errors


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as a shell would."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["asd-policy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ran(ended.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def fit_arguments(tmp_path: Path) -> list[str]:
    """Arguments of a fit to tiny files, without the output."""
    rng = random.Random(0)
    files = [str(write(tmp_path / name, [record(rng) for _ in range(30)])) for name in ("a", "b")]
    costs = tmp_path / "costs.yaml"
    costs.write_text("stages: [{name: small, cost: 1}, {name: large, cost: 5}]")
    return ["fit", *files, "--costs", str(costs), "--output"]


def test_a_fit_makes_the_directories_that_are_missing(run, fit_arguments, tmp_path):
    ended = run(*fit_arguments, tmp_path / "new" / "deep")
    assert ended.code == 0
    assert f"is in {tmp_path / 'new' / 'deep'}" in ended.out.replace("\n", "")
    assert run("price", "--artifact", tmp_path / "new" / "deep", "--min-accuracy", "0").code == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "b").write_bytes(b"x"), "not a file of outcomes"),
        (lambda path: (path / "b").unlink(), "no such file"),
        (lambda path: shutil.copy(path / "a", path / "b"), "the prompt is in"),
        (lambda path: (path / "costs.yaml").write_text("stages: [{name: a, cost: 1}]"), "holds the cascade"),
    ],
)
def test_a_fit_that_fails_leaves_no_directory_and_no_other_policy(
    spoil, message, run, fit_arguments, tmp_path
):
    served = make_artifact(tmp_path / "served", "v1")
    before = served.read_bytes()
    spoil(tmp_path)
    for output in (tmp_path / "new", served):
        ended = run(*fit_arguments, output)
        assert ended.code == 1
        assert message in ended.errors
        assert ended.errors.splitlines()[-1].startswith("asd-policy: ")
    assert not (tmp_path / "new").exists()
    assert served.read_bytes() == before


def test_a_fit_into_a_store_is_refused_at_once(run, fit_arguments, tmp_path):
    PolicyStore(tmp_path / "store").publish(make_artifact(tmp_path / "v1", "v1"))
    # Before the files are read: they are not there.
    ended = run("fit", "nowhere", "nowhere", "--output", tmp_path / "store")
    assert ended.code == 1
    assert "is a store of versions: write to a file, and publish that" in ended.errors


def test_a_store_is_priced_and_measured_by_its_version_in_force(run, tmp_path):
    store = tmp_path / "store"
    PolicyStore(store).publish(EMBEDDED)
    wanted = run("price", "--mean-cost", "3")
    assert wanted.code == 0
    assert run("price", "--mean-cost", "3", "--artifact", store).out == wanted.out
    # It gets as far as the file, which is of another cascade.
    outcomes = write(tmp_path / "o", [record(random.Random(0))])
    ended = run("evaluate", outcomes, "--artifact", store)
    assert "cascade small, large" in ended.errors
    (store / "current.json").write_text("{")
    ended = run("price", "--mean-cost", "3", "--artifact", store)
    assert ended.code == 1
    assert f"asd-policy rollback {store} --to" in ended.errors


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["no-such-command"], 2),
        (["price", "--no-such-option"], 2),
        (["price"], 2),
        (["price", "--min-accuracy", "7"], 2),
        (["evaluate"], 2),
        (["evaluate", "o", "--lambda", "-1"], 2),
        (["rollback", "store", "--to", "v9"], 2),
        (["rollback", "store"], 1),
        (["evaluate", "nowhere"], 1),
        (["drift", "nowhere"], 1),
    ],
)
def test_wrong_usage_ends_with_two_and_other_failures_with_one(arguments, code, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PolicyStore(tmp_path / "store").publish(make_artifact(tmp_path / "v1", "v1"))
    ended = run(*arguments)
    assert ended.code == code
    assert ended.errors
    assert "Traceback" not in ended.errors


def test_an_interrupted_command_ends_with_its_code_and_no_traceback(run, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("policy_service.artifact.load_artifact", interrupt)
    ended = run("price", "--mean-cost", "3")
    assert (ended.code, ended.out) == (130, "")
    assert "Traceback" not in ended.errors
    # Also where typer's own code would be another.
    monkeypatch.setattr("typer.core.TyperGroup.invoke", interrupt)
    command = typer.main.get_command(cli.app)
    context = command.make_context("asd-policy", ["price"])
    with pytest.raises(typer.Exit) as ended_by:
        command.invoke(context)
    assert ended_by.value.exit_code == 130


LINES = {"drift": json.dumps(asdict(REPORT)), "shadow": json.dumps(asdict(RECORD))}
NOT_LINES = {
    "drift": ["{}", "[1]", "no JSON", LINES["shadow"]],
    "shadow": ["{}", '"text"', LINES["drift"], json.dumps({**asdict(RECORD), "live_p_correct": "high"})],
}


@pytest.mark.parametrize("command", ["drift", "shadow"])
def test_a_file_of_another_format_is_refused_in_one_line(command, run, tmp_path):
    file = tmp_path / "wrong"
    for content in ("\n".join(NOT_LINES[command]).encode(), files_of(EMBEDDED)["prompt.onnx"]):
        file.write_bytes(content)
        ended = run(command, file)
        assert (ended.code, ended.out) == (1, "")
        assert ended.errors.startswith(f"asd-policy: {file}: no line ")
        assert ended.errors.count("\n") == 1


@pytest.mark.parametrize("command", ["drift", "shadow"])
def test_bad_lines_among_good_ones_are_counted_once(command, run, tmp_path):
    file = tmp_path / "some"
    good = LINES[command]
    file.write_text("\n".join([good, "", *NOT_LINES[command], good, good[:40]]))
    ended = run(command, file)
    assert ended.code == 0
    assert ended.errors.startswith(f"warning: {file}: 5 damaged lines skipped")
    assert ended.errors.count("\n") == 1
    assert "v1" in ended.out
    file.write_text(f"{good}\n{good}\n")
    assert run(command, file).errors == ""


@pytest.mark.parametrize(
    ("command", "said"), [("drift", "nothing was reported yet"), ("shadow", "holds no records")]
)
def test_an_empty_file_is_no_failure(command, said, run, tmp_path):
    (tmp_path / "empty").touch()
    ended = run(command, tmp_path / "empty")
    assert (ended.code, ended.errors) == (0, "")
    assert said in ended.out


def test_damaged_versions_and_a_damaged_pointer_are_listed_and_mended(run, tmp_path):
    store = PolicyStore(tmp_path / "store")
    for name in ("v1", "v2"):
        store.publish(make_artifact(tmp_path / name, name))
    change_file(store.artifact("v1"), "0-None.onnx", b"x")
    (store.directory / "current.json").write_text("{")
    ended = run("versions", store.directory)
    assert ended.code == 0
    first, second = [line.split() for line in ended.out.splitlines()[-3:-1]]
    assert (first, second) == (["v1", "300", "damaged"], ["v2", "300"])
    damaged, unforced = ended.errors.splitlines()
    assert damaged.startswith("warning: v1 is damaged: ")
    assert "0-None.onnx" in damaged
    assert unforced.startswith("warning: none is in ")
    assert f"asd-policy rollback {store.directory} --to VERSION" in ended.errors
    assert run("rollback", store.directory, "--to", "v2").code == 0
    assert run("publish", tmp_path / "v1", store.directory).code == 0
    ended = run("versions", store.directory)
    first, second = [line.split() for line in ended.out.splitlines()[-3:-1]]
    assert (first[0], second[:2]) == ("v2", ["v1", "*"])
    assert "damaged" not in {first[-1], second[-1]}
    assert ended.errors == ""


def test_a_policy_goes_from_store_to_store(run, tmp_path):
    PolicyStore(tmp_path / "tried").publish(make_artifact(tmp_path / "v1", "v1"))
    ended = run("publish", tmp_path / "tried", tmp_path / "live")
    assert ended.code == 0
    assert PolicyStore(tmp_path / "live").current() == "v1"


def test_outcomes_that_are_damaged_anywhere_are_refused_by_name(tmp_path):
    """Cut off at any place, or with other bytes anywhere: a message that names the file, or the same rows."""
    rng = random.Random(0)
    whole = write(tmp_path / "whole", [record(rng) for _ in range(20)]).read_bytes()
    file = tmp_path / "damaged"
    said: dict[object, list[str]] = {read_prompts: [], read_rows: []}
    for _ in range(300):
        content = bytearray(whole)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        for _ in range(3):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
        for read in (read_prompts, read_rows):
            try:
                list(read(file))
            except UnfitOutcomes as error:
                said[read].append(str(error))
    for messages in said.values():
        assert len(messages) > 150
        assert all(message.startswith(f"{file}: ") for message in messages)
        # What is found while rows are read says after which.
        assert any(": broken after row 0: " in message for message in messages)


def test_prompts_of_a_file_without_its_columns_are_refused(tmp_path):
    import pyarrow.parquet as pq

    path = write(tmp_path / "o", [record(random.Random(0))])
    pq.write_table(pq.read_table(path).drop_columns(["history"]), path)
    with pytest.raises(UnfitOutcomes, match="history"):
        check_disjoint(path, path)


def test_help_says_what_the_codes_mean():
    assert "130 interrupted" in " ".join(CliRunner().invoke(cli.app, ["--help"]).output.split())
