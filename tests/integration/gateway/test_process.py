"""The gateway as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import httpx2

from services.gateway.server import serve
from services.gateway.settings import GatewaySettings
from tests.fakes.fake_router import TEXT, FakeRouter
from tests.integration.common.conftest import running
from tests.integration.gateway.test_gateway import CHAT, HELLO
from tests.limits import CALL_S
from tests.unit.gateway.test_app import ScriptedCascade, caller, made


async def test_it_says_ready_answers_and_ends(tmp_path):
    server, port = await FakeRouter().start()
    config = {"router": {"target": f"127.0.0.1:{port}"}}
    async with running("services.gateway", config, tmp_path) as process:
        async with httpx2.AsyncClient(timeout=CALL_S, trust_env=False) as client:
            response = await client.post(f"http://{process.target}{CHAT}", json=HELLO)
            assert response.json()["choices"][0]["message"]["content"] == TEXT
            metrics = (await client.get(f"http://{process.target}/metrics")).text
        assert 'http_response_status_code="200"' in metrics
        assert (await process.stop(signal.SIGTERM))[0] == 0
    await server.stop(0)


async def test_a_signal_makes_it_refuse_requests_and_end():
    app = made(ScriptedCascade())
    settings = GatewaySettings(router={"target": "127.0.0.1:1"}, listen="127.0.0.1:0", drain_seconds=0)
    serving = asyncio.create_task(serve(app, settings))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(CALL_S):
        await serving
    assert (await caller().answered_by(app)).status == 503


async def test_a_taken_name_ends_it_also_if_the_router_comes_later(tmp_path):
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        config = {"router": {"target": f"127.0.0.1:{port}"}}
        async with running("services.gateway", config, tmp_path) as process:
            kept.close()
            server, _ = await FakeRouter(stages=("small", "asd-best")).start(port=port)
            code, log = await process.end()
    assert code == 1
    assert "asd: the cascade has a stage named asd-best" in log
    assert "Traceback" not in log
    await server.stop(0)


async def test_a_stage_named_like_a_virtual_model_ends_it(tmp_path):
    server, port = await FakeRouter(stages=("small", "asd-best")).start()
    (tmp_path / "config.yaml").write_text(f"listen: 127.0.0.1:0\nrouter: {{target: '127.0.0.1:{port}'}}\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway", "--config", str(tmp_path / "config.yaml")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, log = await process.communicate()
    assert process.returncode == 1
    assert b"a stage named asd-best" in log
    assert b"Traceback" not in log
    await server.stop(0)
