"""Versions of a policy: published whole or not at all, rolled back, followed, refused."""

from __future__ import annotations

import asyncio
import copy
import fcntl
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from policy_service.artifact import load_usable, read_document
from policy_service.document import UnfitArtifact
from policy_service.store import (
    PolicyStore,
    PolicyWatch,
    UnfitStore,
    artifact_in,
    follow,
    open_policy,
)
from tests.limits import PROCESS_S
from tests.unit.policy.tiny_policy import (
    change_document,
    change_file,
    files_of,
    make_artifact,
    make_policy,
    write_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "policy_service" / "policy.zip"
# A pointer that does not say that it is one.
NAMELESS = '{"history": [{"version": "v2", "since": 1.0}]}'


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    """A store of v1 and v2, of which v2 is in force since second 101."""
    times = iter(range(100, 200))
    store = PolicyStore(tmp_path / "store", clock=lambda: next(times))
    for name in ("v1", "v2"):
        store.publish(make_artifact(tmp_path / name, name))
    return store


def break_model(store: PolicyStore, version: str) -> None:
    change_file(store.artifact(version), "0-None.onnx", b"cut off")


def test_a_published_policy_is_in_force_and_the_one_before_is_kept(store: PolicyStore, tmp_path: Path):
    assert store.history() == ("v1", "v2")
    loaded, opened = open_policy(store.directory)
    assert loaded.policy.version == "v2"
    assert opened is not None
    listed = [(each.version, each.since, each.is_current, each.prompts) for each in store.versions()]
    assert listed == [("v1", 100.0, False, 300), ("v2", 101.0, True, 300)]
    # What it was copied from may go.
    (tmp_path / "v2").unlink()
    assert open_policy(store.directory)[0].policy.version == "v2"


def test_an_artifact_is_opened_as_before(tmp_path: Path):
    loaded, store = open_policy(make_artifact(tmp_path / "a", "v7"))
    assert (loaded.policy.version, store) == ("v7", None)


def test_publishing_again_changes_nothing_and_another_content_is_refused(store: PolicyStore, tmp_path: Path):
    store.publish(tmp_path / "v2")
    assert store.history() == ("v1", "v2")
    other = make_artifact(tmp_path / "other", "v2", offset=-1.0)
    with pytest.raises(UnfitStore):
        store.publish(other)
    assert store.history() == ("v1", "v2")


def test_rollback_goes_back_step_by_step_and_to_any_version(store: PolicyStore, tmp_path: Path):
    store.publish(make_artifact(tmp_path / "v3", "v3"))
    assert store.rollback() == "v2"
    assert store.rollback() == "v1"
    with pytest.raises(UnfitStore, match="v1"):
        store.rollback()
    assert store.rollback("v3") == "v3"
    assert store.history() == ("v1", "v3")
    assert store.rollback() == "v1"
    store.rollback("v2")
    store.rollback("v3")
    assert store.rollback("v1") == "v1"
    # It was in force before the two, so they are undone with what follows it.
    assert store.history() == ("v1",)
    with pytest.raises(UnfitStore, match="v1, v2, v3"):
        store.rollback("v9")


def test_rollback_to_what_cannot_be_served_is_refused(store: PolicyStore):
    break_model(store, "v1")
    with pytest.raises(UnfitArtifact, match=r"0-None\.onnx"):
        store.rollback()
    assert store.current() == "v2"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.unlink(), "v3"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "v3"),
        (lambda path: change_file(path, "policy.json", None), r"v3.* policy\.json"),
        (lambda path: change_file(path, "policy.json", b"{}"), r"v3: policy\.json: schema_version"),
        (lambda path: change_file(path, "1-0.onnx", b"x"), r"v3: 1-0\.onnx"),
        (lambda path: change_file(path, "1-0.onnx", None), r"v3.* 1-0\.onnx"),
    ],
)
def test_what_cannot_be_served_is_not_published(spoil, named, store: PolicyStore, tmp_path: Path):
    artifact = make_artifact(tmp_path / "v3", "v3")
    spoil(artifact)
    with pytest.raises(UnfitArtifact, match=named):
        store.publish(artifact)
    assert store.history() == ("v1", "v2")
    assert store.names() == ("v1", "v2")
    # What was left of the attempt does not stand in the way.
    store.publish(make_artifact(tmp_path / "v3", "v3"))
    assert store.current() == "v3"


def _without(key: str) -> Callable[[Any], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


def _with(place: str, value: object) -> Callable[[Any], Any]:
    """Return what sets an entry, such as stages.0.cost, to a value."""

    def change(content: Any) -> Any:
        *path, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
        entry = content
        for part in path:
            entry = entry[part]
        entry[last] = value
        return content

    return change


def _change_pointer(store: PolicyStore, change: Callable[[Any], Any]) -> None:
    file = store.directory / "current.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def _refusal(store: PolicyStore, artifact: Path) -> str:
    """Return why an artifact is not published, which it must not be."""
    with pytest.raises(UnfitArtifact) as caught:
        store.publish(artifact)
    assert artifact.name not in store.names()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_without("schema_version"), "schema_version"),
        (_without("schema"), "schema:"),
        (_with("schema_version", 2.0), "schema_version"),
        (_with("schema_version", "2"), "schema_version"),
        (_with("schema_version", None), "schema_version"),
        (_with("schema_version", "\x1b[31m"), "schema_version"),
    ],
)
def test_a_document_that_does_not_say_what_it_is_is_not_published(
    change, field, store: PolicyStore, tmp_path: Path
):
    artifact = make_artifact(tmp_path / "v3", "v3")
    change_document(artifact, change)
    said = _refusal(store, artifact)
    assert said.startswith(f"{artifact}: policy.json: {field}")
    assert said.isprintable()


def _numbers(content: Any, place: str = "") -> Iterator[str]:
    """Yield the place of each number of a document, of alike entries of a list the first one's."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{place}{key}.")
    elif isinstance(content, list):
        yield from (each for value in content[:1] for each in _numbers(value, f"{place}0."))
    elif isinstance(content, int | float):
        yield place[:-1]


def test_true_is_no_number_in_an_artifact(tmp_path: Path):
    content = json.loads(files_of(SHIPPED)["policy.json"])
    artifact = tmp_path / "policy.zip"
    places = list(_numbers(content))
    assert {"stages.0.cost", "seed", "train.prompts", "family.threshold"} <= set(places)
    assert {"views.0.p_correct.0", "views.0.moves.0.transition.0.0", "views.0.cells.counts.0"} <= set(places)
    for place in places:
        for wrong in (True, False):
            changed = _with(place, wrong)(copy.deepcopy(content))
            write_files(artifact, {"policy.json": json.dumps(changed).encode()})
            with pytest.raises(UnfitArtifact) as caught:
                read_document(artifact)
            assert str(caught.value).startswith(f"{artifact}: policy.json: {place}"), place


def _texts(content: Any, place: str = "") -> Iterator[str]:
    """Yield the place of each text of a document, as _numbers."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _texts(value, f"{place}{key}.")
    elif isinstance(content, list):
        yield from (each for value in content[:1] for each in _texts(value, f"{place}0."))
    elif isinstance(content, str):
        yield place[:-1]


def test_no_text_of_an_artifact_has_what_a_terminal_would_execute(tmp_path: Path):
    content = json.loads(files_of(SHIPPED)["policy.json"])
    artifact = tmp_path / "policy.zip"
    places = list(_texts(content))
    assert {"train.file", "train.sha256", "calibration.file", "views.0.model", "views.0.sha256"} <= set(
        places
    )
    for place in places:
        for wrong in ("a\x1b[2Jb", "a\nb", "a\u202eb"):
            changed = _with(place, wrong)(copy.deepcopy(content))
            write_files(artifact, {"policy.json": json.dumps(changed).encode()})
            with pytest.raises(UnfitArtifact) as caught:
                read_document(artifact)
            said = str(caught.value)
            assert said.startswith(f"{artifact}: policy.json: "), place
            assert said.isprintable(), place
            # Of texts that name a stage, the view is named, which holds them.
            assert place.rsplit(".", 1)[0].replace(".", "") in said.replace("[", "").replace(".", ""), place


@pytest.mark.parametrize("wrong", ["", "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_a_digest_is_one(wrong, store: PolicyStore, tmp_path: Path):
    artifact = make_artifact(tmp_path / "v3", "v3")
    change_document(artifact, _with("train.sha256", wrong))
    assert _refusal(store, artifact).startswith(f"{artifact}: policy.json: train.sha256: ")


@pytest.mark.parametrize("wrong", ["v2\x1b[2J", "../policies/v2", "v2\n"])
def test_the_version_in_force_is_a_name(wrong, store: PolicyStore):
    _change_pointer(store, _with("history.1.version", wrong))
    with pytest.raises(UnfitStore):
        store.current()


@pytest.mark.parametrize("wrong", [-1, 1e15])
def test_a_version_is_in_force_since_a_time_that_can_be_shown(wrong, store: PolicyStore):
    _change_pointer(store, _with("history.1.since", wrong))
    with pytest.raises(UnfitStore):
        store.current()


def test_true_is_no_number_in_a_store(store: PolicyStore, tmp_path: Path):
    artifact = make_artifact(tmp_path / "v3", "v3")
    stage = {"stage": "small", "reports": 5, "slope": 1, "offset": 0.5}
    for key, wrong in (("reports", True), ("slope", True), ("offset", False), ("slope", "1")):
        lineage = {"parent": "v2", "stages": [{**stage, key: wrong}]}
        change_document(artifact, _with("lineage", lineage))
        with pytest.raises(UnfitArtifact, match=rf"policy\.json: lineage\.stages\.0\.{key}: "):
            read_document(artifact)
    change_document(artifact, _with("lineage", {"parent": "v2", "stages": [stage]}))
    assert read_document(artifact).lineage is not None
    _change_pointer(store, _with("history.0.since", True))
    with pytest.raises(UnfitStore):
        store.current()


def test_a_policy_with_the_model_of_another_view_is_not_published(store: PolicyStore, tmp_path: Path):
    artifact = make_artifact(tmp_path / "v3", "v3")
    change_file(artifact, "1-0.onnx", None)

    def use_another(document: Any) -> Any:
        by_name = {view["model"]: view for view in document["views"]}
        # The model of another view has a head too many.
        by_name["1-0.onnx"].update({key: by_name["0-None.onnx"][key] for key in ("model", "sha256")})
        return document

    change_document(artifact, use_another)
    with pytest.raises(UnfitArtifact, match=r"0-None\.onnx"):
        store.publish(artifact)
    assert store.current() == "v2"


def test_a_file_that_holds_another_version_than_its_name_is_refused(store: PolicyStore):
    store.artifact("v2").rename(store.artifact("v3"))
    store.artifact("v1").rename(store.artifact("v2"))
    with pytest.raises(UnfitStore, match=r"v2\.zip .*v1"):
        open_policy(store.directory)


def test_names_that_lead_out_of_the_store_are_refused(store: PolicyStore, tmp_path: Path):
    with pytest.raises(UnfitStore, match=r"\.\./v3"):
        store.publish(make_artifact(tmp_path / "odd", "../v3"))
    artifact = make_artifact(tmp_path / "v3", "v3")
    change_document(artifact, _with("views.0.model", "../v3/None-None.onnx"))
    with pytest.raises(UnfitArtifact, match="views"):
        store.publish(artifact)


def test_a_policy_of_another_cascade_is_refused(store: PolicyStore, tmp_path: Path):
    other = make_artifact(tmp_path / "v3", "v3", stages=("small", "medium", "large"))
    with pytest.raises(UnfitStore, match="small, medium, large"):
        store.publish(other)
    with pytest.raises(UnfitStore, match="a, b"):
        open_policy(store.directory, ("a", "b"))
    with pytest.raises(UnfitStore, match="a, b"):
        open_policy(other, ("a", "b"))
    assert open_policy(other, ("small", "medium", "large"))[0].policy.version == "v3"


def test_an_artifact_is_no_store(tmp_path: Path):
    artifact = make_artifact(tmp_path / "v1" / "policy.zip", "v1")
    with pytest.raises(UnfitStore):
        PolicyStore(artifact.parent).publish(artifact)
    with pytest.raises(UnfitStore):
        PolicyStore(artifact).publish(artifact)


def test_a_store_without_a_policy_says_how_to_publish_one(tmp_path: Path):
    (tmp_path / "policies").mkdir()
    with pytest.raises(UnfitStore, match="asd-policy publish"):
        open_policy(tmp_path)
    with pytest.raises(UnfitArtifact, match="nowhere"):
        open_policy(tmp_path / "nowhere")
    (tmp_path / "current.json").write_text('{"schema": "asd.policies", "history": []}')
    with pytest.raises(UnfitStore):
        open_policy(tmp_path)


def test_two_cannot_change_a_store_at_once(store: PolicyStore):
    with (store.directory / ".lock").open("w") as held:
        # Even one that only reads with the lock held keeps a writer out.
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(UnfitStore):
            store.rollback()
    assert store.rollback() == "v1"


def test_at_start_the_last_policy_that_can_be_served_stands_in(store: PolicyStore, caplog):
    break_model(store, "v2")
    assert open_policy(store.directory)[0].policy.version == "v1"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.index("v1") < said.index("v2")
    break_model(store, "v1")
    with pytest.raises(UnfitArtifact, match="v2"):
        open_policy(store.directory)


# Publishes in a child that ends at the nth step that touches the disk, for every n, as a kill would end it:
# no handler of an exception and no `finally` runs. Prints for each what the store then has in force, and what
# it has after publishing anew.
_KILLED = """
import json, os, pathlib, shutil, sys
from policy_service.store import PolicyStore, open_policy
source, work = map(pathlib.Path, sys.argv[1:])
found = []
for last in range(1000):
    directory = work / str(last)
    shutil.copytree(source / "store", directory)
    child = os.fork()
    if child == 0:
        steps = 0
        def dying(call):
            def step(*given, **named):
                global steps
                if steps == last:
                    os._exit(9)
                steps += 1
                return call(*given, **named)
            return step
        os.fsync = dying(os.fsync)
        for name in ("mkdir", "open", "replace", "unlink"):
            setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
        PolicyStore(directory).publish(source / "v3")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    in_force = open_policy(directory)[0].policy.version
    PolicyStore(directory).publish(source / "v3")
    found.append([status, in_force, open_policy(directory)[0].policy.version])
    if status == 0:
        break
print(json.dumps(found))
"""


def test_publishing_killed_at_any_step_leaves_the_last_good_policy(store: PolicyStore, tmp_path: Path):
    make_artifact(tmp_path / "v3", "v3")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", _KILLED, str(tmp_path), str(tmp_path / "work")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # Of the artifact and of the pointer: written, synced, renamed, and the rename synced.
    assert len(found) > 8
    assert {status for status, _, _ in found} == {0, 9}
    in_force = [version for _, version, _ in found]
    assert in_force == sorted(in_force)
    assert set(in_force) == {"v2", "v3"}
    assert {after for _, _, after in found} == {"v3"}
    # The old one up to the pointer's rename; what follows is its sync.
    assert in_force.count("v3") == 2


def test_a_watch_hands_over_each_new_policy_once(store: PolicyStore, tmp_path: Path):
    watch = PolicyWatch(store, open_policy(store.directory)[0])
    assert watch.poll() is None
    store.publish(make_artifact(tmp_path / "v3", "v3"))
    loaded = watch.poll()
    assert loaded is not None
    assert loaded.policy.version == "v3"
    assert watch.poll() is None
    store.rollback()
    loaded = watch.poll()
    assert loaded is not None
    assert loaded.policy.version == "v2"


def test_a_watch_refuses_a_bad_version_once_in_the_log_and_takes_it_when_it_is_mended(
    store: PolicyStore, tmp_path: Path, caplog
):
    watch = PolicyWatch(store, open_policy(store.directory)[0])
    store.publish(make_artifact(tmp_path / "v3", "v3"))
    whole = store.artifact("v3").read_bytes()
    break_model(store, "v3")
    with caplog.at_level(logging.ERROR):
        assert [watch.poll(), watch.poll()] == [None, None]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.index("v2") < said.index("0-None.onnx")
    store.artifact("v3").write_bytes(whole)
    loaded = watch.poll()
    assert loaded is not None
    assert loaded.policy.version == "v3"


@pytest.mark.parametrize(
    "content", [None, "{", '{"schema": "asd.policies", "history": [{"version": "../x"}]}']
)
def test_a_watch_outlives_a_pointer_that_cannot_be_read(content, store: PolicyStore, caplog):
    watch = PolicyWatch(store, open_policy(store.directory)[0])
    pointer = store.directory / "current.json"
    kept = pointer.read_text()
    if content is None:
        pointer.unlink()
    else:
        pointer.write_text(content)
    assert watch.poll() is None
    assert "policy v2" in caplog.text
    pointer.write_text(kept)
    assert watch.poll() is None


def test_a_watch_refuses_another_cascade(store: PolicyStore, tmp_path: Path, caplog):
    watch = PolicyWatch(store, open_policy(store.directory)[0])
    other = make_artifact(tmp_path / "v3", "v3", stages=("small", "medium", "large"))
    other.rename(store.artifact("v3"))
    pointer = store.directory / "current.json"
    pointer.write_text(pointer.read_text().replace('"v2"', '"v3"'))
    assert watch.poll() is None
    assert "small, medium, large" in caplog.text


async def test_following_hands_over_between_sleeps(store: PolicyStore, tmp_path: Path):
    watch = PolicyWatch(store, open_policy(store.directory)[0])
    slept, used = [], []
    store.publish(make_artifact(tmp_path / "v3", "v3"))

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await follow(watch, lambda policy, document: used.append((policy.version, document)), 7.5, sleep)
    assert slept == [7.5] * 3
    assert [version for version, _ in used] == ["v3"]


def test_a_usable_policy_has_solved_what_its_first_requests_need(tmp_path: Path, monkeypatch):
    from policy_service import policy as module
    from policy_service.domain import PolicyObjective
    from policy_service.features import PromptText

    loaded = load_usable(make_artifact(tmp_path / "v1", "v1"))

    def solve(*_: object, **__: object) -> None:
        raise AssertionError("it has to solve again")

    monkeypatch.setattr(module, "solve_policy", solve)
    assert loaded.policy.plan(PromptText("What?"), PolicyObjective(), {}).first_stage == 0


def test_publishing_mends_a_version_that_is_damaged(store: PolicyStore, tmp_path: Path):
    break_model(store, "v2")
    change_file(store.artifact("v1"), "policy.json", b"{")
    assert store.publish(tmp_path / "v2").policy_version == "v2"
    assert load_usable(store.artifact("v2")).policy.version == "v2"
    assert store.history() == ("v1", "v2")
    store.publish(tmp_path / "v1")
    assert [each.problem for each in store.versions()] == ["", ""]
    # Nothing is left of what was damaged.
    assert {path.name for path in (store.directory / "policies").iterdir()} == {"v1.zip", "v2.zip"}


def test_a_damaged_version_in_force_keeps_none_from_being_published(store: PolicyStore, tmp_path: Path):
    store.artifact("v2").unlink()
    other = make_artifact(tmp_path / "other", "other", stages=("small", "medium", "large"))
    # The cascade is still known from v1.
    with pytest.raises(UnfitStore, match=r"v1 .*small, large"):
        store.publish(other)
    store.publish(make_artifact(tmp_path / "v3", "v3"))
    assert store.history() == ("v1", "v2", "v3")
    with pytest.raises(UnfitStore, match=r"asd-policy versions.* v2"):
        store.rollback()
    assert store.rollback("v1") == "v1"


@pytest.mark.parametrize(
    "content", [None, "{", '{"schema": "asd.policies", "history": []}', "\x00" * 40, NAMELESS]
)
def test_a_pointer_that_is_damaged_says_what_mends_it_and_that_does(
    content, store: PolicyStore, tmp_path: Path
):
    pointer = store.directory / "current.json"

    def damage() -> None:
        pointer.unlink()
        if content is not None:
            pointer.write_text(content)

    damage()
    for act in (store.current, store.rollback, lambda: open_policy(store.directory)):
        with pytest.raises(UnfitStore) as caught:
            act()
        said = str(caught.value)
        assert "v1, v2" in said
        assert f"`asd-policy rollback {store.directory} --to VERSION`" in said
        assert f"`asd-policy publish ARTIFACT {store.directory}`" in said
    assert [(each.version, each.is_current) for each in store.versions()] == [("v1", False), ("v2", False)]
    assert store.rollback("v1") == "v1"
    assert store.history() == ("v1",)
    if content is not None:
        # What it said is not lost.
        assert (store.directory / "current.json.damaged").read_text() == content
    damage()
    store.publish(tmp_path / "v2")
    assert store.history() == ("v2",)
    assert open_policy(store.directory)[0].policy.version == "v2"


def test_damaged_versions_are_listed_with_what_is_wrong(store: PolicyStore):
    break_model(store, "v1")
    change_document(store.artifact("v2"), _with("lineage", "no"))
    (store.directory / "policies" / "v3.zip").write_text("no zip")
    first, second, third = store.versions()
    assert (first.since, first.prompts) == (100.0, 300)
    assert "0-None.onnx" in first.problem
    assert second.is_current
    assert "lineage" in second.problem
    assert "v3" in third.problem


def test_what_killed_publishes_left_is_removed_and_versions_stay(store: PolicyStore, tmp_path: Path):
    policies = store.directory / "policies"
    (policies / ".v9.zip.partial").write_bytes(b"PK")
    # Also where the version is there already, and nothing is copied.
    store.publish(tmp_path / "v2")
    assert {path.name for path in policies.iterdir()} == {"v1.zip", "v2.zip"}


def test_a_store_that_is_not_there_is_not_made_by_what_fails(tmp_path: Path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UnfitStore, match="nowhere"):
        PolicyStore(nowhere).rollback()
    with pytest.raises(UnfitStore, match="nowhere"):
        PolicyStore(nowhere).versions()
    spoilt = make_artifact(tmp_path / "v1", "v1")
    change_file(spoilt, "1-0.onnx", b"x")
    with pytest.raises(UnfitArtifact, match=r"1-0\.onnx"):
        PolicyStore(nowhere).publish(spoilt)
    assert not nowhere.exists()


def test_a_store_stands_for_its_version_in_force(store: PolicyStore, tmp_path: Path):
    assert artifact_in(store.directory) == store.artifact("v2")
    assert artifact_in(tmp_path / "v1") == tmp_path / "v1"
    store.artifact("v2").unlink()
    with pytest.raises(UnfitStore, match=r"v2.* `asd-policy rollback"):
        artifact_in(store.directory)


def test_a_policy_whose_model_does_not_load_is_not_published(store: PolicyStore, tmp_path: Path):
    model = onnx.load_from_string(make_policy("v3").models["1-0.onnx"])
    model.opset_import[0].version = 9999
    content = model.SerializeToString()
    artifact = make_artifact(tmp_path / "v3", "v3")
    change_file(artifact, "1-0.onnx", content)

    def name_it(document: Any) -> Any:
        (view,) = [each for each in document["views"] if each["model"] == "1-0.onnx"]
        view["sha256"] = hashlib.sha256(content).hexdigest()
        return document

    change_document(artifact, name_it)
    assert _refusal(store, artifact).startswith(f"{artifact}: ")
