"""Errors over HTTP, and the OpenAPI document."""

from __future__ import annotations

import grpc
import pytest

from services.gateway.app import APIS
from services.gateway.errors import TABLE, Problem, anthropic_body, openai_body, retry_headers
from services.gateway.openapi import document
from services.gateway.parameters import PARAMETERS
from tests.unit.gateway.samples import MODELS


def test_every_status_of_grpc_has_a_row():
    assert {each.name for each in grpc.StatusCode} <= TABLE.keys()


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("INVALID_ARGUMENT", 400),
        ("UNAUTHENTICATED", 401),
        ("NOT_FOUND", 404),
        ("METHOD_NOT_ALLOWED", 405),
        ("BODY_TOO_SLOW", 408),
        ("BODY_TOO_LARGE", 413),
        ("NOT_JSON_TYPE", 415),
        ("RESOURCE_EXHAUSTED", 429),
        ("INTERNAL", 500),
        ("UNAVAILABLE", 503),
        ("DEADLINE_EXCEEDED", 504),
        ("of a later version", 500),
    ],
)
def test_a_status_has_its_http_status(kind, status):
    assert Problem(kind, "x").row.http == status


def test_errors_have_each_apis_form():
    problem = Problem("INVALID_ARGUMENT", "must be 1 to 8", "n")
    assert openai_body(problem) == {
        "error": {
            "message": "must be 1 to 8",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    }
    assert anthropic_body(problem) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "n: must be 1 to 8", "param": "n"},
    }
    assert openai_body(Problem("NOT_FOUND", "x", "model"))["error"]["code"] == "model_not_found"


def test_when_to_ask_again_is_rounded_up():
    assert dict(retry_headers(Problem("RESOURCE_EXHAUSTED", "x", retry_after_s=1.2))) == {
        b"retry-after": b"2",
        b"retry-after-ms": b"1200",
    }
    assert dict(retry_headers(Problem("RESOURCE_EXHAUSTED", "x", retry_after_s=0.0)))[b"retry-after"] == b"1"
    assert retry_headers(Problem("RESOURCE_EXHAUSTED", "x")) == []


def test_the_document_has_every_parameter_of_every_path():
    paths = document(APIS)["paths"]
    for path, api in APIS.items():
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == {each.name for each in PARAMETERS[api.name]}
        assert schema["required"][0] == "model"


def test_the_documents_examples_are_requests():
    for path, api in APIS.items():
        content = document(APIS)["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        names, _ = content["schema"]["properties"]["model"]["anyOf"]
        assert api.parse(content["example"], {}, MODELS).model in names["enum"]
