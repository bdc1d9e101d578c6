"""The gateway as an ASGI application: its paths, and one request from its body to the end of its answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry import context, propagate
from opentelemetry.trace import Status, StatusCode
from starlette.datastructures import QueryParams
from starlette.routing import Route, Router

from asd.errors import AsdError, NotFound, Overloaded
from asd.transport.status import status_of
from asd.values import Answer
from services.common.auth import MISSING
from services.common.errors import Draining
from services.common.status import public_message
from services.common.telemetry import (
    OPERATION_CHAT,
    PROVIDER_NAME,
    Attributes,
    Traced,
    client_interceptors,
    current_trace_id,
)
from services.gateway import answers as told
from services.gateway.anthropic_messages import AnthropicMessages
from services.gateway.errors import Problem, anthropic_body, openai_body, retry_headers
from services.gateway.http import JSON, CallerGone, Headers, HttpError, read_json, respond, token_of
from services.gateway.models import listed, page
from services.gateway.objective import HEADER_PREFIX
from services.gateway.openai_chat import OpenAiChat
from services.gateway.openai_completions import OpenAiCompletions
from services.gateway.openai_responses import OpenAiResponses
from services.gateway.openapi import document
from services.gateway.request import MOST_BYTES, api_field
from services.gateway.streaming import encode, encode_events

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.types import Receive, Scope, Send

    from services.gateway.cascade import Cascade
    from services.gateway.instruments import AccessLog, Instruments
    from services.gateway.request import Api, Call, StreamWriter
    from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

_EVENT_STREAM = b"text/event-stream; charset=utf-8"
_METRICS_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
# Proxies such as nginx hold streams back unless they are told not to.
_STREAM_HEADERS = [
    (b"content-type", _EVENT_STREAM),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
# How long a caller is to wait if there are too many requests. Chosen: as the router's least.
_RETRY_S = 1.0
APIS: dict[str, Api] = {
    "/v1/chat/completions": OpenAiChat(),
    "/v1/completions": OpenAiCompletions(),
    "/v1/responses": OpenAiResponses(),
    "/v1/messages": AnthropicMessages(),
}
_MISSING = (
    "this cascade wants a token: send the header 'authorization: Bearer TOKEN' (to /v1/messages and "
    "/v1/models also 'x-api-key: TOKEN')"
)
MODELS, MODEL = "/v1/models", "/v1/models/{model:path}"
HEALTH, METRICS = "/healthz", "/metrics"
# Left out of traces: they would outnumber the requests.
_PROBES = (HEALTH, METRICS)


@dataclass(slots=True)
class Exchange:
    """One request and its answer, while it is worked on. status: 0 until an answer has begun."""

    scope: Scope
    receive: Receive
    outgoing: Send
    headers: Headers
    route: str
    api: Api | None
    status: int = 0
    model: str = ""
    is_stream: bool = False
    answers: Sequence[Answer] = ()
    problem: Problem | None = None

    @property
    def method(self) -> str:
        """The HTTP method."""
        return str(self.scope["method"])

    async def send(self, message: Any) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.outgoing(message)


class Gateway:
    """Serves the HTTP APIs. clock: monotonic seconds. metrics: renders them for Prometheus."""

    def __init__(
        self,
        settings: GatewaySettings,
        cascade: Cascade,
        instruments: Instruments,
        access_log: AccessLog,
        metrics: Callable[[], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._cascade = cascade
        self._instruments = instruments
        self._access_log = access_log
        self._metrics = metrics
        self._clock = clock
        self._created = int(time.time())
        self._document = encode(document(APIS))
        self._active = 0
        instruments.watch_active(lambda: self._active)
        self._draining = False
        self._is_traced = client_interceptors() is not None
        routes = [
            Route(path, _Endpoint(self, path, "POST", self._complete, api)) for path, api in APIS.items()
        ]
        routes += [
            Route(path, _Endpoint(self, path, "GET", handle))
            for path, handle in (
                (MODELS, self._list_models),
                (MODEL, self._show_model),
                (HEALTH, self._health),
                (METRICS, self._show_metrics),
                ("/openapi.json", self._show_document),
            )
        ]
        unknown = _Endpoint(self, "", "", self._unknown)
        self._router = Router(routes, redirect_slashes=False, default=unknown)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http":
            await self._router(scope, receive, send)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    async def handle(
        self, exchange: Exchange, method: str, handler: Callable[[Exchange], Awaitable[None]]
    ) -> None:
        """Answer a request by a handler, or with its error; measure and log it."""
        started = self._clock()
        is_traced = self._is_traced and exchange.route not in _PROBES
        traced = Traced(f"{exchange.method} {exchange.route}" if exchange.route else "HTTP")
        carrier = exchange.headers.carrier() if is_traced else {}
        parent = context.attach(propagate.extract(carrier)) if carrier else None
        try:
            with traced if is_traced else nullcontext(traced) as span:
                try:
                    if method and exchange.method not in {method, "HEAD" if method == "GET" else method}:
                        raise HttpError("METHOD_NOT_ALLOWED", f"use {method}", allow=method)
                    await handler(exchange)
                except CallerGone:
                    pass
                except Exception as error:
                    await self._fail(exchange, error)
                _describe(span, exchange)
                trace_id = current_trace_id()
        finally:
            if parent is not None:
                context.detach(parent)
            duration_ms = (self._clock() - started) * 1000.0
            self._instruments.ended(exchange.method, exchange.route, exchange.status, duration_ms)
        if self._access_log.is_on:
            self._access_log.write(_line(exchange, duration_ms, trace_id))

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        """Answer with an error, if no answer has begun."""
        problem = problem_of(error, {})
        exchange.problem = exchange.problem or problem
        if exchange.status:
            raise error
        closes = self._draining or (isinstance(error, HttpError) and error.closes)
        headers = retry_headers(problem)
        if isinstance(error, HttpError) and error.allow:
            headers.append((b"allow", error.allow.encode()))
        if problem.row.http == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        body = exchange.api.error(problem) if exchange.api else _plain_error(exchange, problem)
        await respond(exchange.send, problem.row.http, body, headers, closes=closes)

    async def _complete(self, exchange: Exchange) -> None:
        """Answer a prompt, in any of the APIs."""
        if self._draining:
            raise Draining("the gateway is shutting down: call again", retry_after_s=_RETRY_S)
        if self._active >= self._settings.max_concurrent:
            raise Overloaded(
                f"the gateway has {self._active} requests in flight (max_concurrent): call again",
                retry_after_s=_RETRY_S,
            )
        self._active += 1
        try:
            call, token = await self._read(exchange)
            try:
                answering = self._stream if call.is_stream else self._answer
                await _unless_gone(answering(exchange, call, token), exchange.receive)
            except AsdError as error:
                exchange.problem = problem_of(error, call.fields)
                raise _NamedError(error, exchange.problem) from error
        finally:
            self._active -= 1

    async def _read(self, exchange: Exchange) -> tuple[Call, str]:
        api = exchange.api
        assert api is not None
        token = token_of(exchange.headers, takes_api_key=api.name == AnthropicMessages.name)
        body = await read_json(
            exchange.headers,
            exchange.receive,
            most_bytes=self._settings.max_body_bytes,
            timeout_s=self._settings.read_timeout_ms / 1000.0,
        )
        options = exchange.headers.beginning_with(HEADER_PREFIX)
        models = await self._cascade.models(token, body.get("model"))
        call = api.parse(body, options, models)
        models.check_length(call)
        if call.text_bytes > MOST_BYTES:
            raise HttpError(
                "BODY_TOO_LARGE", f"the text has {call.text_bytes} bytes, and {MOST_BYTES} are the most"
            )
        exchange.model, exchange.is_stream = call.model, call.is_stream
        return call, token

    async def _answer(self, exchange: Exchange, call: Call, token: str) -> None:
        assert exchange.api is not None
        exchange.answers = answers = await self._cascade.ask(token, call.requests)
        body = exchange.api.answer(call, answers, int(time.time()))
        await respond(exchange.send, 200, body, told.headers(answers))

    async def _stream(self, exchange: Exchange, call: Call, token: str) -> None:
        assert exchange.api is not None
        writer = exchange.api.writer(call, uuid.uuid4().hex, int(time.time()))
        # HTTP/1.0 has no chunks: its callers get the whole stream at its end.
        is_held = exchange.scope.get("http_version") == "1.0"
        out = _StreamOut(exchange, writer, told.early_headers(call.requests), is_held=is_held)
        ended: dict[int, Answer] = {}
        async with self._cascade.stream(token, call.requests) as queue:
            while len(ended) < len(call.requests):
                try:
                    async with asyncio.timeout(self._settings.keep_alive_ms / 1000.0):
                        pieces = [await queue.get()]
                except TimeoutError:
                    await out.keep_alive()
                    continue
                while not queue.empty():
                    pieces.append(queue.get_nowait())
                errors = [piece for _, piece in pieces if isinstance(piece, Exception)]
                if errors and not out.has_begun:
                    exchange.problem = problem_of(errors[0], call.fields)
                    raise errors[0]
                # First: some APIs number the events.
                events = out.begin()
                for index, piece in pieces:
                    if isinstance(piece, Exception):
                        exchange.problem = problem_of(piece, call.fields)
                        await out.write([*events, *writer.failed(exchange.problem)], is_last=True)
                        return
                    if isinstance(piece, Answer):
                        ended[index] = piece
                        events += writer.finish(index, piece)
                    else:
                        events += writer.text(index, piece)
                exchange.answers = [ended[index] for index in sorted(ended)]
                if len(ended) == len(call.requests):
                    await out.write([*events, *writer.end()], is_last=True)
                else:
                    await out.write(events)

    async def _list_models(self, exchange: Exchange) -> None:
        query = QueryParams(exchange.scope["query_string"])
        await respond(exchange.send, 200, page(await self._models(exchange), query))

    async def _show_model(self, exchange: Exchange) -> None:
        name = exchange.scope["path_params"]["model"]
        found = [each for each in await self._models(exchange) if each["id"] == name]
        if not found:
            raise NotFound(
                f"there is no model {name!r}: GET /v1/models lists those that there are", field="model"
            )
        await respond(exchange.send, 200, found[0])

    async def _models(self, exchange: Exchange) -> list[dict[str, Any]]:
        token = token_of(exchange.headers, takes_api_key=True)
        return listed(await self._cascade.describe(token), self._created)

    async def _health(self, exchange: Exchange) -> None:
        if self._draining:
            raise Draining("the gateway is shutting down")
        await respond(exchange.send, 200, {"status": "ok"})

    async def _show_metrics(self, exchange: Exchange) -> None:
        await respond(exchange.send, 200, self._metrics(), content_type=_METRICS_TEXT)

    async def _show_document(self, exchange: Exchange) -> None:
        await respond(exchange.send, 200, self._document, content_type=JSON)

    async def _unknown(self, exchange: Exchange) -> None:
        raise HttpError("NO_SUCH_PATH", f"there is no such path: there are {', '.join([*APIS, MODELS])}")


class _Endpoint:
    """A path as Starlette's router takes it."""

    def __init__(
        self, gateway: Gateway, route: str, method: str, handler: Any, api: Api | None = None
    ) -> None:
        self._gateway = gateway
        # As OpenAPI and the conventions for traces write it.
        self._route = route.replace(":path", "")
        self._method = method
        self._handler = handler
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, Headers(scope), self._route, self._api)
        await self._gateway.handle(exchange, self._method, self._handler)


class _StreamOut:
    """Sends a stream. Nothing is sent before the first text: until then, an error has a status of its own.

    headers: what is known of the answer already. is_held: whether all is sent at the end.
    """

    def __init__(
        self, exchange: Exchange, writer: StreamWriter, headers: list[tuple[bytes, bytes]], *, is_held: bool
    ) -> None:
        self._exchange = exchange
        self._writer = writer
        self._headers = [*_STREAM_HEADERS, *headers]
        self._held: list[bytes] | None = [] if is_held else None
        self.has_begun = False

    async def write(self, events: list[Any], *, is_last: bool = False) -> None:
        """Send events."""
        content = encode_events(events)
        if self._held is None:
            if not self._exchange.status:
                await self._start([])
            await self._exchange.send(
                {"type": "http.response.body", "body": content, "more_body": not is_last}
            )
            return
        self._held.append(content)
        if is_last:
            whole = b"".join(self._held)
            await self._start([(b"content-length", str(len(whole)).encode())])
            await self._exchange.send({"type": "http.response.body", "body": whole})

    async def keep_alive(self) -> None:
        """Send an event without content: what begins the stream, if it has not begun."""
        await self.write(self._writer.keep_alive() if self.has_begun else self.begin())

    def begin(self) -> list[Any]:
        """Return the events that begin the stream, the first time."""
        if self.has_begun:
            return []
        self.has_begun = True
        return self._writer.begin()

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._exchange.send(
            {"type": "http.response.start", "status": 200, "headers": [*self._headers, *headers]}
        )


def _plain_error(exchange: Exchange, problem: Problem) -> dict[str, Any]:
    """Return the error of a path that both APIs have, in the form of the one that asks."""
    is_anthropics = bool(exchange.headers.get("anthropic-version"))
    return anthropic_body(problem) if is_anthropics else openai_body(problem)


class _NamedError(Exception):
    """An error whose parameter has the API's name."""

    def __init__(self, error: AsdError, problem: Problem) -> None:
        super().__init__(str(error))
        self.problem = problem


def problem_of(error: BaseException, fields: Any) -> Problem:
    """Return an error as callers see it. fields: the API's names of the contract's fields."""
    if isinstance(error, HttpError | _NamedError):
        return error.problem
    if not isinstance(error, AsdError) or type(error) is AsdError:
        logger.error("a request failed", exc_info=error)
    kind = status_of(error).name
    message = public_message(error)
    if message == MISSING:
        # The router's own words are of gRPC.
        message = _MISSING
    if not isinstance(error, AsdError):
        return Problem(kind, message)
    # An error of the gateway's own names the API's parameter already.
    param = (api_field(fields, error.field) if fields else error.field) if error.field else ""
    return Problem(kind, message, param, error.retry_after_s)


async def _unless_gone(answering: Awaitable[None], receive: Receive) -> None:
    """Await an answer; end it and raise CallerGone if the caller closes the connection first.

    The answer stays in this task, and the watch on the connection cancels it: one task less for each request.
    """
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        await answering
    except asyncio.CancelledError:
        # Somebody else may have cancelled it as well.
        if is_gone and task.uncancel() == 0:
            raise CallerGone from None
        raise
    finally:
        watching.cancel()


def _describe(span: Traced, exchange: Exchange) -> None:
    if not span.recording:
        return
    if exchange.model:
        span.set(Attributes.OPERATION, OPERATION_CHAT)
        span.set(Attributes.PROVIDER, PROVIDER_NAME)
        span.set(Attributes.REQUEST_MODEL, exchange.model)
    if exchange.answers:
        usage = told.usage_of(exchange.answers)
        span.set(Attributes.RESPONSE_ID, exchange.answers[0].request_id)
        span.set(Attributes.RESPONSE_MODEL, exchange.answers[0].stage)
        span.set(Attributes.FINISH_REASONS, [told.finish_reason(each) for each in exchange.answers])
        span.set(Attributes.INPUT_TOKENS, usage.prompt)
        span.set(Attributes.OUTPUT_TOKENS, usage.completion)
    if exchange.problem:
        span.set(Attributes.ERROR_TYPE, exchange.problem.kind)
        if exchange.problem.row.http >= 500:
            span.span.set_status(Status(StatusCode.ERROR, exchange.problem.message))


def _line(exchange: Exchange, duration_ms: float, trace_id: str) -> dict[str, Any]:
    """Return the access log's line, without unknown paths, queries and messages: they may hold text."""
    usage = told.usage_of(exchange.answers)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": exchange.method if exchange.route else None,
        "path": exchange.route or None,
        "status": exchange.status or None,
        "duration_ms": round(duration_ms, 3),
        "model": exchange.model or None,
        "stream": exchange.is_stream,
        "request_ids": [each.request_id for each in exchange.answers],
        "stages": [each.stage for each in exchange.answers],
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "error": exchange.problem.kind if exchange.problem else None,
        "trace_id": trace_id or None,
    }
