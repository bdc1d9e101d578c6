"""What the gateway answers can be reported."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from asd.client import AsyncClient
from asd.values import Answer, ReportReceipt
from services.cli.commands import app
from tests.unit.gateway.samples import LEAST, answer, parse

_RUNNER = CliRunner()


@pytest.fixture
def reported(monkeypatch):
    """Return the answers that are reported."""

    async def report(self, answer, **given):
        answers.append(answer)
        return ReportReceipt(1)

    answers: list[Answer] = []
    monkeypatch.setattr(AsyncClient, "report", report)
    return answers


@pytest.mark.parametrize("api", LEAST)
def test_an_answer_of_the_gateway_is_reported_by_its_field(reported, api):
    body = api.answer(parse(api), (answer(),), 99)
    result = _RUNNER.invoke(app, ["report", "-", "--right"], input=json.dumps(body))
    assert result.exit_code == 0, result.output
    (sent,) = reported
    assert (sent.request_id, sent.stage, sent.p_correct, sent.policy_version) == ("r1", "large", 0.75, "p7")


def test_of_several_choices_one_is_reported(reported):
    several = (answer(), answer(request_id="r2"))
    (api, *_) = LEAST
    body = api.answer(parse(api, {"n": 2}), several, 99)
    refused = _RUNNER.invoke(app, ["report", "-", "--right"], input=json.dumps(body))
    assert refused.exit_code == 2
    assert "asd.choices[0]" in refused.output
    one = json.dumps({"asd": body["asd"]["choices"][1]})
    assert _RUNNER.invoke(app, ["report", "-", "--right"], input=one).exit_code == 0
    assert [each.request_id for each in reported] == ["r2"]
