"""The programs that a node consists of: found, or built once with Go and kept.

`python -m tools.node.programs` builds all of them and prints where they are. Versions are those of
modules/NAME/go.mod. A build that was broken off goes on where it stopped: Go keeps every package it compiled.

Looked for in this order: the folder KUBEBUILDER_ASSETS, what was built before, PATH (only in the minor
version that go.mod names: another one may not speak with the rest), and then built.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.images import build as images
from tools.machine import MissingProgramError, cache_dir, check_system, missing_packages, say

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULES = Path(__file__).parent / "modules"

# Debian's packages of what is not built. Of Ubuntu's the names are the same.
SYSTEM_PROGRAMS = {
    "runc": "runc",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "mount": "mount",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "openssl": "openssl",
}
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"), Path("/usr/libexec/cni"))
CNI_PACKAGE = "containernetworking-plugins"

# Of the programs and small: whether Go can fetch modules is tried with it.
_SMALL_MODULE = "golang.org/x/sync"
# Chosen: a small module takes seconds; a newer Go, which Go fetches by itself where it may, is 70 MB.
MODULE_SECONDS = 60.0
_GO_SECONDS = 300.0


@dataclass(frozen=True)
class Program:
    """A program built from a Go module of modules/.

    module: of which go.mod names the version; empty for our own. is_static: without libc, for images that
    hold nothing else. version_arguments: print a version; empty where what is on PATH is never taken.
    """

    name: str
    tool: str
    package: str
    module: str
    is_static: bool = True
    version_arguments: tuple[str, ...] = ()


def _kubernetes(name: str, *version_arguments: str) -> Program:
    package = f"k8s.io/kubernetes/cmd/{name}"
    # With libc where there is a C compiler, as Go does by itself.
    return Program(
        name, "kubernetes", package, "k8s.io/kubernetes", False, version_arguments or ("--version",)
    )


_CONTAINERD = "github.com/containerd/containerd/v2"

PROGRAMS = {
    program.name: program
    for program in (
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kubelet"),
        _kubernetes("kube-proxy"),
        _kubernetes("kubectl", "version", "--client"),
        Program(
            "etcd", "etcd", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3", True, ("--version",)
        ),
        Program(
            "containerd", "containerd", f"{_CONTAINERD}/cmd/containerd", _CONTAINERD, True, ("--version",)
        ),
        Program(
            "containerd-shim-runc-v2",
            "containerd",
            f"{_CONTAINERD}/cmd/containerd-shim-runc-v2",
            _CONTAINERD,
            True,
            ("-v",),
        ),
        Program("ctr", "containerd", f"{_CONTAINERD}/cmd/ctr", _CONTAINERD, True, ("--version",)),
        # These go into images.
        Program("pause", "pause", ".", ""),
        Program("coredns", "coredns", ".", "github.com/coredns/coredns"),
        Program(
            "jaeger",
            "jaeger",
            "github.com/jaegertracing/jaeger/cmd/all-in-one",
            "github.com/jaegertracing/jaeger",
        ),
    )
}
NODE_PROGRAMS = tuple(name for name in PROGRAMS if name != "jaeger")


def version_of(program: Program) -> str:
    """Return the version of a program's module in its go.mod, such as "v1.36.3"; "v0" of our own."""
    return _module_version(program.tool, program.module) if program.module else "v0"


def _module_version(tool: str, module: str) -> str:
    text = (MODULES / tool / "go.mod").read_text(encoding="utf-8")
    found = re.search(rf"^(?:require|\t| )\s*{re.escape(module)} (v\S+)", text, re.MULTILINE)
    if found is None:
        raise MissingProgramError(f"modules/{tool}/go.mod names no version of {module}")
    return found[1]


def find_program(name: str) -> Path:
    """Return a program's path; build it if it is nowhere.

    Raises MissingProgramError where it can neither be found nor built.
    """
    program = PROGRAMS[name]
    found = _look_up(program)
    if found is not None:
        return found
    built = _folder(program) / name
    _build(program, built)
    return built


def _look_up(program: Program) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / program.name).is_file():
        return Path(assets) / program.name
    built = _folder(program) / program.name
    if built.is_file():
        return built
    on_path = shutil.which(program.name)
    return Path(on_path) if on_path and _has_minor_version(program, on_path) else None


def _no_go(program: Program) -> str:
    return (
        f"{program.name} {version_of(program)} is not here and there is no Go to build it: install "
        "Go 1.26 or later, or put the programs into a folder and name it in KUBEBUILDER_ASSETS"
    )


def absent_programs(names: tuple[str, ...]) -> list[str]:
    """Return names and versions of the programs that would have to be built."""
    programs = [PROGRAMS[name] for name in names]
    return [f"{each.name} {version_of(each)}" for each in programs if _look_up(each) is None]


def check_go(needs: Sequence[str]) -> None:
    """Raise MissingProgramError where Go cannot make what is needed: it is absent, too old or cut off.

    needs: what is not here, for the sentence; nothing needs no Go.
    """
    if not needs:
        return
    problem = _problem_of_go()
    if problem:
        others = f" and {len(needs) - 1} more" if needs[1:] else ""
        raise MissingProgramError(f"{needs[0]}{others} would have to come from Go modules: {problem}")


def _problem_of_go() -> str:
    go = shutil.which("go")
    if go is None:
        return "there is no Go; install Go 1.26 or later"
    # In a module's folder: where Go is too old for it, it fetches and becomes a newer one, if it may and can.
    module = MODULES / "kubernetes"
    done, said = _ask([go, "env", "GOVERSION"], module, _GO_SECONDS)
    wanted = go_version((module / "go.mod").read_text(encoding="utf-8"))
    if not done or go_version(said) < wanted:
        least = ".".join(map(str, wanted))
        return f"{go} is not, and cannot become, Go {least} or later; install that: {said}"
    small = f"{_SMALL_MODULE}@{_module_version('kubernetes', _SMALL_MODULE)}"
    # Into an empty folder: what was fetched before says nothing of now.
    with tempfile.TemporaryDirectory() as scratch:
        flags = f"{os.environ.get('GOFLAGS', '')} -modcacherw".strip()
        changed = {"GOMODCACHE": f"{scratch}/modules", "GOFLAGS": flags, "GOWORK": "off"}
        done, said = _ask([go, "mod", "download", small], Path(scratch), MODULE_SECONDS, changed)
    return "" if done else f"Go cannot fetch modules; let it reach the proxy that GOPROXY names: {said}"


def go_version(text: str) -> tuple[int, ...]:
    """Return the version that a text gives of Go, such as (1, 26, 8); () where it gives none.

    text: a version, or go.mod.
    """
    found = re.search(r"^(?:devel )?go ?(\d+)\.(\d+)(?:\.(\d+))?", text, re.MULTILINE)
    return tuple(int(number or 0) for number in found.groups()) if found else ()


def _ask(
    command: list[str], folder: Path, timeout_s: float, changed: dict[str, str] | None = None
) -> tuple[bool, str]:
    """Return whether a command succeeded, and the last line that it printed."""
    try:
        run = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(changed or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer after {timeout_s:.0f} s"
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return run.returncode == 0, lines[-1] if lines else f"exit {run.returncode}"


def find_all(names: tuple[str, ...] = NODE_PROGRAMS) -> dict[str, Path]:
    """Return the paths of programs by name; build those that are nowhere."""
    return {name: find_program(name) for name in names}


def check_node() -> Path:
    """Return the folder of the CNI plugins.

    Raises MissingProgramError if this machine cannot run a node, with all that is missing at once.
    """
    check_system("a node (KUBECONFIG would name another cluster)", absent_packages())
    folder = _cni_folder()
    assert folder is not None
    return folder


def absent_packages() -> list[str]:
    """Return Debian's packages of what a node needs and this machine lacks."""
    plugins = [] if _cni_folder() else [CNI_PACKAGE]
    return sorted({*missing_packages(SYSTEM_PROGRAMS | images.PROGRAMS), *plugins})


def _cni_folder() -> Path | None:
    return next((each for each in CNI_FOLDERS if (each / "bridge").is_file()), None)


def _folder(program: Program) -> Path:
    module = MODULES / program.tool
    # A dependency may change without the version.
    digest = hashlib.sha256()
    for path in sorted(module.iterdir()):
        digest.update(path.read_bytes())
    return cache_dir("cluster") / f"{program.tool}-{version_of(program)}-{digest.hexdigest()[:8]}"


def _has_minor_version(program: Program, path: str) -> bool:
    if not program.version_arguments:
        return False
    command = [path, *program.version_arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    minor = version_of(program).lstrip("v").rpartition(".")[0]
    return re.search(rf"\b{re.escape(minor)}\.\d", run.stdout) is not None


def _build(program: Program, target: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise MissingProgramError(_no_go(program))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    flags = "-s -w"
    if program.tool == "kubernetes":
        version = version_of(program)
        major, minor, _ = version.lstrip("v").split(".", maxsplit=2)
        into = "k8s.io/component-base/version"
        flags += f" -X {into}.gitVersion={version} -X {into}.gitMajor={major} -X {into}.gitMinor={minor}"
    # Verbose: a line for every package compiled, which is how far it is.
    command = [go, "build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", flags]
    command += ["-o", str(unfinished), program.package]
    environment = {**os.environ, **({"CGO_ENABLED": "0"} if program.is_static else {})}
    say(f"building {program.name} {version_of(program)} (kept under {target.parent})")
    output: list[str] = []
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=MODULES / program.tool,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        done = threading.Event()
        ticker = threading.Thread(target=_tell, args=(program.name, output, done, started), daemon=True)
        ticker.start()
        assert process.stderr is not None
        output.extend(process.stderr)
        process.wait()
        done.set()
        ticker.join()
    if process.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise MissingProgramError(f"Go could not build {program.name}:\n{''.join(output[-20:])}")
    unfinished.replace(target)
    say(f"built {program.name} in {time.monotonic() - started:.0f} s")


def _tell(name: str, output: list[str], done: threading.Event, started: float) -> None:
    while not done.wait(15):
        packages = sum(1 for line in output if not line.startswith("go: "))
        say(f"  {name}: {time.monotonic() - started:.0f} s, {packages} packages compiled")


def main() -> None:
    """Build what is asked for, or everything, and print the paths."""
    names = tuple(sys.argv[1:]) or tuple(PROGRAMS)
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown:
        sys.exit(f"no such program: {', '.join(unknown)} (there are {', '.join(PROGRAMS)})")
    try:
        for name in names:
            sys.stdout.write(f"{name}\t{find_program(name)}\n")
    except MissingProgramError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
