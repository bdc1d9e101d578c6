"""The gateway as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

import httpx2

from tests.fakes.fake_router import TEXT, FakeRouter
from tests.integration.common.conftest import running
from tests.integration.gateway.test_gateway import CHAT, HELLO
from tests.limits import CALL_S


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
