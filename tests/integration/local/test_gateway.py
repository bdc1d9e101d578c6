"""`asd up` with its gateway: asked over HTTP, and on a port that is taken."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from asd.client import Client
from asd.values import Request
from services.local.cascade_file import read_cascade, services_of
from services.local.supervisor import Supervisor, free_ports
from tests.integration.local.conftest import PROMPT, Up, asd
from tests.limits import CALL_S, PROCESS_S
from tests.unit.cli.test_examples import python_in

_PAGE = Path(__file__).parents[3] / "docs" / "gateway.md"

_BODY = {"model": "small", "messages": [{"role": "user", "content": PROMPT}]}


def _gateway_of(up: Up) -> str:
    (address,) = [each["address"] for each in up.ready["processes"] if each["name"] == "gateway"]
    return address


def test_what_asd_up_starts_answers_over_http_as_over_grpc(up):
    with httpx2.Client(base_url=f"http://{_gateway_of(up)}", timeout=CALL_S, trust_env=False) as client:
        models = [each["id"] for each in client.get("/v1/models").json()["data"]]
        answer = client.post("/v1/chat/completions", json=_BODY)
    with Client(up.target) as cascade:
        wanted = cascade.ask(Request(PROMPT, stage="small")).text
    assert {"asd", "small", "medium"} <= set(models)
    assert (answer.status_code, answer.headers["x-asd-stage"]) == (200, "small")
    assert answer.json()["choices"][0]["message"]["content"] == wanted


@pytest.mark.parametrize("library", ["openai", "anthropic"])
def test_the_pages_programs_run(up, library):
    (program,) = [each for each in python_in(_PAGE) if each.startswith(f"from {library} ")]
    result = subprocess.run(
        [sys.executable, "-c", program.replace("127.0.0.1:8000", _gateway_of(up))],
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "true" in result.stdout


def test_a_taken_port_of_the_gateway_names_its_options(cascade_file):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        only = ("--cascade", str(cascade_file), "--only", "gateway", "--json")
        result = asd("up", *only, "--gateway-port", str(port))
    assert result.returncode == 1
    message = json.loads(result.stderr)["error"]["message"]
    for words in (f"port {port}, for gateway,", "--gateway-port", "--no-gateway"):
        assert words in message


def test_without_the_gateway_nothing_speaks_http(start_up):
    up = start_up("--no-gateway")
    assert [each["name"] for each in up.ready["processes"]] == ["router", "small", "medium"]


async def test_a_gateway_that_was_killed_comes_back(cascade_file, tmp_path):
    lines: asyncio.Queue[str] = asyncio.Queue()
    base = free_ports(2)
    ports = replace(base, gateway=base.router + 2)
    services = services_of(read_cascade(cascade_file), ports, tmp_path)
    chosen = [each for each in services if each.name in {"router", "gateway"}]
    async with Supervisor(chosen, tmp_path, say=lines.put_nowait) as supervisor, asyncio.timeout(CALL_S):
        gateway = supervisor.children[1]
        os.kill(gateway.pid, signal.SIGKILL)
        assert "was ended by signal 9" in await lines.get()
        assert f"serves again at 127.0.0.1:{ports.gateway}" in await lines.get()
