"""Tests on a real cluster run where this folder is named: `pytest tests/cluster`, not `pytest`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster import release
from tools.images import build as images
from tools.machine import MissingProgramError
from tools.node import node, programs

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker here, where it is used."""
    config.addinivalue_line("markers", "cluster: needs a Kubernetes cluster")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless it, or a file in it, was asked for."""
    asked = (Path(argument.partition("::")[0]).absolute() for argument in config.args)
    is_ours = collection_path.is_relative_to(HERE)
    return True if is_ours and not any(path.is_relative_to(HERE) for path in asked) else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what tests need before any of them is timed: Kubernetes and the images can take longer."""
    if session.config.option.collectonly:
        return
    on_cluster = [
        item.get_closest_marker("cluster") is not None
        for item in session.items
        if item.path.is_relative_to(HERE)
    ]
    needs_node = any(on_cluster) and not os.environ.get("KUBECONFIG")
    # The fixtures say what is missing, and what to do.
    with contextlib.suppress(MissingProgramError, images.ImageError):
        if needs_node:
            programs.find_all(tuple(programs.PROGRAMS))
        if needs_node or not all(on_cluster):
            images.release_archive()


@pytest.fixture(scope="session")
def cluster() -> Iterator[release.Cluster]:
    with release.cluster() as found:
        yield found
    if not found.is_kept:
        left = node.leftovers(node.DEFAULT_FOLDER)
        assert left == [], f"the node left something on this machine: {left}"


@pytest.fixture(scope="session")
def jaeger(cluster: release.Cluster) -> Iterator[release.Jaeger]:
    store = release.Jaeger(cluster)
    store.up()
    yield store
    store.down()


@pytest.fixture(scope="session")
def installed(cluster: release.Cluster, jaeger: release.Jaeger) -> Iterator[release.Release]:
    """Give a release that exports its traces, for as long as tests want it."""
    values = (f"--values={HERE / 'values.yaml'}", f"--set=telemetry.endpoint={jaeger.endpoint}")
    found = release.Release(cluster, arguments=values)
    found.install()
    yield found
    if cluster.is_kept:
        found.uninstall()
    cluster.remove_namespace(found.namespace)
