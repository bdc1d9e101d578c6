"""An address that a service cannot have: one sentence that says what to change."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from services.common.server import CannotListen, start_server
from tests.limits import PROCESS_S

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
CONFIGS = {
    "policy_service": {"artifact": "policy_service/policy.zip"},
    "services.stage": {"models": [{"name": "small", "path": "models/small", "preload": False}]},
    "services.router": {
        "stages": [{"name": "small", "cost": 1, "target": "127.0.0.1:1", "timeout_ms": 1000}],
        "static_plan": ["small"],
    },
}


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that something else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


@pytest.mark.parametrize("module", CONFIGS)
def test_a_port_that_is_taken_ends_a_service_with_one_sentence(module, taken, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"listen": taken, **CONFIGS[module]}))
    command = [sys.executable, "-m", module, "--config", str(config)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1] == (
        f"asd: cannot listen on {taken}: the port is taken: set `listen` to another one, or end what has it"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("127.0.0.1:65536", "a port is a number from 0 to 65535"),
        ("127.0.0.1:99999", "a port is a number from 0 to 65535"),
        ("[::1]:-1", "a port is a number from 0 to 65535"),
        ("127.0.0.1:http", "a port is a number from 0 to 65535"),
        ("127.0.0.1", "write HOST:PORT"),
        ("203.0.113.5:50998", "is the address this machine's"),
    ],
)
async def test_addresses_that_cannot_be_are_refused(listen, message):
    with pytest.raises(CannotListen, match=message):
        await start_server(listen, [])


async def test_a_port_is_free_again_at_once():
    server, port = await start_server("127.0.0.1:0", [])
    with pytest.raises(CannotListen, match=f":{port}"):
        await start_server(f"127.0.0.1:{port}", [])
    await server.stop(0)
    again, same = await start_server(f"127.0.0.1:{port}", [])
    assert same == port
    await again.stop(0)
