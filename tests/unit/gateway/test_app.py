"""The gateway's application, called as a server calls it, before a cascade that answers from a script."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from asd.errors import InputFailed, PreconditionFailed, Unauthenticated
from services.gateway.app import Gateway
from services.gateway.instruments import Instruments
from services.gateway.settings import GatewaySettings
from tests.limits import CALL_S
from tests.unit.gateway.samples import MODELS, answer

CHAT = "/v1/chat/completions"
HELLO = {"model": "asd", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = HELLO | {"stream": True}


class ScriptedCascade:
    """Answers, or raises `error`. While `hold` is cleared, calls wait; `waiting` is set once one does.

    is_silent: streams have a text, and no end.
    """

    def __init__(self):
        self.admitted = True
        self.error = None
        self.is_silent = False
        self.hold = asyncio.Event()
        self.hold.set()
        self.waiting = asyncio.Event()

    def admits(self, token):
        return self.admitted

    async def describe(self, token):
        await self._wait()

    async def models(self, token, model):
        await self._wait()
        return MODELS

    async def ask(self, token, requests):
        await self._wait()
        return tuple(answer() for _ in requests)

    @asynccontextmanager
    async def stream(self, token, requests):
        queue = asyncio.Queue()
        queue.put_nowait((0, "Forty"))
        if not self.is_silent:
            queue.put_nowait((0, answer()))
        yield queue

    async def _wait(self):
        self.waiting.set()
        await self.hold.wait()
        if self.error:
            raise self.error


class Caller:
    """One request. parts: of its body. Without all_sent, more parts are said to come, and none do."""

    def __init__(self, parts, *, path=CHAT, method="POST", headers=(), all_sent=True):
        kind = (b"content-type", b"application/json")
        self._scope = {
            "type": "http",
            "method": method,
            "path": path,
            "http_version": "1.1",
            "headers": [kind, *headers],
        }
        self._messages = [
            {"type": "http.request", "body": part, "more_body": not all_sent or index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        self.left = asyncio.Event()
        self.received = asyncio.Event()
        self.begun = asyncio.Event()
        self._sent = []

    async def receive(self):
        if self._messages:
            return self._messages.pop(0)
        self.received.set()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self._sent.append(message)
        if message["type"] == "http.response.body":
            self.begun.set()

    def call(self, app):
        return asyncio.create_task(app(self._scope, self.receive, self.send))

    async def answered_by(self, app):
        async with asyncio.timeout(CALL_S):
            await self.call(app)
        return self

    @property
    def status(self):
        return self._sent[0]["status"]

    @property
    def headers(self):
        return dict(self._sent[0]["headers"])

    @property
    def text(self):
        return b"".join(message["body"] for message in self._sent[1:]).decode()

    @property
    def is_complete(self):
        return not self._sent[-1].get("more_body", False)


def caller(body=None, **options):
    return Caller([json.dumps(HELLO if body is None else body).encode()], **options)


@pytest.fixture
def cascade():
    return ScriptedCascade()


class Lines(list):
    """An access log."""

    is_on = True
    write = list.append


def made(cascade, log=None, router=None, **settings):
    known = GatewaySettings(router={"target": "127.0.0.1:1"} | (router or {}), **settings)
    return Gateway(known, cascade, Instruments(), Lines() if log is None else log, lambda: b"")


async def test_a_token_is_tried_before_the_body_is_read(cascade):
    cascade.admitted, cascade.error = False, Unauthenticated("no")
    first = await Caller([b"{"], all_sent=False).answered_by(made(cascade))
    assert first.status == 401
    # Nor does a fault of the body tell a stranger anything.
    assert (await caller(HELLO | {"n": 0}).answered_by(made(cascade))).status == 401
    cascade.error = None
    assert (await caller(HELLO | {"n": 0}).answered_by(made(cascade))).status == 400


async def test_an_error_before_an_expected_body_ends_the_connection(cascade):
    cascade.admitted, cascade.error = False, Unauthenticated("no")
    waiting = caller(headers=[(b"expect", b"100-continue")])
    assert (await waiting.answered_by(made(cascade))).headers[b"connection"] == b"close"


@pytest.mark.parametrize("admitted", [False, True])
async def test_a_caller_that_leaves_before_the_names_are_known_is_let_go(cascade, admitted):
    cascade.admitted = admitted
    app = made(cascade, max_concurrent=1)
    cascade.hold.clear()
    leaving = caller()
    task = leaving.call(app)
    async with asyncio.timeout(CALL_S):
        await cascade.waiting.wait()
        leaving.left.set()
        await task
    cascade.hold.set()
    assert (await caller().answered_by(app)).status == 200


async def test_a_body_is_whole_though_its_caller_was_watched_meanwhile(cascade):
    cascade.admitted = False
    content = json.dumps(HELLO).encode()
    parts = [content[:9], content[9:20], content[20:]]
    cascade.hold.clear()
    slow = Caller(parts)
    task = slow.call(made(cascade))
    await cascade.waiting.wait()
    await asyncio.sleep(0)
    cascade.hold.set()
    async with asyncio.timeout(CALL_S):
        await task
    assert slow.status == 200


async def test_bodies_share_a_bound(cascade):
    size = 1000
    app = made(cascade, max_body_bytes=size, max_buffered_bytes=size)
    unfinished = Caller([b" " * (size - 10)], all_sent=False)
    task = unfinished.call(app)
    await unfinished.received.wait()
    refused = await caller().answered_by(app)
    assert refused.status == 429
    assert refused.headers[b"retry-after"] == b"1"
    unfinished.left.set()
    await task
    assert (await caller().answered_by(app)).status == 200


def test_the_bound_on_all_bodies_is_not_below_that_on_one():
    with pytest.raises(ValueError, match="max_buffered_bytes"):
        GatewaySettings(router={"target": "127.0.0.1:1"}, max_body_bytes=9, max_buffered_bytes=8)


async def test_a_body_has_a_bound_on_its_values(cascade):
    many = Caller([b'{"model": "asd", "messages": [' + b"{}," * 200_000 + b"{}]}"])
    assert (await many.answered_by(made(cascade))).status == 400
    assert json.loads(many.text)["error"]["code"] == "invalid_json"
    # A text may have any signs.
    text = HELLO | {"messages": [{"role": "user", "content": '[{"a": "\\", 5}, ' * 200_000}]}
    assert (await caller(text).answered_by(made(cascade))).status == 200


@pytest.mark.parametrize("body", [HELLO, STREAM])
async def test_every_answer_names_its_request(cascade, body):
    log = Lines()
    app = made(cascade, log)
    for each in (caller(body), caller({}), caller(path="/made-up"), caller(path="/healthz", method="GET")):
        headers = (await each.answered_by(app)).headers
        # As OpenAI's and as Anthropic's clients read it.
        assert headers[b"x-request-id"] == headers[b"request-id"]
        assert log[-1]["request_id"] == headers[b"request-id"].decode()
    assert len({line["request_id"] for line in log}) == 4


async def test_a_stream_of_a_router_that_falls_silent_ends(cascade):
    cascade.is_silent = True
    silent = await caller(STREAM).answered_by(made(cascade, router={"timeout_ms": 1.0}))
    assert (silent.status, silent.is_complete) == (200, True)
    assert '"code":"timeout"' in silent.text


async def test_a_drain_that_runs_out_ends_requests_with_an_error(cascade):
    cascade.hold.clear()
    log = Lines()
    app = made(cascade, log)
    whole, unread = caller(), Caller([b"{"], all_sent=False)
    tasks = [whole.call(app), unread.call(app)]
    await unread.received.wait()
    await cascade.waiting.wait()
    app.end()
    async with asyncio.timeout(CALL_S):
        await asyncio.gather(*tasks)
    for each in (whole, unread):
        assert (each.status, each.headers[b"retry-after"]) == (503, b"1")
    assert [line["status"] for line in log] == [503, 503]


async def test_a_drain_that_runs_out_ends_streams_with_an_error(cascade):
    cascade.is_silent = True
    log = Lines()
    app = made(cascade, log)
    stream = caller(STREAM)
    task = stream.call(app)
    async with asyncio.timeout(CALL_S):
        await stream.begun.wait()
        app.end()
        await task
    assert stream.is_complete
    assert "service_unavailable" in stream.text
    assert log[0]["error"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PreconditionFailed("a stage is named asd-best"), 503),
        (PreconditionFailed("no", field="sampling.top_p"), 400),
        (InputFailed("the template fails on this input"), 400),
    ],
)
async def test_a_fault_of_the_cascades_own_is_not_the_callers(cascade, caplog, error, status):
    app = made(cascade)
    cascade.error = error
    assert (await caller().answered_by(app)).status == status
    assert (error.message in caplog.text) == (status == 503)


async def test_proxies_do_not_hold_a_stream_back(cascade):
    headers = (await caller(STREAM).answered_by(made(cascade))).headers
    assert (headers[b"x-accel-buffering"], headers[b"cache-control"]) == (b"no", b"no-cache")


async def test_the_rest_of_a_large_body_is_read_so_that_the_answer_is(cascade):
    large = Caller([b" " * 100] * 3)
    assert (await large.answered_by(made(cascade, max_body_bytes=100))).status == 413
    assert b"connection" not in large.headers
    # But not without end.
    endless = Caller([b" " * 100] * 1000, all_sent=False)
    assert (await endless.answered_by(made(cascade, max_body_bytes=100))).status == 413
    assert endless.headers[b"connection"] == b"close"


async def test_a_large_body_is_refused_before_it_is_sent_if_its_caller_asks(cascade):
    asks = [(b"content-length", b"101"), (b"expect", b"100-continue")]
    refused = await Caller([], headers=asks).answered_by(made(cascade, max_body_bytes=100))
    assert (refused.status, refused.headers[b"connection"]) == (413, b"close")
