"""What is written whole or not at all, and what is said where it is not."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from asd.errors import PreconditionFailed, ResourceExhausted
from services.common.disks import cannot_write, explain, replace_file, writing
from tests.file_limit import limited

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_lack_of_space_may_pass(number: int, tmp_path: Path):
    with (
        pytest.raises(ResourceExhausted, match=f"^{tmp_path} cannot be written: "),
        writing(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR])
def test_what_does_not_pass_is_told_apart(number: int, tmp_path: Path):
    with pytest.raises(PreconditionFailed, match=r"(or|:) pick another$"), writing(tmp_path, "pick another"):
        raise OSError(number, os.strerror(number))


def test_a_sentence_a_user_reads(tmp_path: Path):
    told = cannot_write(tmp_path, OSError(errno.ENOSPC, "No space left on device"), "name another file")
    assert (
        told.message
        == f"{tmp_path} cannot be written: the disk is full: make room there or name another file"
    )
    assert explain(OSError(errno.ENOENT, "No such file", "a")) == "a: no such file"


def test_a_file_is_replaced_with_its_mode_and_links_stay_links(tmp_path: Path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    replace_file(link, "new")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o640)
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    replace_file(link, "new")
    assert link.is_char_device()
    link.unlink()
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        replace_file(link, "new")


def test_what_was_there_stays_where_there_is_no_room_for_its_successor(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("old")
    code = (
        "import sys; from pathlib import Path; from services.common.disks import replace_file\n"
        "try:\n    replace_file(Path(sys.argv[1]), 'x' * 10_000)\nexcept OSError as error: print(error.errno)"
    )
    ended = subprocess.run(
        limited(5_000, "-c", code, str(file)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout == f"{errno.EFBIG}\n"
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_one_who_writes_alone_leaves_nothing_of_a_killed_writer(tmp_path: Path):
    file = tmp_path / "file"
    replace_file(file, "before", is_alone=True)
    (tmp_path / ".file.partial").write_text("of one that was killed, and longer")
    replace_file(file, "after", is_alone=True)
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_text() == "after"
