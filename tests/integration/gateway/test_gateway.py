"""The gateway over real sockets: what only they can show."""

from __future__ import annotations

import json

import pytest

from tests.fakes.fake_router import TEXT, WORDS

CHAT = "/v1/chat/completions"
HELLO = {"model": "asd", "messages": [{"role": "user", "content": "Hi"}]}
BODIES = {
    CHAT: HELLO,
    "/v1/completions": {"model": "asd", "prompt": "Hi"},
    "/v1/responses": {"model": "asd", "input": "Hi"},
    "/v1/messages": HELLO | {"max_tokens": 5},
}


def data_of(text):
    """Return the JSON values of a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", BODIES)
async def test_an_answer_comes_with_what_happened(gateway, path):
    response = await gateway.post(path, BODIES[path])
    assert response.status_code == 200, response.text
    assert TEXT in response.text
    told = {name: value for name, value in response.headers.items() if name.startswith("x-asd-")}
    assert told == {
        "x-asd-request-id": "r1",
        "x-asd-stage": "large",
        "x-asd-p-correct": "0.75",
        "x-asd-cost": "3.5",
        "x-asd-policy": "p7",
    }
    assert [each["stage"] for each in response.json()["asd"]["stages"]] == ["small", "large"]
    assert "secret" not in response.text


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_has_the_words_in_order(gateway, path):
    response = await gateway.post(path, BODIES[path] | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    places = [response.text.index(f'"{word}"') for word in WORDS]
    assert places == sorted(places)
    assert '"asd":{"request_id":"r1"' in response.text
    assert data_of(response.text)
