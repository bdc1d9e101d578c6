"""The images of the Dockerfile: what each runs starts, as the user that it names."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING

import pytest

from services.common.privacy import SWITCHES
from tools.images import build
from tools.machine import MissingProgramError, cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

USER = "10001:10001"
NAME = "localhost/some:1"
SAYS = {
    "router": "Settings of the asd router.",
    "gateway": "Settings of the asd gateway.",
    "policy": "Settings of the policy service.",
    "manager": "Settings of the asd manager.",
    "stage-onnx": "Settings of a stage service.",
    "tools": "Usage: asd ",
    "train": "Usage: asd-policy ",
}


@pytest.fixture(scope="module", autouse=True)
def machine() -> None:
    """Leave these tests out where buildah cannot run."""
    try:
        build.check()
    except MissingProgramError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def store() -> Iterator[build.Store]:
    """Give buildah's store with the images of this working tree."""
    with build.opened(cache_dir("images")) as found:
        build.release(found)
        yield found


@pytest.fixture(params=build.TARGETS)
def image(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(store: build.Store, image: str) -> Iterator[Callable[..., str]]:
    """Give what runs a command in a container of an image."""
    container = store.buildah("from", "--pull=never", build.image_name(image)).strip()
    yield lambda *command: store.buildah("run", "--isolation=chroot", container, "--", *command)
    store.buildah("rm", container)


def test_it_starts_as_the_user_that_kubernetes_is_promised(
    store: build.Store, image: str, run: Callable[..., str]
) -> None:
    config = json.loads(store.buildah("inspect", "--type=image", build.image_name(image)))["OCIv1"]["config"]
    assert config["User"] == USER
    assert {f"{switch}={value}" for switch, value in SWITCHES.items()} <= set(config["Env"])
    assert SAYS[image] in run(*config["Entrypoint"], "--help")
    assert run("python", "-c", "import os; print(os.getuid(), os.getgid(), sep=':')").strip() == USER


def test_settings_of_pip_were_there_for_the_build_alone(run: Callable[..., str]) -> None:
    assert run("sh", "-c", "cat /etc/pip.conf 2>/dev/null || true") == ""


def test_an_archive_is_made_once_and_its_images_go_with_the_next(tmp_path: Path) -> None:
    built = []

    def archive(key: str) -> Path:
        with build.opened(tmp_path / "images") as store:

            def make() -> dict[str, str]:
                built.append(key)
                return {NAME: store.build(NAME, context)}

            return store.archive("some", key, make)

    (context := tmp_path / "context").mkdir()
    (context / "Dockerfile").write_text("FROM scratch\nCOPY first /\nCOPY second /\n")
    for name in ("first", "second"):
        (context / name).write_text("1")
    archive("1")
    archive("1")
    (context / "second").write_text("2")
    with tarfile.open(archive("2")) as held:
        index = held.extractfile("./index.json")
        assert index is not None
        (manifest,) = json.load(index)["manifests"]
    assert manifest["annotations"]["org.opencontainers.image.ref.name"] == NAME
    assert built == ["1", "2"]
    with build.opened(tmp_path / "images") as store:
        # One for each step.
        assert len(store.buildah("images", "--all", "--quiet").split()) == 2
