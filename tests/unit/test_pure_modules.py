"""A module whose docstring says that it is pure is held to it by the import contracts."""

import ast
import tomllib
from pathlib import Path

import services

ROOT = Path(services.__file__).parents[1]
FORBIDDEN = {"asd.v1", "google", "grpc"}


def _names():
    for package in ("clients/python/asd", "services", "policy_service", "suites"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            if text.partition("\n\n")[0].rstrip().endswith("Pure.") or "No gRPC, no protobuf." in text:
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("clients.python.")


def test_what_says_that_it_is_pure_is_in_a_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = {
        name
        for contract in contracts
        if set(contract.get("forbidden_modules", ())) >= FORBIDDEN
        for name in contract["source_modules"]
    }
    names = set(_names())
    assert {"services.router.planning.admission", "asd.visible"} <= names
    assert not names - held
