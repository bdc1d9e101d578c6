"""Processes that start, fail, end, come back and are stopped."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import tempfile
from pathlib import Path

import psutil
import pytest

from asd.client import AsyncClient
from asd.errors import Unavailable
from asd.v1 import cascade_pb2, cascade_pb2_grpc
from asd.values import Request
from services.cli.console import notes
from services.common.server import ServiceRegistration, start_server
from services.common.terminal import LiteralConsole
from services.local import supervisor as supervising
from services.local.cascade_file import Service, read_cascade
from services.local.running import Signalled, running
from services.local.supervisor import Child, LaunchError, Reach, Supervisor
from tests.integration.local.conftest import PROMPT, asd
from tests.limits import CALL_S


def _assert_gone(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=CALL_S)
    assert not alive


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_child_outlives_asd_up(start_up, number, code):
    # Whoever runs the tests under nohup has SIGHUP ignored, in children too; `asd up` respects that.
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        up = start_up("--only", "small")
    finally:
        signal.signal(signal.SIGHUP, inherited)
    children = up.children()
    assert [each["name"] for each in up.ready["processes"]] == ["small"]
    assert all(child.is_running() for child in children)
    up.process.send_signal(number)
    _, errors = up.process.communicate(timeout=CALL_S)
    assert up.process.returncode == code
    assert "Traceback" not in errors
    _assert_gone(children)
    if number != signal.SIGKILL:
        assert not Path(up.ready["processes"][0]["log"]).parent.exists()


def test_a_second_interrupt_kills_what_drains(start_up):
    up = start_up("--only", "small")
    children = up.children()
    # A stopped process cannot drain.
    children[0].suspend()
    up.process.send_signal(signal.SIGINT)
    assert "stopping" in up.process.stderr.readline()
    # And however many more.
    for _ in range(100):
        up.process.send_signal(signal.SIGINT)
    _, errors = up.process.communicate(timeout=CALL_S)
    assert "Traceback" not in errors
    # It was killed for the second interrupt, not for taking too long.
    assert "did not end" not in errors
    assert up.process.returncode == 130
    _assert_gone(children)


def test_a_port_in_use_is_named(cascade_file):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = asd("up", "--cascade", str(cascade_file), "--port-base", str(port - 11), "--json")
    assert result.returncode == 1
    error = json.loads(result.stderr)["error"]
    assert f"port {port}, for small," in error["message"]
    assert "--port-base" in error["message"]


# Prints more than a pipe holds.
CHATTY = """
print("READY chatty 127.0.0.1:1", flush=True)
for _ in range(100):
    print("x" * 10_000, flush=True)
"""


async def test_output_that_finds_no_room_is_lost_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = tmp_path / "modules" / "chatty.py"
    module.parent.mkdir()
    module.write_text(CHATTY)
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    lines: list[str] = []
    service = Service("chatty", "chatty", {}, 1)
    (tmp_path / "chatty.log").symlink_to("/dev/full")
    child = Child(service, tmp_path, lines.append)
    await child.start()
    keeping = asyncio.create_task(child.keep())
    async with asyncio.timeout(60):
        # It has said all that it had to say.
        while not any("ended with code 0" in line for line in lines):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await child.stop(10)
    assert sum("disk is full" in line for line in lines) == 1


async def test_settings_that_cannot_be_written_are_named(tmp_path: Path):
    folder = tmp_path / "gone"
    child = Child(Service("chatty", "chatty", {}, 1), folder, lambda _: None)
    with pytest.raises(LaunchError, match=f"{folder} .*TMPDIR"):
        await child.start()


async def test_a_stage_that_was_killed_comes_back(services, tmp_path):
    lines: list[str] = []
    is_back = asyncio.Event()

    def say(line: str) -> None:
        lines.append(line)
        if "serves again" in line:
            is_back.set()

    chosen = [services["router"], services["small"]]
    async with (
        Supervisor(chosen, tmp_path, say=say) as supervisor,
        AsyncClient(chosen[0].address) as client,
    ):
        request = Request(PROMPT, stage="small")
        before = await client.ask(request)
        with pytest.raises(Unavailable, match=r"^stage medium .*\(connection refused\)"):
            await client.ask(Request(PROMPT, stage="medium"))
        child = supervisor.children[1]
        old = child.pid
        os.kill(old, signal.SIGKILL)
        async with asyncio.timeout(CALL_S):
            await is_back.wait()
        assert child.pid != old
        assert lines[0] == (
            f"small (process {old}) was ended by signal 9; starting it again in 0.25 s (log: {child.log})"
        )
        assert (await client.ask(request)).text == before.text
        assert supervisor.has_crashed
        processes = [psutil.Process(each.pid) for each in supervisor.children]
    _assert_gone(processes)
    assert len(lines) == 2


async def test_a_service_that_cannot_start_shows_its_log_and_stops_the_others(services, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    services["small"].config["models"][0]["path"] = str(broken)
    supervisor = Supervisor(list(services.values()), tmp_path, say=print)
    with pytest.raises(LaunchError) as failed:
        await supervisor.__aenter__()
    message = str(failed.value)
    assert message.startswith("small ")
    assert "code 1." in message
    assert "model_type is 'gpt2'" in message
    assert not any(psutil.pid_exists(child.pid) for child in supervisor.children)


async def test_a_variable_that_moves_a_service_is_told(services, tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_ROUTER_LISTEN", "127.0.0.1:0")
    with pytest.raises(LaunchError, match=r"^router .* 127\.0\.0\.1:[0-9]+ .*ASD_\*_LISTEN"):
        async with Supervisor([services["router"]], tmp_path, say=print):
            pass


async def test_a_cancelled_start_leaves_no_child(services, tmp_path):
    supervisor = Supervisor([services["router"], services["small"]], tmp_path, say=print)
    starting = asyncio.create_task(supervisor.__aenter__())
    async with asyncio.timeout(CALL_S):
        while not all(child.pid for child in supervisor.children):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
    pids = [child.pid for child in supervisor.children]
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_a_stray_package_in_the_current_directory_is_not_run(services, tmp_path, monkeypatch):
    stray = tmp_path / "services"
    stray.mkdir()
    (stray / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    async with Supervisor([services["router"]], tmp_path, say=print) as supervisor:
        assert supervisor.children[0].pid


async def test_a_service_that_keeps_ending_is_started_later_each_time(tmp_path):
    lines: list[str] = []
    four_lines = asyncio.Event()

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 4:
            four_lines.set()

    child = Child(Service("small", "no_such_module", {}, 1), tmp_path, say, delays_s=(0.001, 0.004))
    with pytest.raises(LaunchError, match=r"^small .*code 1\.(?s:.*)no_such_module"):
        await child.start()
    keeper = asyncio.create_task(child.keep())
    async with asyncio.timeout(CALL_S):
        await four_lines.wait()
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    await child.stop(10.0)
    delays = [line.partition("starting it again in ")[2].partition(" s ")[0] for line in lines[:4]]
    assert delays == ["0.001", "0.002", "0.004", "0.004"]


async def test_a_service_that_was_asked_to_end_is_started_again_without_delay(tmp_path, monkeypatch):
    (tmp_path / "obedient.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('READY obedient 127.0.0.1:1', flush=True)\n"
        "signal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines: asyncio.Queue[str] = asyncio.Queue()
    service = Service("small", "obedient", {}, 1)
    child = Child(service, tmp_path, lines.put_nowait, delays_s=(0.001, 0.004))
    await child.start()
    keeper = asyncio.create_task(child.keep())
    for _ in range(3):
        os.kill(child.pid, signal.SIGTERM)
        async with asyncio.timeout(CALL_S):
            assert "code 0; starting it again in 0.001 s" in await lines.get()
            assert "serves again" in await lines.get()
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    await child.stop(10.0)


async def test_a_service_serves_again_once_the_router_reaches_it(tmp_path):
    class Router(cascade_pb2_grpc.CascadeServiceServicer):
        """Reaches a stage, and the policy service, the third time that it is asked; an absent one never."""

        calls = 0

        async def Describe(self, request, context):  # noqa: N802
            self.calls += 1
            is_there = self.calls % 3 == 0
            stage = cascade_pb2.StageDescription(stage="small", available=is_there)
            answer = cascade_pb2.DescribeResponse(stages=[stage])
            if is_there:
                answer.policy.policy_version = "v1"
            return answer

    router = Router()
    add = cascade_pb2_grpc.add_CascadeServiceServicer_to_server
    server, port = await start_server(
        "127.0.0.1:0", [ServiceRegistration("asd.v1.CascadeService", lambda server: add(router, server))]
    )
    reach = Reach(f"127.0.0.1:{port}")
    # The gateway is not the router's to reach.
    for name, calls in (("small", 3), ("policy", 6), ("router", 7), ("gateway", 7)):
        await reach(name)
        assert router.calls == calls
    await server.stop(0)


async def test_a_process_ends_before_those_that_it_needs(services, tmp_path, monkeypatch):
    happened = []

    async def stop(child: Child, grace_seconds: float) -> None:
        happened.append(f"stop {child.service.name}")
        await asyncio.sleep(0)
        happened.append(f"{child.service.name} ended")

    monkeypatch.setattr(Child, "stop", stop)
    chosen = [*reversed(services.values()), Service("gateway", "services.gateway", {}, 1)]
    await Supervisor(chosen, tmp_path, say=print).__aexit__(None, None, None)
    assert happened[:4] == ["stop gateway", "gateway ended", "stop router", "router ended"]
    assert sorted(happened[4:]) == ["medium ended", "small ended", "stop medium", "stop small"]


async def test_the_gateway_starts_once_the_router_serves(services, tmp_path, monkeypatch):
    happened = []

    async def start(child: Child) -> None:
        happened.append(f"start {child.service.name}")
        await asyncio.sleep(0)
        happened.append(f"{child.service.name} serves")

    async def nothing(child: Child, *_: float) -> None:
        pass

    monkeypatch.setattr(Child, "start", start)
    monkeypatch.setattr(Child, "keep", nothing)
    monkeypatch.setattr(Child, "stop", nothing)
    gateway = Service("gateway", "services.gateway", {}, supervising.free_ports(1).router)
    chosen = [gateway, *services.values()]
    async with Supervisor(chosen, tmp_path, say=print):
        assert happened.index("start gateway") > happened.index("router serves")
        assert "gateway serves" in happened


def test_a_start_that_fails_tells_why_and_leaves_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    file, temporary = tmp_path / "cascade.yaml", tmp_path / "temporary"
    file.write_text("stages: [{name: tiny, path: model, cost: 1}]")
    temporary.mkdir()
    for command in (["up", "--port-base", str(supervising.free_ports(1).router)], ["demo"]):
        result = asd(*command, "--cascade", str(file), TMPDIR=str(temporary))
        assert result.returncode == 1
        assert "model_type is 'gpt2'" in result.stderr
        assert not list(temporary.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_while_a_cascade_starts_leaves_nothing(cascade_file, tmp_path, monkeypatch, number):
    async def start(supervisor: Supervisor) -> None:
        assert list(tmp_path.iterdir())
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    monkeypatch.setattr(Supervisor, "__aenter__", start)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Signalled) as ended:
        async with running(read_cascade(cascade_file), supervising.free_ports(2), notes()):
            pass
    assert (ended.value.code, ended.value.has_served) == (128 + number, False)
    assert not list(tmp_path.iterdir())


async def test_logs_of_a_process_that_ended_by_itself_are_kept_and_named(cascade_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = io.StringIO()
    console = LiteralConsole(file=file, width=200)
    async with running(
        read_cascade(cascade_file), supervising.free_ports(2), console, only="router"
    ) as supervisor:
        os.kill(supervisor.children[0].pid, signal.SIGKILL)
        async with asyncio.timeout(CALL_S):
            while not supervisor.has_crashed:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
    (directory,) = tmp_path.iterdir()
    assert f"kept in {directory}" in file.getvalue()
    assert (directory / "router.log").exists()


async def test_a_start_that_takes_long_says_what_it_waits_for(cascade_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = io.StringIO()
    console = LiteralConsole(file=file, width=200)
    # Any start of Python takes longer than this pause.
    async with running(
        read_cascade(cascade_file), supervising.free_ports(2), console, only="small", tell_every_s=0.01
    ) as supervisor:
        assert f"small starts, 0 s so far (log: {supervisor.children[0].log}): " in file.getvalue()
        assert supervisor.children[0].serves
