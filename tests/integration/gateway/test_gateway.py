"""The gateway over real sockets: what only they can show."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl

import anthropic
import httpx2
import openai
import pytest
from opentelemetry.trace import SpanKind, StatusCode

from asd.errors import BudgetSpent, InvalidRequest, Overloaded, PromptTooLong, Unavailable
from services.gateway.instruments import ACCESS_LOG
from services.gateway.server import MOST_HEAD_BYTES
from tests.fakes.fake_router import TEXT, WORDS, FakeRouter
from tests.integration.common.certificates import Authority
from tests.integration.gateway.conftest import running
from tests.limits import CALL_S

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HELLO = {"model": "asd", "messages": [{"role": "user", "content": "Hi"}]}
BODIES = {
    CHAT: HELLO,
    "/v1/completions": {"model": "asd", "prompt": "Hi"},
    "/v1/responses": {"model": "asd", "input": "Hi"},
    MESSAGES: HELLO | {"max_tokens": 5},
}


def data_of(text):
    """Return the JSON values of a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def raw(path=CHAT, body=b"", headers=(), version="1.1", method="POST"):
    """Return a request as bytes."""
    lines = [
        f"{method} {path} HTTP/{version}",
        "host: x",
        "content-type: application/json",
        *headers,
    ]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


async def read_answer(reader):
    """Return status, headers and body of an answer with a length."""
    async with asyncio.timeout(CALL_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body


async def rest_of(reader):
    """Return what comes before the connection's end."""
    try:
        async with asyncio.timeout(CALL_S):
            return await reader.read()
    except ConnectionResetError:
        return b""


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


@pytest.mark.parametrize(("model", "stage"), [("asd", None), ("asd-exact", "large"), ("small", "small")])
async def test_a_stream_says_at_first_which_stage_was_named(gateway, model, stage):
    response = await gateway.post(CHAT, HELLO | {"stream": True, "model": model})
    assert response.headers.get("x-asd-stage") == stage


async def test_several_choices_come_in_one_stream(gateway):
    body = HELLO | {"stream": True, "n": 3, "seed": 5, "temperature": 1}
    choices = [each["choices"][0] for each in data_of((await gateway.post(CHAT, body)).text)]
    for index in range(3):
        words = [each["delta"].get("content", "") for each in choices if each["index"] == index]
        assert "".join(words) == TEXT
    assert len({each.sampling.seed for each in gateway.router.requests}) == 3


async def test_models_are_listed_for_clients_of_both_apis(gateway):
    openai_client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x")
    anthropic_client = anthropic.AsyncAnthropic(base_url=gateway.url, api_key="x")
    async with openai_client, anthropic_client:
        names = [model.id async for model in openai_client.models.list()]
        assert names == ["asd", "asd-fastest", "asd-best", "asd-exact", "small", "large"]
        assert [model.id async for model in anthropic_client.models.list()] == names
        assert (await openai_client.models.retrieve("small")).owned_by == "asd"
        with pytest.raises(openai.NotFoundError) as refused:
            await openai_client.models.retrieve("gpt-4")
        assert refused.value.code == "model_not_found"
        with pytest.raises(anthropic.NotFoundError) as refused:
            await anthropic_client.models.retrieve("gpt-4")
        assert refused.value.body["error"]["type"] == "not_found_error"


async def test_openais_client_reads_answers_streams_and_errors(gateway):
    options = {"model": "asd-best", "messages": HELLO["messages"]}
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
        said = await client.chat.completions.with_raw_response.create(
            **options, extra_body={"asd": {"task": "math"}}
        )
        assert said.headers["x-asd-stage"] == "large"
        completion = said.parse()
        assert completion.choices[0].message.content == TEXT
        assert completion.usage.completion_tokens_details.accepted_prediction_tokens == 2
        assert gateway.router.requests[0].task == "math"
        stream = await client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
        assert chunks[-1].usage.prompt_tokens == 7
        async with client.responses.stream(model="asd", input="Hi") as events:
            seen = [(event.type, event.sequence_number) async for event in events]
        assert seen[-1][0] == "response.completed"
        assert [number for _, number in seen] == list(range(len(seen)))
        assert (await client.responses.create(model="asd", input="Hi")).output_text == TEXT
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**options, n=9)
        assert refused.value.param == "n"
        gateway.router.error = Overloaded("no room", retry_after_s=1.5)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**options)
        assert refused.value.response.headers["retry-after"] == "2"


async def test_anthropics_client_reads_answers_streams_and_errors(gateway):
    options = {"model": "asd", "messages": HELLO["messages"], "max_tokens": 5}
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="x", max_retries=0) as client:
        message = await client.messages.create(**options)
        assert message.content[0].text == TEXT
        async with client.messages.stream(**options) as stream:
            assert [text async for text in stream.text_stream] == list(WORDS)
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 3)
        with pytest.raises(anthropic.BadRequestError):
            await client.messages.create(**options, extra_body={"top_k": 5})
        gateway.router.error, gateway.router.words_first = Unavailable("large is away"), 1
        with pytest.raises(anthropic.APIStatusError, match="large is away"):
            async with client.messages.stream(**options) as stream:
                await stream.get_final_message()


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (InvalidRequest("bad", field="sampling.max_new_tokens"), 400, "max_tokens"),
        (PromptTooLong("too long", field="conversation.messages[0].content"), 400, "messages[0].content"),
        (Overloaded("no room", retry_after_s=1.5), 429, None),
        (Unavailable("away"), 503, None),
        (BudgetSpent("late"), 504, None),
        (RuntimeError("a secret"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_routers_error_has_its_status(gateway, error, status, param, stream):
    gateway.router.error = error
    if stream and isinstance(error, InvalidRequest):
        error.field = f"request.{error.field}"
    response = await gateway.post(CHAT, HELLO | {"stream": stream, "max_tokens": 5})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    # Callers learn neither where the router is nor what went wrong inside.
    assert "127.0.0.1" not in response.text
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 429)


async def test_an_error_after_the_first_word_ends_the_stream(gateway):
    gateway.router.error, gateway.router.words_first = Unavailable("large is away"), 1
    response = await gateway.post(CHAT, HELLO | {"stream": True})
    assert response.status_code == 200
    assert data_of(response.text)[-1]["error"]["message"] == "large is away"
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_connection_ends_the_call(gateway, stream):
    router = gateway.router
    router.hold.clear()
    router.words_first = 1
    _, writer = await gateway.connect()
    writer.write(raw(body=json.dumps(HELLO | {"stream": stream, "n": 2}).encode()))
    async with asyncio.timeout(CALL_S):
        await router.begun.wait()
        writer.close()
        await router.idle.wait()
    assert router.running == 0


async def test_a_silent_stream_is_kept_open():
    async with running(FakeRouter(), keep_alive_ms=1.0) as gateway:
        gateway.router.hold.clear()
        async with (
            gateway.client() as client,
            client.stream("POST", CHAT, json=HELLO | {"stream": True}) as got,
        ):
            lines = got.aiter_lines()
            chunks = [json.loads((await anext(lines) + await anext(lines))[6:]) for _ in range(3)]
            gateway.router.hold.set()
            rest = "\n".join([line async for line in lines])
    assert [each["choices"][0]["delta"].get("content") for each in chunks] == ["", None, None]
    said = [each["choices"][0]["delta"].get("content", "") for each in data_of(rest)]
    assert "".join(said) == TEXT


async def test_a_token_is_passed_on_and_a_wrong_one_refused():
    router = FakeRouter()
    router.token = "right"
    async with running(router) as gateway:
        bearer = {"authorization": "Bearer right"}
        assert (await gateway.post(CHAT, HELLO, bearer)).status_code == 200
        assert (await gateway.get("/v1/models", bearer)).status_code == 200
        body = BODIES[MESSAGES]
        assert (await gateway.post(MESSAGES, body, {"x-api-key": "right"})).status_code == 200
        both = {"x-api-key": "right", **bearer}
        assert (await gateway.post(MESSAGES, body, both)).status_code == 200
        for path, headers in (
            (CHAT, {}),
            # As clients send it that were given no key.
            (CHAT, {"authorization": "Bearer"}),
            (MESSAGES, {"x-api-key": ""}),
            (CHAT, {"authorization": "Bearer wrong"}),
            (CHAT, {"authorization": "Basic right"}),
            (CHAT, {"x-api-key": "right"}),
            (MESSAGES, {"x-api-key": "other", **bearer}),
        ):
            response = await gateway.post(path, BODIES[path], headers)
            assert response.status_code == 401, (path, headers)
            assert "right" not in response.text
        assert (await gateway.get("/healthz")).status_code == 200
        router.token = ""
        assert (await gateway.post(CHAT, HELLO, {"authorization": "Bearer"})).status_code == 200


@pytest.mark.parametrize(
    ("path", "content", "headers", "status"),
    [
        (CHAT, b"{", {}, 400),
        (CHAT, b"", {}, 400),
        (CHAT, b"[]", {}, 400),
        (CHAT, b'{"model": "\xff"}', {}, 400),
        (CHAT, b'{"model": "asd", "model": "asd"}', {}, 400),
        (CHAT, b'{"n": NaN}', {}, 400),
        (CHAT, b"[" * 10_000, {}, 400),
        (CHAT, b"{}", {"x-asd-lamda": "5"}, 400),
        (CHAT, b"{}", {"content-type": "text/plain"}, 415),
        (CHAT, b"{}", {"content-type": "application/json; charset=latin-1"}, 415),
        (CHAT, b"{}", {"content-encoding": "gzip"}, 415),
        (CHAT, b" " * 10_000_000, {}, 413),
        (MESSAGES, b" " * 10_000_000, {}, 413),
        ("/v1/embeddings", b"{}", {}, 404),
        ("/healthz", b"{}", {}, 405),
        ("/v1/models", b"{}", {}, 405),
    ],
)
async def test_a_bad_request_is_refused_and_the_next_one_answered(gateway, path, content, headers, status):
    async with gateway.client() as client:
        kind = {"content-type": "application/json"} | headers
        response = await client.post(path, content=content, headers=kind)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
    assert (await gateway.get(CHAT)).headers["allow"] == "POST"


async def test_http_1_0_gets_whole_answers_and_streams_without_chunks(gateway):
    for stream in (False, True):
        reader, writer = await gateway.connect()
        writer.write(raw(body=json.dumps(HELLO | {"stream": stream}).encode(), version="1.0"))
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert TEXT in body.decode() or data_of(body.decode())
        assert await reader.read() == b""
        writer.close()


async def test_pipelined_requests_are_answered_in_order(gateway):
    reader, writer = await gateway.connect()
    body = json.dumps(HELLO).encode()
    writer.write(raw(body=body) + raw(body=b"{") + raw(body=body))
    answers = [await read_answer(reader) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200, 400, 200]
    writer.close()


async def test_a_slow_body_and_a_slow_head_are_ended():
    async with running(FakeRouter(), read_timeout_ms=50.0) as gateway:
        reader, writer = await gateway.connect()
        writer.write(raw(body=b"{}")[:-1])
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["code"] == "request_timeout"
        writer.close()
        reader, writer = await gateway.connect()
        writer.write(b"POST / HTTP/1.1\r\n")
        async with asyncio.timeout(CALL_S):
            assert await rest_of(reader) == b""
        writer.close()


async def test_a_head_without_end_is_refused():
    # For its size, long before it is late. Otherwise the end of the connection would not come.
    async with running(FakeRouter(), read_timeout_ms=1_000.0 * 2 * CALL_S) as gateway:
        reader, writer = await gateway.connect()
        writer.write(b"GET /healthz HTTP/1.1\r\n" + b"x-a: aaaaaaaaaaaaaa\r\n" * MOST_HEAD_BYTES)
        await rest_of(reader)
        writer.close()


async def test_too_many_requests_are_told_to_come_back():
    async with running(FakeRouter(), max_concurrent=1) as gateway:
        gateway.router.hold.clear()
        first = asyncio.create_task(gateway.post(CHAT, HELLO))
        await gateway.router.begun.wait()
        refused = await gateway.post(CHAT, HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        gateway.router.hold.set()
        assert (await first).status_code == 200


async def listens(gateway):
    """Return whether the gateway takes new connections."""
    try:
        _, writer = await gateway.connect()
    except ConnectionError:
        return False
    writer.close()
    return True


async def test_a_server_that_ends_gives_requests_their_time_and_then_an_error():
    router = FakeRouter()
    router.words_first = 1
    async with running(router, drain_seconds=0.05) as gateway:
        router.hold.clear()
        stream = asyncio.create_task(gateway.post(CHAT, HELLO | {"stream": True}))
        await router.begun.wait()
        gateway.server.should_exit = True
        ended = (await stream).text
    assert data_of(ended)[-1]["error"]["code"] == "service_unavailable"
    # A longer drain lets the answer come.
    async with running(FakeRouter(), drain_seconds=CALL_S) as gateway:
        gateway.router.hold.clear()
        whole = asyncio.create_task(gateway.post(CHAT, HELLO))
        await gateway.router.begun.wait()
        gateway.server.should_exit = True
        while await listens(gateway):
            pass
        gateway.router.hold.set()
        assert (await whole).status_code == 200
        # uvicorn ends requests without an answer, and so after the gateway.
        assert gateway.server.config.timeout_graceful_shutdown > CALL_S


async def test_a_draining_gateway_refuses_new_requests(gateway):
    gateway.app.drain()
    for response in (await gateway.get("/healthz"), await gateway.post(CHAT, HELLO)):
        assert (response.status_code, response.headers["connection"]) == (503, "close")


async def test_a_new_certificate_is_used_from_the_next_connection_on(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway", "127.0.0.1")
    settings = {"cert_file": cert, "key_file": key}
    async with running(FakeRouter(), tls=settings) as gateway:
        trust = ssl.create_default_context(cafile=authority.file)
        async with gateway.client(verify=trust) as client:
            assert (await client.post(CHAT, json=HELLO)).status_code == 200
        other = Authority(tmp_path, "other")
        other.issue("gateway", "127.0.0.1")
        async with gateway.client(verify=ssl.create_default_context(cafile=other.file)) as client:
            assert (await client.post(CHAT, json=HELLO)).status_code == 200


async def test_a_client_needs_a_certificate_where_the_gateway_wants_one(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway", "127.0.0.1")
    settings = {"cert_file": cert, "key_file": key, "client_ca_file": authority.file}
    own = authority.issue("caller", "caller")
    stranger = Authority(tmp_path, "other").issue("stranger", "stranger")
    async with running(FakeRouter(), tls=settings) as gateway:
        for pair in (own, stranger, None):
            trust = ssl.create_default_context(cafile=authority.file)
            if pair:
                trust.load_cert_chain(*pair)
            async with gateway.client(verify=trust) as client:
                if pair is own:
                    assert (await client.post(CHAT, json=HELLO)).status_code == 200
                    continue
                with pytest.raises(httpx2.TransportError):
                    await client.post(CHAT, json=HELLO)


async def test_the_access_log_has_no_prompt_and_no_token(caplog):
    async with running(FakeRouter(), access_log=True) as gateway:
        logging.getLogger(ACCESS_LOG).addHandler(caplog.handler)
        try:
            body = HELLO | {"messages": [{"role": "user", "content": "my prompt"}]}
            await gateway.post(CHAT, body, {"authorization": "Bearer my-token"})
            await gateway.get("/my-prompt?q=my-token")
        finally:
            logging.getLogger(ACCESS_LOG).removeHandler(caplog.handler)
    served, unknown = (json.loads(each.message) for each in caplog.records if each.name == ACCESS_LOG)
    assert (served["path"], served["status"], served["stages"]) == (CHAT, 200, ["large"])
    assert (unknown["path"], unknown["status"]) == (None, 404)
    assert "my-" not in caplog.text
    assert "my prompt" not in caplog.text


async def test_a_trace_goes_from_the_caller_to_the_router(recorded):
    async with running(FakeRouter()) as gateway:
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        for stream in (False, True):
            headers = {"traceparent": f"00-{trace}-{parent}-01"}
            await gateway.post(CHAT, HELLO | {"stream": stream}, headers)
            (span,) = recorded.spans(f"POST {CHAT}")[-1:]
            assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
            assert span.kind is SpanKind.SERVER
            assert span.attributes["gen_ai.request.model"] == "asd"
            assert span.attributes["gen_ai.response.id"] == "r1" if not stream else "r2"
            assert span.attributes["http.request.method"] == "POST"
            assert span.attributes["http.route"] == CHAT
            assert span.attributes["http.response.status_code"] == 200
            # They are on the router's span.
            assert not [name for name in span.attributes if name.startswith("gen_ai.usage")]
            sent = gateway.router.metadata[-1]["traceparent"]
            assert sent.split("-")[1] == trace
            assert sent.split("-")[2] != parent
        await gateway.get("/healthz")
    assert recorded.spans("GET /healthz") == []


async def test_a_span_of_a_failure_says_so(recorded):
    async with running(FakeRouter()) as gateway:
        for error, code in (
            (Unavailable("away"), StatusCode.ERROR),
            (InvalidRequest("no"), StatusCode.UNSET),
        ):
            gateway.router.error = error
            await gateway.post(CHAT, HELLO)
            (span,) = recorded.spans(f"POST {CHAT}")[-1:]
            assert span.status.status_code is code
            assert span.attributes["error.type"] in {"UNAVAILABLE", "INVALID_ARGUMENT"}


async def test_metrics_name_paths_and_statuses(metered):
    async with running(FakeRouter()) as gateway:
        await gateway.post(CHAT, HELLO)
        await gateway.get("/made/up")
        async with gateway.client() as client:
            await client.request("REPORT", CHAT)
        assert (await gateway.get("/metrics")).text == "metrics 1\n"
    points = metered()["http.server.request.duration"].data.data_points
    seen = {
        (each.attributes.get("http.route"), each.attributes["http.response.status_code"]) for each in points
    }
    assert {(CHAT, 200), (None, 404)} <= seen
    # A caller's own methods would make a series each.
    assert {each.attributes["http.request.method"] for each in points} == {"GET", "POST", "_OTHER"}


async def test_the_document_is_served(gateway):
    document = (await gateway.get("/openapi.json")).json()
    assert set(BODIES) <= document["paths"].keys()
