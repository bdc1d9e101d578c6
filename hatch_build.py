"""Compile protos/asd/v1 into the package `asd.v1` whenever asd is installed or built."""

from __future__ import annotations

import sys
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def compile_protos(root: Path = ROOT) -> list[Path]:
    """Write the stubs of protos/asd/v1/*.proto to asd/v1/ and return their paths.

    Raises RuntimeError if protoc refuses a file.
    """
    from grpc_tools import protoc

    out = root / "asd" / "v1"
    out.mkdir(parents=True, exist_ok=True)
    protos = sorted((root / "protos" / "asd" / "v1").glob("*.proto"))
    scripts = Path(sysconfig.get_path("scripts"))
    # mypy-protobuf's plugins sit beside the interpreter, or in an isolated build on the overlay's path.
    plugins = []
    for name in ("mypy", "mypy_grpc"):
        plugin = _find_plugin(f"protoc-gen-{name}", scripts)
        if plugin:
            plugins += [f"--plugin=protoc-gen-{name}={plugin}", f"--{name}_out=quiet:{root}"]
    arguments = [
        "protoc",
        f"--proto_path={root / 'protos'}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        *plugins,
        *(str(p) for p in protos),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused protos/asd/v1: see its message above")
    for package in (root / "asd", out):
        (package / "__init__.py").write_text('"""Stubs compiled from protos/: do not edit."""\n')
    (root / "asd" / "py.typed").touch()
    return sorted(out.glob("*"))


def _find_plugin(name: str, scripts: Path) -> Path | None:
    import shutil

    found = shutil.which(name, path=str(scripts)) or shutil.which(name)
    return Path(found) if found else None


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatch calls this before it collects files, for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the stubs."""
        compile_protos(Path(self.root))


if __name__ == "__main__":
    compile_protos()
    sys.stdout.write("compiled protos/asd/v1\n")
