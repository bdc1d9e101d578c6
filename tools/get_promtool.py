"""Puts a promtool binary into a folder, for machines that have none: `python tools/get_promtool.py FOLDER`.

It comes from Debian's package `prometheus`, which is unpacked and not installed, so that no service starts.
apt checks its signature. Debian and its relatives only; elsewhere install promtool by hand.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "prometheus"
MISSING = "there is no promtool on PATH: install Prometheus' tools"


def get_promtool(folder: Path) -> Path:
    """Return the path of folder/promtool, fetched if it is not there.

    Raises RuntimeError if this is no Debian, or the package cannot be had.
    """
    target = folder / "promtool"
    if target.exists():
        return target
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(MISSING)
    with tempfile.TemporaryDirectory() as scratch:
        # apt drops its rights to a user who must be able to write here.
        Path(scratch).chmod(0o777)
        _run(["apt-get", "download", "--quiet", PACKAGE], scratch)
        package = next(Path(scratch).glob("*.deb"))
        _run(["dpkg-deb", "--extract", str(package), "unpacked"], scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            unfinished = Path(file.name)
        shutil.copyfile(Path(scratch) / "unpacked" / "usr" / "bin" / "promtool", unfinished)
    unfinished.chmod(0o755)
    unfinished.replace(target)
    return target


def find_promtool() -> Path:
    """Return promtool from PATH, else the one kept beside this interpreter, fetched if need be."""
    found = shutil.which("promtool")
    return Path(found) if found else get_promtool(Path(sys.executable).parent)


def _run(command: list[str], folder: str) -> None:
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{MISSING} ({command[0]} did not end)") from error
    if run.returncode != 0:
        raise RuntimeError(f"{MISSING} ({PACKAGE} cannot be had: {run.stderr.strip()})")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{get_promtool(Path(sys.argv[1]))}\n")
    except IndexError:
        sys.exit("usage: python tools/get_promtool.py FOLDER")
    except RuntimeError as error:
        sys.exit(str(error))
