"""Formats of JSON Schema that llguidance keeps in form alone, as exact regular expressions. Pure.

It would let 30 February through. Days of months and leap years are regular, if long.
Source: RFC 3339, section 5.6; the years are 0001 to 9999, as in most languages' types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

_YEAR = r"([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
# Two digits that 4 divides, but not 00.
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"([0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DATE = (
    f"({_YEAR}-(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    f"|{_YEAR}-(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    f"|{_YEAR}-02-(0[1-9]|1[0-9]|2[0-8])"
    f"|{_LEAP_YEAR}-02-29)"
)
_HOURS = "([01][0-9]|2[0-3])"
# A leap second would need the day and the offset, so there is none.
_TIME = rf"{_HOURS}:[0-5][0-9]:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_HOURS}:[0-5][0-9])"
# Keywords that hold values, and those that hold schemas by names of the caller's.
_VALUES = ("enum", "const", "default", "examples")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PATTERNS = {"date": _DATE, "date-time": f"{_DATE}T{_TIME}", "time": _TIME}


def with_exact_dates(schema: Any, field: str) -> Any:
    """Return a schema whose formats of dates and times are patterns.

    Values that only look like schemas, such as an enum's, are left as they are. Raises InvalidRequest for a
    format beside a pattern.
    """
    if isinstance(schema, list):
        return [with_exact_dates(each, field) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return _with_pattern({name: _inside(name, each, field) for name, each in schema.items()}, field)


def _inside(keyword: str, value: Any, field: str) -> Any:
    """Return the value of a keyword, with exact dates in the schemas that stand in it."""
    if keyword in _VALUES:
        return value
    if keyword in _NAMED and isinstance(value, dict):
        return {name: with_exact_dates(each, field) for name, each in value.items()}
    return with_exact_dates(value, field)


def _with_pattern(schema: Mapping[str, Any], field: str) -> dict[str, Any]:
    name = schema.get("format")
    pattern = _PATTERNS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return dict(schema)
    if "pattern" in schema:
        raise InvalidRequest(
            f'"format": "{name}" stands beside a pattern: leave one of them out', field=field
        )
    kept = {key: each for key, each in schema.items() if key != "format"}
    return {**kept, "pattern": f"^{pattern}$"}
