"""The gateway as an ASGI application: its paths, and one request from its body to the end of its answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opentelemetry import context, propagate
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.routing import Route, Router

from asd.errors import AsdError, BudgetSpent, InputFailed, NotFound, Overloaded, PreconditionFailed
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
from services.gateway.http import (
    JSON,
    CallerGone,
    Headers,
    HttpError,
    Incoming,
    Room,
    read_json,
    respond,
    token_of,
)
from services.gateway.instruments import http_attributes
from services.gateway.models import listed, page
from services.gateway.objective import HEADER_PREFIX
from services.gateway.openai_chat import OpenAiChat
from services.gateway.openai_completions import OpenAiCompletions
from services.gateway.openai_responses import OpenAiResponses
from services.gateway.openapi import document
from services.gateway.request import api_field
from services.gateway.streaming import encode, encode_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

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
# How long after a request's deadline its stream is ended here, if the router has not done so. Chosen.
_MARGIN_S = 1.0
APIS: dict[str, Api] = {
    "/v1/chat/completions": OpenAiChat(),
    "/v1/completions": OpenAiCompletions(),
    "/v1/responses": OpenAiResponses(),
    "/v1/messages": AnthropicMessages(),
}
_MISSING = "this cascade wants a token: send the header 'authorization: Bearer TOKEN'"
MODELS, MODEL = "/v1/models", "/v1/models/{model:path}"
HEALTH, METRICS = "/healthz", "/metrics"
# Left out of traces: they would outnumber the requests.
_PROBES = (HEALTH, METRICS)


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its answer, while it is worked on.

    id: of the gateway's own. status: 0 until an answer has begun. is_over: whether all of it is sent.
    fields: the API's names of the contract's fields, once they are known. stream: what writes the answer, if
    it is a stream. reason: why the work on it was ended, if it was.
    """

    scope: Scope
    incoming: Incoming
    outgoing: Send
    headers: Headers
    route: str
    api: Api | None
    task: asyncio.Task[Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: int = 0
    is_over: bool = False
    model: str = ""
    is_stream: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    stream: _StreamOut | None = None
    answers: Sequence[Answer] = ()
    problem: Problem | None = None
    reason: Exception | None = None

    @property
    def method(self) -> str:
        """The HTTP method."""
        return str(self.scope["method"])

    async def send(self, message: Any) -> None:
        """Send a part of the answer. Its head names the request, for OpenAI's and for Anthropic's clients."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = [(b"x-request-id", self.id.encode()), (b"request-id", self.id.encode())]
            message = message | {"headers": [*message["headers"], *names]}
        else:
            self.is_over = not message.get("more_body", False)
        await self.outgoing(message)

    def end(self, reason: Exception) -> None:
        """End the work on it, which raises the reason."""
        if self.reason is None:
            self.reason = reason
            self.task.cancel()

    def take_reason(self) -> Exception:
        """Return why it was ended, and forget it: otherwise the error would hold itself in memory."""
        reason, self.reason = self.reason, None
        assert reason is not None
        return reason

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """End the work within the block with CallerGone if the caller closes the connection."""

        async def watch() -> None:
            if await self.incoming.is_closed() and not self.is_over:
                self.end(CallerGone())

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()


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
        self._room = Room(settings.max_buffered_bytes, _RETRY_S)
        self._exchanges: set[Exchange] = set()
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

    def end(self) -> None:
        """End the requests in flight with an error."""
        for each in self._exchanges:
            each.end(Draining("the gateway shuts down: call again", retry_after_s=_RETRY_S))

    def error_of(self, path: str, problem: Problem) -> dict[str, Any]:
        """Return the body of an error of a request that never became one."""
        api = APIS.get(path.partition("?")[0])
        return api.error(problem) if api else openai_body(problem)

    async def handle(
        self, exchange: Exchange, method: str, handler: Callable[[Exchange], Awaitable[None]]
    ) -> None:
        """Answer a request by a handler, or with its error; measure and log it."""
        started = self._clock()
        is_traced = self._is_traced and exchange.route not in _PROBES
        name = f"{exchange.method} {exchange.route}" if exchange.route else "HTTP"
        traced = Traced(name, kind=SpanKind.SERVER)
        carrier = exchange.headers.carrier() if is_traced else {}
        parent = context.attach(propagate.extract(carrier)) if carrier else None
        trace_id = ""
        try:
            with traced if is_traced else nullcontext(traced) as span:
                trace_id = current_trace_id()
                try:
                    if method and exchange.method not in {method, "HEAD" if method == "GET" else method}:
                        raise HttpError("METHOD_NOT_ALLOWED", f"use {method}", allow=method)
                    await self._run(exchange, handler)
                except CallerGone:
                    pass
                except Exception as error:
                    await self._fail(exchange, error)
                finally:
                    _describe(span, exchange)
        finally:
            if parent is not None:
                context.detach(parent)
            duration_ms = (self._clock() - started) * 1000.0
            self._instruments.ended(exchange.method, exchange.route, exchange.status, duration_ms)
            if self._access_log.is_on:
                self._access_log.write(_line(exchange, duration_ms, trace_id))

    async def _run(self, exchange: Exchange, handler: Callable[[Exchange], Awaitable[None]]) -> None:
        self._exchanges.add(exchange)
        try:
            await handler(exchange)
        except asyncio.CancelledError:
            # Somebody else may have cancelled it as well.
            if exchange.reason is None or exchange.task.uncancel():
                raise
            raise exchange.take_reason() from None
        finally:
            self._exchanges.discard(exchange)

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        """Answer with an error, or end the stream with it."""
        exchange.problem = problem = problem_of(error, exchange.fields)
        if exchange.status:
            if exchange.stream is None or exchange.is_over:
                raise error
            await exchange.stream.fail(problem)
            return
        # A caller that waits for "100 Continue" may take an error in its place, and not send the body.
        closes = self._draining or bool(exchange.headers.get("expect"))
        closes = closes or (isinstance(error, HttpError) and error.closes)
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
            api = exchange.api
            assert api is not None
            token = token_of(exchange.headers, takes_api_key=api.name == AnthropicMessages.name)
            if not self._cascade.admits(token):
                async with exchange.watched():
                    await self._cascade.describe(token)
            with self._room.taken() as take:
                body = await read_json(
                    exchange.headers,
                    exchange.incoming,
                    take,
                    most_bytes=self._settings.max_body_bytes,
                    timeout_s=self._settings.read_timeout_ms / 1000.0,
                )
                async with exchange.watched():
                    models = await self._cascade.models(token, body.get("model"))
                    call = api.parse(body, exchange.headers.beginning_with(HEADER_PREFIX), models)
                    models.check_length(call)
                    exchange.model, exchange.is_stream = call.model, call.is_stream
                    exchange.fields = call.fields
                    answering = self._stream if call.is_stream else self._answer
                    await answering(exchange, call, token)
        finally:
            self._active -= 1

    async def _answer(self, exchange: Exchange, call: Call, token: str) -> None:
        assert exchange.api is not None
        exchange.answers = answers = await self._cascade.ask(token, call.requests)
        body = exchange.api.answer(call, answers, int(time.time()))
        await respond(exchange.send, 200, body, told.headers(answers))

    async def _stream(self, exchange: Exchange, call: Call, token: str) -> None:
        assert exchange.api is not None
        writer = exchange.api.writer(call, exchange.id, int(time.time()))
        # HTTP/1.0 has no chunks: its callers get the whole stream at its end.
        is_held = exchange.scope.get("http_version") == "1.0"
        exchange.stream = out = _StreamOut(
            exchange, writer, told.early_headers(call.requests), is_held=is_held
        )
        ended: dict[int, Answer] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.router.timeout_ms / 1000.0 + _MARGIN_S
        async with self._cascade.stream(token, call.requests) as queue:
            while len(ended) < len(call.requests):
                silent_until = min(loop.time() + self._settings.keep_alive_ms / 1000.0, deadline)
                try:
                    async with asyncio.timeout_at(silent_until):
                        pieces = [await queue.get()]
                except TimeoutError:
                    if silent_until == deadline:
                        raise BudgetSpent("the cascade's stream did not end in time") from None
                    await out.keep_alive()
                    continue
                while not queue.empty():
                    pieces.append(queue.get_nowait())
                errors = [piece for _, piece in pieces if isinstance(piece, Exception)]
                if errors and not out.has_begun:
                    raise errors[0]
                # First: some APIs number the events.
                events = out.begin()
                for index, piece in pieces:
                    if isinstance(piece, Exception):
                        await out.write(events)
                        raise piece
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
        await respond(exchange.send, 200, page(await self._models(exchange)))

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
        async with exchange.watched():
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
        task = asyncio.current_task()
        assert task is not None
        headers, incoming = Headers(scope), Incoming(receive)
        exchange = Exchange(scope, incoming, send, headers, self._route, self._api, task)
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

    async def fail(self, problem: Problem) -> None:
        """Send the events of an error, which end the stream."""
        await self.write(self._writer.failed(problem), is_last=True)

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


def problem_of(error: BaseException, fields: Mapping[str, str]) -> Problem:
    """Return an error as callers see it. fields: the API's names of the contract's fields, once known."""
    if isinstance(error, HttpError):
        return error.problem
    kind = status_of(error).name
    message = public_message(error)
    if message == MISSING:
        # The router's own words are of gRPC.
        message = _MISSING
    if not isinstance(error, AsdError):
        logger.error("a request failed", exc_info=error)
        return Problem(kind, message)
    # An error of the gateway's own names the API's parameter already.
    param = (api_field(fields, error.field) if fields else error.field) if error.field else ""
    if isinstance(error, InputFailed) or (isinstance(error, PreconditionFailed) and error.field):
        kind = "INPUT_FAILED"
    elif type(error) is AsdError or isinstance(error, PreconditionFailed):
        logger.error("a request failed: %s", message, exc_info=error)
    return Problem(kind, message, param, error.retry_after_s)


def _describe(span: Traced, exchange: Exchange) -> None:
    if not span.recording:
        return
    span.span.set_attributes(http_attributes(exchange.method, exchange.route, exchange.status))
    if exchange.model:
        span.set(Attributes.OPERATION, OPERATION_CHAT)
        span.set(Attributes.PROVIDER, PROVIDER_NAME)
        span.set(Attributes.REQUEST_MODEL, exchange.model)
    if exchange.answers:
        # The tokens are on the router's span: in both, they would count twice.
        span.set(Attributes.RESPONSE_ID, exchange.answers[0].request_id)
        span.set(Attributes.RESPONSE_MODEL, exchange.answers[0].stage)
        span.set(Attributes.FINISH_REASONS, [told.finish_reason(each) for each in exchange.answers])
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
        "request_id": exchange.id,
        "request_ids": [each.request_id for each in exchange.answers],
        "stages": [each.stage for each in exchange.answers],
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "error": exchange.problem.kind if exchange.problem else None,
        "trace_id": trace_id or None,
    }
