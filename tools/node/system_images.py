"""The images that a node itself needs: each holds one program."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from tools.images.build import LIBRARY, Store, opened
from tools.machine import cache_dir
from tools.node.programs import PROGRAMS, find_program, version_of

DOCKERFILE = Path(__file__).with_name("Dockerfile")
PAUSE_IMAGE = f"{LIBRARY}/asd-cluster-pause:0"
COREDNS_IMAGE = f"{LIBRARY}/asd-cluster-coredns:{version_of(PROGRAMS['coredns'])}"
JAEGER_IMAGE = f"{LIBRARY}/asd-cluster-jaeger:{version_of(PROGRAMS['jaeger'])}"


def system_archive() -> Path:
    """Return an OCI archive with the images that a node cannot do without."""
    return _archive("system", {"pause": PAUSE_IMAGE, "coredns": COREDNS_IMAGE})


def jaeger_archive() -> Path:
    """Return an OCI archive with Jaeger, which keeps traces in memory."""
    return _archive("jaeger", {"jaeger": JAEGER_IMAGE})


def _archive(name: str, images: dict[str, str]) -> Path:
    """Return an archive of images by program."""
    paths = {image: find_program(program) for program, image in images.items()}
    key = " ".join(_digest(path) for path in (DOCKERFILE, *paths.values()))

    def build() -> dict[str, str]:
        return {image: _build(store, image, path) for image, path in paths.items()}

    with opened(cache_dir("cluster") / "system") as store:
        return store.archive(name, key, build)


def _build(store: Store, image: str, program: Path) -> str:
    with tempfile.TemporaryDirectory() as context:
        shutil.copy2(program, Path(context) / "program")
        return store.build(image, Path(context), f"--file={DOCKERFILE}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
