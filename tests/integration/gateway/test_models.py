"""The gateway before a real cascade of two real models: the same answers as over gRPC."""

from __future__ import annotations

import pytest

from asd.client import AsyncClient
from asd.values import Message
from tests.integration.gateway.conftest import serving
from tests.integration.gateway.test_gateway import CHAT, data_of
from tests.integration.local.conftest import PROMPT


@pytest.fixture
async def real(up):
    async with serving(up.target) as gateway, AsyncClient(up.target) as client:
        yield gateway, client


def body(model, **more):
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}], **more}


@pytest.mark.parametrize("model", ["asd", "asd-fastest", "asd-best", "asd-exact", "small", "medium"])
async def test_an_answer_is_that_of_grpc(real, model):
    gateway, client = real
    options = {
        "asd-fastest": {"preference": "fastest"},
        "asd-best": {"preference": "best"},
        "asd-exact": {"chain": ("small", "medium")},
        "small": {"stage": "small"},
        "medium": {"stage": "medium"},
    }
    expected = await client.ask([Message("user", PROMPT)], **options.get(model, {}))
    response = (await gateway.post(CHAT, body(model))).json()
    assert response["choices"][0]["message"]["content"] == expected.text
    assert response["asd"]["stage"] == expected.stage
    assert response["usage"]["completion_tokens"] == len(expected.token_ids)
    assert response["usage"]["prompt_tokens"] > 0
    streamed = data_of((await gateway.post(CHAT, body(model, stream=True))).text)
    said = "".join(each["choices"][0]["delta"].get("content", "") for each in streamed)
    assert said == expected.text


async def test_the_exact_model_gives_the_last_stages_answer(real):
    gateway, client = real
    alone = await client.ask([Message("user", PROMPT)], stage="medium")
    exact = (await gateway.post(CHAT, body("asd-exact", temperature=1, seed=5))).json()
    drawn = await client.ask([Message("user", PROMPT)], stage="medium", temperature=1.0, seed=5)
    assert exact["choices"][0]["message"]["content"] == drawn.text
    greedy = (await gateway.post(CHAT, body("asd-exact"))).json()
    assert greedy["choices"][0]["message"]["content"] == alone.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 1_000_000}, "max_tokens"),
        ({"asd": {"lambda": -1}}, "asd.lambda"),
        ({"asd": {"max_cost": 0}}, "asd.max_cost"),
        ({"asd": {"min_quality": 1.5}}, "asd.min_quality"),
        ({"asd": {"task": "NO SUCH"}}, "asd.task"),
        ({"asd": {"session_id": "s" * 257}}, "asd.session_id"),
        ({"messages": [{"role": "user", "content": "word " * 100_000}]}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_cascade_refuses_has_the_apis_parameter(real, changes, param, stream):
    gateway, _ = real
    response = await gateway.post(CHAT, body("asd") | changes | {"stream": stream})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text
