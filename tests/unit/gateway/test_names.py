"""When the gateway asks for the stages' names."""

from __future__ import annotations

import asyncio

import pytest

from asd.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from asd.values import Description, Request, StageDescription
from services.gateway.cascade import Cascade


class Client:
    """A router's client that describes stages, and knows no stage when it is asked."""

    def __init__(self):
        self.stages = ["small"]
        self.described = 0
        self.error = None

    def with_token(self, token):
        return self

    async def describe(self, timeout_ms):
        self.described += 1
        if self.error:
            raise self.error
        stages = [StageDescription(each, 0, "", "", 0, 0, 1.0, True, 0) for each in self.stages]
        return Description(tuple(stages), None, (), "1")

    async def ask(self, request, timeout_ms):
        raise self.error or NotFound("cascade at 10.0.0.1:5: there is no stage small", field="stage")


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def cascade(client, now):
    return Cascade(client, "10.0.0.1:5", 1_000.0, lambda: now[0])


async def test_names_are_asked_for_once_and_again_for_one_that_is_missing(cascade, client):
    for _ in range(3):
        assert "small" in await cascade.models("", "asd")
    assert client.described == 1
    client.stages = ["small", "large"]
    assert "large" in await cascade.models("", "large")
    assert client.described == 2


async def test_old_names_are_read_again_behind_the_request(cascade, client, now):
    await cascade.models("", "asd")
    now[0] += 1e9
    client.stages = ["small", "large"]
    assert "large" not in await cascade.models("", "small")
    await asyncio.sleep(0)
    assert "large" in await cascade.models("", "small")
    # A router that is away does not matter while the names are known.
    now[0] += 1e9
    client.error = Unavailable("away")
    assert "large" in await cascade.models("", "small")
    await asyncio.sleep(0)
    assert "large" in await cascade.models("", "small")


async def test_a_stage_that_is_gone_is_forgotten_and_the_router_is_not_named(cascade, client):
    await cascade.models("", "small")
    with pytest.raises(NotFound) as refused:
        await cascade.ask("", [Request("Hi", stage="small")])
    assert (refused.value.message, refused.value.field) == ("there is no stage small", "stage")
    await cascade.models("", "small")
    assert client.described == 2


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("stage large at 127.0.0.1:21013: Stream removed", "stage large: Stream removed"),
        ("cascade at 10.0.0.1:5: stage large at [::1]:50061: gone", "stage large: gone"),
        ("stage large at asd-large-0.asd.svc:50061 is away", "stage large is away"),
        ("stage large at unix:/run/asd/large.sock: gone", "stage large: gone"),
        ("no connection; last: ipv6:%5B::1%5D:50061, 10.0.0.2:7", "no connection; last:,"),
        ("it takes 5:30 at most, model llama:8b", "it takes 5:30 at most, model llama:8b"),
    ],
)
async def test_addresses_are_for_the_log_alone(cascade, client, caplog, message, told):
    client.error = Unavailable(message)
    with pytest.raises(Unavailable) as refused:
        await cascade.ask("", [Request("Hi")])
    assert refused.value.message == told
    assert message in caplog.text


async def test_a_callers_own_fault_is_left_as_it_is_and_not_logged(cascade, client, caplog):
    client.error = InvalidRequest("there is no task at 10.0.0.2:7", field="task")
    with pytest.raises(InvalidRequest) as refused:
        await cascade.ask("", [Request("Hi")])
    assert refused.value.message == "there is no task at 10.0.0.2:7"
    client.error = Overloaded("stage large at 10.0.0.2:7: its queue is full")
    with pytest.raises(Overloaded, match=r"^stage large: its queue is full$"):
        await cascade.ask("", [Request("Hi")])
    assert not caplog.records
