"""What every program does beside its work, as the kernel sees it: nothing is written and nobody is called."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.common.conftest import PROCESS_S
from tests.integration.common.test_tls import router_config
from tests.integration.scaler.test_scaler import api, kubeconfig  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[3]
STAGES = ("small", "medium", "large")
# onnxruntime looks its maker's server up 10 s after it was imported, which it was once a stage is ready.
WATCHED_S = 12.0
CALLS = "%network,open,openat,creat,mkdir,mkdirat,link,linkat,symlink,symlinkat,rename,renameat,renameat2"


def why_not() -> str:
    """Return why processes cannot be watched here, or ""."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    run = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=openat", "-o", os.devnull, "true"],
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    return "" if run.returncode == 0 else f"strace may not trace here: {run.stderr.strip()}"


class Watched:
    """Starts programs in a home of their own, and says what they called and wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.home, self.temporary = folder / "home", folder / "tmp"
        self.cache = self.home / "cache"
        for each in (self.home, self.temporary, self.cache):
            each.mkdir()
        self._processes: list[Process] = []
        # Nothing of the environment of the tests, which switches reports off.
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(self.cache),
            **{f"XDG_{kind}_HOME": str(self.home / kind) for kind in ("CONFIG", "DATA", "STATE")},
        }

    def log(self, name: str) -> Path:
        """Return the file that a program's calls are written to."""
        return self._folder / f"{name}.strace"

    async def start(self, name: str, *command: str) -> Process:
        """Start a program of Python's."""
        process = await asyncio.create_subprocess_exec(
            *("strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", "signal=none"),
            *("-e", f"trace={CALLS}", "-o", str(self.log(name)), sys.executable, *command),
            stdout=PIPE,
            stderr=PIPE,
            env=self.environment,
            cwd=ROOT,
            # strace passes no signal on: its group is what is ended.
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    async def end(self) -> None:
        """End what still runs."""
        running = [process for process in self._processes if process.returncode is None]
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            await process.communicate()

    async def serve(self, module: str, settings: dict[str, Any]) -> str:
        """Start a service, and return its address once it is ready."""
        file = self._folder / f"{module}.yaml"
        file.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **settings}))
        process = await self.start(module, "-m", module, "--config", str(file))
        assert process.stdout is not None
        words = (await process.stdout.readline()).decode().split()
        assert words[:1] == ["READY"], words
        return words[-1]


def outside_calls(log: str) -> list[str]:
    """Return the calls that leave this machine, or look a name up."""
    sent = [line for line in log.splitlines() if re.search(r"sa_family=AF_INET|nscd", line)]
    local = re.compile(r'inet_addr\("127\.|inet_pton\(AF_INET6, "::(1|ffff:127\.[\d.]+)"')
    # What listens on every address, or asks which address is its own, calls nobody.
    asks = re.compile(r"\b(connect|sendto|sendmsg|sendmmsg)\(|<\.\.\. (sendto|sendmsg|sendmmsg) resumed>")
    return [line for line in sent if asks.search(line) and ("nscd" in line or not local.search(line))]


def written(log: str, allowed: tuple[Path, ...]) -> list[str]:
    """Return the files and folders that were made or opened for writing, but in the allowed places."""
    makes = re.compile(r"O_CREAT|O_WRONLY|O_RDWR|\b(creat|mkdir|mkdirat|link|linkat|symlink\w*|rename\w*)\(")
    lines = [line for line in log.splitlines() if makes.search(line) and "ENOENT" not in line]
    return [line for line in lines if not any(f'"{place}' in line for place in map(str, allowed))]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
async def test_no_program_writes_or_calls_what_it_was_not_told_to(
    api: tuple[Any, str],  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    watched = Watched(tmp_path)
    config = tmp_path / "kubeconfig"
    config.write_text(kubeconfig(api[1]))
    watched.environment["KUBECONFIG"] = str(config)
    artifact = str(ROOT / "policy_service" / "policy.zip")
    models = [{"name": name, "path": str(ROOT / "models" / name)} for name in STAGES]
    question = "True or false? 3 plus 22 is more than 24."
    try:
        async with asyncio.timeout(PROCESS_S):
            stage, policy = await asyncio.gather(
                watched.serve("services.stage", {"models": models}),
                watched.serve("policy_service", {"artifact": artifact}),
            )
            ready = time.monotonic()
            cascade = router_config(
                stages=[
                    {"name": name, "target": stage, "model": name, "cost": cost}
                    for name, cost in zip(STAGES, (1.0, 3.0, 10.0), strict=True)
                ],
                policy={"target": policy, "timeout_ms": 60_000},
            )
            managed = {"name": "large", "deployment": "asd-large", "target": stage}
            router, _ = await asyncio.gather(
                watched.serve("services.router", cascade),
                watched.serve("services.scaler", {"stages": [managed]}),
            )
            for name, *command in (
                ("ask", "services.cli", "ask", "--target", router, question),
                ("publish", "policy_service.train.cli", "publish", artifact, str(tmp_path / "store")),
            ):
                process = await watched.start(name, "-m", *command)
                _, errors = await process.communicate()
                assert process.returncode == 0, errors.decode()
        await asyncio.sleep(ready + WATCHED_S - time.monotonic())
    finally:
        await watched.end()
    # What a stage derives from its models.
    derived = watched.cache / "asd"
    for name in ("services.stage", "policy_service", "services.router", "services.scaler", "ask", "publish"):
        log = watched.log(name).read_text(errors="replace")
        assert "sa_family=AF_INET" in log or name == "publish", f"{name} was not watched"
        assert outside_calls(log) == [], name
        allowed = (tmp_path / "store", derived) if name in {"publish", "services.stage"} else ()
        assert written(log, (Path("/dev"), Path("/proc"), *allowed)) == [], name
    assert list(watched.home.iterdir()) == [watched.cache]
    assert list(watched.cache.iterdir()) == [derived]
    assert list(watched.temporary.iterdir()) == []
