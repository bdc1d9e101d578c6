"""The objective of a request, from the body's field `asd` and from `x-asd-*` headers. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.values import Objective, Preference
from services.gateway.parameters import ASD_FIELDS, Body, finite
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
}
_TEXTS = ("task", "session_id")


@dataclass(frozen=True)
class Options:
    """What a caller asks of the cascade. fields: the names under which it was given, by the contract's."""

    objective: Objective
    task: str
    session_id: str
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
    """Return the options of a request. given: the body's `asd`, which wins over headers.

    headers: those that begin with x-asd-, in lower case. Raises InvalidRequest, naming field or header.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for header, text in headers.items():
        name = _BY_HEADER.get(header)
        if name is None:
            raise invalid(header, f"there is no such header: there are {', '.join(_BY_HEADER)}")
        values[name], names[name] = (text if name in _TEXTS else _number(text, header)), header
    if given is not None and not isinstance(given, dict):
        raise invalid("asd", "must be an object")
    for name, value in (given or {}).items():
        where = f"asd.{name}"
        if name not in ASD_FIELDS:
            raise invalid(where, f"there is no such field: there are {', '.join(ASD_FIELDS)}")
        if value is None:
            continue
        if name in _TEXTS and not isinstance(value, str):
            raise invalid(where, "must be a text")
        values[name], names[name] = (value if name in _TEXTS else finite(value, where)), where
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
    return Options(objective, values.get("task", ""), values.get("session_id", ""), fields)


def _refuse_clashes(names: Mapping[str, str], route: Route) -> None:
    if route.is_fixed:
        for name, where in names.items():
            if name not in _TEXTS:
                raise invalid(where, "clashes with the model, which names the stages: use the model asd")
    if isinstance(route.preference, Preference) and "lambda" in names:
        raise invalid(names["lambda"], "clashes with the model, which states a preference: use the model asd")


def _number(text: str, header: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    return finite(number, header)
