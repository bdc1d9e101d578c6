"""An artifact written in place of another: old or new at every moment, also to one that reads just then."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from policy_service import store as module
from policy_service.artifact import read_document
from policy_service.document import UnfitArtifact
from policy_service.store import (
    Lineage,
    PolicyStore,
    UnfitStore,
    check_output,
    load_artifact,
    load_usable,
    read_lineage,
    write_artifact,
)
from services.common.errors import ResourceExhausted
from tests.limits import PROCESS_S
from tests.unit.policy.test_fit import record, write
from tests.unit.policy.tiny_policy import make_artifact

if TYPE_CHECKING:
    from policy_service.document import PolicyDocument

ROOT = Path(__file__).parents[3]
LINEAGE = Lineage(parent="v0", stages=())


def put(
    source: Path, directory: Path, *, spoilt: bool = False, lineage: Lineage | None = None
) -> PolicyDocument:
    """Write a tiny policy's content to a directory. spoilt: with models that do not load."""
    document = read_document(source)
    models = {view.model: (source / view.model).read_bytes() for view in document.views}
    if spoilt:
        models = dict.fromkeys(models, b"cut off")
    return write_artifact(document, models, directory, lineage)


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A directory that holds v1, and what v1 and v2 are made from. Their models differ."""
    old, new = (make_artifact(tmp_path / name, name) for name in ("v1", "v2"))
    # Metadata that changes bytes and digest alone.
    for path in new.glob("*.onnx"):
        model = onnx.load(path)
        model.doc_string = "v2"
        onnx.save(model, path)
    document = json.loads((new / "policy.json").read_text())
    for view in document["views"]:
        view["sha256"] = hashlib.sha256((new / view["model"]).read_bytes()).hexdigest()
    (new / "policy.json").write_text(json.dumps(document))
    put(old, tmp_path / "served")
    return tmp_path / "served", old, new


def test_the_new_policy_takes_the_place_of_the_old_one_and_its_files(old_and_new):
    served, _, new = old_and_new
    before = {path.name for path in served.iterdir()}
    (served / "notes.txt").write_text("kept")
    document = put(new, served)
    assert load_usable(served).document == document
    assert document.policy_version == "v2"
    after = {path.name for path in served.iterdir()}
    assert after == {*(view.model for view in document.views), "policy.json", "notes.txt"}
    assert before & after == {"policy.json"}


def test_one_that_reads_meanwhile_finds_a_whole_policy(old_and_new, monkeypatch):
    served, _, new = old_and_new
    load_predictor, swaps = module.load_predictor, []

    def swap_before(directory, document):
        if not swaps:
            swaps.append(document.policy_version)
            put(new, served)
        return load_predictor(directory, document)

    monkeypatch.setattr(module, "load_predictor", swap_before)
    assert load_artifact(served).document.policy_version == "v2"
    # It had read the old document, whose models are gone.
    assert swaps == ["v1"]


def test_what_is_published_while_it_is_replaced_is_one_of_the_two(old_and_new, tmp_path, monkeypatch):
    served, _, new = old_and_new
    copyfile, swaps = module.shutil.copyfile, []

    def swap_before(source, target):
        if not swaps:
            swaps.append(source)
            put(new, served)
        return copyfile(source, target)

    monkeypatch.setattr(module.shutil, "copyfile", swap_before)
    assert PolicyStore(tmp_path / "store").publish(served).policy_version == "v2"
    assert len(swaps) == 1


def test_a_policy_that_cannot_be_served_changes_nothing(old_and_new, tmp_path):
    served, old, _ = old_and_new
    before = {path.name: path.read_bytes() for path in served.iterdir()}
    with pytest.raises(UnfitArtifact):
        put(old, served, spoilt=True)
    assert {path.name: path.read_bytes() for path in served.iterdir()} == before
    with pytest.raises(UnfitArtifact):
        put(old, tmp_path / "fresh" / "deep", spoilt=True)
    assert not (tmp_path / "fresh").exists()


def test_a_disk_that_fails_while_models_move_leaves_the_old_policy_alone(old_and_new, monkeypatch):
    served, _, new = old_and_new
    before = {path.name for path in served.iterdir()}
    replace, moved = Path.replace, []

    def fail_at_the_fourth(path: Path, target: Path) -> Path:
        moved.append(target)
        # The first is the document's, in the hidden directory where all of it is written.
        if len(moved) == 4:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_fourth)
    with pytest.raises(ResourceExhausted, match="the disk is full"):
        put(new, served)
    assert moved[-1].parent == served
    assert {path.name for path in served.iterdir()} == before
    assert load_usable(served).policy.version == "v1"


def test_a_lineage_never_stands_beside_another_policy(old_and_new, monkeypatch):
    served, old, new = old_and_new
    put(old, served, lineage=LINEAGE)
    assert read_lineage(served) == LINEAGE
    seen = []
    replace = Path.replace

    def look(path: Path, target: Path) -> Path:
        done = replace(path, target)
        if target.parent == served:
            seen.append((read_document(served).policy_version, read_lineage(served) is not None))
        return done

    monkeypatch.setattr(Path, "replace", look)
    put(new, served)
    put(old, served, lineage=LINEAGE)
    assert ("v2", True) not in seen
    assert seen[-1] == ("v1", True)


def test_what_a_killed_writer_left_is_removed_when_it_is_old(old_and_new):
    served, _, new = old_and_new
    for name, age in ((".served.partial-old", 7200), (".served.partial-young", 60), ("other", 7200)):
        (served / name).mkdir()
        (served / name / "a").write_text("b")
        then = (served / name).stat().st_mtime - age
        os.utime(served / name, (then, then))
    (served / f"stage-0.{'a' * 12}.onnx").write_bytes(b"moved, then killed")
    put(new, served)
    left = {path.name for path in served.iterdir()} - {view.model for view in read_document(served).views}
    assert left == {"policy.json", ".served.partial-young", "other"}


def test_places_that_cannot_be_are_refused_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "store" / "policies").mkdir(parents=True)
    for place, message in (
        (file, "is a file: name a directory"),
        (file / "under", "is a file: name another directory"),
        (tmp_path / "store", "is a store of versions: write to another directory, and publish"),
    ):
        with pytest.raises(UnfitStore, match=message):
            check_output(place)
    check_output(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


# Fits in a child that SIGKILL ends at the nth step that touches the disk, for every n. Prints how each ended
# and which policy the directory then holds; "" for a directory that is not there.
_KILLED = """
import json, os, pathlib, shutil, signal, sys
from policy_service.store import load_usable
from policy_service.train.dataset import read_dataset
from policy_service.train.fit import InputFile, fit_policy
from services.common.errors import ResourceExhausted
from tests.unit.policy.test_fit import COSTS
work = pathlib.Path(sys.argv[1])
inputs = [InputFile(work / name, read_dataset(work / name, COSTS)) for name in ("a.parquet", "b.parquet")]
found = {}
for kind in ("replaced", "new"):
    found[kind] = []
    for last in range(1000):
        directory = work / kind / str(last) / "policy"
        directory.parent.mkdir(parents=True)
        if kind == "replaced":
            shutil.copytree(work / "old", directory)
        child = os.fork()
        if child == 0:
            steps = 0
            def dying(call):
                def step(*given, **named):
                    global steps
                    if steps == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    steps += 1
                    return call(*given, **named)
                return step
            os.fsync, shutil.rmtree = dying(os.fsync), dying(shutil.rmtree)
            for name in ("mkdir", "rename", "replace", "unlink", "write_bytes", "write_text"):
                setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
            fit_policy(inputs[0], inputs[1], COSTS, directory, 0, lambda _: None)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        version = load_usable(directory).policy.version if directory.exists() else ""
        found[kind].append([status, version])
        if status != -9:
            break
print(json.dumps(found))
"""


def test_a_fit_killed_at_any_step_leaves_the_old_policy_or_the_new_one(tmp_path: Path):
    rng = random.Random(0)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", [record(rng) for _ in range(30)])
    make_artifact(tmp_path / "old", "old")
    run = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for kind, before in (("replaced", "old"), ("new", "")):
        *killed, (status, fitted) = found[kind]
        assert status == 0
        assert {each for each, _ in killed} == {-9}
        versions = [version for _, version in killed]
        assert set(versions) == {before, fitted}
        # Old up to one step, new from there on.
        assert versions == sorted(versions, key=lambda version: version == fitted)
        # Four models and the document are written and synced before.
        assert versions.count(before) > 10
