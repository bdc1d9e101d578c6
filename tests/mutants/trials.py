"""A clone of a revision, in which the router's tests run over changed code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from benchmarks import revisions
from benchmarks.revisions import environment_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "mutants"
UNIT, INTEGRATION = "tests/unit/router", "tests/integration/router"
# A run may take so many times what it takes over the unchanged code, and at least so many seconds: a busy
# machine is no hang.
_TIMES, _LEAST_S = 5.0, 120.0
# A mutant that never stops growing ends itself, not the machine.
_MEMORY_BYTES = 8 * 2**30
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What became of a change. by: the test that failed, or "timeout"; "" where all passed."""

    is_caught: bool
    by: str
    seconds: float


@dataclass(frozen=True)
class Room:
    """A folder of tests. files: with the seconds of their tests. seconds: in all. Over the unchanged code."""

    folder: str
    files: tuple[tuple[str, float], ...]
    seconds: float


class Clone:
    """A clone of a revision. Tests import from it, and from this environment what it does not have."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def measure(self, folder: str) -> Room:
        """Run a room over the unchanged code. Raises RuntimeError where a test fails."""
        report = self.root / "build" / "report.xml"
        began = time.monotonic()
        run = self._pytest([folder], None, f"--junitxml={report}")
        if run is None or run.returncode != 0:
            raise RuntimeError(f"{folder} fails over the unchanged code:\n{run.stdout if run else ''}")
        seconds: dict[str, float] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = self._file_of(case.get("classname", ""))
            seconds[file] = seconds.get(file, 0.0) + float(case.get("time", "0"))
        return Room(folder, tuple(sorted(seconds.items())), time.monotonic() - began)

    @contextmanager
    def changed(self, file: str, text: str) -> Iterator[None]:
        """Have other text in a file during the block."""
        path = self.root / file
        own = path.read_text(encoding="utf-8")
        try:
            self._write(path, text)
            yield
        finally:
            self._write(path, own)

    def judge(self, rooms: list[Room]) -> Verdict:
        """Run the files of all rooms, the quickest first, up to the first test that fails."""
        began = time.monotonic()
        files = sorted((file for room in rooms for file in room.files), key=lambda each: each[1])
        longest_s = max(_TIMES * sum(room.seconds for room in rooms), _LEAST_S)
        run = self._pytest([file for file, _ in files], longest_s)
        taken_s = time.monotonic() - began
        if run is None:
            return Verdict(True, "timeout", taken_s)
        if run.returncode == 0:
            return Verdict(False, "", taken_s)
        failed = _FAILED.search(run.stdout)
        return Verdict(True, failed.group(1) if failed else f"exit code {run.returncode}", taken_s)

    def _pytest(
        self, tests: list[str], timeout_s: float | None, *options: str
    ) -> subprocess.CompletedProcess[str] | None:
        """Run tests; None: they took too long."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=environment_of(self.root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # What it started as well.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def _file_of(self, name: str) -> str:
        """Return the file of a test's module, or of a class in it."""
        parts = name.split(".")
        while parts and not (self.root / "/".join(parts)).with_suffix(".py").exists():
            parts.pop()
        return "/".join(parts) + ".py"

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # A change within a second that keeps the file's size would not be seen.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


class Kept:
    """Verdicts of a run, in a file that a later one goes on from."""

    def __init__(self, name: str) -> None:
        self.path = KEPT / f"{name}.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            # An interrupted run may have left part of a line.
            whole = text[: text.rfind("\n") + 1]
            self.path.write_text(whole, encoding="utf-8")
            self._rows = {row["id"]: row for row in map(json.loads, whole.splitlines())}

    def get(self, name: str) -> dict[str, Any] | None:
        """Return what is kept of a name."""
        return self._rows.get(name)

    def put(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row."""
        self._rows[name] = {"id": name, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._rows[name]) + "\n")
        return self._rows[name]


def measured(clone: Clone, kept: Kept, folders: list[str]) -> list[Room]:
    """Return the rooms, measured over the unchanged code unless an earlier run has done so."""
    rooms = []
    for folder in folders:
        row = kept.get(folder)
        if row is None:
            say(f"{folder} over the unchanged code ...")
            row = kept.put(folder, asdict(clone.measure(folder)))
            say(f"  passes in {row['seconds']:.0f} s")
        rooms.append(Room(folder, tuple(map(tuple, row["files"])), row["seconds"]))
    return rooms


def judged(
    commit: str, rooms: list[Room], changes: Mapping[str, tuple[str, str]], jobs: int
) -> Iterator[tuple[str, Verdict]]:
    """Yield the verdict on each change as it comes, by its name. changes: a file and its text, by name.

    jobs: runs side by side, each in a clone of its own.
    """
    with ExitStack() as stack:
        idle: SimpleQueue[Clone] = SimpleQueue()
        for _ in range(min(jobs, len(changes))):
            idle.put(stack.enter_context(cloned(commit)))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        # Before the pool is waited for: an interrupted run begins nothing more.
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)

        def judge(file: str, text: str) -> Verdict:
            clone = idle.get()
            try:
                with clone.changed(file, text):
                    return clone.judge(rooms)
            finally:
                idle.put(clone)

        names = {pool.submit(judge, *change): name for name, change in changes.items()}
        for future in as_completed(names):
            yield names[future], future.result()


@contextmanager
def cloned(commit: str) -> Iterator[Clone]:
    """Have a clone of a revision during the block."""
    with revisions.cloned(commit) as root:
        yield Clone(root)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
