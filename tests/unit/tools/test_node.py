"""What is said of a machine before a node is tried on it, without starting one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tools import machine as tools_machine
from tools.images import build as images
from tools.machine import MissingProgramError
from tools.node import crds, node, programs

if TYPE_CHECKING:
    from pathlib import Path

NEEDED = ["kubelet v1.36.3", "etcd v3.6.13"]
MAKES_GO = """#!/bin/sh
case $1 in
  env) echo {version} ;;
  mod) {download} ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the only folder of PATH, empty."""
    (programs := tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def install_go(folder: Path, version: str, download: str = "exit 0") -> None:
    (program := folder / "go").write_text(MAKES_GO.format(version=version, download=download))
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("go1.26.8", (1, 26, 8)),
        ("go1.19", (1, 19, 0)),
        ("go1.26rc1", (1, 26, 0)),
        ("devel go1.27-0123abc", (1, 27, 0)),
        ("module asd/tools/node/pause\n\ngo 1.26.0\n", (1, 26, 0)),
        ("module example.org/go1.2\n", ()),
        ("", ()),
    ],
)
def test_a_version_of_go_is_read(text: str, version: tuple[int, ...]) -> None:
    assert programs.go_version(text) == version


def test_every_tool_asks_for_the_go_that_is_checked() -> None:
    modules = sorted(programs.MODULES.glob("*/go.mod"))
    assert {programs.go_version(path.read_text()) for path in modules} == {(1, 26, 0)}


@pytest.mark.usefixtures("machine")
def test_where_nothing_is_needed_go_is_not() -> None:
    programs.check_go([])


@pytest.mark.usefixtures("machine")
def test_a_machine_without_go_is_told_what_it_lacks() -> None:
    with pytest.raises(MissingProgramError, match=r"^kubelet v1\.36\.3 .*no Go"):
        programs.check_go(NEEDED)


def test_an_old_go_is_refused(machine: Path) -> None:
    install_go(machine, "go1.24.4")
    with pytest.raises(MissingProgramError, match=r"Go 1\.26\.0 .*: go1\.24\.4"):
        programs.check_go(NEEDED)


def test_a_go_that_is_cut_off_is_refused(machine: Path) -> None:
    install_go(machine, "go1.26.8", "echo dial tcp: no such host >&2; exit 1")
    with pytest.raises(MissingProgramError, match=r"modules.*: dial tcp: "):
        programs.check_go(NEEDED)


def test_a_go_that_gets_no_answer_is_not_waited_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MODULE_SECONDS", 0.2)
    install_go(machine, "go1.26.8", "exec /bin/sleep 60")
    with pytest.raises(MissingProgramError, match=r"modules.*: no answer"):
        programs.check_go(NEEDED)


def test_a_new_go_that_fetches_modules_is_enough(machine: Path) -> None:
    install_go(machine, "go1.26.8")
    programs.check_go(NEEDED)


def test_programs_that_only_root_has_on_its_path_are_found(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own := tmp_path / "sbin").mkdir()
    (own / "bridge").touch()
    monkeypatch.setattr(tools_machine, "ROOT_FOLDERS", (str(own),))
    monkeypatch.setattr(programs, "CNI_FOLDERS", (own,))
    assert "conntrack" in programs.absent_packages()
    for name in programs.SYSTEM_PROGRAMS | images.PROGRAMS:
        (own / name).touch(0o755)
    assert programs.absent_packages() == []


@pytest.mark.usefixtures("machine")
def test_programs_that_lie_ready_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    (tmp_path / "etcd").touch()
    assert programs.absent_programs(("etcd", "pause")) == ["pause v0"]


def test_definitions_are_absent_until_go_has_them(machine: Path) -> None:
    every = [f"{each.module} {each.version}" for each in crds.DEFINITIONS]
    assert crds.absent_definitions() == every
    install_go(machine, "go1.26.8", """echo '{"Error": "module lookup disabled"}'; exit 1""")
    assert crds.absent_definitions() == every
    install_go(machine, "go1.26.8", """echo '{"Dir": "/modules/it"}'""")
    assert crds.absent_definitions() == []


def test_another_kubelet_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "CGROUP_ROOT", tmp_path)
    (pod := tmp_path / "memory" / "kubepods" / "pod1").mkdir(parents=True)
    (pod / "cgroup.procs").write_text("")
    monkeypatch.setattr(node, "check_node", lambda: None)
    monkeypatch.setattr(images, "check", lambda: None)
    # Nothing lives in it: what the check says next is of what lies beyond.
    monkeypatch.setattr(node, "cgroup_parents", lambda: [tmp_path / "absent" / "deeper"])
    with pytest.raises(node.NodeError, match="cgroups"):
        node.check_machine()
    (pod / "cgroup.procs").write_text("7\n")
    with pytest.raises(node.NodeError, match=f"another kubelet .*{pod} "):
        node.check_machine()
