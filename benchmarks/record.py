"""What every result says of itself: command, commit, machine, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.disks import replace_file, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RESULTS = Path(__file__).parent / "results"


def record(command: str) -> dict[str, object]:
    """Return what a figure needs to be believed: command, commit, time and machine."""
    return {
        "command": command,
        # Where a commit's tree was copied to a machine without its history, the caller says which it is
        # (ASD_COMMIT), and nobody can say what else was changed.
        "commit": os.environ.get("ASD_COMMIT") or _git("rev-parse", "HEAD"),
        "changed_files": None
        if "ASD_COMMIT" in os.environ
        else _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
    }


def keep_row(file: Path, row: Mapping[str, object], key: Callable[[Mapping[str, object]], object]) -> None:
    """Put a row into a file of rows; it replaces the one with the same key."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = [each for each in rows if key(each) != key(row)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": [*rows, row]}, indent=2) + "\n", encoding="utf-8")


def write_result(name: str, command: str, figures: Mapping[str, object]) -> Path:
    """Write a result file with its record, and return its path."""
    return _write(name, {**figures, **record(command)})


def update_result(name: str, command: str, figures: Mapping[str, object]) -> Path:
    """Put figures of a later run into a result file; their own record stands under `later_runs`.

    A file without a record of its own gets this run's: every file has the shape that write_result gives.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return write_result(name, command, figures)
    kept = json.loads(path.read_text(encoding="utf-8"))
    own = record(command)
    later = {**kept.pop("later_runs", {}), **dict.fromkeys(figures, own)}
    whole = {} if own.keys() <= kept.keys() else own
    return _write(name, {**kept, **figures, **whole, "later_runs": later})


def _write(name: str, content: Mapping[str, object]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    # A full disk must not cost the figures that are there.
    with writing(path, "run it again once there is room"):
        replace_file(path, json.dumps(content, indent=2) + "\n")
    return path


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, timeout=30)
    return run.stdout.rstrip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
