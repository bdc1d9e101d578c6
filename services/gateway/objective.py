"""The objective of a request, from the body's field `asd` and from `x-asd-*` headers. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.values import Constraint, Objective, Preference
from services.gateway.parameters import ASD_FIELDS, ASD_FORMS, Body, finite
from services.gateway.request import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.gateway.models import Models, Route

HEADER_PREFIX = "x-asd-"
# Contract's fields, by names in the body.
_CONTRACT = {
    "lambda": "objective.lambda",
    "max_cost": "objective.max_cost",
    "max_latency_ms": "objective.max_latency_ms",
    "min_quality": "objective.min_quality",
    "task": "task",
    "session_id": "session_id",
    "allow_switch": "allow_switch",
}
_TEXTS = ("task", "session_id")
# What a request may have that names its stages.
_NOT_FOR_POLICY = (*_TEXTS, "allow_switch")
_FLAGS = {"true": True, "false": False}
# A header's number in decimal digits.
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Options:
    """What a caller asks of the cascade. fields: the names under which it was given, by the contract's.

    constraint: of the answer's form. constraint_field: its name.
    """

    objective: Objective
    task: str
    session_id: str
    allow_switch: bool
    constraint: Constraint | None
    constraint_field: str
    fields: Mapping[str, str]


def header_of(name: str) -> str:
    """Return the header of a field of `asd`."""
    return HEADER_PREFIX + name.replace("_", "-")


_BY_HEADER = {header_of(name): name for name in ASD_FIELDS}


def open_body(
    api: str, body: Mapping[str, Any], headers: Mapping[str, str], models: Models
) -> tuple[Body, str, Route, Options]:
    """Return what all APIs' bodies have: their fields, the model, its stages, and the options.

    Raises InvalidRequest or NotFound, naming the parameter.
    """
    fields = Body(api, body)
    model = fields.text("model", is_required=True) or ""
    route = models.route(model)
    return fields, model, route, read_options(fields.get("asd"), headers, route)


def read_options(given: object, headers: Mapping[str, str], route: Route) -> Options:
    """Return the options of a request.

    given: the body's `asd`. A header of a field that it has is not read. headers: those that begin with
    x-asd-, in lower case. Raises InvalidRequest, naming field or header.
    """
    if given is not None and not isinstance(given, dict):
        raise invalid("asd", "must be an object")
    given = {name: value for name, value in (given or {}).items() if value is not None}
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for header, text in headers.items():
        name = _BY_HEADER.get(header)
        if name is None:
            raise invalid(header, f"there is no such header: there are {', '.join(_BY_HEADER)}")
        if name not in given:
            values[name], names[name] = _header_value(name, text, header), header
    constraint, constraint_field = None, ""
    for name, value in given.items():
        where = f"asd.{name}"
        if name not in ASD_FIELDS and name not in ASD_FORMS:
            raise invalid(where, f"there is no such field: there are {', '.join([*ASD_FIELDS, *ASD_FORMS])}")
        if name in ASD_FORMS:
            if constraint is not None:
                raise invalid(where, f"clashes with {constraint_field}: give one of them")
            constraint, constraint_field = _constraint(name, value, where), where
        else:
            values[name], names[name] = _body_value(name, value, where), where
    _refuse_clashes(names, route)
    # `asd` leaves the preference to the policy's default, so that a value can take its place.
    objective = Objective(
        values.get("lambda"),
        values.get("max_cost"),
        values.get("max_latency_ms"),
        values.get("min_quality"),
        route.preference,
    )
    fields = {_CONTRACT[name]: where for name, where in names.items()}
    return Options(
        objective,
        values.get("task", ""),
        values.get("session_id", ""),
        values.get("allow_switch", False),
        constraint,
        constraint_field,
        fields,
    )


def _refuse_clashes(names: Mapping[str, str], route: Route) -> None:
    if route.is_fixed:
        for name, where in names.items():
            if name not in _NOT_FOR_POLICY:
                raise invalid(where, "clashes with the model, which names the stages: use the model asd")
    if isinstance(route.preference, Preference) and "lambda" in names:
        raise invalid(names["lambda"], "clashes with the model, which states a preference: use the model asd")


def _body_value(name: str, value: object, where: str) -> object:
    if name == "allow_switch":
        if not isinstance(value, bool):
            raise invalid(where, "must be true or false")
        return value
    if name in _TEXTS:
        if not isinstance(value, str):
            raise invalid(where, "must be a text")
        return value
    return finite(value, where)


def _constraint(name: str, value: object, where: str) -> Constraint:
    if name == "regex":
        if not isinstance(value, str) or not value:
            raise invalid(where, "must be a text, and not an empty one")
        return Constraint(regex=value)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise invalid(where, "must be a list of texts")
    return Constraint(choice=tuple(value))


def _header_value(name: str, text: str, header: str) -> object:
    if name in _TEXTS:
        return text
    if name == "allow_switch":
        if text not in _FLAGS:
            raise invalid(header, "must be true or false")
        return _FLAGS[text]
    # Python's own reading takes 1_0 as well.
    return finite(float(text) if _NUMBER.fullmatch(text) else math.nan, header)
