"""A refused field of the contract is told as the option that was typed."""

from __future__ import annotations

import re

import pytest
import typer
from google.protobuf.descriptor import FieldDescriptor

from asd.convert import request_to
from asd.errors import AsdError
from asd.v1 import cascade_pb2
from asd.values import Acceptance, Constraint, Message, Objective, Request, Sampling
from services.cli.arguments import ASK_OPTIONS, in_options, option_of
from services.cli.commands import app
from services.router.servicer import check_request

# What says how to ask, and not what.
_OF_THE_CALL = {"--target", "--timeout-ms", "--json", "--help"}

# What `asd ask` does not offer.
_NOT_ASKED = re.compile(r"tool|allow_switch")


def _options() -> set[str]:
    command = typer.main.get_command(app).commands["ask"]
    return {
        each.name if each.param_type_name == "argument" else max(each.opts, key=len)
        for each in command.params
        if getattr(each, "rich_help_panel", None) != "Connection"
    }


def _fields(descriptor, prefix="") -> list[str]:
    found = []
    for field in descriptor.fields:
        found.append(prefix + field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            found.remove(prefix + field.name)
            found += _fields(field.message_type, f"{prefix}{field.name}.")
    return found


def test_every_option_that_becomes_part_of_a_request_is_known_and_every_field_is():
    assert set(ASK_OPTIONS.values()) == _options() - _OF_THE_CALL
    fields = {each for each in _fields(cascade_pb2.GenerateRequest.DESCRIPTOR) if not _NOT_ASKED.search(each)}
    assert fields <= set(ASK_OPTIONS)


def _with(**values) -> Request:
    return Request("Hi", **values)


def _constrained(**constraint) -> Request:
    return _with(sampling=Sampling(constraint=Constraint(**constraint)))


WRONG = {
    "prompt": [Request(""), Request("x" * (5 << 20)), Request((Message("system", "s"), Message("user", "")))],
    "--system": [
        Request((Message("system", "x" * (5 << 20)), Message("user", "u"))),
        Request((Message("system", "\udcff"), Message("user", "u"))),
    ],
    "--max-new-tokens": [_with(sampling=Sampling(max_new_tokens=each)) for each in (0, -1, 1 << 40)],
    "--temperature": [_with(sampling=Sampling(temperature=each)) for each in (3, -1, float("nan"), 1e300)],
    "--top-p": [_with(sampling=Sampling(top_p=each)) for each in (0, 2, float("nan"))],
    "--seed": [_with(sampling=Sampling(seed=each)) for each in (-1, 1 << 70)],
    "--stop": [_with(sampling=Sampling(stop=each)) for each in (("",), ("a",) * 9, ("\udcff",))],
    "--lambda": [_with(objective=Objective(quality_value=each)) for each in (-1, 1e300, float("nan"))],
    "--max-cost": [_with(objective=Objective(max_cost=each)) for each in (0, float("inf"))],
    "--max-latency-ms": [_with(objective=Objective(max_latency_ms=each)) for each in (0, float("nan"))],
    "--min-quality": [_with(objective=Objective(min_quality=each)) for each in (0, 2)],
    "--preference": [_with(objective=Objective(quality_value=1, preference="best"))],
    "--tolerance": [_with(acceptance=Acceptance("tolerant", each)) for each in (0, 2, float("nan"))],
    "--session": [_with(session_id="s" * 257), _with(session_id="\udcff")],
    "--stage": [_with(stage="\udcff")],
    "--chain": [_with(stage="a", chain=("a", "b")), _with(chain=("a", "\udcff"))],
    "--task": [_with(task="Math!"), _with(task="\udcff")],
    "--json-schema": [
        _constrained(json_schema=each)
        for each in ("{", "[]", '{"$ref": "http://a/b"}', "\udcff", "1" * 999_999)
    ],
    "--regex": [_constrained(regex=each) for each in ("", "a" * 99_999, "\udcff")],
    "--choice": [_constrained(choice=each) for each in (("",), ("a", "a"), ("a", "\udcff"), ("a" * 99_999,))],
    "--top-logprobs": [_with(sampling=Sampling(top_logprobs=each)) for each in (-1, 21)],
    "--prediction": [_with(prediction="\udcff")],
}


@pytest.mark.parametrize("option", sorted(_options() - _OF_THE_CALL))
def test_a_wrong_value_is_told_by_its_option(option):
    for request in WRONG[option]:
        with pytest.raises(AsdError) as refused:
            check_request(request_to(request))
        error = refused.value
        assert option_of(error.field, ASK_OPTIONS) == option
        message = in_options(error.message, error.field, ASK_OPTIONS)
        assert option in message
        # No word of the contract is left.
        assert not re.search(r"[a-z]_[a-z]|[a-z]\.[a-z]|\w\[\d", message), message


@pytest.mark.parametrize(
    ("message", "field", "told"),
    [
        ("no stage 'huge'; the cascade has a", "stage", "no --stage 'huge'; the cascade has a"),
        ("no stage 'x'; the cascade has a", "chain[1]", "--chain: no stage 'x'; the cascade has a"),
        ("max_cost 1 is below the cheapest", "objective.max_cost", "--max-cost 1 is below the cheapest"),
        ("top_p must be", "request.sampling.top_p", "--top-p must be"),
        ("conversation has 9 tokens", "conversation", "prompt has 9 tokens"),
        ("what newer services say", "newer.field", "what newer services say"),
        ("no field", "", "no field"),
    ],
)
def test_a_message_is_told_in_options(message, field, told):
    assert in_options(message, field, ASK_OPTIONS) == told
