"""asd's images, built from the Dockerfile by buildah: no Docker, no registry.

The images that the Dockerfile starts from are made by debootstrap, under the names that it gives them.
README.md in this folder says how they differ from the published ones.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tools.machine import MissingProgramError, cache_dir, check_system, missing_packages, run, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
# The targets that run on CPUs: those that start from the Dockerfile's `base`.
TARGETS = ("router", "gateway", "policy", "manager", "stage-onnx", "tools", "train")
# What containerd makes of a name without a registry.
LIBRARY = "docker.io/library"
# Debian's packages. Of Ubuntu's the names are the same.
PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux"}

_CERTIFICATES = Path("/etc/ssl/certs")
# Of the base: what python:slim has, as far as Debian packages it.
_BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv", "python3-pip")
# Not in python:slim either, or of this machine.
_NOT_IN_BASE = (
    "etc/hostname",
    "etc/resolv.conf",
    "usr/share/doc/*",
    "usr/share/locale/*",
    "usr/share/man/*",
    "var/cache/apt/*",
    "var/lib/apt/lists/*",
    "var/log/*",
)
# How pip reaches its index.
_PIP_KEYS = (
    "cert",
    "default-timeout",
    "extra-index-url",
    "index-url",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
)
# Chosen: many times what two busy cores took (README.md).
_BUILD_SECONDS = 1800.0
_STEP_SECONDS = 300.0


class ImageError(RuntimeError):
    """An image cannot be made; the message says which and why."""


def missing() -> list[str]:
    """Return Debian's packages that a build needs and this machine lacks."""
    return missing_packages(PROGRAMS)


def check() -> None:
    """Raise MissingProgramError where this machine cannot build images, with all that is missing at once."""
    check_system("building images", missing())
    # debootstrap mounts /proc, and each RUN step has mounts of its own.
    try:
        run(["unshare", "--mount", "true"], timeout_s=10, error=ImageError)
    except ImageError as error:
        raise MissingProgramError(
            f"building images needs mounts, and this machine refuses: {str(error).splitlines()[-1]}"
        ) from error


def release_tag() -> str:
    """Return the tag that the chart gives its images: its appVersion."""
    chart = (ROOT / "charts" / "Chart.yaml").read_text(encoding="utf-8")
    return _match(r'^appVersion: "([^"]+)"$', chart, "charts/Chart.yaml")


def image_name(target: str) -> str:
    """Return the name of a target's image, as containerd writes it."""
    return f"{LIBRARY}/asd-{target}:{release_tag()}"


class Store:
    """buildah's images in a folder. Only `opened` makes one, so that one process at a time uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[str] = set()

    def buildah(self, *arguments: str, timeout_s: float = _STEP_SECONDS) -> str:
        """Return what buildah prints. It takes overlay mounts where the folder allows them, else copies."""
        return run(
            ["buildah", "--root", str(self.folder), "--runroot", str(self.folder / "run"), *arguments],
            timeout_s=timeout_s,
            error=ImageError,
        )

    def build(self, name: str, context: Path, *options: str) -> str:
        """Build an image and return its id; steps whose input is unchanged are not run again."""
        how = ("--layers", "--pull=never", "--isolation=chroot", f"--tag={name}")
        printed = self.buildah("build", *how, *options, str(context), timeout_s=_BUILD_SECONDS)
        made = printed.split()[-1]
        self._used |= {made, *re.findall(r"^--> (?:Using cache )?([0-9a-f]+)$", printed, re.MULTILINE)}
        return made

    def _make_base(self) -> None:
        """Make the image that the Dockerfile's targets start from, unless it is there."""
        name = base_name(DOCKERFILE.read_text(encoding="utf-8"))
        kept = f"localhost/asd-base:{_base_digest()}"
        if kept not in self._list("{{.Name}}:{{.Tag}}"):
            say(f"making {name} with debootstrap")
            started = time.monotonic()
            self._bootstrap(name.rpartition("-")[2], kept)
            say(f"made it in {time.monotonic() - started:.0f} s")
        self.buildah("tag", kept, name)
        self._used |= set(self._list("{{.ID}}", kept))

    def _bootstrap(self, suite: str, name: str) -> None:
        container = self.buildah("from", "scratch").strip()
        root = Path(self.buildah("mount", container).strip())
        include = f"--include={','.join(_BASE_PACKAGES)}"
        # What debootstrap mounts goes with its namespace, however it ends.
        command = ["unshare", "--mount", "debootstrap", "--variant=minbase", include, suite, str(root)]
        run(command, timeout_s=_BUILD_SECONDS, error=ImageError)
        for path in (path for pattern in _NOT_IN_BASE for path in root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (root / "usr" / "bin" / "python").symlink_to("python3")
        self.buildah("umount", container)
        self.buildah("commit", "--quiet", "--rm", container, name)

    def build_targets(self) -> dict[str, str]:
        """Build every CPU target; return the images' ids by name."""
        self._make_base()
        made = {}
        with tempfile.TemporaryDirectory() as scratch:
            settings = Path(scratch) / "pip.conf"
            settings.write_text(_pip_settings(), encoding="utf-8")
            # Steps reach package registries as this machine does; no image holds these files.
            shown = [f"--volume={settings}:/etc/pip.conf:ro"]
            if _CERTIFICATES.is_dir():
                shown.append(f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro")
            for target in TARGETS:
                started = time.monotonic()
                name = image_name(target)
                made[name] = self.build(name, ROOT, f"--target={target}", *shown)
                say(f"built {target} in {time.monotonic() - started:.1f} s")
        return made

    def archive(self, name: str, key: str, make: Callable[[], Mapping[str, str]]) -> Path:
        """Return an OCI archive of images, made unless it was made with the same key.

        make: builds images and returns their ids by name.
        """
        path = self.folder.parent / f"{name}.tar"
        note = path.with_suffix(".key")
        if not path.exists() or not note.exists() or note.read_text(encoding="ascii") != key:
            note.unlink(missing_ok=True)
            self._export(make(), path)
            self._remove_unused()
            note.write_text(key, encoding="ascii")
        return path

    def _export(self, ids: Mapping[str, str], path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            layout, unfinished = Path(scratch) / "layout", Path(scratch) / "archive"
            # The fastest there is; buildah cannot leave layers uncompressed here.
            how = ("--quiet", "--compression-format=zstd", "--compression-level=1")
            for name, image in ids.items():
                self.buildah("push", *how, image, f"oci:{layout}:{name}")
            command = ["tar", "--create", f"--file={unfinished}", f"--directory={layout}", "."]
            run(command, timeout_s=_STEP_SECONDS, error=ImageError)
            unfinished.replace(path)

    def size_mb(self, name: str) -> float:
        """Return how large an image is, uncompressed."""
        return megabytes(" ".join(self._list("{{.Size}}", name)))

    def _remove_unused(self) -> None:
        """Remove every image that no build of this store used since it was opened."""
        # The newest first, so that none goes before what is made from it.
        unused = [
            image
            for image in self._list("{{.ID}}", "--all")
            if not any(image.startswith(each) or each.startswith(image) for each in self._used)
        ]
        if unused:
            self.buildah("rmi", "--force", *unused)

    def _list(self, what: str, *options: str) -> list[str]:
        return self.buildah("images", "--noheading", f"--format={what}", *options).split()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """Yield the store of a folder, once no other process uses it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = Store(folder / "store")
        # Of builds that were broken off.
        store.buildah("rm", "--all")
        yield store


def release(store: Store) -> Path:
    """Return an archive of asd's images as they are in this working tree."""
    return store.archive("release", _digest_of_tree(), store.build_targets)


def release_archive() -> Path:
    """Return an archive of asd's images. Raises MissingProgramError where this machine cannot build them."""
    check()
    with opened(cache_dir("images")) as store:
        return release(store)


def sizes_mb() -> dict[str, float]:
    """Return how large the images are that were built last, by target; base: what all of them start from."""
    names = {target: image_name(target) for target in TARGETS}
    names["base"] = base_name(DOCKERFILE.read_text(encoding="utf-8"))
    with opened(cache_dir("images")) as store:
        return {target: store.size_mb(name) for target, name in names.items()}


def megabytes(text: str) -> float:
    """Return what buildah's text of a size says, such as "352 MB"."""
    number, unit = text.split()[:2]
    return float(number) * {"kB": 0.001, "MB": 1.0, "GB": 1000.0}[unit]


def base_name(dockerfile: str) -> str:
    """Return the name of the image that the CPU targets start from."""
    return _match(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, "Dockerfile")


def _match(pattern: str, text: str, file: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ImageError(f"{file}: no line matches {pattern}")
    return found[1]


def _digest_of_tree() -> str:
    """Return a digest of all that images are made of: what .dockerignore lets through, and the rest."""
    ignore = ROOT / ".dockerignore"
    tops = [line.removeprefix("!") for line in ignore.read_text(encoding="utf-8").split() if line[0] == "!"]
    found = {path for top in tops for path in (ROOT / top, *(ROOT / top).rglob("*"))}
    files = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    digest = hashlib.sha256(_base_digest().encode() + release_tag().encode())
    for path in (DOCKERFILE, ignore, *sorted(files)):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _base_digest() -> str:
    name = base_name(DOCKERFILE.read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join([name, *_BASE_PACKAGES, *_NOT_IN_BASE]).encode()).hexdigest()[:12]


def _pip_settings() -> str:
    """Return this machine's settings of pip, from files and environment, as a pip.conf."""
    listed = run([sys.executable, "-m", "pip", "config", "list"], timeout_s=60, error=ImageError)
    found = dict(line.split("=", 1) for line in listed.splitlines())
    lines = ["[global]"]
    for key in _PIP_KEYS:
        value = found.get(f":env:.{key}") or found.get(f"global.{key}")
        lines += [f"{key} = {ast.literal_eval(value)}"] if value else []
    return "\n".join([*lines, ""])
