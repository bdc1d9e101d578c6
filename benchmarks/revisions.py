"""Clones of revisions of asd, to run one beside another in this environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]


def commit_of(revision: str) -> str:
    """Return a revision's commit, shortened. Raises SystemExit where there is none."""
    command = ["git", "rev-parse", "--short=9", "--verify", "--quiet", f"{revision}^{{commit}}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"{revision} is no commit of this repository")
    return run.stdout.strip()


@contextmanager
def cloned(commit: str) -> Iterator[Path]:
    """Yield the root of a temporary clone of a commit, its stubs compiled."""
    with tempfile.TemporaryDirectory(prefix="asd-revision-") as folder:
        root = Path(folder) / "asd-clone"
        _run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(root)], ROOT)
        _run(["git", "checkout", "--quiet", "--detach", commit], root)
        (hook,) = [*root.glob("hatch_build.py"), *root.glob("clients/python/hatch_build.py")]
        _run([sys.executable, str(hook)], root)
        _name_itself(root)
        yield root


def environment_of(root: Path) -> dict[str, str]:
    """Return the environment in which modules are imported from a clone.

    This environment's own install points at the checkout: the clone comes before it. The client has been a
    distribution of its own since 0.2.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "clients" / "python")])}


def _name_itself(root: Path) -> None:
    """Make the clone's version known where its distribution had another name: services ask for it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        version(project["name"])
    except PackageNotFoundError:
        info = root / f"{project['name']}-{project['version']}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
