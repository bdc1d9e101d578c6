"""The file of a policy: its bytes, damage to it, its replacement by another one, and the form of 0.1."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asd.errors import ResourceExhausted
from policy_service.artifact import (
    Artifact,
    load_artifact,
    load_usable,
    pack,
    read_artifact,
    read_document,
    unpack,
)
from policy_service.document import Lineage, UnfitArtifact, document_text
from policy_service.store import PolicyStore, UnfitStore, check_output, open_policy, write_artifact
from tests.limits import PROCESS_S
from tests.unit.policy.test_fit import record, write
from tests.unit.policy.tiny_policy import (
    as_of_0_1,
    change_file,
    files_of,
    make_artifact,
    make_policy,
    write_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "policy_service" / "policy.zip"
# Of the policy.json that 0.1 shipped. It names each model with its SHA-256, which reading checks.
SHIPPED_BY_0_1 = "088687c411e1ba0974b76c92b3892b62679da2bb4816ce9c2aba74e7b8a8f5fe"


# What is in the file.


def test_the_shipped_policy_is_that_of_0_1_to_the_bit():
    artifact = read_artifact(SHIPPED)
    assert artifact.document.policy_version == "6c781246084d"
    assert hashlib.sha256(document_text(artifact.document).encode()).hexdigest() == SHIPPED_BY_0_1


def test_the_same_policy_makes_the_same_bytes():
    assert pack(read_artifact(SHIPPED)) == SHIPPED.read_bytes()
    artifact = make_policy("v1")
    backwards = Artifact(artifact.document, dict(reversed(artifact.models.items())))
    assert pack(backwards) == pack(artifact)


def test_what_is_packed_is_unpacked():
    artifact = make_policy("v1")
    assert unpack(pack(artifact), "policy.zip") == artifact


def test_a_directory_stands_for_the_policy_zip_in_it(tmp_path: Path):
    make_artifact(tmp_path / "policy.zip", "v1")
    assert load_artifact(tmp_path).policy.version == "v1"
    # It goes before what 0.1 has left there.
    as_of_0_1(make_artifact(tmp_path / "old.zip", "v0"), tmp_path / "both")
    assert load_artifact(tmp_path / "both").policy.version == "v0"
    make_artifact(tmp_path / "both" / "policy.zip", "v1")
    assert load_artifact(tmp_path / "both").policy.version == "v1"


# Damage.


def _twice(path: Path) -> None:
    files = files_of(path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("policy.json", files["policy.json"])


def _on_top_of_each_other(path: Path) -> None:
    """Have the directory name each model's content a hundred times more."""
    with zipfile.ZipFile(path, "a") as archive:
        big = max(archive.infolist(), key=lambda each: each.file_size)
        for number in range(100):
            entry = zipfile.ZipInfo(f"{number}.onnx")
            entry.file_size, entry.compress_size = big.file_size, big.compress_size
            entry.CRC, entry.header_offset = big.CRC, big.header_offset
            archive.filelist.append(entry)
        archive.writestr("one-more.onnx", b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b'"quality_values"') + 40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(b""), " is no policy of `asd-policy fit`"),
        (lambda path: path.write_bytes(b"{}" * 100), " is no policy of `asd-policy fit`"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), " is no policy of `asd-policy fit`"),
        (_flip, ": policy.json is damaged"),
        (_twice, " has a file twice"),
        (_on_top_of_each_other, " says that it holds more than its size"),
        (
            lambda path: write_files(path, files_of(path), zipfile.ZIP_DEFLATED),
            ": 'policy.json' is compressed",
        ),
        (lambda path: change_file(path, "more", b""), ": 'more' belongs to no view"),
        (lambda path: change_file(path, "../more", b""), ": '../more' belongs to no view"),
        (lambda path: change_file(path, "a\x1b[2J", b""), r": 'a\x1b[2J' belongs to no view"),
        (lambda path: write_files(path, {str(n): b"" for n in range(5000)}), " files in it"),
    ],
)
def test_a_damaged_file_is_refused_by_name(spoil: Callable[[Path], object], says: str, tmp_path: Path):
    path = make_artifact(tmp_path / "policy.zip", "v1")
    spoil(path)
    with pytest.raises(UnfitArtifact) as caught:
        read_artifact(path)
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_what_is_no_file_is_refused(tmp_path: Path):
    with pytest.raises(UnfitArtifact, match=r"policy\.zip"):
        read_artifact(tmp_path)
    with pytest.raises(UnfitArtifact, match="/dev/zero"):
        read_artifact(Path("/dev/zero"))


# Replacing.


def test_the_new_policy_takes_the_place_of_the_old_one(tmp_path: Path):
    served = tmp_path / "served"
    write_artifact(make_policy("v1", note="old"), served)
    new = make_policy("v2", note="new")
    write_artifact(new, served)
    assert read_artifact(served) == new
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_policy_that_cannot_be_served_changes_nothing(tmp_path: Path):
    served = make_artifact(tmp_path / "served", "v1")
    before = served.read_bytes()
    spoilt = Artifact(make_policy("v2").document, dict.fromkeys(make_policy("v2").models, b"cut off"))
    for path in (served, tmp_path / "fresh" / "deep"):
        with pytest.raises(UnfitArtifact):
            write_artifact(spoilt, path)
    assert served.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_disk_that_is_full_leaves_the_old_policy_alone(tmp_path: Path, monkeypatch):
    served = make_artifact(tmp_path / "served", "v1")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(ResourceExhausted):
            write_artifact(make_policy("v2"), served)
    assert load_usable(served).policy.version == "v1"
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_lineage_goes_with_its_policy(tmp_path: Path):
    lineage = Lineage(parent="v0", stages=())
    refitted = make_policy("v1")
    refitted = Artifact(refitted.document.model_copy(update={"lineage": lineage}), refitted.models)
    write_artifact(refitted, tmp_path / "served")
    assert read_document(tmp_path / "served").lineage == lineage
    write_artifact(make_policy("v2"), tmp_path / "served")
    assert read_document(tmp_path / "served").lineage is None


def test_places_that_cannot_be_are_refused_before_any_work(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "store" / "policies").mkdir(parents=True)
    for place in (file / "under", tmp_path / "store"):
        with pytest.raises(UnfitStore, match=str(place)):
            check_output(place)
    check_output(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


# Fits in a child that SIGKILL ends at the nth step that touches the disk, for every n. Prints how each ended
# and which policy the file then holds; "" for one that is not there. Then fits once more.
_KILLED = """
import json, os, pathlib, shutil, signal, sys
from policy_service.artifact import load_usable
from policy_service.train.dataset import read_dataset
from policy_service.train.fit import InputFile, fit_policy
from tests.unit.policy.test_fit import COSTS
work = pathlib.Path(sys.argv[1])
inputs = [InputFile(work / name, read_dataset(work / name, COSTS)) for name in ("a.parquet", "b.parquet")]
fit = lambda file: fit_policy(inputs[0], inputs[1], COSTS, file, 0, lambda _: None)
found = {}
for kind in ("replaced", "new"):
    found[kind] = []
    for last in range(1000):
        file = work / kind / str(last) / "policy.zip"
        file.parent.mkdir(parents=True)
        if kind == "replaced":
            shutil.copyfile(work / "old", file)
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
            os.fsync = dying(os.fsync)
            for name in ("mkdir", "open", "replace", "unlink"):
                setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
            fit(file)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found[kind].append([status, load_usable(file).policy.version if file.exists() else ""])
        if status != -9:
            break
        if kind == "new" and last == 3:
            fit(file)
            found["left"] = [path.name for path in file.parent.iterdir()]
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
    # The next fit takes what a killed one has left.
    assert found["left"] == ["policy.zip"]
    for kind, before in (("replaced", "old"), ("new", "")):
        *killed, (status, fitted) = found[kind]
        assert status == 0
        assert {each for each, _ in killed} == {-9}
        versions = [version for _, version in killed]
        assert set(versions) == {before, fitted}
        # Old up to one step, new from there on.
        assert versions == sorted(versions, key=lambda version: version == fitted)


# The form of 0.1. To be removed with it.


@pytest.fixture
def of_0_1(tmp_path: Path) -> Path:
    """A directory as 0.1 has written it: of a policy that was refitted."""
    directory = as_of_0_1(make_artifact(tmp_path / "made", "v1"), tmp_path / "of 0.1")
    (directory / "lineage.json").write_text('{"parent": "v0", "stages": []}')
    return directory


def test_the_form_of_0_1_is_read(of_0_1: Path, tmp_path: Path):
    old, new = read_artifact(of_0_1), read_artifact(tmp_path / "made")
    assert [*old.models.values()] == [*new.models.values()]
    assert old.document.lineage == Lineage(parent="v0", stages=())
    views = tuple(
        view.model_copy(update={"model": named.model})
        for view, named in zip(old.document.views, new.document.views, strict=True)
    )
    assert old.document.model_copy(update={"lineage": None, "views": views}) == new.document
    assert open_policy(of_0_1)[0].policy.version == "v1"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("policy.json", b"{}", ": schema_version is missing"),
        ("policy.json", b"{", " is not JSON"),
        ("1-0.*.onnx", b"x", " is not the model"),
        ("1-0.*.onnx", None, ": No such file"),
        ("lineage.json", b"no", " is not JSON"),
        ("lineage.json", b'{"parent": 1, "stages": []}', ": parent: "),
    ],
)
def test_damage_to_the_form_of_0_1_is_refused_by_name(
    file: str, content: bytes | None, says: str, of_0_1: Path
):
    [path] = of_0_1.glob(file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnfitArtifact) as caught:
        read_artifact(of_0_1)
    assert str(caught.value).startswith(f"{path}{says}")


def test_a_policy_in_a_directory_of_0_1_is_replaced_by_one_file(of_0_1: Path):
    write_artifact(make_policy("v2"), of_0_1)
    assert read_artifact(of_0_1) == read_artifact(of_0_1 / "policy.zip") == make_policy("v2")


def test_a_store_of_0_1_is_followed_and_its_versions_become_files(of_0_1: Path, tmp_path: Path):
    store = PolicyStore(tmp_path / "store")
    as_of_0_1(make_artifact(tmp_path / "v0", "v0"), store.directory / "policies" / "v0")
    shutil.copytree(of_0_1, store.directory / "policies" / "v1")
    history = [{"version": "v0", "since": 1.0}, {"version": "v1", "since": 2.0}]
    (store.directory / "current.json").write_text(json.dumps({"schema": "asd.policies", "history": history}))
    listed = [(each.version, each.parent, each.problem) for each in store.versions()]
    assert listed == [("v0", "", ""), ("v1", "v0", "")]
    assert open_policy(store.directory)[0].policy.version == "v1"
    assert store.rollback() == "v0"
    # The same policies, with models of other names.
    with pytest.raises(UnfitStore):
        store.publish(make_artifact(tmp_path / "other", "v0", offset=-1.0))
    store.publish(tmp_path / "v0")
    store.publish(of_0_1)
    assert store.history() == ("v0", "v1")
    for version in store.history():
        assert store.artifact(version) == store.directory / "policies" / f"{version}.zip"
        assert load_usable(store.artifact(version)).policy.version == version
