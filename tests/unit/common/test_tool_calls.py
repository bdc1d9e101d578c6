"""Tool calls are found in what a model writes, and what is none stays text."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.common.tool_calls import ToolCallReader, WrittenCall, read_tool_calls

TOOLS = ("weather", "now")
WEATHER = '{"name": "weather", "arguments": {"city": "Köln"}}'
NOW = '{"name": "now", "parameters": {}}'
AT_KOELN, AT_ONCE = WrittenCall("weather", '{"city": "Köln"}'), WrittenCall("now", "{}")


def _tagged(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (_tagged(WEATHER), "", (AT_KOELN,)),
        (f"I look.\n\n{_tagged(WEATHER)}\n{_tagged(NOW)} \n Done. ", "I look.Done. ", (AT_KOELN, AT_ONCE)),
        (f"I look. <tool_call>{WEATHER}", "I look.", (AT_KOELN,)),
        (WEATHER, "", (AT_KOELN,)),
        (f" <|python_tag|>{NOW}\n", "", (AT_ONCE,)),
        (f"{WEATHER}; {NOW}", "", (AT_KOELN, AT_ONCE)),
        ('{"type": "function", "name": "now", "parameters": {}}', "", (AT_ONCE,)),
        # Text of a string is not the end of a call.
        (_tagged('{"name": "now", "arguments": {"a": "}</tool_call>\\"{"}}'), "",
         (WrittenCall("now", '{"a": "}</tool_call>\\"{"}'),)),
        (
            _tagged('{"name": "now", "arguments": {"a": "}}"}}'),
            "",
            (WrittenCall("now", '{"a": "}}"}'),),
        ),
        # A model that gives up on a call, and begins anew.
        (f'<tool_call>{{"name": {_tagged(NOW)}', '<tool_call>{"name":', (AT_ONCE,)),
        # Behind calls without tags, everything else is text.
        (f"{NOW}; and so on", "; and so on", (AT_ONCE,)),
    ],
)  # fmt: skip
def test_calls_are_taken_out_of_an_answer(text, content, calls):
    assert read_tool_calls(text, TOOLS) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "Hello.\n",
        "a < b <tool",
        '{"city": "Köln"}',
        '{"name": "rain", "arguments": {}}',
        '{"name": "now", "arguments": "{}"}',
        '{"name": "now", "arguments": [1]}',
        '{"name": ["now"], "arguments": {}}',
        '{"name": "now"}',
        f"{NOW} is what I would call",
        f"I call {NOW}",
        _tagged('{"name": "rain", "arguments": {}}'),
        _tagged("{'name': 'now', 'arguments': {}}"),
        _tagged('{"name": "now", "arguments": {"a": NaN}}'),
        f"<tool_call>{NOW} and </tool_call>",
        f"<tool_call>{NOW}</tool",
        '<tool_call>{"name": "now", "arguments": {"a": "cut',
        '{"name": "now", "parameters": {"a": "cut',
        "<tool_call>" * 3,
        "<|python_tag|>print(1)",
        "<|python",
        '{"name": "now", "arguments": ' + '{"a": ' * 2000 + "0" + "}" * 2000 + "}",
    ],
)
def test_what_is_no_call_stays_content(text):
    assert read_tool_calls(text, TOOLS) == (text, ())


def test_content_is_shown_as_soon_as_it_is_certain():
    reader = ToolCallReader(TOOLS)
    pieces = ["Let ", "me <", "b> ", "<tool", "_call>", NOW, "</tool_call>", " x"]
    assert [reader.read(each) for each in pieces] == ["Let", " me", " <b>", "", "", "", "", "x"]
    assert reader.calls == [AT_ONCE]
    # JSON that begins as no call does.
    reader = ToolCallReader(TOOLS)
    assert [reader.read(each) for each in ('{"n', 'o": ', "1}")] == ["", '{"no":', " 1}"]


_TAGS = ("<tool_call>", "</tool_call>", "<|python_tag|>", WEATHER, NOW)
_BITS = (
    ";",
    " ",
    "\n",
    "{",
    "}",
    '"',
    "\\",
    "<",
    "a",
    '{"name"',
    '{"name": "now", "arguments": {"a": "',
    '"}}',
)
_PARTS = st.sampled_from(_TAGS + _BITS)


@given(st.lists(_PARTS, max_size=12).map("".join), st.data())
@example(f"a {_tagged(WEATHER)}\n{_tagged(NOW)} b", None)
@example(f"<|python_tag|>{WEATHER};{NOW}", None)
@example(_tagged('{"name": "now", "arguments": {"a": "\\\\", "b": "\\"}}"}}'), None)
def test_an_answer_in_pieces_has_the_calls_and_the_content_of_the_whole(text, data):
    cuts = range(len(text)) if data is None else sorted(data.draw(st.sets(st.integers(0, len(text)))))
    bounds = [0, *cuts, len(text)]
    reader = ToolCallReader(TOOLS)
    content = "".join(reader.read(text[a:b]) for a, b in pairwise(bounds)) + reader.end()
    assert (content, tuple(reader.calls)) == read_tool_calls(text, TOOLS)
    if not reader.calls:
        assert content == text
    assert all(isinstance(json.loads(each.arguments), dict) for each in reader.calls)


def test_what_follows_many_unfinished_calls_is_content() -> None:
    unfinished = '<tool_call>{"name": "weather' * 40
    call = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    assert read_tool_calls(unfinished + call, ["weather"]) == (unfinished + call, ())
