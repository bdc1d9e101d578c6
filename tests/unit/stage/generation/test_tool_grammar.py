"""Grammars of answers that are tool calls, as llguidance keeps them."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from asd.values import Tool, Tools
from services.common.tool_calls import read_tool_calls
from services.stage.generation.constraint import Grammar, GrammarCompiler
from services.stage.generation.tool_grammar import CallForm, call_grammar
from tests.fakes.tiny_tokenizers import byte_level

HERMES = CallForm("<tool_call>\n", "arguments", "\n</tool_call>", "\n")
LLAMA = CallForm("", "parameters", "", "; ")
# The reference is to the schema of the arguments, wherever those stand.
CITY = """{"properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"],
 "additionalProperties": false, "$defs": {"name": {"enum": ["Ulm", "Trier"]}}}"""
TOOLS = (Tool("weather", "", CITY), Tool("now"))


_TOKENIZER = Tokenizer.from_str(json.dumps(byte_level(("<|end|>",))))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """A compiler for a model whose tokens are bytes."""
    end = _TOKENIZER.token_to_id("<|end|>")
    return GrammarCompiler(_TOKENIZER.to_str(), _TOKENIZER.get_vocab_size(), [end])


async def _matches(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Return whether a text is a whole answer of a grammar."""
    ids = _TOKENIZER.encode(f"{text}<|end|>").ids
    return (await compiler.compile(grammar)).take(ids) == len(ids)


def _call(form: CallForm, name: str, arguments: str) -> str:
    return f'{form.before}{{"name": "{name}", "{form.key}": {arguments}}}{form.after}'


@pytest.mark.parametrize("form", [HERMES, LLAMA])
async def test_an_answer_of_the_grammar_is_calls_of_the_tools(compiler, form):
    ulm, now = _call(form, "weather", '{"city": "Ulm"}'), _call(form, "now", "{}")
    grammar = call_grammar(form, Tools(TOOLS, "required"))
    for text in (ulm, now, ulm + form.between + now):
        assert await _matches(compiler, grammar, text)
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
        assert not await _matches(compiler, grammar, text), text


async def test_arguments_have_no_names_but_those_of_a_plain_schema(compiler):
    said = _call(LLAMA, "f", '{"a": 1, "more": 2}')
    plain = Tool("f", "", '{"properties": {"a": {"type": "integer"}}}')
    composed = Tool("f", "", '{"allOf": [{"properties": {"a": {"type": "integer"}}}]}')
    # A name that is required and not described must be possible.
    required = Tool("f", "", '{"properties": {"a": {"type": "integer"}}, "required": ["more"]}')
    for tool, is_taken in ((plain, False), (composed, True), (required, True)):
        grammar = call_grammar(LLAMA, Tools((tool,), "required"))
        assert await _matches(compiler, grammar, said) is is_taken


async def test_one_call_may_be_the_most_and_a_tool_may_be_named(compiler):
    ulm, now = _call(HERMES, "weather", '{"city": "Ulm"}'), _call(HERMES, "now", "{}")
    single = call_grammar(HERMES, Tools(TOOLS, "required", single_call=True))
    assert await _matches(compiler, single, now)
    assert not await _matches(compiler, single, f"{now}\n{now}")
    named = call_grammar(HERMES, Tools(TOOLS, "named", "now"))
    assert await _matches(compiler, named, f"{now}\n{now}")
    assert not await _matches(compiler, named, ulm)
