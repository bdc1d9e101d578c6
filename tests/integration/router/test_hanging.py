"""A last stage that hangs: the earlier answer comes within the deadline, and later requests avoid the stage.

The router's clock stands still, so that a stage stays avoided until a test advances it. Deadlines on the wire
pass.
"""

# ruff: noqa: N802 - methods have the protos' names

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from asd.v1 import cascade_pb2, policy_pb2
from tests.integration.router.conftest import FakeStage
from tests.limits import PROCESS_S

ROOT = Path(__file__).parents[3]
ASK = cascade_pb2.GenerateRequest(prompt="hi")
DEADLINE = policy_pb2.DECISION_REASON_DEADLINE
# What a request has, in seconds: the stage is left after half of them.
CALL_S = 3.0

STAGE = """
import asyncio, sys
from services.common.server import ServiceRegistration, start_server
from tests.integration.router.conftest import FakeStage

async def serve():
    fake = FakeStage("large")
    server, port = await start_server("127.0.0.1:0", [ServiceRegistration(fake.full_name, fake.add)])
    print(port, flush=True)
    # Until the test closes it.
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)

asyncio.run(serve())
"""


@dataclass
class Silent(FakeStage):
    """A stage whose verifications are taken and never answered, while its gate is shut."""

    async def Verify(self, request, context):
        self.calls.append("verify")
        await self.gate.wait()
        self.calls.pop()
        async for response in super().Verify(request, context):
            yield response


@asynccontextmanager
async def large_process():
    """Start the last stage as a process; give it and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STAGE),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PROCESS_S):
            port = int(await process.stdout.readline())
        yield process, f"127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.communicate()


async def ask(w, kind):
    """Return the response of a unary request or of a stream. Raises where it is not there in time."""
    if kind == "unary":
        return await w.stub.Generate(ASK, timeout=CALL_S)
    request = cascade_pb2.GenerateStreamRequest(request=ASK)
    events = [event async for event in w.stub.GenerateStream(request, timeout=CALL_S)]
    return events[-1].response


def reached(response):
    return [(record.stage, record.reason) for record in response.stages]


def avoided(w):
    """Return the stages that the policy was told to leave out of the latest plan."""
    return [each.stage for each in w.policy.plans[-1].conditions if not each.available]


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_an_answer_is_not_lost_to_a_handler_that_never_answers(world, clock, kind):
    large = Silent("large")
    w = await world(
        world.stage("small"),
        world.stage("medium"),
        large,
        policy=world.policy(script={"small": ("large",)}),
    )
    response = await ask(w, kind)
    assert (response.stage, response.text) == ("small", "one two three")
    assert reached(response) == [("small", DEADLINE)]
    for _ in range(3):
        assert (await ask(w, kind)).stage == "small"
        assert avoided(w) == ["large"]
    assert large.calls == ["verify"]
    # It is asked again after a while.
    large.gate.set()
    clock.advance(60.0)
    assert (await ask(w, kind)).stage == "large"


async def test_an_answer_is_not_lost_to_a_process_that_is_stopped(world, clock):
    async with large_process() as (process, target):
        w = await world(
            policy=world.policy(script={"small": ("large",)}), stage_settings={"large": {"target": target}}
        )
        # It has answered before, and its connection stands.
        assert (await ask(w, "unary")).stage == "large"
        process.send_signal(signal.SIGSTOP)
        assert reached(await ask(w, "unary")) == [("small", DEADLINE)]
        assert (await ask(w, "stream")).stage == "small"
        assert avoided(w) == ["large"]
        process.send_signal(signal.SIGCONT)
        clock.advance(60.0)
        assert (await ask(w, "unary")).stage == "large"
