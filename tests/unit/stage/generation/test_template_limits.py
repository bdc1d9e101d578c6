"""A chat template that computes for ever, or makes what no memory holds, is refused at once."""

import functools
import json
import re

import pytest

from asd.errors import InputFailed, PreconditionFailed
from asd.values import Message
from services.stage.generation.chat_template import ChatTemplate
from services.stage.generation.template_limits import MOST_BYTES, MOST_STEPS, Meter, TooMuchWork
from tests.fakes.chat_templates import FAMILIES

_LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(n=[1]) %}{% for a in range(99) %}{% set ns.n = ns.n + ns.n %}{% endfor %}",
    "{% set ns = namespace(n='a') %}{% for a in range(99) %}{% set ns.n = ns.n ~ ns.n %}{% endfor %}",
    "{% set ns = namespace(n='a') %}{% for a in range(99) %}{% set ns.n = [ns.n, ns.n] %}{% endfor %}",
    "{% set ns = namespace(n=3) %}{% for a in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ range(99999) | map('center', 9999) | join }}",
    "{{ range(99999) | map('string') | map('replace', '', 'a' * 9999) | list }}",
    "{{ range(99999) | map('list') | sum(start=[]) }}",
)
_LARGE = (
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9**99999 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "{{ ('%(a)s' * 99999) % {'a': 'a' * 99999} }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ ('\t' * 9999).expandtabs(10**6) }}",
    "{{ ('a' * 99999).translate({97: 'a' * 99999}) }}",
    "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "{{ ('a' * 99999).join('a' * 99999) }}",
    "{{ ('\n' * 99999) | indent(9999) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ [['a' * 99999] * 9999] }}",
    "{{ [['a' * 99999] * 9999] | string }}",
    "{{ ('a' * 999999) | wordwrap(1) }}",
)
# What templates of model families do, shortened, where FAMILIES has no such one: from memory.
_SHAPES = {
    "mistral with tools": (
        "{%- set user_messages = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{%- set tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {'a': 1}}}] %}"
        "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{%- if tools is not none and (message == user_messages[-1]) %}{{ '[AVAILABLE_TOOLS] [' }}"
        '{%- for tool in tools %}{%- set tool = tool.function %}{{ \'{"type": "function", \' }}'
        "{%- for key, val in tool.items() if key != 'return' %}{{ '\"' + key + '\": ' + (val | tojson) }}"
        "{%- if not loop.last %}{{ ', ' }}{% endif %}{%- endfor %}{{ '}' }}{%- endfor %}"
        "{{ '][/AVAILABLE_TOOLS]' }}{%- endif %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
        "{%- else %}{{ ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "gemma 3": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
        "{%- set loop_messages = messages[1:] -%}"
        "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
        "{%- for message in loop_messages -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles') }}"
        "{%- endif -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
        "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
        "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    ),
    "deepseek v3": (
        "{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}"
        "{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}"
        "{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}"
        "{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}"
        "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{ '<User>' + message['content'] }}{%- endif %}"
        "{%- if message['role'] == 'assistant' %}"
        "{{ '<Assistant>' + message['content'].split('</think>')[-1] + '<end>' }}{%- endif %}{%- endfor -%}"
    ),
    "a macro of the content": (
        "{%- macro render(content) -%}{%- if content is string -%}{{ content }}{%- endif -%}{%- endmacro -%}"
        "{%- for message in messages %}{%- set content = render(message.content) | trim %}"
        "{{ '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}{%- endfor %}"
    ),
    "a macro of all messages": (
        "{%- macro is_last(all, index) -%}{{ 'last' if index == all | length - 1 }}{%- endmacro -%}"
        "{%- for message in messages %}{{ message.content + is_last(messages, loop.index0) }}{%- endfor %}"
    ),
    "one text": (
        "{%- set ns = namespace(text='') %}{%- for m in messages %}"
        "{%- set ns.text = ns.text + m.content %}{%- endfor %}{{ ns.text }}"
    ),
    "one text of several terms": (
        "{%- set ns = namespace(text='') %}{%- for m in messages %}"
        "{%- set ns.text = ns.text + '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' %}"
        "{%- endfor %}{{ ns.text }}"
    ),
    "one text by tildes": (
        "{%- set ns = namespace(text='') %}{%- for m in messages %}"
        "{%- set ns.text = ns.text ~ '<|im_start|>' ~ m.role ~ m.content %}{%- endfor %}{{ ns.text }}"
    ),
    "a list of messages": (
        "{%- set ns = namespace(kept=[]) %}{%- for m in messages %}{%- set ns.kept = ns.kept + [m] %}"
        "{%- endfor %}{%- for m in ns.kept %}{{ m.content }}{%- endfor %}"
    ),
}
# Hold every text that was made, where "one text" lets each go.
_HELD = {
    "in a list": "{% set ns.all = ns.all + [ns.text] %}",
    "in objects": "{% set ns.all = namespace(others=ns.all, text=ns.text) %}",
    "in what is written": "{{ ns.text }}",
}
_HELLO = (Message("user", "Hello"),)
_ROLES = ("user", "assistant")


def _template(folder, source, meter=Meter):
    config = {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTemplate(folder, meter)


class _Meters:
    """Makes meters whose clock stands still, and keeps them."""

    def __init__(self):
        self.made = []

    def __call__(self, characters, messages):
        self.made.append(Meter(characters, messages, clock=lambda: 0.0))
        return self.made[-1]


@pytest.mark.parametrize("source", [*_LOOPS, *_LARGE])
def test_a_template_that_never_ends_or_makes_too_much_is_refused_as_it_is_loaded(tmp_path, source):
    meters = _Meters()
    with pytest.raises(PreconditionFailed, match=r"tokenizer_config\.json: the chat template") as refused:
        _template(tmp_path, source + "{{ messages[-1].content }}", meters)
    assert str(refused.value).isprintable()
    (meter,) = meters.made
    assert meter.steps <= MOST_STEPS + 1
    # Other values are counted before they are made; a sum is after, of two that were within the bound.
    assert meter.passing_bytes <= 3 * MOST_BYTES


def test_the_bound_on_steps_holds_by_itself(tmp_path):
    meters = _Meters()
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(PreconditionFailed, match=re.escape(f"{MOST_STEPS} steps")):
        _template(tmp_path, loops, meters)
    (meter,) = meters.made
    assert meter.steps == MOST_STEPS + 1
    assert meter.bytes + meter.passing_bytes < MOST_BYTES // 1000


def test_a_template_that_never_ends_on_one_conversation_alone_fails_that_request_and_no_other(tmp_path):
    template = _template(
        tmp_path,
        "{% if 'loop' in messages[-1].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[-1].content }}",
    )
    with pytest.raises(InputFailed, match="stopped"):
        template.render((Message("user", "loop"),))
    with pytest.raises(InputFailed, match="stopped"):
        template.trace((Message("user", "loop"),))
    assert template.render(_HELLO) == "Hello"


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{% if a %}" * 200 + "{% endif %}" * 200,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ a" + ".a" * 50_000 + " }}",
        "{% block a %}" * 300,
        "{{ messages | nosuch }}",
        "{% include 'x' %}",
        "{% extends messages %}",
        "{{ 'x' | attr('__class__') }}{{ ''.__class__.__mro__ }}{{ 1 / 0 }}",
    ],
)
def test_a_template_that_the_library_cannot_compile_is_refused_with_its_file(tmp_path, source):
    with pytest.raises(PreconditionFailed, match=r"tokenizer_config\.json: the chat template"):
        _template(tmp_path, source)


def test_a_name_in_a_template_cannot_write_to_the_terminal(tmp_path):
    with pytest.raises(PreconditionFailed) as refused:
        _template(tmp_path, "{{ raise_exception('\x1b[2J\r\nline') }}")
    assert str(refused.value).isprintable()


_MANY = tuple(Message(_ROLES[index % 2], f"turn {index:04d} ".ljust(200, "x")) for index in range(4095))
_SHORT = (*(Message(_ROLES[index % 2], "Hi") for index in range(4094)), Message("user", "turn 4094"))
_LARGEST = (Message("user", "word </think> " * 75_000 + "turn 4094"),)


@pytest.mark.parametrize("turns", [_MANY, _SHORT, _LARGEST], ids=["many", "short", "largest"])
@pytest.mark.parametrize("name", [*FAMILIES, *_SHAPES])
def test_no_real_template_comes_near_a_bound(tmp_path, name, turns):
    source = _SHAPES[name] if name in _SHAPES else FAMILIES[name].template
    meters = _Meters()
    template = _template(tmp_path, source, meters)
    meters.made.clear()
    text = template.render(turns)
    assert "turn 4094" in text
    (meter,) = meters.made
    assert meter.steps < 20 * len(turns) + 100
    characters = sum(len(turn.content) for turn in turns)
    assert meter.bytes < 10 * characters + 1000 * len(turns)
    if "one text" not in name and "list" not in name:
        assert meter.passing_bytes < 10 * characters + 1000 * len(turns)


@pytest.mark.parametrize("name", _SHAPES)
def test_a_template_at_many_turns_can_be_followed(tmp_path, name):
    template = _template(tmp_path, _SHAPES[name], _Meters())
    assert "turn 4094" in template.trace(_SHORT)


@pytest.mark.parametrize("field", _HELD)
def test_a_template_that_holds_a_copy_for_each_message_is_stopped_where_many_are_large(tmp_path, field):
    source = (
        "{%- macro f() %}{%- set ns = namespace(text='', all=[]) %}{%- for m in messages %}"
        "{%- set ns.text = ns.text + m.content %}"
        + _HELD[field]
        + "{%- endfor %}{{ ns.text }}{%- endmacro %}"
        "{{ f() }}"
    )
    meters = _Meters()
    template = _template(tmp_path, source, meters)
    with pytest.raises(PreconditionFailed, match="stopped"):
        template.render(_MANY)
    characters = sum(len(turn.content) for turn in _MANY)
    assert meters.made[-1].passing_bytes < 2 * (MOST_BYTES + 64 * characters)


def test_a_meter_ends_what_computes_for_long_in_few_steps():
    now = iter([0.0, *[100.0] * 1000])
    meter = Meter(0, clock=functools.partial(next, now))
    with pytest.raises(TooMuchWork, match=r"more than 0\.5 s"):
        _take_steps(meter, 1000)


def _take_steps(meter, count):
    for _ in range(count):
        meter.step()
