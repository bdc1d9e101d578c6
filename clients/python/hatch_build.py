"""Compile protos/asd/v1 into the package `asd.v1` whenever asd-client is installed or built."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def compile_protos(root: Path = ROOT) -> None:
    """Write the stubs of protos/asd/v1/*.proto to asd/v1/. Raises RuntimeError if protoc refuses a file."""
    from grpc_tools import protoc

    # A source distribution includes the contract; in a checkout it is in the top folder.
    contract = next(each for each in (root / "protos", root.parents[1] / "protos") if each.is_dir())
    protos = [*sorted((contract / "asd" / "v1").glob("*.proto")), *sorted((root / "asd").rglob("*.proto"))]
    plugins = []
    for name in ("mypy", "mypy_grpc"):
        if plugin := _find_plugin(f"protoc-gen-{name}"):
            plugins += [f"--plugin=protoc-gen-{name}={plugin}", f"--{name}_out=quiet:{root}"]
    arguments = [
        "protoc",
        f"--proto_path={contract}",
        f"--proto_path={root}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        *plugins,
        *map(str, protos),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the contract: see its message above")
    (root / "asd" / "v1" / "__init__.py").write_text('"""Stubs compiled from protos/: do not edit."""\n')


def _find_plugin(name: str) -> str | None:
    """Return mypy-protobuf's plugin: beside the interpreter, or on the path of an isolated build."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatch calls this before it collects files, for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the stubs."""
        compile_protos(Path(self.root))


if __name__ == "__main__":
    compile_protos()
    sys.stdout.write("compiled protos/asd/v1\n")
