"""OpenAI's SDK."""

from __future__ import annotations

import openai
import pytest

TURNS = [{"role": "user", "content": "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"}]


@pytest.fixture
def client(api):
    with openai.OpenAI(base_url=api, api_key="none", timeout=60, max_retries=2) as made:
        yield made


def test_a_completion(client):
    answer = client.chat.completions.create(model="asd", messages=TURNS, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "19" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("model", ["asd", "asd-fastest", "asd-best", "asd-exact", "small", "large"])
def test_every_model_is_listed_and_answers(client, model):
    assert model in [each.id for each in client.models.list()]
    assert client.models.retrieve(model).id == model
    answer = client.chat.completions.create(model=model, messages=TURNS)
    assert answer.choices[0].message.content


def test_a_stream_is_the_answer(client):
    plain = client.chat.completions.create(model="asd-exact", messages=TURNS)
    chunks = list(
        client.chat.completions.create(
            model="asd-exact", messages=TURNS, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


async def _ask(api):
    async with openai.AsyncOpenAI(base_url=api, api_key="none") as client:
        answer = await client.chat.completions.create(model="asd", messages=TURNS)
        stream = await client.chat.completions.create(model="asd", messages=TURNS, stream=True)
        chunks = [each async for each in stream]
    return answer, chunks


def test_asynchronously(api):
    import asyncio

    answer, chunks = asyncio.run(_ask(api))
    assert answer.choices[0].message.content
    assert chunks


def test_headers_say_what_happened(client):
    raw = client.chat.completions.with_raw_response.create(model="asd", messages=TURNS)
    for name in ("x-asd-request-id", "x-asd-stage", "x-asd-cost"):
        assert raw.headers[name]
    assert raw.parse().choices


def test_an_objective_in_the_body(client):
    cheap = client.chat.completions.create(model="asd", messages=TURNS, extra_body={"asd": {"lambda": 0}})
    raw = client.chat.completions.with_raw_response.create(
        model="asd", messages=TURNS, extra_body={"asd": {"lambda": 0}}
    )
    assert raw.headers["x-asd-stage"] == "small"
    assert cheap.choices


def test_several_choices(client):
    answer = client.chat.completions.create(model="asd", messages=TURNS, n=3, temperature=1, seed=5)
    assert [each.index for each in answer.choices] == [0, 1, 2]


def test_responses(client):
    answer = client.responses.create(
        model="asd",
        input="Max has 9 beads. Max finds 10 more. How many beads does Max have now?",
        store=False,
    )
    assert "19" in answer.output_text
    with client.responses.stream(
        model="asd",
        input="Max has 9 beads. Max finds 10 more. How many beads does Max have now?",
        store=False,
    ) as stream:
        assert "19" in stream.get_final_response().output_text


@pytest.mark.parametrize(
    ("changes", "error", "parameter"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
)
def test_errors_are_the_sdks(client, changes, error, parameter):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "asd", "messages": TURNS} | changes)
    assert raised.value.param == parameter


def test_a_timeout_is_the_sdks(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.0001, max_retries=0).chat.completions.create(
            model="asd", messages=TURNS
        )
