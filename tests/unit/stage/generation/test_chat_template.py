"""Chat templates as transformers has them: where they are, what they may use, whose fault a failure is."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from asd.errors import InvalidRequest, PreconditionFailed
from asd.values import Message
from services.stage.generation.chat_template import ChatTemplate
from tests.fakes.chat_templates import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

ASK = (Message("user", "a<b> 'c' ü"),)


def _write(directory: Path, template: object, **config: object) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return directory


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", ASK[0].content + "!"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("{{ messages[0].content | tojson }}", "\"a<b> 'c' ü\""),
        ("{{ {'b': 1, 'a': '<'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "<",\n "b": 1\n}'),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token }}", "<s></s><i>"),
        ("{{ pad_token is defined }}", "False"),
        # A newline after a block goes, and so do blanks before one.
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}", "x\n"),
        ("{{ 'a\\nb' }}{{ messages | length }}", "a\nb1"),
    ],
)  # fmt: skip
def test_a_template_may_use_what_transformers_gives_it(tmp_path: Path, template: str, text: str) -> None:
    tokens = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    chat = ChatTemplate(_write(tmp_path, template, extra_special_tokens={"image_token": "<i>"}, **tokens))
    assert chat.render(ASK) == text
    assert chat.trace(ASK) == text


def test_strftime_now_is_the_time_of_the_request(tmp_path: Path) -> None:
    chat = ChatTemplate(_write(tmp_path, "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}"))
    before = datetime.now()
    now = datetime.strptime(chat.trace(ASK), "%Y-%m-%d %H:%M:%S.%f")
    assert before <= now <= datetime.now()


def test_tokens_that_only_the_older_file_names_are_known(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>"}}'
    )
    template = "{{ bos_token }}{{ eos_token }}"
    assert ChatTemplate(_write(tmp_path, template)).render(ASK) == "<s></s>"
    chat = ChatTemplate(_write(tmp_path, template, bos_token="<b>", added_tokens_decoder={}))
    assert chat.render(ASK) == "<b>"


@pytest.mark.parametrize(
    ("files", "config", "text"),
    [
        ({}, "config", "config"),
        ({}, [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}], "named"),
        ({}, {"default": "named", "rag": "r"}, "named"),
        ({"chat_template.jinja": "file"}, "config", "file"),
        ({"chat_template.jinja": "file"}, None, "file"),
        ({"chat_template.json": '{"chat_template": "processor"}'}, None, "processor"),
        ({"chat_template.json": '{"chat_template": "processor"}'}, "config", "config"),
    ],
)
def test_the_template_is_looked_for_as_transformers_does(
    tmp_path: Path, files: dict[str, str], config: object, text: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert ChatTemplate(_write(tmp_path, config)).render(ASK) == text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for %}", "line 1"),
        ("{{ undefined_function() }}", "undefined_function"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'other' %}", "other|loader"),
        ("{% if messages | length > 1 %}{{ missing.name }}{% endif %}", "missing"),
        ([{"name": "tool_use", "template": "x"}], "default, only tool_use"),
        (None, "no chat_template"),
        ("{{ raise_exception('Tools are a must') }}", "every plain conversation: Tools are a must$"),
        (
            "{% if messages | length == 1 %}{{ raise_exception('One is few') }}{% endif %}"
            "{{ raise_exception('Some are many') }}",
            "One is few; Some are many$",
        ),
    ],
)
def test_a_broken_template_is_found_when_the_model_is_read(
    tmp_path: Path, template: object, says: str
) -> None:
    with pytest.raises(PreconditionFailed, match=says):
        ChatTemplate(_write(tmp_path, template))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("", "nothing of a conversation"),
        ("{% for m in messages %} {% endfor %}", "nothing of a conversation"),
        ("User: Hello\nAssistant:", "leaves out what the user says"),
        ("{{ strftime_now('%f') }}{{ messages[-1].content | length }}", "leaves out what the user says"),
        ("{{ messages[-1].text }}!", "leaves out what the user says"),
        ("{{ messages[0].content }}", "leaves out what the user says"),
    ],
)
def test_a_template_without_the_users_words_is_refused(tmp_path: Path, template: str, says: str) -> None:
    with pytest.raises(PreconditionFailed, match=rf"tokenizer_config\.json.*{says}"):
        ChatTemplate(_write(tmp_path, template)).check_reads_messages()


@pytest.mark.parametrize("changed", ["trim", "upper", "tojson", "e"])
def test_a_template_may_change_the_users_words(tmp_path: Path, changed: str) -> None:
    ChatTemplate(_write(tmp_path, f"{{{{ messages[-1].content | {changed} }}}}")).check_reads_messages()


def test_a_template_may_refuse_all_plain_conversations_but_one(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('No system') }}{% endif %}x"
    assert ChatTemplate(_write(tmp_path, template)).render((Message("system", "Be brief."), *ASK)) == "x"


def test_a_template_that_fails_on_a_message_is_not_the_callers_fault(tmp_path: Path) -> None:
    chat = ChatTemplate(
        _write(tmp_path, "{{ messages[0].content if messages[0].content != 'x' else 1 + '' }}")
    )
    with pytest.raises(PreconditionFailed, match="chat template fails"):
        chat.render((Message("user", "x"),))


@pytest.mark.parametrize(
    ("family", "says"), [("gemma", "System role not supported"), ("mistral v0.1", "must")]
)
def test_a_conversation_that_a_template_refuses_is_refused_in_its_words(
    tmp_path: Path, family: str, says: str
) -> None:
    chat = ChatTemplate(_write(tmp_path, FAMILIES[family].template, bos_token="<s>", eos_token="</s>"))
    with pytest.raises(InvalidRequest, match=says) as caught:
        chat.render((Message("system", "x"), *ASK))
    assert caught.value.field == "conversation"


def test_text_of_a_template_and_of_messages_is_told_apart(tmp_path: Path) -> None:
    template = "{{ bos_token }}[{{ messages[-1].content | trim }}]{{ messages[-1].role | upper }}"
    traced = ChatTemplate(_write(tmp_path, template, bos_token="<s>")).trace((Message("user", " ab "),))
    assert traced == "<s>[ab]USER"
    assert traced.origins == "ttttmmttttt"
