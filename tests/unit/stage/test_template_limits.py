"""A chat template that computes for ever, or makes what no memory holds, is refused at once."""

import json
import time

import pytest

from services.common.errors import PreconditionFailed
from services.stage.chat_template import ChatTemplate
from services.stage.engine import Turn
from services.stage.template_limits import Meter, TooMuchWork
from tests.fakes.chat_templates import FAMILIES

# Processor seconds. A refusal takes about one, as the bound on time is; the rest is for slow machines.
_SOON = 5.0
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
_HELLO = (Turn("user", "Hello"),)


def _template(folder, source):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    return ChatTemplate(folder)


@pytest.mark.parametrize("source", [*_LOOPS, *_LARGE])
def test_a_template_that_never_ends_or_makes_too_much_is_refused_as_it_is_loaded(tmp_path, source):
    begin = time.process_time()
    with pytest.raises(PreconditionFailed, match=r"tokenizer_config\.json: the chat template") as refused:
        _template(tmp_path, source + "{{ messages[-1].content }}")
    assert time.process_time() - begin < _SOON
    assert str(refused.value).isprintable()


def test_a_template_that_never_ends_on_one_conversation_alone_fails_that_request_and_no_other(tmp_path):
    template = _template(
        tmp_path,
        "{% if 'loop' in messages[-1].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[-1].content }}",
    )
    with pytest.raises(PreconditionFailed, match="stopped"):
        template.render((Turn("user", "loop"),))
    with pytest.raises(PreconditionFailed, match="stopped"):
        template.trace((Turn("user", "loop"),))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_conversation_is_far_from_every_bound(tmp_path, family):
    known = FAMILIES[family]
    tokens = {"bos_token": known.bos, "eos_token": known.eos, "chat_template": known.template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[place % 2], f"turn {place} " * 20) for place in range(1001))
    text = ChatTemplate(tmp_path).render(turns)
    assert "turn 1000" in text


def test_a_meter_ends_what_computes_for_long_in_few_steps():
    now = iter([0.0, *[100.0] * 1000])
    meter = Meter(0, clock=lambda: next(now))
    with pytest.raises(TooMuchWork):
        _take_steps(meter, 1000)


def _take_steps(meter, count):
    for _ in range(count):
        meter.step()
