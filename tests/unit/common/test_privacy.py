"""No library reports its use to its makers: wherever one is imported, in every program and in every image."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common.privacy import SWITCHES, report_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
REPORTING = {"onnxruntime", "onnxruntime_genai", "vllm", "tensorrt_llm", "huggingface_hub"}
# Once vLLM's engine runs, and so once vLLM was imported.
LATER = {
    ("services/stage/engines/vllm/engine.py", "_ask"),
    ("services/stage/engines/vllm/engine.py", "_call_workers"),
    ("services/stage/engines/vllm/engine.py", "_output_kind"),
}
SOURCES = [
    path
    for folder in ("services", "policy_service", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    # These run inside of vLLM.
    if path.name != "predictable.py" and path.parts[-2:] != ("vllm", "constraint.py")
]


def test_what_the_environment_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SWITCHES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    report_nothing()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert {name: os.environ[name] for name in SWITCHES} == {**SWITCHES, "ORT_DISABLE_TELEMETRY": "0"}


def scopes(tree: ast.Module) -> Iterator[tuple[str, list[ast.AST]]]:
    """Yield the module and each function: its name, and what is in it but in no function inside of it."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        scope = waiting.pop()
        inside: list[ast.AST] = []
        nodes = list(ast.iter_child_nodes(scope))
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                waiting.append(node)
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            inside.append(node)
            nodes.extend(ast.iter_child_nodes(node))
        yield getattr(scope, "name", ""), inside


def imported(node: ast.AST) -> set[str]:
    """Return the top-level modules that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return set()


def lines_of_calls(nodes: list[ast.AST]) -> list[int]:
    """Return where `report_nothing()` is called."""
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ast.unparse(call.func) == "report_nothing"]


def test_reports_are_off_wherever_a_library_that_makes_them_is_imported() -> None:
    found = set()
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        for name, nodes in scopes(ast.parse(path.read_text())):
            for node in nodes:
                libraries = imported(node) & REPORTING
                if not libraries or (place, name) in LATER:
                    continue
                found |= libraries
                line = node.lineno  # type: ignore[attr-defined] - an import has one
                assert any(call < line for call in lines_of_calls(nodes)), f"{place}:{line} {libraries}"
    assert found == REPORTING


def entry_points() -> list[str]:
    """Return the files of all programs: the commands, and the modules that serve."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    commands = [f"{target.partition(':')[0].replace('.', '/')}.py" for target in scripts.values()]
    served = [*(ROOT / "services").glob("*/__main__.py"), ROOT / "policy_service" / "__main__.py"]
    return sorted({*commands, *(path.relative_to(ROOT).as_posix() for path in served)})


@pytest.mark.parametrize("place", entry_points())
def test_a_program_switches_reports_off(place: str) -> None:
    """For what it imports by other packages, and for the processes that it starts."""
    functions = dict(scopes(ast.parse((ROOT / place).read_text())))
    assert lines_of_calls(functions["main"])


def test_an_image_switches_reports_off() -> None:
    """Each stage that starts from a published image says so, and others inherit it; `build` is no image."""
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    run = [stage for stage in stages if re.match(r"\$\{\w+\} AS (?!build\n)", stage)]
    assert len(run) == 3
    for stage in run:
        assert {f"{switch}={value}" for switch, value in SWITCHES.items()} <= set(stage.split())
