"""What an answer has to be: JSON, a regular expression or a choice, in each API's form. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import Constraint, ToolChoice
from services.gateway.request import invalid
from services.gateway.tools import known

if TYPE_CHECKING:
    from asd.values import Tools
    from services.gateway.objective import Options


def read_format(value: object, where: str, nested: str = "") -> Constraint | None:
    """Return the constraint of a format; None for text. A schema is kept whether `strict` is set or not.

    nested: the key of the object that holds the schema; "": none. Raises InvalidRequest, naming the place.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise invalid(f"{where}.type", "must be text, json_object or json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        known(value, where, ("type",))
        return Constraint(json_schema={"type": "object"})
    about: Any = value
    if nested:
        known(value, where, ("type", nested))
        where, about = f"{where}.{nested}", value.get(nested)
    if isinstance(about, dict):
        known(about, where, ("name", "description", "schema", "strict", *(() if nested else ("type",))))
    schema = about.get("schema") if isinstance(about, dict) else None
    if not isinstance(schema, dict):
        raise invalid(f"{where}.schema", "must be a JSON Schema, an object")
    return Constraint(json_schema=schema)


def one_constraint(
    wanted: Constraint | None, where: str, options: Options, tools: Tools | None = None
) -> tuple[Constraint | None, str]:
    """Return the only constraint of a request, and the parameter that it is of.

    wanted: that of the API's own parameter, which is `where`. Raises InvalidRequest for two constraints, and
    for one beside tools, whose calls would break it.
    """
    if options.constraint is not None:
        if wanted is not None:
            raise invalid(options.constraint_field, f"clashes with {where}: give one of them")
        wanted, where = options.constraint, options.constraint_field
    if wanted is not None and tools is not None and tools.choice != ToolChoice.NONE:
        raise invalid(where, "clashes with tools: a call would not have this form; leave one of them out")
    return wanted, where
