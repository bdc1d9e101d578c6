"""Prepared models in a cache that others share, that a crash has damaged, or whose disk is full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asd.errors import PreconditionFailed
from services.stage.engines.onnx import partial_folders
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.engines.onnx.export import prepare
from services.stage.engines.onnx.partial_folders import MANIFEST, find_damage, finish, partial_folder
from tests.fakes import tiny_llama
from tests.file_limit import limited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIGEST = "0123456789abcdef" * 2
NOBODY = 65534
# Arguments: the model, the cache, and what another cache and user may be. Becomes that user once all modules
# are imported: the interpreter may lie where only root may look.
PREPARE = """
import os, sys
from pathlib import Path
from asd.errors import AsdError
from services.stage.engines.onnx.export import prepare
if len(sys.argv) > 3:
    prepare(Path(sys.argv[1]), Path(sys.argv[3]))
    os.setgroups([])
    os.setgid(int(sys.argv[4]))
    os.setuid(int(sys.argv[4]))
try:
    print(prepare(Path(sys.argv[1]), Path(sys.argv[2])))
except AsdError as error:
    print(type(error).__name__, error.message)
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can reach, as tmp_path is not; a model lies in it."""
    folder = Path(tempfile.mkdtemp(prefix="asd-test-"))
    folder.chmod(0o755)
    tiny_llama.write(folder / "model")
    yield folder
    shutil.rmtree(folder)


def run(folder: Path, *further: str, most_bytes: int = resource.RLIM_INFINITY) -> str:
    ended = subprocess.run(
        limited(most_bytes, "-c", PREPARE, str(folder / "model"), str(folder / "cache"), *further),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert not ended.returncode, ended.stderr
    return ended.stdout.strip()


def as_nobody(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as other:
        return run(folder, other, str(NOBODY))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_are_those_that_the_umask_and_the_folder_above_leave(tmp_path: Path):
    tiny_llama.write(tmp_path / "model")
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2775)
    before = os.umask(0o027)
    try:
        form = prepare(tmp_path / "model", cache)
    finally:
        os.umask(before)
    assert mode(form) == 0o2750
    assert {mode(path) for path in form.iterdir()} == {0o640}


def spoil(path: Path) -> None:
    """Change a byte in the middle, as a failing disk does: the size stays."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [spoil, cut, Path.unlink])
@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "genai_config.json", MANIFEST])
def test_a_damaged_form_is_made_anew_and_the_log_says_so(
    damage: Callable[[Path], None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tiny_llama.write(tmp_path / "model")
    form = prepare(tmp_path / "model", tmp_path / "cache")
    damage(form / name)
    for _ in range(2):
        assert prepare(tmp_path / "model", tmp_path / "cache") == form
    assert find_damage(form, reads_all=True) is None
    assert [*form.parent.iterdir()] == [form]
    (told,) = caplog.records
    assert str(form) in told.getMessage()


def test_what_is_no_folder_gives_way(tmp_path: Path):
    tiny_llama.write(tmp_path / "model")
    form = prepare(tmp_path / "model", tmp_path / "cache")
    shutil.rmtree(form)
    form.write_text("x")
    assert prepare(tmp_path / "model", tmp_path / "cache") == form
    assert find_damage(form) is None


def test_content_of_large_files_is_compared_on_demand_alone(tmp_path: Path):
    target = tmp_path / DIGEST
    with partial_folder(target) as partial:
        with (partial / "weights").open("wb") as file:
            file.truncate((64 << 20) + 1)
        finish(partial, target)
    spoil(target / "weights")
    assert find_damage(target) is None
    assert find_damage(target, reads_all=True) is not None
    cut(target / "weights")
    assert find_damage(target) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda files: {},
        lambda files: {"../other": files["weights"]},
        lambda files: {"/etc/hostname": files["weights"]},
        lambda files: {"..": files["weights"]},
        lambda files: {"weights\x1b[2J\n": files["weights"]},
        lambda files: {"weights": ["\x1b[2J\r\n", "a"]},
        lambda files: {"weights": [1e308, None]},
        lambda files: {"weights": 1},
        lambda files: [*files],
    ],
)
def test_a_list_of_what_is_no_file_of_the_folder_is_damage_in_one_line(
    change: Callable[[dict[str, object]], object], tmp_path: Path
):
    target = tmp_path / DIGEST
    with partial_folder(target) as partial:
        (partial / "weights").write_text("x")
        finish(partial, target)
    (tmp_path / "other").write_text("x")
    files = json.loads((target / MANIFEST).read_text())["files"]
    (target / MANIFEST).write_text(json.dumps({"files": change(files)}))
    damage = find_damage(target)
    assert damage is not None
    assert damage.isprintable()


@pytest.mark.parametrize("name", ["weights", MANIFEST])
def test_a_pipe_in_the_place_of_a_prepared_file_blocks_nobody(name: str, tmp_path: Path):
    target = tmp_path / DIGEST
    with partial_folder(target) as partial:
        (partial / "weights").write_text("")
        finish(partial, target)
    (target / name).unlink()
    os.mkfifo(target / name)
    damage = find_damage(target)
    assert damage is not None
    assert "pipe" in damage


async def test_a_form_that_does_not_load_is_looked_through_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASD_CACHE_DIR", str(tmp_path / "cache"))
    tiny_llama.write(tmp_path / "model")
    form = prepare(tmp_path / "model", most_tokens=512)
    cut(form / "model.onnx")
    asked = []

    def prepare_unchecked(directory: Path, *, most_tokens: int | None, reads_all: bool) -> Path:
        # As where the damage is in the content of a large file.
        asked.append(reads_all)
        return prepare(directory, most_tokens=most_tokens, reads_all=True) if reads_all else form

    monkeypatch.setattr("services.stage.engines.onnx.engine.prepare", prepare_unchecked)
    engine = OnnxEngine("tiny", tmp_path / "model", OnnxOptions(max_model_len=512))
    await engine.load()
    await engine.unload()
    assert asked == [False, True]
    assert find_damage(form) is None


async def test_a_whole_form_that_does_not_load_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASD_CACHE_DIR", str(tmp_path / "cache"))
    tiny_llama.write(tmp_path / "model")

    def refuse() -> None:
        raise MemoryError("no room for the model")

    monkeypatch.setattr("services.stage.engines.onnx.engine.load_binding", refuse)
    engine = OnnxEngine("tiny", tmp_path / "model", OnnxOptions(max_model_len=512))
    with pytest.raises(PreconditionFailed, match="room"):
        await engine.load()
    (form,) = (tmp_path / "cache" / "onnx").iterdir()
    made = form.stat().st_ino
    with pytest.raises(PreconditionFailed):
        await engine.load()
    assert form.stat().st_ino == made


def test_a_folder_has_its_name_after_its_files_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target, synced = tmp_path / DIGEST, []
    monkeypatch.setattr(
        partial_folders, "sync", lambda path: synced.append((path, target.exists(), path.exists()))
    )
    with partial_folder(target) as partial:
        (partial / "weights").write_text("x")
        finish(partial, target)
    before = {path.name for path, is_named, _ in synced if not is_named}
    assert before == {"weights", MANIFEST, partial.name}
    assert synced[-1] == (tmp_path, True, True)


def test_processes_that_prepare_or_mend_the_same_at_once_do_no_harm(tmp_path: Path):
    tiny_llama.write(tmp_path / "model")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "model"), str(tmp_path / "cache")]
    for is_damaged in (False, True):
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        printed = {process.communicate(timeout=60)[0].strip() for process in started}
        (form,) = (tmp_path / "cache" / "onnx").iterdir()
        assert printed == {str(form)}
        assert find_damage(form, reads_all=True) is None
        if not is_damaged:
            spoil(form / "model.onnx.data")


def test_a_full_disk_is_one_sentence_and_nothing_is_left(tmp_path: Path):
    tiny_llama.write(tmp_path / "model")
    told = run(tmp_path, most_bytes=100_000)
    assert told.startswith("ResourceExhausted ")
    assert "cannot be written" in told
    assert "ASD_CACHE_DIR" in told
    assert not [*(tmp_path / "cache" / "onnx").iterdir()]


@needs_root
def test_another_user_reads_what_root_has_made(shared: Path):
    form = prepare(shared / "model", shared / "cache")
    assert as_nobody(shared) == str(form)


@needs_root
def test_another_user_is_told_what_to_do_where_the_cache_does_not_let_them(shared: Path):
    form = prepare(shared / "model", shared / "cache")
    form.chmod(0o700)
    assert as_nobody(shared).startswith(f"PreconditionFailed {form} is another")
    form.chmod(0o755)
    spoil(form / "model.onnx.data")
    told = as_nobody(shared)
    assert told.startswith(f"PreconditionFailed {form} cannot be written: ")
    assert "ASD_CACHE_DIR" in told


@needs_root
def test_another_user_mends_what_is_damaged_where_the_cache_is_for_all(shared: Path):
    form = prepare(shared / "model", shared / "cache")
    for folder in (shared / "cache", form.parent):
        folder.chmod(0o777)
    cut(form / "model.onnx.data")
    assert as_nobody(shared) == str(form)
    assert find_damage(form) is None
    assert form.stat().st_uid == NOBODY
