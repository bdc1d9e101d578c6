"""asd's images without Docker and without a registry: `python -m tests.cluster.images`.

What an image runs, as whom, with which environment and which files is read from the Dockerfile, so that the
two cannot drift apart. What a Dockerfile leaves to its base image is put together here: this machine's
Python and the libraries that it needs, in the places of python:slim, without symbols as there. Layers are
shared, made once and kept; equal content gives equal layers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster.build import PROGRAMS, cache_dir, find_program, say, version_of
from tools.slim_packages import slim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[2]

# What containerd makes of a name without a registry.
LIBRARY = "docker.io/library"
PAUSE_IMAGE = f"{LIBRARY}/asd-cluster-pause:0"
COREDNS_IMAGE = f"{LIBRARY}/asd-cluster-coredns:{version_of(PROGRAMS['coredns'])}"
JAEGER_IMAGE = f"{LIBRARY}/asd-cluster-jaeger:{version_of(PROGRAMS['jaeger'])}"

TARGETS = ("router", "policy", "manager", "stage-onnx", "tools", "train")

# PATH of python:slim.
_BASE_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What python:slim has beside what Python itself needs, and compiled packages expect.
_LIBRARIES = (
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libnss_dns.so.2",
    "libnss_files.so.2",
    "libpthread.so.0",
    "libresolv.so.2",
    "librt.so.1",
    "libstdc++.so.6",
    "libutil.so.1",
    "libz.so.1",
)
_TOP_FOLDERS = ("bin", "dev", "etc", "home", "lib64", "proc", "root", "run", "sys", "usr", "var")
# python:slim has no tests either.
_NOT_IN_STDLIB = (
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "config-*",
    "_tkinter.*",
    "*.pyc",
)


class ImageError(RuntimeError):
    """An image cannot be made; the message says which and why."""


@dataclass(frozen=True)
class Target:
    """What a Dockerfile says of an image.

    copies: source in the context and place in the image. venv: place of the virtual environment, empty
    where there is none. extras: of the project, as installed there. is_slim: whether packages are slimmed.
    sources: what it is built from. not_compiled: pattern of the standard library's files that are not
    compiled; None: none is.
    """

    name: str
    base: str
    environment: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    venv: str = ""
    extras: frozenset[str] = frozenset()
    is_project: bool = False
    is_slim: bool = False
    sources: tuple[str, ...] = ()
    not_compiled: str | None = None


@dataclass(frozen=True)
class Layer:
    """A layer, kept as a tar file. size: of what it holds, in bytes."""

    path: Path
    digest: str
    size: int


@dataclass(frozen=True)
class Image:
    """An image ready to be packed."""

    name: str
    layers: tuple[Layer, ...]
    config: dict[str, object]

    @property
    def size(self) -> int:
        """Bytes of all layers, uncompressed."""
        return sum(layer.size for layer in self.layers)


def parse_dockerfile(text: str) -> dict[str, Target]:
    """Return the stages of a Dockerfile by name.

    Raises ImageError for an instruction that says something of an image and is not understood here.
    """
    stages: dict[str, Target] = {}
    current: Target | None = None
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "FROM":
            if current is not None:
                stages[current.name] = current
            found = re.fullmatch(r"(?:--\S+ )?(\S+) (?:AS|as) (\S+)", rest)
            if found is None:
                raise ImageError(f"Dockerfile: a stage without a name: {line}")
            base = stages.get(found[1])
            current = (
                replace(base, name=found[2]) if base else Target(found[2], found[1], dict(_BASE_ENVIRONMENT))
            )
        elif current is not None:
            current = _apply(current, word, rest, stages)
        elif word != "ARG":
            raise ImageError(f"Dockerfile: before the first FROM: {line}")
    if current is not None:
        stages[current.name] = current
    return stages


def _apply(target: Target, word: str, rest: str, stages: dict[str, Target]) -> Target:
    if word == "ENV":
        environment = dict(target.environment)
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            environment[name] = re.sub(r"\$\{?(\w+)\}?", lambda found: environment.get(found[1], ""), value)
        return replace(target, environment=environment)
    if word == "USER":
        return replace(target, user=rest)
    if word == "WORKDIR":
        return replace(target, workdir=rest)
    if word == "ENTRYPOINT":
        return replace(target, entrypoint=tuple(json.loads(rest)))
    if word == "EXPOSE":
        ports = tuple(port if "/" in port else f"{port}/tcp" for port in rest.split())
        return replace(target, ports=target.ports + ports)
    if word == "COPY":
        return _copy(target, rest, stages)
    if word == "RUN":
        # Only what is installed matters here: how an image is kept small is for Docker.
        extras = set(target.extras)
        for found in re.finditer(r"""pip install [^&;|]*?["']?\.(?:\[([^\]]*)\])?["']?(?=\s|$)""", rest):
            extras.update(filter(None, map(str.strip, (found[1] or "").split(","))))
            target = replace(target, is_project=True)
        made = re.search(r"-m venv (?:--\S+ )*(\S+)", rest)
        compiled = re.search(r"-m compileall .*-x '([^']*)'", rest)
        return replace(
            target,
            extras=frozenset(extras),
            is_slim=target.is_slim or "slim_packages.py" in rest,
            venv=made[1] if made else target.venv,
            not_compiled=compiled[1] if compiled else target.not_compiled,
        )
    if word in {"LABEL", "ARG", "SHELL", "STOPSIGNAL"}:
        return target
    raise ImageError(f"Dockerfile, {target.name}: tests/cluster/images.py does not know {word}")


def _copy(target: Target, rest: str, stages: dict[str, Target]) -> Target:
    words = shlex.split(rest)
    options = [word for word in words if word.startswith("--")]
    *sources, place = [word for word in words if not word.startswith("--")]
    origin = next((option.partition("=")[2] for option in options if option.startswith("--from=")), "")
    if origin in stages:
        other = stages[origin]
        if sources != [other.venv]:
            raise ImageError(
                f"Dockerfile, {target.name}: only the virtual environment is copied from {origin}"
            )
        sources = [source for source, _ in other.copies]
        return replace(
            target,
            venv=place,
            extras=other.extras,
            is_project=other.is_project,
            is_slim=other.is_slim,
            sources=tuple(sources),
        )
    if origin:
        raise ImageError(f"Dockerfile, {target.name}: a copy from another image: {origin}")
    placed = str(PurePosixPath(target.workdir) / place)
    several = place.endswith("/") or len(sources) > 1
    copies = tuple((source, f"{placed}/{Path(source).name}" if several else placed) for source in sources)
    return replace(target, copies=target.copies + copies)


def release_tag() -> str:
    """Return the tag that the chart gives its images: its appVersion."""
    chart = yaml.safe_load((ROOT / "charts" / "Chart.yaml").read_text(encoding="utf-8"))
    return str(chart["appVersion"])


def release_images(folder: Path) -> list[Image]:
    """Return asd's images; what they need is made in a folder and kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = parse_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    made = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        context = Path(scratch) / "context"
        _copy_context(context)
        for name in TARGETS:
            target = stages.get(name)
            if target is None or not target.venv or not target.is_project:
                raise ImageError(f"Dockerfile: no target {name} that installs the project")
            layers = [
                _base_layer(folder, target),
                *_dependency_layers(folder, target),
                _project_layer(folder, context, target),
            ]
            if target.copies:
                layers.append(_files_layer(folder, context, target))
            made.append(_image(f"{LIBRARY}/asd-{name}:{release_tag()}", layers, target))
    _forget_others(folder, {layer.path.stem for image in made for layer in image.layers})
    return made


def _forget_others(folder: Path, used: set[str]) -> None:
    """Remove layers of earlier states of the tree, and the packages that they were made from."""
    for path in folder.iterdir():
        if not path.name.startswith(("base-", "files-", "packages-", "project-")) or path.stem in used:
            continue
        if path.is_dir():
            if not any(name.startswith(f"{path.name}-") for name in used):
                shutil.rmtree(path)
        else:
            path.unlink()


def sizes_mb(made: Sequence[Image]) -> dict[str, float]:
    """Return how large images are, uncompressed, by target; base: the part that all of them have."""
    sizes = {image.name.removeprefix(f"{LIBRARY}/asd-").partition(":")[0]: image.size for image in made}
    if made:
        sizes["base"] = made[0].layers[0].size
    return {name: round(size / 1e6, 1) for name, size in sizes.items()}


def release_archive(folder: Path) -> Path:
    """Return a docker-archive with asd's images, as they are in this working tree."""
    made = release_images(folder)
    for image in made:
        say(f"{image.name.removeprefix(LIBRARY + '/')}: {image.size / 1e6:.0f} MB")
    return _pack(made, folder / "release.tar")


def system_archive() -> Path:
    """Return a docker-archive with the images that a node itself needs."""
    return _program_archive({"pause": PAUSE_IMAGE, "coredns": COREDNS_IMAGE}, "system.tar")


def jaeger_archive() -> Path:
    """Return a docker-archive with Jaeger, which keeps traces in memory."""
    return _program_archive({"jaeger": JAEGER_IMAGE}, "jaeger.tar")


def _program_archive(names: dict[str, str], archive: str) -> Path:
    folder = cache_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for program, name in names.items():
        path = find_program(program)
        layer = _layer(folder, f"{program}-{path.parent.name}", partial(_add, path=path, name=path.name))
        target = Target(
            program, "scratch", dict(_BASE_ENVIRONMENT), user="10001", entrypoint=(f"/{path.name}",)
        )
        made.append(_image(name, [layer], target))
    return _pack(made, folder / archive)


def _image(name: str, layers: Sequence[Layer], target: Target) -> Image:
    config: dict[str, object] = {
        "Env": [f"{key}={value}" for key, value in target.environment.items()],
        "Entrypoint": list(target.entrypoint),
        "User": target.user,
        "WorkingDir": target.workdir,
        "ExposedPorts": {port: {} for port in target.ports},
    }
    return Image(name, tuple(layers), config)


def _pack(made: Sequence[Image], path: Path) -> Path:
    """Write a docker-archive; layers that several images have are in it once."""
    manifest = []
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with tarfile.open(unfinished, "w") as archive:
        layers = {layer.digest: layer for image in made for layer in image.layers}
        for digest, layer in layers.items():
            archive.add(layer.path, f"{digest}.tar")
        for image in made:
            config = {
                "architecture": "amd64",
                "os": "linux",
                "config": image.config,
                "rootfs": {
                    "type": "layers",
                    "diff_ids": [f"sha256:{layer.digest}" for layer in image.layers],
                },
            }
            content = json.dumps(config, sort_keys=True).encode()
            name = f"{hashlib.sha256(content).hexdigest()}.json"
            _add_bytes(archive, content, name)
            files = [f"{layer.digest}.tar" for layer in image.layers]
            manifest.append({"Config": name, "RepoTags": [image.name], "Layers": files})
        _add_bytes(archive, json.dumps(manifest).encode(), "manifest.json")
    unfinished.replace(path)
    return path


def _layer(folder: Path, name: str, write: Callable[[tarfile.TarFile], None]) -> Layer:
    """Return the layer of a name, written if it is not kept yet. A name stands for its content."""
    path = folder / f"{name}.tar"
    note = folder / f"{name}.json"
    if not path.exists() or not note.exists():
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
            write(tar)
        with tarfile.open(unfinished) as tar:
            size = sum(member.size for member in tar)
        with unfinished.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        unfinished.replace(path)
        note.write_text(json.dumps({"digest": digest, "size": size}), encoding="utf-8")
    return Layer(path, **json.loads(note.read_text(encoding="utf-8")))


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member that depends on nothing but content, place and whether it can be run."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    if member.isfile():
        member.mode = 0o755 if member.mode & 0o100 else 0o644
    elif member.isdir():
        member.mode = 0o755
    return member


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file, or a folder with all it holds, in an order of its own."""
    member = _plain(tar.gettarinfo(path, name))
    if member.isfile():
        with path.open("rb") as file:
            tar.addfile(member, file)
        return
    tar.addfile(member)
    if member.isdir():
        for each in sorted(path.iterdir()):
            _add(tar, each, f"{name}/{each.name}")


def _add_bytes(tar: tarfile.TarFile, content: bytes, name: str, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = mode
    tar.addfile(member, io.BytesIO(content))


def _add_folder(tar: tarfile.TarFile, name: str, mode: int = 0o755) -> None:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    member.mode = mode
    tar.addfile(member)


def _add_link(tar: tarfile.TarFile, name: str, to: str) -> None:
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE
    member.linkname = to
    tar.addfile(member)


def _base_layer(folder: Path, target: Target) -> Layer:
    """Return Python and the libraries that it needs, in the places of python:slim."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    interpreter = Path(sys.executable).resolve()
    modules = sorted((stdlib / "lib-dynload").glob("*.so"))
    libraries = _libraries([interpreter, *(path for path in modules if not _is_left_out(path))])
    parts = [
        sys.version,
        *(f"{name} {path} {path.stat().st_size}" for name, path in sorted(libraries.items())),
        str(target.not_compiled),
    ]
    key = _digest(*parts, *_NOT_IN_STDLIB)

    def write(tar: tarfile.TarFile) -> None:
        for name in (*_TOP_FOLDERS, "usr/lib", "usr/local", "usr/local/bin", "usr/local/lib"):
            _add_folder(tar, name)
        _add_folder(tar, "tmp", 0o1777)
        users = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        _add_bytes(tar, users.encode(), "etc/passwd")
        _add_bytes(tar, b"root:x:0:\nnogroup:x:65534:\n", "etc/group")
        _add_bytes(tar, b"hosts: files dns\n", "etc/nsswitch.conf")
        _add(tar, Path("/bin/sh").resolve(), "bin/sh")
        # Where every program looks for its loader. Libraries lie in a folder that the loader always searches.
        _add_link(tar, "lib64/ld-linux-x86-64.so.2", "../usr/lib/ld-linux-x86-64.so.2")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch)
            for name, path in [*libraries.items(), (_PYTHON, interpreter)]:
                shutil.copy2(path, made / name)
                if name.startswith(("libpython", "python")):
                    _output(["strip", "--strip-unneeded", str(made / name)])
            for name in sorted(libraries):
                _add(tar, made / name, f"usr/lib/{name}")
            _add(tar, made / _PYTHON, f"usr/local/bin/{_PYTHON}")
        _add_link(tar, "usr/local/bin/python3", _PYTHON)
        _add_link(tar, "usr/local/bin/python", "python3")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "made"
            shutil.copytree(stdlib, made, ignore=shutil.ignore_patterns(*_NOT_IN_STDLIB))
            if target.not_compiled is not None:
                _compile(made, "-x", target.not_compiled)
            _add(tar, made, f"usr/local/lib/{_PYTHON}")

    return _layer(folder, f"base-{key}", write)


def _is_left_out(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in _NOT_IN_STDLIB)


def _libraries(programs: Sequence[Path]) -> dict[str, Path]:
    """Return the shared libraries that programs need, by name, and those that python:slim always has."""
    found: dict[str, Path] = {}
    for line in _output(["ldd", *map(str, programs)]).splitlines():
        match = re.search(r"(\S+) => (/\S+)", line)
        if match:
            found.setdefault(match[1], Path(match[2]).resolve())
    known: dict[str, Path] = {}
    for line in _output(["/sbin/ldconfig", "-p"]).splitlines():
        match = re.search(r"^\s+(\S+) \(.*x86-64.*\) => (\S+)", line)
        if match:
            known.setdefault(match[1], Path(match[2]).resolve())
    for name in _LIBRARIES:
        if name in known:
            found.setdefault(name, known[name])
    found.setdefault("ld-linux-x86-64.so.2", Path("/lib64/ld-linux-x86-64.so.2").resolve())
    return found


def _dependency_layers(folder: Path, target: Target) -> list[Layer]:
    """Return what the project needs, and what its extras need beyond that."""
    plain = _dependencies(folder, frozenset(), is_slim=target.is_slim)
    site = f"{target.venv.lstrip('/')}/lib/{_PYTHON}/site-packages"
    layers = [_layer(folder, f"{plain.name}-{_digest(site)}", lambda tar: _add_in(tar, plain, site))]
    if target.extras:
        full = _dependencies(folder, target.extras, is_slim=target.is_slim)
        further = [path for path in _files(full) if not _same(full / path, plain / path)]
        layers.append(
            _layer(
                folder,
                f"{full.name}-without-{plain.name.rpartition('-')[2]}-{_digest(site)}",
                lambda tar: _add_files(tar, full, further, site),
            )
        )
    return layers


def _dependencies(folder: Path, extras: frozenset[str], *, is_slim: bool) -> Path:
    """Return a folder with what the project needs, in the versions that the tests run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    unknown = extras - optional.keys()
    if unknown:
        raise ImageError(f"Dockerfile: pyproject.toml has no extra {', '.join(sorted(unknown))}")
    # The client comes with the project, from the same tree.
    needed = [line for line in project["dependencies"] if not line.startswith("asd-client")]
    wanted = [*needed, *(line for extra in sorted(extras) for line in optional[extra])]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pinned = [f"{name}=={version}" for name, version in sorted(_closure(wanted).items())]
    slimming = (ROOT / "tools" / "slim_packages.py").read_text(encoding="utf-8") if is_slim else ""
    key = _digest(sys.version, *wanted, *pinned, slimming)
    target = folder / "-".join(["packages", *sorted(extras), key])
    if target.exists():
        return target
    say(f"installing the packages of {', '.join(sorted(extras)) or 'all images'}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("\n".join(pinned), encoding="utf-8")
        made = Path(scratch) / "made"
        command = [*pip, "install", "--quiet", "--no-compile", "--only-binary=:all:", "--target", str(made)]
        _output([*command, "--constraint", str(constraints), *wanted], timeout_s=900)
        # Scripts name this machine's Python.
        shutil.rmtree(made / "bin", ignore_errors=True)
        if is_slim:
            slim(made)
        _compile(made)
        made.rename(target)
    return target


def _closure(wanted: Sequence[str]) -> dict[str, str]:
    """Return the versions, in this environment, of what is wanted and all that it needs."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # pip chooses a version.
            continue
        found[name] = distribution.version
        for each in {"", *requirement.extras}:
            if (name, each) not in seen:
                seen.add((name, each))
                waiting += [(Requirement(line), each) for line in distribution.requires or ()]
    return found


def _compile(folder: Path, *options: str) -> None:
    """Compile as pip does; the files say nothing of when and where."""
    command = [
        sys.executable,
        "-m",
        "compileall",
        "-q",
        "-s",
        str(folder),
        "--invalidation-mode",
        "unchecked-hash",
        *options,
    ]
    subprocess.run([*command, str(folder)], stdout=subprocess.DEVNULL, check=False, timeout=600)


def _project_layer(folder: Path, context: Path, target: Target) -> Layer:
    """Return the project itself and the virtual environment around everything."""
    wanted = _chosen(context, target.sources)
    key = _digest(*(f"{path} {_file_digest(context / path)}" for path in wanted), target.venv)
    venv = target.venv.lstrip("/")
    site = f"{venv}/lib/{_PYTHON}/site-packages"

    def write(tar: tarfile.TarFile) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "made"
            # A build writes the stubs into the tree it builds from.
            source = Path(scratch) / "source"
            for path in wanted:
                (source / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(context / path, source / path)
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            command += [
                "--no-deps",
                "--no-build-isolation",
                "--no-compile",
                "--target",
                str(made),
                str(source / "clients" / "python"),
                str(source),
            ]
            _output(command, timeout_s=300)
            shutil.rmtree(made / "bin", ignore_errors=True)
            _compile(made)
            _add_in(tar, made, site)
        version = sys.version.split()[0]
        home = f"home = /usr/local/bin\ninclude-system-site-packages = false\nversion = {version}\n"
        _add_bytes(tar, home.encode(), f"{venv}/pyvenv.cfg")
        _add_folder(tar, f"{venv}/bin")
        _add_link(tar, f"{venv}/bin/python", f"/usr/local/bin/{_PYTHON}")
        scripts = tomllib.loads((context / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "scripts"
        ]
        for name, entry in sorted(scripts.items()):
            module, _, function = entry.partition(":")
            run = f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            script = f"#!{target.venv}/bin/python\n{run}"
            _add_bytes(tar, script.encode(), f"{venv}/bin/{name}", 0o755)

    return _layer(folder, f"project-{key}", write)


def _files_layer(folder: Path, context: Path, target: Target) -> Layer:
    """Return what an image copies from the context."""
    parts = []
    for source, place in target.copies:
        path = context / source
        if not path.exists():
            raise ImageError(f"Dockerfile, {target.name}: {source} is not in the context; see .dockerignore")
        files = [Path()] if path.is_file() else _files(path)
        parts += [f"{place}/{file} {_file_digest(path / file)}" for file in files]

    def write(tar: tarfile.TarFile) -> None:
        for source, place in target.copies:
            for parent in reversed(PurePosixPath(place.lstrip("/")).parents[:-1]):
                _add_folder(tar, str(parent))
            _add(tar, context / source, place.lstrip("/"))

    return _layer(folder, f"files-{target.name}-{_digest(*parts)}", write)


def _copy_context(target: Path) -> None:
    """Copy what .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    if not lines or lines[0] != "**":
        raise ImageError(".dockerignore: tests/cluster/images.py expects ** first, then what is let through")
    ignored = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    target.mkdir()
    for line in lines[1:]:
        source = ROOT / line.removeprefix("!")
        if not line.startswith("!") or not source.exists():
            continue
        place = target / line.removeprefix("!")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns(*ignored), dirs_exist_ok=True)
        else:
            shutil.copy2(source, place)


def _add_in(tar: tarfile.TarFile, top: Path, name: str) -> None:
    """Add what a folder holds, under a name whose parents are made."""
    for parent in reversed(PurePosixPath(name).parents[:-1]):
        _add_folder(tar, str(parent))
    _add(tar, top, name)


def _add_files(tar: tarfile.TarFile, top: Path, files: Sequence[Path], name: str) -> None:
    folders: set[Path] = set()
    for path in files:
        for parent in reversed(path.parents):
            if parent not in folders:
                folders.add(parent)
                _add_folder(tar, str(PurePosixPath(name) / parent))
        _add(tar, top / path, str(PurePosixPath(name) / path))


def _files(top: Path) -> list[Path]:
    return sorted(path.relative_to(top) for path in _walk(top))


def _chosen(context: Path, sources: Sequence[str]) -> list[Path]:
    """Return the files of the context that a build copies, as COPY reads its sources."""
    found: set[Path] = set()
    for source in sources:
        for path in context.glob(source):
            place = path.relative_to(context)
            found.update([place / each for each in _files(path)] if path.is_dir() else [place])
    return sorted(found)


def _walk(top: Path) -> Iterator[Path]:
    for path in top.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            yield path


def _same(one: Path, other: Path) -> bool:
    return (
        other.exists()
        and one.stat().st_size == other.stat().st_size
        and _file_digest(one) == _file_digest(other)
    )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _output(command: Sequence[str], timeout_s: float = 60.0) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if run.returncode != 0:
        raise ImageError(f"exit {run.returncode} of {' '.join(command)}\n{run.stdout}{run.stderr}".rstrip())
    return run.stdout


def main() -> None:
    """Make asd's images and say what they hold."""
    folder = cache_dir() / "images"
    try:
        for image in release_images(folder):
            sys.stdout.write(f"{image.name.removeprefix(LIBRARY + '/')}\t{image.size / 1e6:.1f} MB\n")
            for layer in image.layers:
                sys.stdout.write(f"\t{layer.path.stem}\t{layer.size / 1e6:.1f} MB\n")
    except ImageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
