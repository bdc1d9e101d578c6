"""Anthropic's SDK."""

from __future__ import annotations

import anthropic
import pytest

TURNS = [{"role": "user", "content": "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"}]


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", timeout=60) as made:
        yield made


def test_a_message(client):
    message = client.messages.create(model="asd", max_tokens=64, messages=TURNS)
    assert "19" in message.content[0].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0


def test_its_streaming_helper(client):
    plain = client.messages.create(model="asd-exact", max_tokens=64, messages=TURNS)
    with client.messages.stream(model="asd-exact", max_tokens=64, messages=TURNS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == plain.content[0].text == final.content[0].text
    assert final.usage.output_tokens == plain.usage.output_tokens


def test_errors_are_the_sdks(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=64, messages=TURNS)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="asd", max_tokens=0, messages=TURNS)
