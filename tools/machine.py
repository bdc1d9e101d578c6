"""What the tools need of a machine: programs of Debian's packages, root, and a folder that is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# `su` leaves them off the path.
ROOT_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# Exit status of the tools' `check`. Chosen: neither a failure's nor that of a wrong command line.
CANNOT = 3


class MissingProgramError(RuntimeError):
    """This machine lacks something; the message says what to do."""


def say(text: str) -> None:
    """Print progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def cache_dir(tool: str) -> Path:
    """Return where a tool keeps what it made."""
    return Path(os.environ.get("ASD_CACHE_DIR") or Path.home() / ".cache" / "asd").absolute() / tool


def system_path() -> str:
    """Return where programs are looked for: on the caller's path, and where root has them."""
    return ":".join([os.environ.get("PATH") or os.defpath, *ROOT_FOLDERS])


def missing_packages(programs: Mapping[str, str]) -> list[str]:
    """Return Debian's packages of the programs that this machine lacks. programs: packages by program."""
    path = system_path()
    return sorted({package for name, package in programs.items() if shutil.which(name, path=path) is None})


def check_system(task: str, packages: Sequence[str]) -> None:
    """Raise MissingProgramError where this is not Linux, nobody is root, or packages are missing."""
    if sys.platform != "linux":
        raise MissingProgramError(f"{task} needs Linux")
    if os.geteuid() != 0:
        raise MissingProgramError(f"{task} needs root: use sudo")
    if packages:
        install = f"apt-get install --yes --no-install-recommends {' '.join(packages)}"
        raise MissingProgramError(f"{task} needs further programs; on Debian: {install}")


def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    error: type[RuntimeError],
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Return what a program prints. Raises `error`, with the program's words, where it fails or hangs."""
    env = os.environ | {"PATH": system_path()} if env is None else env
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s, env=env
        )
    except subprocess.TimeoutExpired as expired:
        raise error(f"not done after {timeout_s:.0f} s: {' '.join(command)}") from expired
    if done.returncode != 0:
        raise error(f"exit {done.returncode} of {' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout
