"""Tries to install the built wheels as users do: `python tools/try_installs.py`.

With pip, pipx and `uv tool`, on each of PYTHONS, in empty folders. Says what it could not try, and why; ends
with 1 where something that it tried does not work. Needs the standard library, and pip with its index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.13")
_VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
_ASK = """
from asd import AsyncClient, Away, Client
import services
try:
    Client("127.0.0.1:1").ask("Hi", min_quality=0.95)
except Away:
    print(services.MINE)
"""


class TryError(Exception):
    """Something that was tried does not work."""


def main() -> None:
    """Try everything."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="asd-installs-") as scratch:
        work = Path(scratch)
        wheels = work / "wheels"
        projects = [str(ROOT / "clients" / "python"), str(ROOT)]
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(wheels),
            *projects,
        )
        tools = environment(work / "tools", sys.executable)
        has_tools = succeeds(tools, "-m", "pip", "install", "--quiet", "pipx", "uv")
        for version in PYTHONS:
            python = find_python(version, tools if has_tools else None)
            if not python:
                say(f"Python {version}: not tried, since this machine has none and uv could not get one")
                continue
            for name, attempt in (("pip", with_pip), ("pipx", with_pipx), ("uv", with_uv)):
                if name != "pip" and not has_tools:
                    say(f"Python {version}, {name}: not tried, since pip could not get {name}")
                    continue
                folder = work / f"{name}-{version}"
                folder.mkdir()
                try:
                    attempt(python, folder, wheels, tools)
                    say(f"Python {version}, {name}: installed, and works")
                except TryError as error:
                    failed.append(name)
                    say(f"Python {version}, {name}: {error}")
    sys.exit(1 if failed else 0)


def with_pip(python: str, folder: Path, wheels: Path, _tools: str) -> None:
    """Try the client alone beside somebody's own `services`, then the application."""
    alone = environment(folder / "client", python)
    run(alone, "-m", "pip", "install", "--quiet", "--find-links", str(wheels), f"asd-client=={_VERSION}")
    own = folder / "own"
    (own / "services").mkdir(parents=True)
    (own / "services" / "__init__.py").write_text("MINE = 'mine'\n", encoding="utf-8")
    expect("mine", run(alone, "-c", _ASK, folder=own))
    whole = environment(folder / "application", python)
    run(whole, "-m", "pip", "install", "--quiet", "--find-links", str(wheels), f"asd-cascade=={_VERSION}")
    check_command(str(Path(whole).with_name("asd")), folder)


def with_pipx(python: str, folder: Path, wheels: Path, tools: str) -> None:
    """Try the application."""
    places = {"PIPX_HOME": str(folder / "home"), "PIPX_BIN_DIR": str(folder / "bin")}
    options = ("--python", python, f"--pip-args=--find-links {wheels}")
    run(tools, "-m", "pipx", "install", *options, f"asd-cascade=={_VERSION}", variables=places)
    check_command(str(folder / "bin" / "asd"), folder)


def with_uv(python: str, folder: Path, wheels: Path, tools: str) -> None:
    """Try the application."""
    places = {"UV_TOOL_DIR": str(folder / "home"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    options = ("--python", python, "--find-links", str(wheels))
    run(tools, "-m", "uv", "tool", "install", *options, f"asd-cascade=={_VERSION}", variables=places)
    check_command(str(folder / "bin" / "asd"), folder)


def check_command(asd: str, folder: Path) -> None:
    """Check that the command works, and says in one line what a plain install lacks."""
    empty = folder / "empty"
    empty.mkdir()
    expect(f"asd {_VERSION}", run(asd, "--version", folder=empty))
    done = subprocess.run([asd, "up"], cwd=empty, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stderr.splitlines()
    if done.returncode != 1 or len(lines) != 1 or "asd-cascade[gateway,policy,stage]" not in lines[0]:
        raise TryError(f"`asd up` without extras ends with {done.returncode} and says: {done.stderr}")


def find_python(version: str, tools: str | None) -> str:
    """Return a Python of a version: of this machine, or from where uv gets them; "" where there is none."""
    known = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for path in filter(None, map(str, filter(None, known))):
        if succeeds(
            path, "-c", f"import sys; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"
        ):
            return path
    if tools and succeeds(tools, "-m", "uv", "python", "install", "--quiet", version):
        return run(tools, "-m", "uv", "python", "find", version).strip()
    return ""


def environment(folder: Path, python: str) -> str:
    """Make a virtual environment and return its Python."""
    run(python, "-m", "venv", str(folder))
    return str(folder / "bin" / "python")


def run(*command: str, folder: Path | None = None, variables: dict[str, str] | None = None) -> str:
    """Return what a command writes. Raises TryError, with what it says, where it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(variables or {})},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode != 0:
        raise TryError(f"{' '.join(command[:5])} …: {done.stderr.strip()[-2000:]}")
    return done.stdout


def succeeds(*command: str) -> bool:
    """Return whether a command ends well."""
    try:
        run(*command)
    except (TryError, OSError):
        return False
    return True


def expect(wanted: str, said: str) -> None:
    """Raise TryError where a command did not say what it should."""
    if said.strip() != wanted:
        raise TryError(f"it says {said.strip()!r} in the place of {wanted!r}")


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
