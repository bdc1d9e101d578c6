"""Lines on a disk that fills up: whole or not there, and none is glued to another."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from asd.errors import PreconditionFailed, ResourceExhausted
from services.common.line_log import LineLog, parse_lines
from tests.fakes.full_disk import FullFile
from tests.file_limit import limited

if TYPE_CHECKING:
    from pathlib import Path


def log_of(file: FullFile, tmp_path: Path) -> LineLog:
    return LineLog(tmp_path / "log", opened=file.opened)


@pytest.mark.parametrize("room", range(4, 12))
def test_a_line_that_does_not_fit_leaves_nothing_wherever_the_disk_ends(room: int, tmp_path: Path):
    file = FullFile(b"one\n", room)
    log = log_of(file, tmp_path)
    with pytest.raises(ResourceExhausted):
        log.append("second line")
    assert file.content == b"one\n"
    file.room = 100
    log.append("third")
    assert file.content == b"one\nthird\n"
    assert log.size == len(file.content)


def test_what_cannot_be_cut_off_is_ended_before_the_next_line(tmp_path: Path):
    file = FullFile(b"one\n", 8, may_cut=False)
    log = log_of(file, tmp_path)
    with pytest.raises(PreconditionFailed):
        log.append("second line")
    file.room = 100
    log.append("third")
    assert file.content == b"one\nseco\nthird\n"


def test_a_line_that_an_earlier_process_left_cut_is_ended(tmp_path: Path):
    file = FullFile(b"one\ntw", 100)
    log_of(file, tmp_path).append("three")
    assert file.content == b"one\ntw\nthree\n"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EFBIG, ResourceExhausted),
        (errno.EIO, PreconditionFailed),
        (errno.EROFS, PreconditionFailed),
        (errno.EACCES, PreconditionFailed),
        (errno.ESTALE, PreconditionFailed),
    ],
)
def test_what_fails_is_told_with_the_file_and_logged_once_until_it_works(
    number: int, kind: type[Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = FullFile(b"", 0, number)
    log = log_of(file, tmp_path)
    for _ in range(3):
        with pytest.raises(kind, match=f"{tmp_path / 'log'} cannot be written: "):
            log.append("line")
    file.room = 100
    log.append("line")
    log.append("line")
    assert [each.levelno for each in caplog.records] == [logging.ERROR, logging.WARNING]
    assert caplog.records[1].args == (tmp_path / "log", 3)


def test_a_full_disk_does_not_keep_it_from_being_opened_and_others_do(tmp_path: Path):
    def failing(number: int):
        def opened(path: Path):
            raise OSError(number, os.strerror(number))

        return opened

    log = LineLog(tmp_path / "log", opened=failing(errno.ENOSPC))
    with pytest.raises(ResourceExhausted):
        log.append("line")
    with pytest.raises(OSError, match="Permission"):
        LineLog(tmp_path / "log", opened=failing(errno.EACCES))


def test_on_a_real_file_that_may_not_grow_nothing_is_lost(tmp_path: Path):
    path = tmp_path / "log"
    code = (
        "import sys; from pathlib import Path\n"
        "from asd.errors import ResourceExhausted\n"
        "from services.common.line_log import LineLog\n"
        "log = LineLog(Path(sys.argv[1]))\n"
        "taken = 0\n"
        "try:\n"
        "    while True:\n"
        "        log.append('x' * 299); taken += 1\n"
        "except ResourceExhausted:\n"
        "    print(taken)\n"
    )
    ended = subprocess.run(
        limited(1_000, "-c", code, str(path)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout == "3\n"
    assert path.stat().st_size == 900
    LineLog(path).append("y")
    assert [len(line) for line in path.read_text().splitlines()] == [299, 299, 299, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_on_a_real_disk_that_is_full_the_line_after_it_is_whole(tmp_path: Path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        filler, path = tmp_path / "filler", tmp_path / "log"
        log = LineLog(path)
        log.append("x" * 3000)
        filler.write_bytes(b"0" * (14 * 4096))
        with pytest.raises(ResourceExhausted, match="disk is full"):
            log.append("y" * 9000)
        filler.unlink()
        log.append("z")
        assert [line[:1] + str(len(line)) for line in path.read_text().splitlines()] == ["x3000", "z1"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def parsed(path: Path) -> tuple[list[int], list[tuple[int, int]]]:
    def parse(line: str) -> int:
        number = json.loads(line)["n"]
        if not isinstance(number, int):
            raise TypeError("no number")
        return number

    damage: list[tuple[int, int]] = []
    return list(parse_lines(path, parse, lambda count, first: damage.append((count, first)))), damage


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        (b'{"n":2,"text":"cu{"n":3}', [1, 3, 4]),
        (b'{"n":2,"tex{"n":5,"te{"n":3}', [1, 3, 4]),
        (b'\0\0\0\0{"n":3}', [1, 3, 4]),
        (b'{"n":2', [1, 4]),
        (b'{"n":"2"}', [1, 4]),
        (b"\xff\xfe", [1, 4]),
        (b"[" * 100_000, [1, 4]),
        (b'{"' * 100_000, [1, 4]),
    ],
    ids=["glued", "glued twice", "zeros", "cut", "other type", "no text", "nested", "many beginnings"],
)
def test_a_damaged_line_is_counted_and_what_is_whole_behind_it_is_read(
    damaged: bytes, kept: list[int], tmp_path: Path
):
    path = tmp_path / "lines"
    path.write_bytes(b'{"n":1}\n' + damaged + b'\n{"n":4}\n')
    assert parsed(path) == (kept, [(1, 2)])


def test_lines_that_are_whole_are_no_damage(tmp_path: Path):
    path = tmp_path / "lines"
    path.write_text('{"n":1}\n\n{"n":2}')
    assert parsed(path) == ([1, 2], [])
