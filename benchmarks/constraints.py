"""Answers under JSON Schemas: whether they keep them, also where a draft is verified, and what that costs.

    python -m benchmarks.constraints

20 schemas, 100 prompts of the suites each. Every stage of the embedded family writes alone under the schema,
greedily; then every later stage verifies the answer of every earlier one (EXACT). The models know the suites'
tasks alone, and no JSON: what they write follows the grammar, not the question.

`outside_schema`: of the answers that ended by themselves, those that the `jsonschema` package refuses, plus
those cut ones that the grammar does not allow up to where they were cut. `ended_share`: answers that ended by
themselves. `exact_mismatches`: verified answers that are not, token for token, what the last stage wrote
alone. `mask_share_of_time`: of the time that the large stage took for its tokens, that spent on the grammar;
`large_token_ms`: a token's time with and without constraint. One request at a time.

Interrupt it at any time: the same command goes on. Writes benchmarks/results/constraints.json.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import sys
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import jsonschema

from asd.values import Constraint, FinishReason, Message, Sampling
from benchmarks import arguments as kinds
from benchmarks.processes import ROOT
from benchmarks.record import keep_row, write_result
from services.stage.domain import DraftText
from services.stage.engines.conformance import collect
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.generation.constraint import GrammarCompiler, Matcher
from services.stage.generation.tokenizer import ChatTokenizer
from suites import split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.stage.domain import Result

NAMES = ("small", "medium", "large")
# Room for every answer that its schema bounds, in a context of 512 tokens.
MOST_TOKENS = 256
ROWS = ROOT / "build" / "constraints.json"


def _object(**properties: object) -> dict[str, object]:
    """Return the schema of an object that has all these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(most: int) -> dict[str, object]:
    return {"type": "string", "maxLength": most}


_COUNT = {"type": "integer", "minimum": 0, "maximum": 999}
_COLOUR = {"enum": ["red", "green", "blue"]}
SCHEMAS: dict[str, Any] = {
    "enum": {"enum": ["iron", "lamps", "grain", 7, None]},
    "enum in an object": _object(answer={"enum": ["A", "B", "C"]}, sure={"type": "boolean"}),
    "const": _object(kind={"const": "report"}, value=_COUNT),
    "integers": _object(answer=_COUNT, steps={"type": "integer", "minimum": 1, "maximum": 9}),
    "numbers": _object(
        price={"type": "number", "minimum": 0, "maximum": 99, "multipleOf": 0.01},
        share={"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.1},
    ),
    "strings": _object(question=_text(24), answer=_text(12)),
    "pattern": _object(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "pattern with alternatives": _object(
        time={"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}, what=_text(8)
    ),
    "format": _object(day={"type": "string", "format": "date"}),
    "optional fields": {
        **_object(answer=_COUNT, unit=_text(6), note=_text(10), colour=_COLOUR),
        "required": ["answer"],
    },
    "nesting": _object(a=_object(b=_object(c=_object(d=_COUNT, e=_COLOUR)), f={"type": "boolean"})),
    "array": {"type": "array", "items": _COUNT, "minItems": 1, "maxItems": 5},
    "array of objects": {
        "type": "array",
        "items": _object(name=_text(8), count=_COUNT),
        "minItems": 1,
        "maxItems": 3,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [_COLOUR, _COUNT, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "union": {"anyOf": [_COUNT, _text(10), {"type": "null"}, _object(answer=_COUNT)]},
    "union by a kind": {
        "anyOf": [
            _object(kind={"const": "circle"}, radius=_COUNT),
            _object(kind={"const": "square"}, side=_COUNT, colour=_COLOUR),
        ]
    },
    "nullable": _object(answer={"type": ["integer", "null"], "minimum": 0, "maximum": 99}, why=_text(16)),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": _COUNT}, "required": ["a"]},
            {"properties": {"a": {"maximum": 50}, "b": _COLOUR}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "references": {
        **_object(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
        "$defs": {"point": _object(x=_COUNT, y=_COUNT)},
    },
    "recursion": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                **_object(
                    value=_COUNT, children={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
                ),
                "required": ["value"],
            }
        },
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.constraints", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=kinds.count, default=100)
    parser.add_argument("--schemas", type=kinds.count, default=len(SCHEMAS), help="only the first ones")
    options = parser.parse_args(arguments)
    rows = asyncio.run(_measure(options.prompts, dict(itertools.islice(SCHEMAS.items(), options.schemas))))
    command = " ".join(
        ["python -m benchmarks.constraints", *(sys.argv[1:] if arguments is None else arguments)]
    )
    sys.stdout.write(f"{write_result('constraints', command, _figures(rows))}\n")


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    total = {
        name: sum(row[name] for row in rows) for name in rows[0] if isinstance(rows[0][name], int | float)
    }
    return {
        "engines": ["onnx"],
        "schemas": len(rows),
        "prompts": rows[0]["prompts"],
        "answers": total["answers"],
        "outside_schema": total["outside_schema"],
        "ended_share": round(total["ended"] / total["answers"], 4),
        "verified": total["verified"],
        "exact_mismatches": total["exact_mismatches"],
        "mask_share_of_time": round(total["mask_s"] / total["large_s"], 4),
        "large_token_ms": {
            "constrained": round(1e3 * total["large_s"] / total["large_tokens"], 3),
            "free": round(1e3 * total["free_s"] / total["free_tokens"], 3),
        },
        "rows": list(rows),
    }


async def _measure(prompts: int, schemas: Mapping[str, Any]) -> list[dict[str, Any]]:
    engines = {name: OnnxEngine(name, ROOT / "models" / name, OnnxOptions()) for name in NAMES}
    for engine in engines.values():
        await engine.load()
    turns = [(Message("user", task.prompt),) for task in split("evaluation", prompts)]
    rows = []
    try:
        for index, (name, schema) in enumerate(schemas.items(), start=1):
            key = _key(name, schema, prompts)
            row = _kept(key)
            if row is None:
                row = {"key": key, "schema": name, "prompts": prompts, **await _one(engines, schema, turns)}
                keep_row(ROWS, row, lambda each: each["key"])
            rows.append(row)
            told = {field: row[field] for field in ("ended", "answers", "outside_schema", "exact_mismatches")}
            sys.stderr.write(f"{index} of {len(schemas)}: {name} {json.dumps(told)}\n")
    finally:
        for engine in engines.values():
            await engine.unload()
    return rows


def _key(name: str, schema: object, prompts: int) -> str:
    """Return what a row depends on: whatever makes answers is part of it."""
    made_by = [ROOT / "services" / "stage" / each for each in ("generation", "engines/onnx")]
    sources = [path.read_bytes() for folder in made_by for path in sorted(folder.glob("*.py"))]
    about = json.dumps([name, schema, prompts, MOST_TOKENS]).encode()
    return hashlib.sha256(b"".join([about, *sources])).hexdigest()[:16]


def _kept(key: str) -> dict[str, Any] | None:
    rows = json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.exists() else []
    return next((row for row in rows if row["key"] == key), None)


async def _one(
    engines: Mapping[str, OnnxEngine], schema: object, prompts: Sequence[tuple[Message, ...]]
) -> dict[str, Any]:
    """Return the figures of one schema."""
    constraint = Constraint(json_schema=json.dumps(schema))
    sampling = Sampling(max_new_tokens=MOST_TOKENS, constraint=constraint)
    # In decimals: of 9.78, jsonschema says in floats that it is no multiple of 0.01.
    validator = jsonschema.Draft202012Validator(
        json.loads(json.dumps(schema), parse_float=Decimal),
        format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
    )
    alone: dict[str, list[Result]] = {}
    mask = _Stopwatch()
    figures: dict[str, Any] = {"answers": 0, "ended": 0, "outside_schema": 0, "outside": []}
    for name, engine in engines.items():
        matcher = await _compiler(name).compile(constraint)
        with mask.on(
            Matcher, ("take", "allowed", "roll_back", "likeliest", "masked"), is_on=name == NAMES[-1]
        ):
            alone[name] = [(await collect(engine.generate(turns, sampling))).result for turns in prompts]
        for result in alone[name]:
            figures["answers"] += 1
            has_ended = result.finish is FinishReason.EOS
            figures["ended"] += has_ended
            if not (_is_valid(validator, result.text) if has_ended else _may_go_on(matcher, result)):
                figures["outside_schema"] += 1
                figures["outside"].append(result.text)
    figures |= {"verified": 0, "exact_mismatches": 0, "mask_s": mask.seconds}
    for drafter, target in itertools.combinations(NAMES, 2):
        engine = engines[target]
        for turns, draft, wanted in zip(prompts, alone[drafter], alone[target], strict=True):
            sent = DraftText(draft.text, draft.ids, engines[drafter].status().fingerprint, draft.finish)
            found = (await collect(engine.verify(turns, sampling, sent, None), evidence="first")).result
            figures["verified"] += 1
            figures["exact_mismatches"] += (found.ids, found.finish) != (wanted.ids, wanted.finish)
    # Fewer than the constrained ones: the models end their own answers soon.
    free = [
        (await collect(engines[NAMES[-1]].generate(turns, Sampling(max_new_tokens=MOST_TOKENS)))).result
        for turns in prompts
    ]
    for name, results in (("large", alone[NAMES[-1]]), ("free", free)):
        figures[f"{name}_s"] = sum(result.decode_ms for result in results) / 1e3
        figures[f"{name}_tokens"] = sum(len(result.ids) for result in results)
    return figures


def _is_valid(validator: Any, text: str) -> bool:
    try:
        value = json.loads(text, parse_float=Decimal)
    except ValueError:
        return False
    return bool(validator.is_valid(value))


def _may_go_on(matcher: Matcher, result: Result) -> bool:
    """Return whether the grammar allows every prefix of a cut answer."""
    taken = matcher.take(result.ids)
    matcher.roll_back(taken)
    return taken == len(result.ids)


def _compiler(name: str) -> GrammarCompiler:
    tokenizer = ChatTokenizer(ROOT / "models" / name)
    end = next(token for token, mark in tokenizer.special.items() if mark == "<|end|>")
    return GrammarCompiler(tokenizer.to_json(), tokenizer.vocabulary_size, (end,))


class _Stopwatch:
    """Counts the time that is spent in methods of a class; in one that calls another, once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_inside = False

    def on(self, owner: type, names: Sequence[str], *, is_on: bool) -> _Replaced:
        """Return a context in which the methods are timed, if it is on."""
        return _Replaced(owner, {name: self._timed(getattr(owner, name)) for name in names if is_on})

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:
                return method(*arguments, **options)
            self._is_inside, begin = True, time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin
                self._is_inside = False

        return timed


class _Replaced:
    """Methods of a class, replaced within a context."""

    def __init__(self, owner: type, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._owner = owner
        self._methods = methods
        self._kept = {name: getattr(owner, name) for name in methods}

    def __enter__(self) -> None:
        for name, method in self._methods.items():
            setattr(self._owner, name, method)

    def __exit__(self, *_: object) -> None:
        for name, method in self._kept.items():
            setattr(self._owner, name, method)


if __name__ == "__main__":
    main()
