"""Tries real clients against the gateway: `python -m tests.clients` (or `make clients`).

They have an environment of their own in build/clients, by tests/clients/requirements.txt. The embedded
cascade and a gateway run beside them. What came of it is kept in benchmarks/results/clients.json, with a
hash of the files that it covers: `python -m tests.clients stale` says where these have changed since. If
every test passes, aiperf's load report is kept in benchmarks/results/aiperf.json.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.gateway import gateway_of
from benchmarks.processes import ROOT, embedded_cascade
from benchmarks.record import RESULTS, write_result

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / "build" / "clients"
# What a client sees depends on these.
COVERED = ("services/gateway", "clients/python/asd", "protos", "tests/clients")
PORT_BASE = 21_250
_COMMAND = "python -m tests.clients"
_INSTALL_S, _TEST_S = 1800, 1800


def main() -> None:
    """Run the command."""
    if sys.argv[1:] == ["stale"]:
        sys.stdout.write(f"{state()}\n")
        return
    sys.exit(asyncio.run(run()))


def state() -> str:
    """Return in a sentence whether the kept result is of the present files."""
    file = RESULTS / "clients.json"
    if not file.exists():
        return "real clients were never tried: make clients"
    is_fresh = f'"covers": "{covered()}"' in file.read_text(encoding="utf-8")
    return (
        "real clients were tried with these files"
        if is_fresh
        else "real clients are to be tried: make clients"
    )


def covered() -> str:
    """Return a hash of the files that a result depends on, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *COVERED], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
        digest.update(name.encode() + b"\0" + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return digest.hexdigest()


async def run() -> int:
    """Install the clients, try them, and keep what came of it; return pytest's status."""
    python = await asyncio.to_thread(install)
    report = ENVIRONMENT / "report.xml"
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(embedded_cascade(PORT_BASE))
        gateway, _ = await stack.enter_async_context(gateway_of(router))
        command = [
            *(str(python), "-m", "pytest", str(HERE), "-p", "no:cacheprovider", "--rootdir", str(HERE)),
            *("-c", os.devnull, f"--junitxml={report}", "--timeout=600", "-v"),
        ]
        child = await asyncio.create_subprocess_exec(
            *command,
            env={
                **os.environ,
                "ASD_GATEWAY": f"http://{gateway}",
                "ASD_ROUTER": router,
                "ASD_PYTHON": sys.executable,
            },
        )
        async with asyncio.timeout(_TEST_S):
            status = await child.wait()
    cases = {case.get("name", ""): _outcome(case) for case in ET.parse(report).iter("testcase")}
    packages = versions(python)
    figures = {"covers": covered(), "packages": packages, "tests": cases}
    sys.stdout.write(f"{write_result('clients', _COMMAND, figures)}\n")
    if status == 0:
        measured = {"aiperf": packages["aiperf"], "rows": loads(report)}
        sys.stdout.write(f"{write_result('aiperf', _COMMAND, measured)}\n")
    return status


def loads(report: Path) -> list[object]:
    """Return the figures of loads that tests recorded in pytest's report."""
    found = ET.parse(report).iter("property")
    return [json.loads(each.get("value", "")) for each in found if each.get("name") == "load"]


def install() -> Path:
    """Make the clients' environment, unless it is there; return its interpreter."""
    wanted = HERE / "requirements.txt"
    mark, python = ENVIRONMENT / "installed.txt", ENVIRONMENT / "venv" / "bin" / "python"
    if not mark.exists() or mark.read_bytes() != wanted.read_bytes():
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT / "venv")], check=True, timeout=300
        )
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "-r",
                str(wanted),
            ],
            check=True,
            timeout=_INSTALL_S,
        )
        mark.write_bytes(wanted.read_bytes())
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the clients that were asked for."""
    names = [line.partition("==")[0] for line in _pinned()]
    code = "import sys; from importlib.metadata import version; print([version(n) for n in sys.argv[1:]])"
    bare = [name.partition("[")[0] for name in names]
    done = subprocess.run(
        [str(python), "-c", code, *bare], capture_output=True, text=True, check=True, timeout=60
    )
    found = done.stdout.strip().strip("[]").replace("'", "").split(", ")
    return dict(zip(bare, found, strict=True))


def _pinned() -> list[str]:
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "==" in line]


def _outcome(case: ET.Element) -> str:
    children = {child.tag for child in case}
    return "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"


if __name__ == "__main__":
    main()
