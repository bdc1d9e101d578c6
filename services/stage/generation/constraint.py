"""What an answer must be, compiled by llguidance for a model's tokenizer and kept token by token. Pure.

One grammar stands for every kind of constraint, in llguidance's dialect of Lark: an engine whose library
takes such a text keeps exactly what the others keep. JSON is written with one blank after each comma and
colon, and with properties in the schema's order: a model that may write blanks where it likes need not end.
"""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from asd.errors import InvalidRequest, ModelRefusal, ResourceExhausted
from services.common.constraints import check_schema
from services.stage.generation.dates import with_exact_dates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from asd.values import Constraint
    from services.stage.generation.tokenizer import ChatTokenizer

    Logits = npt.NDArray[np.float32]

# How JSON is written. Keywords that llguidance does not know are errors, and what a schema says of this in
# `x-guidance` is replaced.
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
# Measured: what they let through compiles in about a second at most.
_MOST_SYMBOLS, _MOST_LEXER_FUEL = 30_000, 200_000
# The time grows with the square of the number of properties.
_MOST_OBJECTS = 2_000
# Each is compared with each: 900 took more than 5 s.
_MOST_PATTERNS = 100
# llguidance has no bound for it: dividing by 9,999,991 took minutes, by 3,001 it takes 0.02 s.
_MOST_DIVISOR = 3_000
# For what no bound foresees. Chosen: a busy machine may take several times as long.
_LONGEST_S = 5.0
# llguidance has no bound for it either: 37 patterns at once took half a minute.
_MOST_INTERSECTED = 8
# Chosen. A compiled grammar takes up to a few megabytes.
_KEPT_GRAMMARS = 64
_COMPILED_AT_A_TIME = 2
# llguidance's words.
_SCHEMA_ERROR = "failed to compile JSON schema: "
_NOTHING_FITS = "NoExtensionBias"
# Where a schema holds further ones: under any name, in a list, or itself.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint as llguidance's Lark. field: of the request, which errors name."""

    lark: str
    field: str


def grammar_of(constraint: Constraint, path: str = "sampling.constraint") -> Grammar:
    """Return a constraint's grammar. Raises InvalidRequest for a schema that is none."""
    if constraint.json_schema is not None:
        assert isinstance(constraint.json_schema, str)
        field = f"{path}.json_schema"
        return Grammar(f"start: {json_rule(check_schema(constraint.json_schema, field), field)}", field)
    if constraint.regex is not None:
        return Grammar(f"start: /{regex_to_lark(constraint.regex, use_ascii='')}/", f"{path}.regex")
    assert constraint.choice is not None
    return Grammar(f"start: {' | '.join(map(json.dumps, constraint.choice))}", f"{path}.choice.texts")


def json_rule(schema: Any, field: str) -> str:
    """Return the part of a grammar that stands for a value of a parsed JSON Schema."""
    if schema is False:
        raise InvalidRequest("the schema false allows no answer at all", field=field)
    schema = {} if schema is True else with_exact_dates(schema, field)
    # Whatever stands in it may be referred to.
    objects = list(_objects_in(schema))
    if len(objects) > _MOST_OBJECTS:
        raise InvalidRequest(
            f"the schema holds {len(objects):,} objects, and {_MOST_OBJECTS:,} are the most: make it smaller",
            field=field,
        )
    patterns = [each["patternProperties"] for each in objects if "patternProperties" in each]
    if sum(len(each) for each in patterns if isinstance(each, dict)) > _MOST_PATTERNS:
        raise InvalidRequest(
            f"patternProperties hold more than {_MOST_PATTERNS} patterns: make it smaller", field=field
        )
    if any(_patterns_in(each["allOf"]) > _MOST_INTERSECTED for each in objects if "allOf" in each):
        raise InvalidRequest(
            f"allOf holds more than {_MOST_INTERSECTED} patterns: make it smaller", field=field
        )
    for each in objects:
        _check_least(each, field)
    divisors = {_divisor(each["multipleOf"]) for each in objects if "multipleOf" in each}
    if prod(divisors) > _MOST_DIVISOR:
        raise InvalidRequest(
            f"multipleOf has too many digits: multiplied without their decimal points, all its numbers give "
            f"{_MOST_DIVISOR:,} at most",
            field=field,
        )
    return f"%json {json.dumps(schema | {'x-guidance': _JSON})}"


class Matcher:
    """Keeps a grammar along one answer. One thread uses it at a time.

    It stands after the tokens that it took. Where the grammar is complete, a token that ends answers is
    allowed as well, and nothing after it. Every method raises InvalidRequest for a grammar that turns out to
    be too complex, and ModelRefusal where the model has no token for what must follow.
    """

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int], grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._has_ended = False

    def copy(self) -> Matcher:
        """Return another one at the same place."""
        copied = Matcher(self._matcher.deep_copy(), self._eos_ids, self.grammar)
        copied._has_ended = self._has_ended
        return copied

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow but the end."""
        is_stopped = self._has_ended or self._matcher.is_stopped()
        self._check()
        return is_stopped

    def take(self, ids: Sequence[int]) -> int:
        """Go on by tokens, up to the first that is not allowed; return how many were."""
        return self._go_on(ids, self._matcher.try_consume_tokens, ends=True)

    def allowed(self, ids: Sequence[int]) -> int:
        """Return how many of the tokens may follow, one after the other."""
        return self._go_on(ids, self._matcher.validate_tokens, ends=False)

    def roll_back(self, count: int) -> None:
        """Forget the last tokens that it took."""
        if count and self._has_ended:
            self._has_ended = False
            count -= 1
        self._matcher.rollback(count)
        self._check()

    def likeliest(self, logits: Logits) -> int:
        """Return the likeliest token that may follow. logits: float32 [V]."""
        token = int(logits.argmax())
        # Computing the mask takes many times as long, and models mostly keep to what they are asked for.
        return token if self.allowed([token]) else int(self.masked(logits).argmax())

    def not_taken(self, token: int) -> Exception:
        """Return the error for a token that was chosen and that it does not take.

        Where llguidance has come to a limit of its own, it takes nothing more, and says so only when it makes
        a mask: the constraint is too complex. Otherwise the token was chosen wrongly.
        """
        self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return self._too_complex(_reason(self._matcher.get_error()))
        return RuntimeError(f"token {token} was chosen, which the constraint does not allow")

    def masked(self, logits: Logits) -> Logits:
        """Return logits, float32 [V], with -inf for each token that may not follow."""
        masked: Logits = np.where(self.mask()[: len(logits)], logits, np.float32(-np.inf))
        return masked

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return for each token whether it may be chosen: bool [V].

        Of a text that must follow, this has the usual tokens alone; `allowed` knows the others, too.
        """
        mask: npt.NDArray[np.bool_] = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        return mask

    def _go_on(self, ids: Sequence[int], go: Callable[[list[int]], int], *, ends: bool) -> int:
        if self._has_ended:
            return 0
        # llguidance takes no end-of-sequence token once a grammar is complete, so it is shown none.
        end = next((index for index, each in enumerate(ids) if each in self._eos_ids), len(ids))
        count = go(list(ids[:end]))
        self._check()
        if count < end or end == len(ids):
            return count
        if ends:
            is_complete = self._has_ended = self._matcher.is_accepting()
        else:
            is_complete = self._is_complete_after(ids[:end])
        return count + is_complete

    def _is_complete_after(self, ids: Sequence[int]) -> bool:
        self._matcher.try_consume_tokens(list(ids))
        is_complete = self._matcher.is_accepting()
        self.roll_back(len(ids))
        return is_complete

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        if self._matcher.get_error().startswith(_NOTHING_FITS):
            raise ModelRefusal(
                "the model has no token for what the constraint wants next: its tokenizer lacks a character",
                field=self.grammar.field,
            )
        raise self._too_complex(_reason(self._matcher.get_error()))

    def _too_complex(self, reason: str) -> InvalidRequest:
        return InvalidRequest(
            f"the constraint is too complex to be kept: {reason}: simplify it", field=self.grammar.field
        )


class GrammarCompiler:
    """Compiles constraints for one model. tokenizer: the content of tokenizer.json.

    vocabulary: ids of the model, those without a token included. drops_blank: whether a text's first tokens
    hold a blank that is not part of it. Raises ValueError for a tokenizer that
    llguidance cannot use.
    """

    def __init__(
        self, tokenizer: str, vocabulary: int, eos_ids: Sequence[int], *, drops_blank: bool = False
    ) -> None:
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos_ids))
        self._eos_ids = frozenset(eos_ids)
        self._start = 'start: " " after_blank\nafter_blank:' if drops_blank else "start:"
        self._limits = LLParserLimits(
            initial_lexer_fuel=_MOST_LEXER_FUEL, max_grammar_size=_MOST_SYMBOLS, verbose_errors=False
        )
        self._threads = ThreadPoolExecutor(_COMPILED_AT_A_TIME, thread_name_prefix="grammar")
        self._compiled = lru_cache(_KEPT_GRAMMARS)(self._compile)
        # Grammars that are being compiled, for all requests that want them, and those whose turn has come.
        self._under_way: dict[Grammar, asyncio.Future[LLMatcher]] = {}
        self._begun: set[Grammar] = set()

    async def compile(self, wanted: Constraint | Grammar) -> Matcher:
        """Return a matcher at the beginning of an answer.

        Raises InvalidRequest for a grammar that is wrong, cannot be kept, or takes too long to compile, and
        ResourceExhausted where others take the time.
        """
        grammar = wanted if isinstance(wanted, Grammar) else grammar_of(wanted)
        try:
            compiled = await asyncio.wait_for(asyncio.shield(self._work_for(grammar)), _LONGEST_S)
        except TimeoutError:
            if grammar not in self._begun:
                raise ResourceExhausted("other constraints are being compiled: try again later") from None
            raise InvalidRequest(
                f"the constraint takes more than {_LONGEST_S:g} s to compile: simplify it",
                field=grammar.field,
            ) from None
        return Matcher(compiled.deep_copy(), self._eos_ids, grammar)

    def _work_for(self, grammar: Grammar) -> asyncio.Future[LLMatcher]:
        """Return the work of compiling a grammar, which goes on however long a request waits for it."""
        loop = asyncio.get_running_loop()
        work = self._under_way.get(grammar)
        if work is None or work.get_loop() is not loop:
            work = self._under_way[grammar] = loop.run_in_executor(self._threads, self._begin, grammar)
            work.add_done_callback(lambda done: self._ended(grammar, done))
        return work

    def _begin(self, grammar: Grammar) -> LLMatcher:
        self._begun.add(grammar)
        return self._compiled(grammar)

    def _ended(self, grammar: Grammar, work: asyncio.Future[LLMatcher]) -> None:
        self._begun.discard(grammar)
        self._under_way.pop(grammar, None)
        if not work.cancelled():
            # Nobody may be waiting for its error any more.
            work.exception()

    def compile_now(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of an answer, as `compile` does, without a bound on the time."""
        return Matcher(self._compiled(grammar).deep_copy(), self._eos_ids, grammar)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = self._matcher(re.sub("^start:", self._start, grammar.lark, count=1, flags=re.MULTILINE))
        if not matcher.is_error():
            # The first mask shows what is too ambiguous, and what no answer fits.
            matcher.compute_bitmask()
        if matcher.get_error().startswith(_NOTHING_FITS):
            raise InvalidRequest("the constraint allows no answer at all", field=grammar.field)
        if matcher.is_error():
            error = matcher.get_error()
            is_limit = _SCHEMA_ERROR not in error and "regex" not in error
            raise InvalidRequest(
                f"the constraint cannot be kept: {self._place(grammar, error)}{_reason(error)}: "
                + ("make it smaller or simpler" if is_limit else "change that, or leave it out"),
                field=grammar.field,
            )
        return matcher

    def _matcher(self, lark: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0, limits=self._limits)

    def _place(self, grammar: Grammar, error: str) -> str:
        """Return where in a schema an error is, as a JSON pointer, before a colon; "" for no schema's error.

        llguidance does not say. It is in the innermost schema that fails alone as the whole one does.
        """
        _, is_schema, text = grammar.lark.partition("start: %json ")
        if not is_schema or _SCHEMA_ERROR not in error:
            return ""
        schema, place, reason = json.loads(text), "#", _reason(error)
        while True:
            for name, each in _schemas_in(schema):
                own = self._matcher(f"start: %json {json.dumps(each | {'x-guidance': _JSON})}").get_error()
                if own and _reason(own) == reason:
                    schema, place = each, f"{place}/{name}"
                    break
            else:
                return f"{place}: "


def compiler_for(tokenizer: ChatTokenizer, vocabulary: int, eos_ids: Sequence[int]) -> GrammarCompiler:
    """Return the compiler of a model. Raises ValueError for a tokenizer that llguidance cannot use."""
    return GrammarCompiler(
        tokenizer.to_json(),
        max(vocabulary, tokenizer.vocabulary_size),
        eos_ids,
        drops_blank=tokenizer.drops_blank(),
    )


def _reason(error: str) -> str:
    """Return what llguidance says is wrong, in one line, without its listing of the grammar."""
    reason = re.sub(r"^at \d+\(\d+\): ", "", re.split(r"\n +\d+ \| ", error)[0]).removeprefix(_SCHEMA_ERROR)
    if "oneOf constraints" in reason:
        return "oneOf is kept only where no value fits two of its schemas: use anyOf"
    pattern = re.search(r"regex parse error:\n    (.*)\n    ( *)\^+\nerror: (.*)", reason)
    if pattern is not None:
        return f"the regular expression {pattern[1]!r}, at character {len(pattern[2]) + 1}: {pattern[3]}"
    return reason.partition("\n")[0]


def _schemas_in(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas that stand directly in one, with their places."""
    found: list[tuple[str, Any]] = []
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            found += [(f"{key}/{_escaped(name)}", each) for name, each in schema[key].items()]
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            found += [(f"{key}/{index}", each) for index, each in enumerate(schema[key])]
    found += [(key, schema.get(key)) for key in _SINGLE]
    yield from ((place, each) for place, each in found if isinstance(each, dict))


def _escaped(name: str) -> str:
    """Return a name as a JSON pointer has it."""
    return name.replace("~", "~0").replace("/", "~1")


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON value, itself included; check_schema has bounded its depth."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objects_in(each)


def _patterns_in(value: Any) -> int:
    return sum("pattern" in each for each in _objects_in(value))


def _check_least(schema: Mapping[str, Any], field: str) -> None:
    """Raise InvalidRequest for a least number of properties that are not all named.

    llguidance counts what is written, and would let one free name stand twice.
    """
    least, required, named = (schema.get(key) for key in ("minProperties", "required", "properties"))
    if not isinstance(least, int) or least <= 0:
        return
    sure = set(required if isinstance(required, list) else ()) & set(named if isinstance(named, dict) else ())
    if least > len(sure):
        raise InvalidRequest(
            f"minProperties {least} cannot be kept: name so many properties, and require them", field=field
        )


def _divisor(value: Any) -> int:
    """Return a number without its decimal point; 1 for what is no number, which llguidance refuses."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 1
    digits = Decimal(str(value)).normalize().as_tuple()
    assert isinstance(digits.exponent, int)
    number = int("".join(map(str, digits.digits)))
    # Beyond this, it is too large whatever follows.
    return number * int(10 ** min(max(digits.exponent, 0), 9))
