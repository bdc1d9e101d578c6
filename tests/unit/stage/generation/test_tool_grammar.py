"""Grammars of answers that are tool calls, held against llguidance."""

from __future__ import annotations

import pytest

from asd.values import Tool, Tools
from services.common.tool_calls import read_tool_calls
from services.stage.generation.tool_grammar import CallForm, call_grammar

llguidance = pytest.importorskip("llguidance")

HERMES = CallForm("<tool_call>\n", "arguments", "\n</tool_call>", "\n")
LLAMA = CallForm("", "parameters", "", "; ")
# The reference is to the schema of the arguments, wherever those stand.
CITY = """{"properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"],
 "additionalProperties": false, "$defs": {"name": {"enum": ["Ulm", "Trier"]}}}"""
TOOLS = (Tool("weather", "", CITY), Tool("now"))


def _matches(grammar: str, text: str) -> bool:
    """Return whether a text is an answer of a grammar, one byte to a token."""
    tokens = [bytes([each]) for each in range(256)] + [b"</s>"]
    wrapper = llguidance.TokenizerWrapper(_Bytes(tokens))
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(wrapper), grammar)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(each) for each in text.encode()) and matcher.is_accepting()


class _Bytes:
    """A tokenizer of bytes, as llguidance takes one."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def __call__(self, text: str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _call(form: CallForm, name: str, arguments: str) -> str:
    return f'{form.before}{{"name": "{name}", "{form.key}": {arguments}}}{form.after}'


@pytest.mark.parametrize("form", [HERMES, LLAMA])
def test_an_answer_of_the_grammar_is_calls_of_the_tools(form):
    ulm, now = _call(form, "weather", '{"city": "Ulm"}'), _call(form, "now", "{}")
    grammar = call_grammar(form, Tools(TOOLS, "required"))
    for text in (ulm, now, ulm + form.between + now):
        assert _matches(grammar, text)
        assert len(read_tool_calls(text, ["weather", "now"])[1]) == text.count('"name"')
    for text in (
        "",
        "Hello",
        ulm[:-1],
        f"{ulm} ",
        _call(form, "rain", "{}"),
        _call(form, "weather", "{}"),
        _call(form, "weather", '{"city": "Rome"}'),
        _call(form, "now", '{"city": "Ulm"}'),
        _call(form, "now", "[]"),
    ):
        assert not _matches(grammar, text), text


def test_one_call_may_be_the_most_and_a_tool_may_be_named():
    ulm, now = _call(HERMES, "weather", '{"city": "Ulm"}'), _call(HERMES, "now", "{}")
    single = call_grammar(HERMES, Tools(TOOLS, "required", single_call=True))
    assert _matches(single, now)
    assert not _matches(single, f"{now}\n{now}")
    named = call_grammar(HERMES, Tools(TOOLS, "named", "now"))
    assert _matches(named, f"{now}\n{now}")
    assert not _matches(named, ulm)
