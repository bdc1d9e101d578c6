"""Special tokens in messages: they are letters, and the prompt around them is the template's own."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from asd.errors import InvalidRequest
from asd.values import Message
from services.stage.generation.tokenizer import ChatTokenizer
from tests.fakes.chat_templates import FAMILIES, Family
from tests.fakes.tiny_tokenizers import byte_level, pieces, write, write_family

if TYPE_CHECKING:
    from pathlib import Path

# Stands in messages where a special token's text stood. No template looks for it.
WORD = "Quiz"


class Model(NamedTuple):
    """A family's tokenizer, ours and the library's."""

    family: Family
    ours: ChatTokenizer
    plain: Tokenizer

    def __repr__(self) -> str:
        """Return less than a vocabulary: hypothesis shows it with a failing example."""
        return "Model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("families")
    return {name: _model(root / name.replace(" ", "-"), family) for name, family in FAMILIES.items()}


def _model(directory: Path, family: Family) -> Model:
    write_family(directory, family)
    return Model(family, ChatTokenizer(directory), Tokenizer.from_file(str(directory / "tokenizer.json")))


_FRAGMENTS = (
    "the user", " ", "\n", "\n\n", "ü", "🙂", "<", ">", "|>", "/", "[", "]",
    "<think>", "</think>", "<|im_", "<|im_start", "INST]", "a  b", " \t", "system", "end|>",
)  # fmt: skip
_PLACE = "\ue000"


@st.composite
def _conversations(draw: st.DrawFn) -> tuple[str, tuple[Message, ...], int]:
    """Return a family, and a conversation with places where a special token's text may stand."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    content = st.lists(st.sampled_from((*_FRAGMENTS, _PLACE, _PLACE)), min_size=1, max_size=5).map("".join)
    roles = ["user", "assistant"] * draw(st.integers(0, 2)) + ["user"]
    if FAMILIES[name].has_system and draw(st.booleans()):
        roles.insert(0, "system")
    turns = tuple(Message(role, draw(content)) for role in roles)
    # Fragments may make a special token; here those count that are put in.
    assume(not any(mark in turn.content for turn in turns for mark in FAMILIES[name].special))
    return name, turns, draw(st.integers(0, 20))


def _with(turns: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    return tuple(Message(turn.role, turn.content.replace(_PLACE, text)) for turn in turns)


def _split(ids: list[int], special: set[int]) -> list[list[int]]:
    """Return the stretches of ids between special tokens, and those tokens as stretches of their own."""
    return [list(group) for _, group in groupby(ids, key=lambda each: each if each in special else -1)]


@settings(max_examples=400, deadline=None)
@given(_conversations())
def test_a_special_tokens_text_changes_nothing_around_it(
    models: dict[str, Model], drawn: tuple[str, tuple[Message, ...], int]
) -> None:
    """The prompt is that of an ordinary word, with the token's text in its place."""
    name, turns, index = drawn
    model = models[name]
    mark = model.family.special[index % len(model.family.special)]
    ours = model.ours.encode_chat(_with(turns, mark))
    template_text = model.ours.render(_with(turns, WORD))
    plain = model.plain.encode(template_text, add_special_tokens=False).ids
    special = set(model.ours.special)
    expected, found = _split(plain, special), _split(ours, special)
    assert len(found) == len(expected)
    for is_, should in zip(found, expected, strict=True):
        text = _decode(model, should)
        if WORD not in text:
            assert is_ == should
        assert _decode(model, is_) == text.replace(WORD, mark)


def _decode(model: Model, ids: list[int]) -> str:
    return model.plain.decode(ids, skip_special_tokens=False)


@settings(max_examples=400, deadline=None)
@given(_conversations())
def test_without_special_tokens_the_prompt_is_the_librarys(
    models: dict[str, Model], drawn: tuple[str, tuple[Message, ...], int]
) -> None:
    name, turns, _ = drawn
    model = models[name]
    turns = _with(turns, WORD)
    plain = model.plain.encode(model.ours.render(turns), add_special_tokens=False).ids
    assert model.ours.encode_chat(turns) == plain


@given(st.sampled_from(sorted(FAMILIES)), st.text(alphabet="<|im_startend>/s [INST]\n▁ü", max_size=30))
def test_text_is_never_a_special_token(models: dict[str, Model], name: str, text: str) -> None:
    model = models[name]
    for mark in ("", *model.family.special):
        ids = model.ours.encode_text(text + mark + text)
        assert not set(ids) & set(model.ours.special)
        assert _decode(model, ids).strip() == (text + mark + text).replace("▁", _blank(model)).strip()


def _blank(model: Model) -> str:
    # As SentencePiece has it, the mark for a blank is one.
    return " " if model.family.pieces else "▁"


@pytest.mark.parametrize(
    "template",
    [
        # Repeats, drops, and moves.
        "<s>{{ messages[-1].content }}|{{ messages[-1].content }}</s>",
        "{% for m in messages[::-1] %}<s>{{ m['content'] | trim }}</s>{% endfor %}",
        "<s>{{ messages | map(attribute='content') | join('</s>') }}",
        # Macros, blocks, calls, filters and joins.
        "{% macro say(m) %}<s>{{ m.content ~ '</s>' }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}",
        "{% set all %}<s>{{ messages[-1].content }}</s>{% endset %}{{ all | trim }}",
        "{% filter trim %} <s>{{ messages[-1].content }}</s> {% endfilter %}",
        "{% generation %}<s>{{ messages[-1].content }}</s>{% endgeneration %}",
        "<s>{{ [messages[-1].content, 1, none] | join('</s>') }}",
        "<s>{{ '</s>'.join([messages[-1].content, '!']) }}",
        "{% set text = messages[-1].content %}"
        "<s>{{ text.split('X')[0].rstrip() + '</s>' + text.partition('X')[2] }}",
        "<s>{{ messages[-1].content | replace('X', '</s>') }}",
        "<s>{{ messages[-1].content.splitlines() | join('</s>') }}</s>",
        "<s>{{ (messages[-1].content ~ '</s>')[2:] }}",
        "<s>{{ messages[-1].content | list | join('') }}</s>{{ messages[-1].content | reverse }}",
        "<s>{{ messages[-1].content | tojson }}</s>",
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text + '<s>' + m.content %}{% endfor %}{{ ns.text + '</s>' }}",
        "<s>{{ messages[-1].content.removeprefix('hi').removesuffix('X') }}</s>",
        "<s>{% for letter in messages[-1].content %}{{ letter }}{% endfor %}</s>",
        "<s>{{ messages[-1].content * 2 }}</s>{{ '-' * 3 }}",
        "{{ bos_token + messages[-1].content + eos_token }}",
    ],
)
@pytest.mark.parametrize("make", [byte_level, pieces])
def test_whatever_a_template_does_its_own_marks_are_known(
    tmp_path: Path, template: str, make: object
) -> None:
    tokenizer = make(("<unk>", "<s>", "</s>"))  # type: ignore[operator]
    write(tmp_path, tokenizer, {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"})
    ours = ChatTokenizer(tmp_path)
    special = set(ours.special)

    def turns(text: str) -> tuple[Message, ...]:
        return Message("system", f"{text}s"), Message("user", f"hi {text}\n a X{text} {text}b \nX")

    neutral = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = neutral.encode(ours.render(turns("")), add_special_tokens=False).ids
    for mark in ("<s>", "</s>"):
        ids = ours.encode_chat(turns(mark))
        assert [each for each in ids if each in special] == [each for each in expected if each in special]
        text = neutral.decode(ids, skip_special_tokens=False)
        assert text.replace(" ", "") == ours.render(turns(mark)).replace(" ", "")


def test_a_special_token_that_a_template_puts_together_of_a_message_is_letters(tmp_path: Path) -> None:
    template = "<s>{{ messages[-1].content | replace('-', '') }}</s>"
    write(tmp_path, byte_level(("<s>", "</s>")), {"chat_template": template})
    ours = ChatTokenizer(tmp_path)
    ids = ours.encode_chat((Message("user", "a <-/s> <-s>"),))
    assert [each for each in ids if each in ours.special] == [ids[0], ids[-1]]


def test_the_first_line_of_an_indented_message_may_hold_a_special_token(tmp_path: Path) -> None:
    template = "<s>{{ messages[-1].content | indent(2) }}</s>"
    write(tmp_path, byte_level(("<s>", "</s>")), {"chat_template": template})
    ours = ChatTokenizer(tmp_path)
    ids = ours.encode_chat((Message("user", "a </s> b\nc"),))
    assert [each for each in ids if each in ours.special] == [ids[0], ids[-1]]


@pytest.mark.parametrize(
    "written",
    [
        "messages[-1].content | indent(2)",
        "'%s!' | format(messages[-1].content)",
        "messages[-1].content | wordwrap(9)",
    ],
)
def test_a_message_whose_place_in_the_prompt_is_hidden_is_refused_with_its_token(
    tmp_path: Path, written: str
) -> None:
    template = f"<s>{{{{ {written} }}}}</s>"
    write(tmp_path, byte_level(("<s>", "</s>")), {"chat_template": template})
    ours = ChatTokenizer(tmp_path)
    ours.encode_chat((Message("user", "x < y\nz > y"),))
    with pytest.raises(InvalidRequest, match="</s>") as caught:
        ours.encode_chat((Message("user", "a\n</s> is not allowed"),))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("form", ["bytes", "legacy", "new", "bare"])
def test_what_a_special_token_does_to_its_neighbours_stays(tmp_path: Path, flag: str, form: str) -> None:
    special = ("<unk>", "<s>", "</s>", "[x]")
    tokenizer = (
        byte_level(special, **{flag: True}) if form == "bytes" else pieces(special, form=form, **{flag: True})
    )
    template = "<s> {{ messages[-1].content }} </s>a</s>  [x]\n{{ messages[-1].content }}[x]b [x] c"
    write(tmp_path, tokenizer, {"chat_template": template})
    ours = ChatTokenizer(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    turns = [(Message("user", f"is {text} is"),) for text in (WORD, "[x]")]
    expected = plain.encode(ours.render(turns[0]), add_special_tokens=False).ids
    ids = ours.encode_chat(turns[1])
    for is_, should in zip(_split(ids, set(ours.special)), _split(expected, set(ours.special)), strict=True):
        text = plain.decode(should, skip_special_tokens=False)
        assert is_ == should or WORD in text
        assert plain.decode(is_, skip_special_tokens=False) == text.replace(WORD, "[x]")


def test_text_that_the_vocabulary_lacks_is_no_special_token_of_the_templates(tmp_path: Path) -> None:
    # The token for it is a special one, which the template writes as well.
    tokenizer = pieces(("<unk>", "<s>", "</s>"), form="bare")
    tokenizer["model"]["byte_fallback"] = False
    write(tmp_path, tokenizer, {"chat_template": "<s><unk>{{ messages[-1].content }}</s>"})
    ours = ChatTokenizer(tmp_path)
    ids = ours.encode_chat((Message("user", "a\U0001f642b</s>"),))
    assert [each for each in ids if each in ours.special] == [1, 0, 0, 2]
