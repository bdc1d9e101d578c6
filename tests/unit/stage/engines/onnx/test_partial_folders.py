"""What an interrupted process left half done is removed; what another one is at stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from services.stage.engines.onnx.partial_folders import partial_folder, remove_left, remove_own
from tests.limits import CALL_S

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "0123456789abcdef" * 2
# Holds a folder until its standard input ends; then ends without tidying up.
HOLD = """
import os, sys
from pathlib import Path
from services.stage.engines.onnx.partial_folders import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
    os._exit(1)
"""


def test_a_folder_goes_with_the_block_or_by_its_new_name(tmp_path: Path) -> None:
    with partial_folder(tmp_path / DIGEST) as folder:
        (folder / "weights").write_text("x")
    assert not [*tmp_path.iterdir()]
    with partial_folder(tmp_path / DIGEST) as folder:
        folder.rename(tmp_path / DIGEST)
    assert [*tmp_path.iterdir()] == [tmp_path / DIGEST]


def test_a_folder_stays_while_its_process_lives_and_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / DIGEST)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        remove_left(tmp_path)
        assert [str(path) for path in tmp_path.iterdir()] == [folder]
        process.communicate(timeout=CALL_S)
    assert [str(path) for path in tmp_path.iterdir()] == [folder]
    remove_left(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_process_can_remove_what_it_is_filling(tmp_path: Path) -> None:
    with partial_folder(tmp_path / DIGEST) as folder:
        (folder / "weights").write_text("x")
        remove_own()
        assert not [*tmp_path.iterdir()]


def test_folders_without_a_lock_go_once_they_are_old(tmp_path: Path) -> None:
    new, old, busy = (tmp_path / f"{DIGEST}.{name}" for name in ("new", "old", "busy"))
    for folder in (new, old, busy, tmp_path / DIGEST, tmp_path / "other.things"):
        folder.mkdir()
        (folder / "weights").write_text("x")
    hours_ago = time.time() - 7300
    for path in (old / "weights", old, busy, tmp_path / DIGEST, tmp_path / "other.things"):
        os.utime(path, (hours_ago, hours_ago))
    remove_left(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, busy.name, DIGEST, "other.things"}


def test_a_folder_that_is_not_there_has_nothing_left(tmp_path: Path) -> None:
    remove_left(tmp_path / "absent")
