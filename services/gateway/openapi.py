"""The OpenAPI document of the gateway, made of its tables. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.common.version import VERSION
from services.gateway.models import VIRTUAL
from services.gateway.objective import header_of
from services.gateway.parameters import ASD_FIELDS, PARAMETERS, Effect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.gateway.parameters import Parameter
    from services.gateway.request import Api

_REQUIRED = {
    "chat/completions": ["model", "messages"],
    "completions": ["model", "prompt"],
    "responses": ["model", "input"],
    "messages": ["model", "messages", "max_tokens"],
}
_TURNS = [{"role": "user", "content": "True or false? 3 plus 22 is more than 24."}]
_EXAMPLES: dict[str, dict[str, Any]] = {
    "chat/completions": {"model": "asd", "messages": _TURNS},
    "completions": {"model": "asd", "prompt": _TURNS[0]["content"]},
    "responses": {"model": "asd", "input": _TURNS[0]["content"]},
    "messages": {"model": "asd", "messages": _TURNS, "max_tokens": 16},
}
_ERRORS = {
    "400": "malformed, or a parameter is refused",
    "401": "no token, or a wrong one",
    "404": "unknown model",
    "405": "wrong method",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "the body is no JSON in UTF-8",
    "429": "no room now: see Retry-After",
    "500": "internal error",
    "503": "the cascade does not answer",
    "504": "the deadline has passed",
}
_OBJECT = {"schema": {"type": "object"}}
_TEXT = {"schema": {"type": "string"}}
# A token is not needed everywhere. Anthropic's clients send it as a key.
_EITHER: list[dict[str, list[str]]] = [{}, {"token": []}, {"key": []}]


def document(apis: Mapping[str, Api]) -> dict[str, Any]:
    """Return the document. apis: by path."""
    paths: dict[str, Any] = {path: {"post": _post(api.name)} for path, api in apis.items()}
    faults = ("401", "405", "500", "503", "504")
    paths["/v1/models"] = {"get": _get("listModels", "Lists the models", faults, security=_EITHER)}
    paths["/v1/models/{model}"] = {
        "get": _get("showModel", "Shows a model", ("404", *faults), security=_EITHER)
        | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
    }
    paths["/healthz"] = {
        "get": _get("health", "Says whether the gateway serves", ("405", "503"), security=[])
    }
    paths["/metrics"] = {
        "get": _get("metrics", "Metrics for Prometheus", ("405",), kind="text/plain", security=[])
    }
    paths["/openapi.json"] = {"get": _get("document", "This document", ("405",), security=[])}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "asd gateway",
            "version": VERSION,
            "description": "OpenAI's and Anthropic's APIs over a cascade of language models",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{}, {"token": []}],
    }


def _post(name: str) -> dict[str, Any]:
    properties = {each.name: _schema(each) for each in PARAMETERS[name]}
    properties["asd"] = {
        "type": ["object", "null"],
        "properties": {each.name: _schema(each) for each in ASD_FIELDS.values()},
        "additionalProperties": False,
    }
    body = {
        "type": "object",
        "properties": properties,
        "required": _REQUIRED[name],
        "additionalProperties": False,
    }
    headers = [
        {"name": header_of(each.name), "in": "header", "required": False, "schema": dict(each.schema)}
        for each in ASD_FIELDS.values()
    ]
    operation = {
        "operationId": name.replace("/", "_"),
        "parameters": headers,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body, "example": _EXAMPLES[name]}},
        },
        "responses": {
            "200": {
                "description": "the answer, or its stream",
                "content": {"application/json": _OBJECT, "text/event-stream": _TEXT},
            },
            **_errors(_ERRORS),
        },
    }
    if name == "messages":
        operation["security"] = _EITHER
    return operation


def _get(
    name: str, text: str, errors: tuple[str, ...], *, kind: str = "application/json", **more: Any
) -> dict[str, Any]:
    schema = _OBJECT if kind == "application/json" else _TEXT
    answers = {"200": {"description": "the answer", "content": {kind: schema}}}
    return {
        "operationId": name,
        "summary": text,
        "responses": answers | _errors({status: _ERRORS[status] for status in errors}),
        **more,
    }


def _errors(texts: Mapping[str, str]) -> dict[str, Any]:
    return {
        status: {"description": text, "content": {"application/json": _OBJECT}}
        for status, text in texts.items()
    }


def _schema(parameter: Parameter) -> dict[str, Any]:
    """Return the JSON Schema of a parameter: of a refused one, the values that are taken. null always is."""
    text = {"description": f"{parameter.effect}: {parameter.note}"}
    if parameter.effect is Effect.REFUSED:
        return {"enum": [*parameter.neutral, None], **text}
    if parameter.effect is Effect.NONE:
        return text
    if parameter.name == "model":
        # Names to choose from; stages have others.
        return {"anyOf": [{"enum": list(VIRTUAL)}, dict(parameter.schema)], **text}
    if parameter.name in {"messages", "prompt", "input"}:
        return {**parameter.schema, **text}
    return {"anyOf": [dict(parameter.schema), {"type": "null"}], **text}
