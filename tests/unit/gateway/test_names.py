"""When the gateway asks for the stages' names."""

from __future__ import annotations

import asyncio

import pytest

from asd.errors import AsdError, NotFound, Unauthenticated, Unavailable
from asd.values import Description, Request, StageDescription
from services.gateway.cascade import Cascade
from tests.limits import CALL_S

LONG = 1e9


class Client:
    """A router's client that describes stages, and knows no stage when it is asked."""

    def __init__(self):
        self.stages = ["small"]
        self.described = 0
        self.error = None
        self.tokens = None
        self.cancels = False
        self.hold = asyncio.Event()
        self.hold.set()
        self._token = ""

    def with_token(self, token):
        self._token = token
        return self

    async def describe(self, timeout_ms):
        self.described += 1
        if self.error:
            raise self.error
        if self.tokens is not None and self._token not in self.tokens:
            raise Unauthenticated("no")
        await self.hold.wait()
        stages = [StageDescription(each, 0, "", "", 0, 0, 1.0, True, 0) for each in self.stages]
        return Description(tuple(stages), None, (), "1")

    async def stream(self, request, timeout_ms):
        if self.cancels:
            raise asyncio.CancelledError
        for event in ():
            yield event

    async def ask(self, request, timeout_ms):
        raise NotFound("cascade at 10.0.0.1:5: there is no stage small", field="stage")


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def cascade(client, now):
    return Cascade(client, "10.0.0.1:5", 1_000.0, lambda: now[0])


async def test_names_are_asked_for_once_and_again_for_one_that_is_missing(cascade, client, now):
    for _ in range(3):
        assert "small" in await cascade.models("", "asd")
    assert client.described == 1
    client.stages = ["small", "large"]
    now[0] += LONG
    assert "large" in await cascade.models("", "large")
    assert client.described == 2


async def test_many_unknown_names_cost_one_call(cascade, client, now):
    await asyncio.gather(*(cascade.models("", f"unknown-{count}") for count in range(20)))
    await cascade.models("", "unknown")
    assert client.described == 1
    now[0] += LONG
    await asyncio.gather(*(cascade.models("", f"unknown-{count}") for count in range(20)))
    assert client.described == 2


async def test_a_caller_that_leaves_does_not_end_the_call_of_another(cascade, client):
    client.hold.clear()
    leaving, staying = (asyncio.create_task(cascade.describe("")) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    client.hold.set()
    assert [each.stage for each in (await staying).stages] == ["small"]
    assert client.described == 1


async def test_old_names_are_read_again_behind_the_request(cascade, client, now):
    await cascade.describe("")
    now[0] += LONG
    client.stages = ["small", "large"]
    assert cascade.admits("")
    assert "large" not in await cascade.models("", "small")
    await asyncio.sleep(0)
    assert "large" in await cascade.models("", "small")
    # A router that is away does not matter while the names are known.
    now[0] += LONG
    client.error = Unavailable("away")
    assert cascade.admits("")
    await asyncio.sleep(0)
    assert "large" in await cascade.models("", "small")


async def test_why_names_stay_old_is_logged(cascade, client, now, caplog):
    await cascade.describe("")
    now[0] += LONG
    client.stages = ["small", "asd-best"]
    assert cascade.admits("")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert "asd-best" in caplog.text


async def test_a_token_is_admitted_once_the_router_has_taken_it(cascade, client, now):
    client.tokens = {"right", "other"}
    assert not cascade.admits("right")
    await cascade.describe("right")
    assert cascade.admits("right")
    for token in ("", "wrong", "other"):
        assert not cascade.admits(token)
    # One that is taken back is not admitted for long.
    now[0] += LONG
    client.tokens = {"other"}
    assert cascade.admits("right")
    await asyncio.sleep(0)
    assert not cascade.admits("right")


async def test_a_cascade_without_tokens_admits_any(cascade):
    await cascade.describe("")
    for count in range(1000):
        await cascade.describe(f"token-{count}")
    assert cascade.admits("whatever")


@pytest.mark.parametrize("ends", [False, True])
async def test_a_stream_that_ends_without_an_answer_is_an_error(cascade, client, ends):
    client.cancels = ends
    async with cascade.stream("", [Request("Hi")]) as queue, asyncio.timeout(CALL_S):
        index, error = await queue.get()
    assert index == 0
    assert isinstance(error, AsdError)


async def test_a_stage_that_is_gone_is_forgotten_and_the_router_is_not_named(cascade, client):
    await cascade.models("", "small")
    with pytest.raises(NotFound) as refused:
        await cascade.ask("", [Request("Hi", stage="small")])
    assert (refused.value.message, refused.value.field) == ("there is no stage small", "stage")
    await cascade.models("", "small")
    assert client.described == 2
