"""What an installation has: the wheel's files, and the modules that the base install can import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from tests.limits import PROCESS_S

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "python"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT_PROJECT = tomllib.loads((CLIENT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
# What a distribution brings, where it is more than a module of the same name.
_MODULES = {"scikit_learn": {"sklearn"}, "onnx": {"onnx", "ml_dtypes"}}


def modules_of(*extras: str) -> set[str]:
    """Return the modules that extras of pyproject.toml bring."""
    requirements = [each for extra in extras for each in PROJECT["project"]["optional-dependencies"][extra]]
    names = [re.split(r"[^\w-]", each)[0].replace("-", "_") for each in requirements]
    return set().union(*(_MODULES.get(name, {name}) for name in names))


def run_python(
    code: str, *arguments: str, folder: Path, path: Path, more: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{more}"},
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )


_IMPORT_WITHOUT = """
import importlib, pkgutil, sys
package, left_out, *missing = sys.argv[1:]


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
found = importlib.import_module(package)
names = [m.name for m in pkgutil.iter_modules(found.__path__, package + ".")]
for name in names:
    if name != left_out:
        importlib.import_module(name)
print(*names)
"""


@pytest.mark.parametrize(
    ("package", "module", "extras"),
    [
        ("services.common", "server", ()),
        ("services.router", "__main__", ()),
        ("services.cli", "__main__", ()),
        ("suites", "arithmetic", ()),
        ("policy_service", "__main__", ("policy",)),
        ("policy_service.train", "cli", ("policy-train",)),
        ("services.stage", "__main__", ("stage",)),
    ],
)
def test_a_packages_modules_import_with_its_extra_alone(
    package: str, module: str, extras: tuple[str, ...], tmp_path: Path
) -> None:
    missing = modules_of("stage", "policy", "policy-train", "train", "bench") - modules_of(*extras)
    assert {"torch", "transformers", "psutil"} <= missing
    left_out = "policy_service.train"
    done = run_python(_IMPORT_WITHOUT, package, left_out, *missing, folder=tmp_path, path=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"{package}.{module}" in done.stdout.split()


class Wheel(NamedTuple):
    """A built wheel: its files, where they are unpacked, and the tree that it was built from."""

    names: frozenset[str]
    folder: Path
    source: Path

    def read(self, name: str) -> str:
        (path,) = self.folder.glob(f"*.dist-info/{name}")
        return path.read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree that has no stubs yet."""
    source = tmp_path_factory.mktemp("tree") / "source"
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    # tests too: a wheel must leave them out by itself.
    for name in {*packages, "clients", "protos", "tests", "tools", "benchmarks"}:
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*", "v1")
        )
    shutil.copytree(ROOT / "protos", source / "protos", dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source / name)
    return source


def build(source: Path, work: Path) -> Wheel:
    (built,) = WheelBuilder(str(source)).build(directory=str(work), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        archive.extractall(work / "unpacked")
        return Wheel(frozenset(archive.namelist()), work / "unpacked", source)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The application, asd-cascade."""
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def client(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The client, asd-client, built from its source distribution."""
    work = tmp_path_factory.mktemp("client")
    (built,) = SdistBuilder(str(source / "clients" / "python")).build(
        directory=str(work), versions=["standard"]
    )
    with tarfile.open(built) as archive:
        archive.extractall(work / "sdist", filter="data")
    (unpacked,) = (work / "sdist").iterdir()
    return build(unpacked, work)


def tops(wheel: Wheel) -> set[str]:
    return {name.partition("/")[0] for name in wheel.names}


def test_the_client_is_one_module_with_the_contracts_stubs(client: Wheel) -> None:
    protos = [path.stem for path in (ROOT / "protos" / "asd" / "v1").glob("*.proto")]
    assert len(protos) >= 4
    kinds = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    wanted = {f"asd/v1/{stem}{kind}" for stem in protos for kind in kinds}
    # Without __init__.py `asd` is a namespace that other distributions may add to.
    assert {*wanted, "asd/v1/__init__.py", "asd/py.typed", "asd/__init__.py"} <= client.names
    code = {path.relative_to(CLIENT).as_posix() for path in (CLIENT / "asd").rglob("*.py")}
    assert code <= client.names
    assert tops(client) == {"asd", f"asd_client-{VERSION}.dist-info"}
    assert not [name for name in client.names if name.endswith((".pyc", ".proto"))]


def test_the_client_needs_grpc_and_protobuf_alone(client: Wheel) -> None:
    metadata = client.read("METADATA")
    needed = re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)
    assert needed == ["grpcio", "protobuf"]
    assert f"Name: asd-client\nVersion: {VERSION}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Apache License" in client.read("licenses/LICENSE")


def test_the_application_wants_the_client_of_its_own_commit() -> None:
    assert f"asd-client=={CLIENT_PROJECT['project']['version']}" in PROJECT["project"]["dependencies"]
    assert CLIENT_PROJECT["project"]["version"] == VERSION


def test_the_wheel_has_every_file_of_its_packages(wheel: Wheel) -> None:
    """Code and data alike: the demo's cascade, the policy's artifact, the models."""
    tool = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {
        path.relative_to(wheel.source).as_posix()
        for package in tool["packages"]
        for path in (wheel.source / package).rglob("*")
        if path.is_file()
    }
    wanted = {name for name in wanted if not any(fnmatch(name, f"{each}/*") for each in tool["exclude"])}
    assert wanted <= wheel.names
    assert {
        "services/local/embedded.yaml",
        "policy_service/train/embedded.yaml",
        "policy_service/policy.zip",
        *(f"models/{name}/model.safetensors" for name in ("small", "medium", "large", "foreign")),
        *(f"models/{name}/tokenizer.json" for name in ("small", "medium", "large", "foreign")),
    } <= wheel.names


def test_the_wheel_has_nothing_else(wheel: Wheel) -> None:
    info = f"asd_cascade-{VERSION}.dist-info"
    assert tops(wheel) == {"services", "policy_service", "suites", "models", info}
    assert not [name for name in wheel.names if "test" in name.lower() or name.endswith((".pyc", ".proto"))]
    assert not [name for name in wheel.names if name.startswith("models/train/")]


def test_the_wheel_names_its_commands_license_and_version(wheel: Wheel) -> None:
    commands = wheel.read("entry_points.txt")
    assert "asd = services.cli.__main__:main" in commands
    assert "asd-policy = policy_service.train.cli:main" in commands
    metadata = wheel.read("METADATA")
    assert f"Version: {PROJECT['project']['version']}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Apache License" in wheel.read("licenses/LICENSE")
    base = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert len(base) == len(PROJECT["project"]["dependencies"])


_USE = """
import services, sys
from pathlib import Path
from asd.v1 import cascade_pb2_grpc
from services.local.cascade_file import EMBEDDED, read_cascade
from services.router.__main__ import build
assert Path(services.__file__).is_relative_to(sys.argv[1]), services.__file__
cascade = read_cascade(EMBEDDED)
print(*[stage.path for stage in cascade.stages], cascade.policy.artifact)
"""


def test_installed_wheels_find_their_cascade(wheel: Wheel, client: Wheel, tmp_path: Path) -> None:
    done = run_python(_USE, str(wheel.folder), folder=tmp_path, path=wheel.folder, more=client.folder)
    assert done.returncode == 0, done.stderr
    paths = [Path(each).resolve() for each in done.stdout.split()]
    assert [path.relative_to(wheel.folder.resolve()).as_posix() for path in paths] == [
        *("models/small", "models/medium", "models/large", "policy_service/policy.zip")
    ]


_ASK = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        known = {*sys.stdlib_module_names, "asd", "services", "grpc", "google", "typing_extensions"}
        if name.partition(".")[0] not in known:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import asd, services
from asd import AsyncClient, Away, Client
from asd.v1 import cascade_pb2
assert asd.__file__.startswith(sys.argv[1]), asd.__file__
assert services.MINE
try:
    Client("127.0.0.1:1").ask("Hi", min_quality=0.95)
except Away as error:
    print(error)
"""


def test_the_client_alone_works_beside_services_of_the_user(client: Wheel, tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("MINE = True\n")
    done = run_python(_ASK, str(client.folder), folder=tmp_path, path=tmp_path, more=client.folder)
    assert (done.returncode, "127.0.0.1:1" in done.stdout) == (0, True), done.stderr
