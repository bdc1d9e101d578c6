"""The contract is clean, and each rule that guards it fires when it is broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import PROCESS_S

ROOT = Path(__file__).parents[3]
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
RELEASED = "tools/protocheck/released.txtpb"


def _buf(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BUF is not None, "buf is missing: install the dev extra (it holds buf-bin)"
    return subprocess.run(
        [BUF, *arguments], cwd=root, capture_output=True, text=True, timeout=PROCESS_S, check=False
    )


def _broken_rules(run: subprocess.CompletedProcess[str]) -> set[str]:
    """Return the rules of a run with --error-format=json."""
    assert run.stderr == "", run.stderr
    return {json.loads(line)["type"] for line in run.stdout.splitlines()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the contract, its rules, and itself as the released contract."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    (tmp_path / "tools" / "protocheck").mkdir(parents=True)
    built = _buf(tmp_path, "build", "--exclude-source-info", "-o", RELEASED)
    assert built.returncode == 0, built.stderr
    return tmp_path


def _edit(root: Path, file: str, *changes: tuple[str, str]) -> None:
    path = root / "protos" / "asd" / "v1" / file
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times, not once"
        text = text.replace(old, new)
    path.write_text(text)


def test_contract_passes_lint() -> None:
    run = _buf(ROOT, "lint")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_contract_keeps_what_was_released() -> None:
    run = _buf(ROOT, "breaking", "--against", RELEASED)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


LINT = [
    ("COMMENT_FIELD", "common.proto", ("  // Whether one has to be called.\n", "")),
    ("COMMENT_ENUM_VALUE", "common.proto", ("  // Instructions that hold for the whole conversation.\n", "")),
    ("COMMENT_MESSAGE", "common.proto", ("// One turn of a conversation.\n", "")),
    ("COMMENT_ENUM", "common.proto", ("// Who wrote a message of a conversation.\n", "")),
    ("COMMENT_ONEOF", "cascade.proto", ("  // What happened. Always set.\n", "")),
    ("COMMENT_RPC", "cascade.proto", ("  // Answers a prompt.\n", "")),
    (
        "COMMENT_SERVICE",
        "policy.proto",
        ("// Predicts whether answers are correct and solves for the best next action.\n", ""),
    ),
    ("ENUM_ZERO_VALUE_SUFFIX", "common.proto", ("ROLE_UNSPECIFIED = 0", "ROLE_NONE = 0")),
    ("ENUM_VALUE_PREFIX", "common.proto", ("ROLE_SYSTEM = 1", "SYSTEM = 1")),
    ("ENUM_VALUE_UPPER_SNAKE_CASE", "common.proto", ("ROLE_SYSTEM = 1", "ROLE_System = 1")),
    ("FIELD_LOWER_SNAKE_CASE", "common.proto", ("max_new_tokens = 1", "maxNewTokens = 1")),
    (
        "MESSAGE_PASCAL_CASE",
        "cascade.proto",
        ("message BatchError {", "message batch_error {"),
        ("BatchError error", "batch_error error"),
    ),
    ("SERVICE_SUFFIX", "cascade.proto", ("service CascadeService", "service Cascade")),
    ("RPC_REQUEST_RESPONSE_UNIQUE", "stage.proto", ("rpc Unload(UnloadRequest)", "rpc Unload(LoadRequest)")),
    ("RPC_REQUEST_STANDARD_NAME", "stage.proto", ("rpc Unload(UnloadRequest)", "rpc Unload(Message)")),
]


@pytest.mark.parametrize(
    ("rule", "file", "changes"), [(r, f, c) for r, f, *c in LINT], ids=[row[0] for row in LINT]
)
def test_lint_rule_fires(copy: Path, rule: str, file: str, changes: list[tuple[str, str]]) -> None:
    _edit(copy, file, *changes)
    run = _buf(copy, "lint", "--error-format=json")
    assert run.returncode == 100
    assert rule in _broken_rules(run)


def test_lint_refuses_a_foreign_package(copy: Path) -> None:
    stray = copy / "protos" / "asd" / "v1" / "stray.proto"
    stray.write_text('syntax = "proto3";\n\npackage asd.v2;\n')
    run = _buf(copy, "lint", "--error-format=json")
    assert run.returncode == 100
    assert "PACKAGE_DIRECTORY_MATCH" in _broken_rules(run)


TOP_P = "  // Nucleus mass in (0, 1]. Absent: 1. Ignored at temperature 0.\n  optional float top_p = 3;\n"
BREAKING = [
    ("removed field", "FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED", "common.proto", (TOP_P, "")),
    (
        "removed field whose name is not reserved",
        "FIELD_NO_DELETE_UNLESS_NAME_RESERVED",
        "common.proto",
        (TOP_P, "  reserved 3;\n"),
    ),
    (
        "renumbered field",
        "FIELD_SAME_NAME",
        "common.proto",
        ("float top_p = 3", "float top_p = 4"),
        ("seed = 4", "seed = 3"),
    ),
    ("renamed field", "FIELD_SAME_JSON_NAME", "common.proto", ("float top_p = 3", "float nucleus = 3")),
    ("retyped field", "FIELD_SAME_TYPE", "common.proto", ("float top_p = 3", "double top_p = 3")),
    (
        "list instead of one",
        "FIELD_SAME_CARDINALITY",
        "common.proto",
        ("optional float top_p", "repeated float top_p"),
    ),
    ("presence lost", "FIELD_SAME_CARDINALITY", "common.proto", ("optional float top_p", "float top_p")),
    (
        "removed enum value",
        "ENUM_VALUE_NO_DELETE_UNLESS_NUMBER_RESERVED",
        "common.proto",
        ("  // Quality first.\n  PREFERENCE_BEST = 3;\n", ""),
    ),
    (
        "renamed enum value",
        "ENUM_VALUE_SAME_NAME",
        "common.proto",
        ("PREFERENCE_BEST = 3", "PREFERENCE_FINEST = 3"),
    ),
    (
        "removed rpc",
        "RPC_NO_DELETE",
        "policy.proto",
        ("  rpc Report(ReportRequest) returns (ReportResponse);\n", ""),
    ),
    (
        "other answer",
        "RPC_SAME_RESPONSE_TYPE",
        "policy.proto",
        ("returns (ReportResponse)", "returns (PlanResponse)"),
    ),
    (
        "stream instead of one answer",
        "RPC_SAME_SERVER_STREAMING",
        "policy.proto",
        ("returns (ReportResponse)", "returns (stream ReportResponse)"),
    ),
    (
        "renamed service",
        "PACKAGE_SERVICE_NO_DELETE",
        "policy.proto",
        ("service PolicyService", "service SolverService"),
    ),
    (
        "removed message",
        "PACKAGE_MESSAGE_NO_DELETE",
        "cascade.proto",
        ("message BatchError {", "message BatchFailure {"),
        ("BatchError error", "BatchFailure error"),
    ),
]


@pytest.mark.parametrize(
    ("rule", "file", "changes"), [(r, f, c) for _, r, f, *c in BREAKING], ids=[row[0] for row in BREAKING]
)
def test_breaking_rule_fires(copy: Path, rule: str, file: str, changes: list[tuple[str, str]]) -> None:
    _edit(copy, file, *changes)
    run = _buf(copy, "breaking", "--against", RELEASED, "--error-format=json")
    assert run.returncode == 100
    assert rule in _broken_rules(run)


def test_reserved_number_cannot_be_used_again(copy: Path) -> None:
    _edit(copy, "common.proto", (TOP_P, '  reserved 3;\n  reserved "top_p";\n'))
    assert _buf(copy, "breaking", "--against", RELEASED).returncode == 0, "reserving what goes is allowed"
    assert _buf(copy, "build", "--exclude-source-info", "-o", RELEASED).returncode == 0
    reuse = "  // Reused.\n  optional float min_p = 3;\n"
    _edit(copy, "common.proto", ('  reserved 3;\n  reserved "top_p";\n', reuse))
    run = _buf(copy, "breaking", "--against", RELEASED, "--error-format=json")
    assert run.returncode == 100
    assert "RESERVED_MESSAGE_NO_DELETE" in _broken_rules(run)


def test_additions_are_allowed(copy: Path) -> None:
    _edit(copy, "common.proto", (TOP_P, TOP_P + "  // Added.\n  optional float min_p = 100;\n"))
    run = _buf(copy, "breaking", "--against", RELEASED)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
