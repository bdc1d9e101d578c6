"""Files of others: plain values, or one sentence with the file and the place."""

import os

import pytest

from asd.transport.files import DamagedFile, read_content
from asd.visible import one_line
from services.common.documents import numbered_lines, parse_json, parse_yaml


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("[1e999]", "too large"),
        ("1" * 5000, "too large"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('["\\ud800"]', "surrogate"),
        ("[" * 100_000, "levels deep"),
        ("[" * 101 + "]" * 101, "levels deep"),
        ('{"a":\n"b\x1b"}', "line 2, column 3"),
        ("", "line 1, column 1"),
        (b"[\xff]", "byte 1"),
    ],
)
def test_json_that_would_harm_a_reader_is_refused_in_a_line(text, says):
    with pytest.raises(DamagedFile) as refused:
        parse_json(text, "/a/config.json")
    assert says in str(refused.value)
    assert str(refused.value).startswith("/a/config.json")
    assert str(refused.value).isprintable()


def test_plain_json_is_read_as_it_is():
    text = '{"a": [1, -2.5, true, null, "\\ud83d\\ude00"], "most": 1000000000000000019884624838656}'
    assert parse_json(text, "x") == {
        "a": [1, -2.5, True, None, "😀"],
        "most": 1000000000000000019884624838656,
    }
    assert parse_json("[" * 100 + "]" * 100, "x")


_BOMB = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
_MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_BOMB, "more than"),
        (_MERGES, "more than"),
        ("a: &a [*a]", "within"),
        ("[" * 100_000, "levels deep"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: a is there twice"),
        ("a: 2001-99-99", "line 1, column 4: not of type timestamp"),
        ("a: !!int x", "not of type int"),
        ('a: !!int ""', "not of type int"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: \x1b", "character 3"),
        ('a: "\\ud800"', "surrogate"),
        ("a: [1, 2", "line 1"),
        (b"a: \xff", "byte 3"),
    ],
)
def test_yaml_that_would_harm_a_reader_is_refused_in_a_line(text, says):
    with pytest.raises(DamagedFile) as refused:
        parse_yaml(text, "/a/cascade.yaml")
    assert says in str(refused.value)
    assert str(refused.value).startswith("/a/cascade.yaml")
    assert str(refused.value).isprintable()


def test_yaml_with_an_anchor_is_read():
    text = "a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}"
    assert parse_yaml(text, "x") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }


def test_a_pipe_or_a_file_too_large_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedFile, match="pipe"):
        read_content(tmp_path / "pipe", 10)
    (tmp_path / "large").write_bytes(b"x" * 2049)
    with pytest.raises(DamagedFile, match="more than 2 KiB"):
        read_content(tmp_path / "large", 2048)
    with pytest.raises(IsADirectoryError):
        read_content(tmp_path, 10)


def test_of_a_line_without_end_only_so_much_is_read(tmp_path):
    (tmp_path / "lines").write_bytes(b"ab\n" + b"x" * 100 + b"\ncd")
    assert list(numbered_lines(tmp_path / "lines", 8)) == [(1, "ab\n"), (2, "x" * 8), (3, "cd")]


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("a\n\tb\x1b[2J\u202e") == "a\\n\\tb\\x1b[2J\\u202e"
    assert len(one_line("\x1b" * 10**6)) == 2000
