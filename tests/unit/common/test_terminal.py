"""What others wrote is shown and not executed, in any encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from services.common.terminal import LiteralConsole, escape_unseen, literal, visible

HOSTILE = "\x1b]52;c;Y2xpcA==\x07 \x1b[2J \x9b31m \r \b \x7f \u202e \u2066 \u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode, 😀, 👩\u200d👩\u200d👧, مرحبا", "plain, ünïcode, 😀, 👩\u200d👩\u200d👧, مرحبا"),
        ("a\nb\tc", "a\nb\tc"),
        ("a\r\nb", "a\nb"),
        ("secret\rpublic", "secret\\rpublic"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x00\x07\x08\x7f\x9b", "\\x00\\x07\\x08\\x7f\\x9b"),
        ("\u202etxt.exe\u2069", "\\u202etxt.exe\\u2069"),
        ("\udcff", "\\udcff"),
    ],
)
def test_controls_are_shown(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_a_terminal_executes_is_left(text):
    kinds = {unicodedata.category(each) for each in visible(text) if each not in "\n\t"}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    assert unicodedata.bidirectional("\u202e") not in {
        unicodedata.bidirectional(each) for each in visible(text)
    }


@given(st.text())
def test_json_holds_the_same_value_and_no_control(text):
    written = escape_unseen(json.dumps({"text": text}, ensure_ascii=False, indent=2))
    assert json.loads(written) == {"text": text}
    assert visible(written) == written


def test_a_console_takes_no_text_for_markup_or_control():
    file = io.StringIO()
    console = LiteralConsole(file=file, width=200, force_terminal=True, color_system=None)
    table = Table("column [bold]", title="title [/] :smile:")
    table.add_row(f"cell [link=x]y[/link] {HOSTILE}")
    for each in (f"text [red]r[/] {HOSTILE}", literal(f"other [b] {HOSTILE}"), table):
        console.print(each)
    with console.status(f"[bold]starting {HOSTILE}"):
        console.print("")
    text = file.getvalue()
    for word in ("[bold]", "[/] :smile:", "[link=x]y[/link]", "[red]r[/]", "[b]", "\\x1b]52;c;", "\\u202e"):
        assert word in text
    # Besides those of the spinner.
    assert "\x1b]" not in text
    assert not set(text) & set("\x07\x9b\x08\x7f\u202e\u2066\u2028")


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("utf-8", "é → 😀 ·".encode()),
        ("latin-1", b"\xe9 -> \\U0001f600 \xb7"),
        ("ascii", b"\\xe9 -> \\U0001f600 -"),
    ],
)
def test_characters_that_an_encoding_lacks_are_shown(encoding, written):
    code = (
        "import sys; from services.common.terminal import prepare_streams as w; w();"
        "[print('é → 😀 ·', file=f) for f in (sys.stdout, sys.stderr)]"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert result.stdout.rstrip() == result.stderr.rstrip() == written


def test_streams_that_are_closed_end_no_program():
    code = (
        "import sys; sys.stdin = sys.stdout = sys.stderr = None;"
        "from services.common.terminal import prepare_streams as p; p(); print(sys.stdin.read())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (result.stdout, result.stderr) == (b"", b"")
