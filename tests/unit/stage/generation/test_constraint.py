"""Constraints: what a grammar allows token by token, and which ones are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer

from asd.errors import InvalidRequest, ModelRefusal
from asd.values import Constraint
from services.stage.generation.constraint import Grammar, GrammarCompiler, Matcher, grammar_of

MODELS = Path(__file__).parents[4] / "models"
_TOKENIZER = (MODELS / "large" / "tokenizer.json").read_text(encoding="utf-8")
_PLAIN = Tokenizer.from_str(_TOKENIZER)
END = 1
# The logits of some models are wider than their vocabulary.
WIDTH = 520
COMPILER = GrammarCompiler(_TOKENIZER, WIDTH, (END,))
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string", "maxLength": 4}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


def _ids(text: str) -> list[int]:
    return list(_PLAIN.encode(text, add_special_tokens=False).ids)


def _matcher(wanted: Constraint | Grammar) -> Matcher:
    return asyncio.run(COMPILER.compile(wanted))


def _is_whole(constraint: Constraint, text: str) -> bool:
    ids = [*_ids(text), END]
    return _matcher(constraint).allowed(ids) == len(ids)


@pytest.mark.parametrize(
    ("constraint", "whole", "others"),
    [
        (
            Constraint(json_schema=POINT),
            ['{"x": 12, "name": "é"}'],
            ['{"name": "a", "x": 1}', '{"x":1,"name":"a"}', '{"x": 1, "name": "abcde"}', '{"x": 1}', "{}"],
        ),
        (Constraint(json_schema={"type": "string", "pattern": "b"}), ['"abc"'], ['"ac"', "b"]),
        (Constraint(json_schema={"const": "see // http://a # b"}), ['"see // http://a # b"'], ['"see "']),
        (Constraint(json_schema=True), ["[1, 2]", '{"a": null}'], ["[1,2]", "yes"]),
        (Constraint(regex=r'a.b/\d"|é+'), ['axb/3"', "éé"], ['a\nb/3"', "axb", ""]),
        (Constraint(regex="a\nb"), ["a\nb"], ["a b"]),
        (Constraint(choice=("yes", 'no "q"', "a\nb\u2028")), ["yes", 'no "q"', "a\nb\u2028"], ["ye", "yess"]),
        (Constraint(regex="()"), [""], ["a"]),
    ],
)
def test_the_whole_answer_keeps_it(constraint: Constraint, whole: list[str], others: list[str]) -> None:
    assert [text for text in whole if not _is_whole(constraint, text)] == []
    assert [text for text in others if _is_whole(constraint, text)] == []


def test_what_a_schema_says_of_blanks_changes_nothing() -> None:
    schema = POINT | {"x-guidance": {"whitespace_flexible": True, "lenient": True}}
    assert grammar_of(Constraint(json_schema=schema)) == grammar_of(Constraint(json_schema=POINT))


def test_a_grammar_of_ones_own_may_hold_a_schema() -> None:
    lark = 'start: "<" body ">"\nbody: %json {"type": "integer"}'
    matcher = _matcher(Grammar(lark, "tools"))
    assert matcher.take([*_ids("<12>"), END]) == len(_ids("<12>")) + 1


def test_a_matcher_goes_on_and_back() -> None:
    matcher = _matcher(Constraint(choice=("abc", "abd", "abdx")))
    assert matcher.take(_ids("abx")) == len(_ids("ab"))
    assert not matcher.is_over
    assert matcher.allowed([END]) == 0
    aside = matcher.copy()
    assert aside.take([*_ids("d"), END, *_ids("x")]) == len(_ids("d")) + 1
    assert aside.is_over
    assert aside.take([END]) == 0
    assert matcher.allowed([*_ids("c"), END]) == len(_ids("c")) + 1
    aside.roll_back(1)
    # The longer one is possible again.
    assert not aside.is_over
    assert aside.allowed([*_ids("x"), END]) == len(_ids("x")) + 1
    assert aside.take(_ids("x")) == len(_ids("x"))
    assert aside.is_over
    aside.roll_back(len(_ids("dx")))
    assert aside.take([*_ids("c"), END]) == len(_ids("c")) + 1


@given(st.lists(st.integers(0, WIDTH - 1), max_size=12), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=200)
def test_the_mask_is_what_may_follow(taken: list[int], seed: int) -> None:
    matcher = _matcher(Constraint(json_schema={"type": "array", "items": {"type": ["integer", "string"]}}))
    matcher.take([*_ids('[1, "'), *taken])
    if matcher.is_over:
        return
    logits = np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)
    masked = matcher.masked(logits)
    may_follow = np.array([matcher.allowed([each]) == 1 for each in range(WIDTH)])
    np.testing.assert_array_equal(masked, np.where(may_follow, logits, np.float32(-np.inf)))
    assert matcher.likeliest(logits) == masked.argmax()


@given(st.lists(st.sampled_from([*_ids('{"x": -12, "name": "ab\\n}'), END]), max_size=30))
@settings(deadline=None, max_examples=200)
def test_allowed_tokens_can_be_taken_and_given_back(ids: list[int]) -> None:
    matcher = _matcher(Constraint(json_schema=POINT))
    start = matcher.take(_ids('{"x": '))
    allowed = matcher.allowed(ids)
    assert matcher.take(ids) == allowed
    matcher.roll_back(allowed)
    assert matcher.allowed(ids) == allowed
    matcher.roll_back(start)
    assert matcher.allowed(_ids('{"x": ')) == start


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "wrong"}, "#: "),
        ({"patternProperties": 5}, "#: "),
        ({"multipleOf": [1]}, "#: "),
        ({"properties": {"a": {"items": {"type": "array", "uniqueItems": True}}}}, "#/properties/a/items: "),
        ({"$defs": {"a": {"pattern": "(b"}}, "$ref": "#/$defs/a"}, "#/$defs/a: "),
        ({"properties": {"a/b~": {"not": {}}}}, "#/properties/a~1b~0: "),
        ({"anyOf": [{"type": "null"}, {"oneOf": [{"minimum": 1}, {"minimum": 2}]}]}, "#/anyOf/1: "),
        ({"$ref": "#/$defs/missing"}, "/$defs/missing"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"type": "integer", "multipleOf": 9_999_991}, "multipleOf"),
        ({"patternProperties": {f"^a{i}x$": {} for i in range(900)}}, "smaller"),
        ({"$ref": "#/mine/0", "mine": [{"type": "integer", "multipleOf": 1e7}]}, "multipleOf"),
        ({"items": [{"multipleOf": 97}, {"multipleOf": 0.89}]}, "multipleOf"),
        ({"properties": {f"p{i}": {} for i in range(9_000)}}, "smaller"),
        ({"$ref": "#"}, "no answer"),
        (False, "no answer"),
        (_nested(200), "deep"),
        ("[", "the schema"),
        ("5", "a JSON Schema"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_the_place(schema: Any, place: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _matcher(Constraint(json_schema=schema))
    assert refused.value.field == "sampling.constraint.json_schema"
    assert place in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("form", "whole", "others"),
    [
        (
            "date",
            ["2024-02-29", "2000-02-29", "1999-12-31", "0001-01-01"],
            ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "0000-01-01", "24-01-01"],
        ),
        (
            "date-time",
            ["2024-02-29T23:59:59Z", "2024-02-28T00:00:00.5+01:00"],
            ["2023-02-29T00:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01T00:00:00"],
        ),
        ("time", ["12:30:00Z"], ["12:60:00Z", "12:30"]),
    ],
)
def test_dates_are_days_that_there_are(form: str, whole: list[str], others: list[str]) -> None:
    constraint = Constraint(json_schema={"type": "string", "format": form})
    for text in whole:
        assert _is_whole(constraint, f'"{text}"'), text
    for text in others:
        assert not _is_whole(constraint, f'"{text}"'), text


@given(st.dates())
def test_every_date_is_one(day: Any) -> None:
    assert _is_whole(Constraint(json_schema={"type": "string", "format": "date"}), f'"{day.isoformat()}"')


def test_what_only_looks_like_a_format_stays() -> None:
    schema = {"enum": [{"format": "date"}]}
    assert _is_whole(Constraint(json_schema=schema), '{"format": "date"}')
    with pytest.raises(InvalidRequest, match="pattern"):
        _matcher(Constraint(json_schema={"type": "string", "format": "date", "pattern": "1"}))


@pytest.mark.parametrize("regex", ["ab(c", "a(?=b)", r"(a)\1", "a$b", "[a&&b]"])
def test_a_regex_that_cannot_be_kept_is_refused(regex: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _matcher(Constraint(regex=regex))
    assert refused.value.field == "sampling.constraint.regex"


def test_the_place_in_a_regex_is_named() -> None:
    with pytest.raises(InvalidRequest, match="'ab\\(c', at character 3"):
        _matcher(Constraint(regex="ab(c"))


def test_a_model_without_the_characters_refuses() -> None:
    description = """{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
      "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false,
      "trim_offsets": true, "use_regex": true},
      "model": {"type": "BPE", "vocab": {"a": 0, "<end>": 1}, "merges": []}}"""
    matcher = asyncio.run(GrammarCompiler(description, 2, (1,)).compile(Constraint(choice=("ab",))))
    matcher.take([0])
    with pytest.raises(ModelRefusal) as refused:
        matcher.masked(np.zeros(2, np.float32))
    assert refused.value.field == "sampling.constraint.choice.texts"


def test_a_grammar_that_turns_out_too_ambiguous_is_refused() -> None:
    row = {"type": "object", "properties": {f"p{i}": {} for i in range(1_500)}, "additionalProperties": False}
    matcher = _matcher(Constraint(json_schema={"type": "array", "items": row}))
    with pytest.raises(InvalidRequest, match="simplify"):
        matcher.take(_ids('[{"p1": 1, '))


def test_a_regex_with_too_many_states_is_refused_where_it_can_go_no_further() -> None:
    (letter,) = _ids("a")

    def go_on(matcher: Matcher) -> None:
        # llguidance says so either at once or at its next mask.
        while matcher.take([letter]):
            pass
        raise matcher.not_taken(letter)

    with pytest.raises(InvalidRequest, match="simplify") as refused:
        go_on(_matcher(Constraint(regex="(a{1,1000}){1,1000}")))
    assert refused.value.field == "sampling.constraint.regex"
    with pytest.raises(RuntimeError):
        go_on(_matcher(Constraint(regex="b")))


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f"a.{{{count}}}b"} for count in range(3, 12)]},
        {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": {}}, "minProperties": 1},
    ],
)
def test_what_llguidance_would_not_keep_or_not_end_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _matcher(Constraint(json_schema=schema))
    assert refused.value.field == "sampling.constraint.json_schema"


def test_properties_that_are_all_required_may_be_counted() -> None:
    schema = {**POINT, "minProperties": 2}
    assert _is_whole(Constraint(json_schema=schema), '{"x": 1, "name": "a"}')


@pytest.mark.parametrize("name", ["default", "enum", "day"])
def test_dates_are_exact_whatever_their_property_is_called(name: str) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "format": "date"}},
        "required": [name],
        "additionalProperties": False,
    }
    assert _is_whole(Constraint(json_schema=schema), f'{{"{name}": "2024-02-29"}}')
    assert not _is_whole(Constraint(json_schema=schema), f'{{"{name}": "2023-02-29"}}')


def test_requests_that_want_the_same_grammar_share_its_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(_TOKENIZER, WIDTH, (END,))
    compiled: list[str] = []
    grammar_from_lark = LLMatcher.grammar_from_lark

    def count(lark: str) -> str:
        compiled.append(lark)
        return grammar_from_lark(lark)

    monkeypatch.setattr(LLMatcher, "grammar_from_lark", staticmethod(count))

    async def ask() -> list[Matcher]:
        return await asyncio.gather(*(compiler.compile(Constraint(regex="ab")) for _ in range(20)))

    matchers = asyncio.run(ask())
    assert len(compiled) == 1
    assert [each.take(_ids("a")) for each in matchers] == [1] * 20, "each goes its own way"
