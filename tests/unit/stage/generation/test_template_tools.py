"""Tools in prompts: templates that know them write them, others refuse, and special tokens stay text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from asd.errors import ConversationRefused
from asd.values import Conversation, Message, Tool, ToolCall, Tools
from services.stage.generation.tokenizer import ChatTokenizer
from services.stage.generation.tool_grammar import CallForm
from tests.fakes.chat_templates import FAMILIES, Family
from tests.fakes.tiny_tokenizers import write_family
from tests.fakes.tool_templates import HERMES, LLAMA

if TYPE_CHECKING:
    from pathlib import Path

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
MODELS = {
    "hermes": Family(HERMES, _IM, None, "<|im_end|>", marks=("<tool_call>", "</tool_call>")),
    "llama": Family(LLAMA, _HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
}
PARAMETERS = '{"type": "object", "properties": {"city": {"type": "string", "description": "where ü"}}}'
WEATHER = Tool("weather", "Says how it is.", PARAMETERS)
LOOP = (
    Message("user", "Köln?"),
    Message("assistant", "", (ToolCall("call_1", "weather", '{"city": "Köln", "days": [1, null]}'),)),
    Message("tool", "rain", tool_call_id="call_1"),
)


def _model(directory: Path, family: Family) -> ChatTokenizer:
    return ChatTokenizer(write_family(directory, family))


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> ChatTokenizer:
    return _model(tmp_path, MODELS[request.param])


def test_a_tool_and_its_calls_are_written_as_transformers_would(tmp_path):
    text = _model(tmp_path, MODELS["hermes"]).render(Conversation(LOOP, Tools((WEATHER,))))
    function = {"name": "weather", "description": "Says how it is.", "parameters": json.loads(PARAMETERS)}
    assert json.dumps({"type": "function", "function": function}, ensure_ascii=False) in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Köln", "days": [1, null]}}'
        "\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ) in text


def test_a_templates_form_of_calls_is_found_by_what_it_writes(tmp_path):
    forms = {name: _model(tmp_path / name, family).call_form for name, family in MODELS.items()}
    assert forms == {
        "hermes": CallForm("<tool_call>\n", "arguments", "\n</tool_call>", "\n"),
        "llama": CallForm("", "parameters", "", "; "),
    }


def test_a_result_has_its_call_and_the_tools_name(tmp_path):
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }} {{ m.tool_call_id }} {{ m.name }}{% endfor %}"
    )
    text = _model(tmp_path, Family(template, _IM)).render(LOOP)
    assert text.endswith("tool rain call_1 weather")


def test_with_the_choice_of_none_the_model_is_not_told_of_tools(model):
    ask = LOOP[:1]
    assert model.takes_tools
    assert model.render(Conversation(ask, Tools((WEATHER,), "none"))) == model.render(ask)
    assert "weather" in model.render(Conversation(ask, Tools((WEATHER,))))


@pytest.mark.parametrize("turns", [Conversation(LOOP[:1], Tools((WEATHER,))), LOOP])
def test_a_template_that_knows_no_tools_refuses_them(tmp_path, turns):
    model = _model(tmp_path, FAMILIES["chatml"])
    assert not model.takes_tools
    for render in (model.render, model.encode_chat):
        with pytest.raises(ConversationRefused) as refused:
            render(turns)
        assert refused.value.field == "conversation.tools"
    assert model.render(Conversation(LOOP[:1], Tools((WEATHER,), "none")))


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|eot_id|>", '"\\<|im_end|>\n<|eot_id|>ü'])
def test_special_tokens_in_tools_and_calls_are_text(model, mark):
    """Each place holds the text of a special token in turn, and the prompt's special tokens are the same."""

    def ids(**places: str) -> list[int]:
        text = {"name": "", "about": "", "schema": "", "argument": "", "key": "", "result": ""} | places
        schema = {"type": "object", "properties": {"city" + text["key"]: {"description": text["schema"]}}}
        tool = Tool("weather", "Says." + text["about"], json.dumps(schema))
        arguments = json.dumps({"city" + text["key"]: ["K" + text["argument"]]})
        call = ToolCall("call_1", "weather" + text["name"], arguments)
        turns = (
            LOOP[0],
            Message("assistant", "", (call,)),
            Message("tool", "r" + text["result"], (), "call_1"),
        )
        return model.encode_chat(Conversation(turns, Tools((tool,))))

    def special(found: list[int]) -> list[int]:
        return [each for each in found if each in model.special]

    plain = special(ids())
    for place in ("name", "about", "schema", "argument", "key", "result"):
        # In escapes too, which the template's JSON undoes.
        assert special(ids(**{place: mark})) == plain, place
        assert ids(**{place: mark}) != ids()


def test_what_json_makes_of_a_text_is_traced_letter_by_letter(tmp_path):
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson(ensure_ascii=true, indent=2, sort_keys=true) }}"
        "{{ {1: tool.function, 'own<|im_end|>': none, none: true} | tojson }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    model = _model(tmp_path, Family(template, _IM))
    turns = Conversation(LOOP[:1], Tools((Tool("weather", 'ü"\\\n<|im_start|>'),)))
    ids = model.encode_chat(turns)
    assert [model.special[each] for each in ids if each in model.special] == ["<|im_end|>", "<|im_start|>"]
