"""docs/gateway.md says of every model, option, parameter, limit and status what the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from services.gateway.errors import TABLE
from services.gateway.models import VIRTUAL
from services.gateway.objective import header_of
from services.gateway.parameters import ASD_FIELDS, ASD_FORMS, PARAMETERS
from services.gateway.settings import GatewaySettings

_PAGE = (Path(__file__).parents[3] / "docs" / "gateway.md").read_text(encoding="utf-8")


def _rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    _, found, section = _PAGE.partition(f"\n{heading}\n")
    assert found, heading
    section = re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("api", PARAMETERS)
def test_every_parameter_of_an_api_is_in_its_table(api):
    assert _rows(f"### /v1/{api}") == [
        [
            f"`{each.name}`",
            str(each.effect),
            each.note,
            ", ".join(f"`{json.dumps(value)}`" for value in each.neutral),
        ]
        for each in PARAMETERS[api]
    ]


def test_every_option_has_its_header():
    assert _rows("## Objectives") == [
        [f"`{each.name}`", f"`{header_of(each.name)}`", each.note] for each in ASD_FIELDS.values()
    ]


def test_every_form_of_an_answer_is_in_its_table():
    forms = [[f"`{each.name}`", each.note] for each in ASD_FORMS.values()]
    assert _rows("### The form of an answer") == forms


def test_every_virtual_model_is_listed():
    assert [row[0] for row in _rows("## Models")][:-1] == [f"`{name}`" for name in VIRTUAL]


def test_limits_have_their_defaults():
    settings = GatewaySettings(router={"target": "127.0.0.1:1"})
    for name, default, _ in _rows("## Limits"):
        value = settings
        for part in name.strip("`").split("."):
            value = getattr(value, part)
        number = float(default.removesuffix(" MiB"))
        assert value == (number * 2**20 if "MiB" in default else number), name


def test_statuses_are_those_that_callers_get():
    # 499 is for logs alone. 403, 409, 500 and 501 are no status of a router that works.
    told = {int(row[0]) for row in _rows("## Errors")}
    assert told == {row.http for row in TABLE.values()} - {403, 409, 499, 500, 501}
