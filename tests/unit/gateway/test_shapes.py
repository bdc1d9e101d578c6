"""Answers and events are those that the SDKs' own types describe."""

from __future__ import annotations

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from asd.errors import InvalidRequest
from asd.values import Description, StageDescription, Tokens
from services.gateway.errors import Problem
from services.gateway.models import listed, page
from tests.unit.gateway.samples import CHAT, COMPLETIONS, MESSAGES, RESPONSES, answer, parse

WHOLE = {CHAT: ChatCompletion, COMPLETIONS: Completion, RESPONSES: Response, MESSAGES: Message}
# Without completions: OpenAI sends null for the reason of a choice that goes on, which its type lacks.
PART = {
    CHAT: ChatCompletionChunk,
    RESPONSES: ResponseStreamEvent,
    MESSAGES: RawMessageStreamEvent,
}


def read(kind, value):
    """Return a value as a type, without conversions."""
    return TypeAdapter(kind).validate_python(value, strict=True)


@pytest.mark.parametrize("api", WHOLE)
def test_an_answer_has_its_type(api):
    read(WHOLE[api], api.answer(parse(api), (answer(),), 99))


@pytest.mark.parametrize("api", PART)
def test_every_event_has_its_type(api):
    writer = api.writer(parse(api, {"stream": True}), "id", 99)
    events = [
        *writer.begin(),
        *writer.text(0, Tokens(text="Hi")),
        *writer.keep_alive(),
        *writer.finish(0, answer()),
        *writer.end(),
    ]
    read_as = [event.data for event in events if event.data not in ("[DONE]", {"type": "ping"})]
    assert read_as
    for each in read_as:
        read(PART[api], each)


def test_a_failed_response_has_its_type():
    (event,) = RESPONSES.writer(parse(RESPONSES), "id", 99).failed(Problem("UNAVAILABLE", "x"))
    read(ResponseStreamEvent, event.data)


@pytest.mark.parametrize(
    ("query", "shown", "has_more"),
    [
        ({}, "abcde", False),
        ({"limit": "2"}, "ab", True),
        ({"limit": "5"}, "abcde", False),
        ({"after_id": "b"}, "cde", False),
        ({"after_id": "b", "limit": "2"}, "cd", True),
        ({"after_id": "e"}, "", False),
        ({"before_id": "d"}, "abc", False),
        ({"before_id": "d", "limit": "2"}, "bc", True),
        ({"after_id": "a", "before_id": "e", "limit": "2"}, "bc", True),
    ],
)
def test_models_come_in_pages(query, shown, has_more):
    got = page([{"id": each} for each in "abcde"], query)
    assert ("".join(each["id"] for each in got["data"]), got["has_more"]) == (shown, has_more)
    assert (got["first_id"], got["last_id"]) == ((shown[0], shown[-1]) if shown else (None, None))


@pytest.mark.parametrize(
    "query", [{"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"after_id": "f"}, {"before_id": ""}]
)
def test_a_page_that_cannot_be_is_refused(query):
    with pytest.raises(InvalidRequest) as refused:
        page([{"id": "a"}], query)
    assert [refused.value.field] == list(query)


def test_a_model_has_its_type():
    stage = StageDescription("small", 0, "s-135m", "onnx", 135, 2048, 1.0, True, 0)
    entries = page(listed(Description((stage,), None, (), "1"), 99), {})["data"]
    assert [read(Model, each).id for each in entries][-1] == "small"
