"""Cascades of the committed models, run by the supervisor itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

from services.local.cascade_file import Service, services_of
from services.local.supervisor import free_ports
from tests.limits import CALL_S, PROCESS_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODELS = Path(__file__).parents[3] / "models"
PROMPT = "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"
_FILE = f"""
stages:
  - {{name: small, path: {MODELS / "small"}, cost: 1.6}}
  - {{name: medium, path: {MODELS / "medium"}, cost: 4.2}}
static_plan: [small, medium]
"""


def count_weights(name: str) -> int:
    """Return the number of weights in a model's file, from the shapes in its header."""
    with (MODELS / name / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


def asd(*arguments: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
        env={**os.environ, **variables},
    )


class Up(NamedTuple):
    """A running `asd up`: its process, and what it wrote when it was ready."""

    process: subprocess.Popen[str]
    ready: dict

    @property
    def target(self) -> str:
        return self.ready["processes"][0]["address"]

    def children(self) -> list[psutil.Process]:
        return [psutil.Process(each["pid"]) for each in self.ready["processes"]]


@pytest.fixture(scope="session")
def cascade_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cascade") / "cascade.yaml"
    file.write_text(_FILE)
    return file


@pytest.fixture(scope="session")
def start_up(cascade_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Up]]:
    """Return a function that runs `asd up --json` and waits until it is ready."""
    started = []
    # A cascade that is killed leaves its logs behind.
    variables = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("up"))}

    def start(*arguments: str) -> Up:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "services.cli", "up", "--json"),
                *("--cascade", str(cascade_file), "--port-base", str(free_ports(2).router)),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )
        started.append(process)
        text = ""
        for line in process.stdout:
            text += line
            # The closing brace of the one object.
            if line == "}\n":
                return Up(process, json.loads(text))
        raise AssertionError(process.stderr.read())

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=CALL_S)


@pytest.fixture(scope="session")
def up(start_up: Callable[..., Up]) -> Up:
    """One cascade that all tests may ask, and none may stop."""
    return start_up()


@pytest.fixture
def services(cascade_file: Path, tmp_path: Path) -> dict[str, Service]:
    """Services on free ports, by name; nothing is started."""
    from services.local.cascade_file import read_cascade

    cascade = read_cascade(cascade_file)
    return {each.name: each for each in services_of(cascade, free_ports(2), tmp_path)}
