"""The cascade's public API over gRPC: checks requests, converts them, and answers."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from asd.errors import AsdError, InvalidRequest, Overloaded, ResourceExhausted
from asd.transport.status import status_of
from asd.v1 import cascade_pb2, cascade_pb2_grpc
from services.common import validation
from services.common.errors import Draining
from services.common.server import ServiceRegistration
from services.common.status import public_message
from services.common.telemetry import Spans, Traced, current_trace_id
from services.common.validation import MAX_REQUEST_BYTES
from services.common.wire import MAX_ENTRIES
from services.router import convert, spans
from services.router.domain import Event, Refusal, RoutedAnswer, RoutedRequest, Visibility, show_nothing
from services.router.planning.admission import LEAST_RETRY_S, MOST_RETRY_S

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    import grpc

    from services.router.cascade import Cascade
    from services.router.clients.directory import Directory
    from services.router.instruments import RouterInstruments
    from services.router.request import Emit

    Context = grpc.aio.ServicerContext[object, object]

# Smallest weight of the newest request in the mean duration. Chosen: the last ten carry nine tenths of it.
_NEWEST = 0.2
# Time kept of a batch's deadline to send its responses: a share of the deadline, and at most this many
# seconds. Chosen, as the router's margin for other requests.
_BATCH_MARGIN_SHARE, _BATCH_MARGIN_S = 0.1, 0.25
MAX_BATCH = MAX_ENTRIES["asd.v1.GenerateBatchRequest.requests"]


class CascadeServicer(cascade_pb2_grpc.CascadeServiceServicer):
    """Serves asd.v1.CascadeService. clock: monotonic seconds, the cascade's own."""

    def __init__(
        self,
        cascade: Cascade,
        directory: Directory,
        clock: Callable[[], float],
        instruments: RouterInstruments,
        *,
        max_concurrent: int,
        batch_concurrency: int,
        default_deadline_ms: float,
    ) -> None:
        self._cascade = cascade
        self._directory = directory
        self._clock = clock
        self._instruments = instruments
        self._max_concurrent = max_concurrent
        self._batch_concurrency = batch_concurrency
        self._default_deadline_s = default_deadline_ms / 1000.0
        self._active = 0
        # Mean duration of recent requests that were answered, and how many there were.
        self._request_s = 0.0
        self._answered = 0
        self._draining = False

    def registration(self) -> ServiceRegistration:
        """Return the registration of this servicer."""
        return ServiceRegistration(
            "asd.v1.CascadeService",
            lambda server: cascade_pb2_grpc.add_CascadeServiceServicer_to_server(self, server),
        )

    async def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    async def Generate(  # noqa: N802 - the proto's name
        self, request: cascade_pb2.GenerateRequest, context: Context
    ) -> cascade_pb2.GenerateResponse:
        """Answer a prompt."""
        check_request(request)
        with self._admitted(), self._timed():
            outcome = await self._outcome(request, self._deadline(context))
            return convert.response_to(outcome, current_trace_id())

    # grpc.aio also takes a coroutine that writes; the stubs' types know generators alone.
    async def GenerateStream(  # type: ignore[override] # noqa: N802 - the proto's name
        self, request: cascade_pb2.GenerateStreamRequest, context: Context
    ) -> None:
        """Answer a prompt and stream its tokens."""
        if not request.HasField("request"):
            raise InvalidRequest("request is required", field="request")
        check_request(request.request, "request.")
        view = Visibility.DRAFTS if request.include_drafts else Visibility.COMMITTED
        with self._admitted(), self._timed():
            trace_id = current_trace_id()

            async def emit(event: Event) -> None:
                await context.write(convert.event_to(event, trace_id))

            async with _fields_below("request."):
                await emit(await self._answer(request.request, self._deadline(context), view, emit))

    async def GenerateBatch(  # noqa: N802 - the proto's name
        self, request: cascade_pb2.GenerateBatchRequest, context: Context
    ) -> AsyncGenerator[cascade_pb2.GenerateBatchResponse, None]:
        """Answer several prompts, each as it is ready."""
        count = len(request.requests)
        if not 1 <= count <= MAX_BATCH:
            raise InvalidRequest(f"send 1 to {MAX_BATCH} requests, not {count}", field="requests")
        # Requests without an answer at this deadline get an error each before the call itself ends.
        left_s = self._deadline(context) - self._clock()
        deadline = self._clock() + left_s - min(left_s * _BATCH_MARGIN_SHARE, _BATCH_MARGIN_S)
        with self._admitted():
            ready: asyncio.Queue[cascade_pb2.GenerateBatchResponse] = asyncio.Queue()
            waiting = iter(enumerate(request.requests))

            async def work() -> None:
                for index, each in waiting:
                    ready.put_nowait(await self._batch_response(index, each, deadline))

            workers = [asyncio.create_task(work()) for _ in range(min(count, self._batch_concurrency))]
            try:
                for _ in range(count):
                    yield await ready.get()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def Describe(  # noqa: N802 - the proto's name
        self, request: cascade_pb2.DescribeRequest, context: Context
    ) -> cascade_pb2.DescribeResponse:
        """Describe the stages, their costs and the policy in force."""
        return await self._directory.describe()

    async def _answer(
        self, message: cascade_pb2.GenerateRequest, deadline: float, view: Visibility, emit: Emit
    ) -> RoutedAnswer:
        request = _domain_request(message)
        with self._instruments.request_under_way(), Traced(Spans.CASCADE) as span:
            spans.describe_request(span, request)
            outcome = await self._cascade.answer(request, deadline, view, emit)
            spans.describe_outcome(span, outcome)
            return outcome

    async def _outcome(self, message: cascade_pb2.GenerateRequest, deadline: float) -> RoutedAnswer:
        return await self._answer(message, deadline, Visibility.OUTCOME, show_nothing)

    async def _batch_response(
        self, index: int, message: cascade_pb2.GenerateRequest, deadline: float
    ) -> cascade_pb2.GenerateBatchResponse:
        try:
            path = f"requests[{index}]."
            check_request(message, path)
            if self._clock() >= deadline:
                raise self._not_begun()
            async with _fields_below(path):
                outcome = await self._outcome(message, deadline)
        except Exception as error:
            failure = cascade_pb2.BatchError(
                code=status_of(error).value[0],
                message=public_message(error),
                field=error.field if isinstance(error, AsdError) else "",
            )
            if isinstance(error, AsdError) and error.retry_after_s is not None:
                failure.retry_after_ms = error.retry_after_s * 1000.0
            return cascade_pb2.GenerateBatchResponse(index=index, error=failure)
        response = convert.response_to(outcome, current_trace_id())
        return cascade_pb2.GenerateBatchResponse(index=index, response=response)

    def _not_begun(self) -> Overloaded:
        """Return the refusal of a request that its batch left no time for."""
        self._instruments.request_refused(Refusal.DEADLINE)
        after_s = min(max(self._request_s, LEAST_RETRY_S), MOST_RETRY_S)
        return Overloaded(
            f"others of the batch took the time to its deadline ({self._batch_concurrency} are under way at "
            "once): allow more time, or send fewer together",
            retry_after_s=after_s,
        )

    def _deadline(self, context: Context) -> float:
        left_s = context.time_remaining()
        return self._clock() + (self._default_deadline_s if left_s is None else left_s)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._draining:
            raise Draining("the router is shutting down: call another replica, or again")
        if self._active >= self._max_concurrent:
            self._instruments.request_refused(Refusal.CONCURRENCY)
            # After the mean duration of a request, most of the current requests have ended.
            after_s = min(max(self._request_s, LEAST_RETRY_S), MOST_RETRY_S)
            raise Overloaded(
                f"the router runs {self._active} requests already (max_concurrent): call again in "
                f"{after_s:.2f} s",
                retry_after_s=after_s,
            )
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Measure how long the block takes to answer a request. Failures are left out: they may be quick."""
        started = self._clock()
        yield
        self._answered += 1
        weight = max(_NEWEST, 1.0 / self._answered)
        self._request_s += weight * (self._clock() - started - self._request_s)


def check_request(request: cascade_pb2.GenerateRequest, path: str = "") -> None:
    """Check a request. Whether its stage exists is checked later.

    Raises InvalidRequest naming the field, ResourceExhausted for a request of more than 4 MiB.
    """
    size = request.ByteSize()
    if size > MAX_REQUEST_BYTES:
        raise ResourceExhausted(
            f"the request has {size} bytes, and {MAX_REQUEST_BYTES} are the most that it may have: shorten "
            "the prompt or the conversation",
            field=path.removesuffix("."),
        )
    validation.check_input(request, path)
    if request.HasField("sampling"):
        validation.check_sampling(request.sampling, f"{path}sampling")
    if request.HasField("objective"):
        validation.check_objective(request.objective, f"{path}objective")
    if request.HasField("acceptance"):
        validation.check_acceptance(request.acceptance, f"{path}acceptance")
    if request.stage and request.chain:
        raise InvalidRequest("stage and chain exclude each other: set one of them", field=f"{path}chain")
    if request.session_id:
        validation.check_session_id(request.session_id, f"{path}session_id")
    validation.check_task(request.task, f"{path}task")
    validation.check_call_is_free(request, path)


@asynccontextmanager
async def _fields_below(path: str) -> AsyncIterator[None]:
    """Prefix the fields in errors with a path, for a request inside a larger message."""
    try:
        yield
    except AsdError as error:
        if not error.field:
            raise
        field = path + error.field
        raise type(error)(error.message, field=field, retry_after_s=error.retry_after_s) from error


def _domain_request(message: cascade_pb2.GenerateRequest) -> RoutedRequest:
    """Return a request with an id, and a seed if it samples: all of its stages must draw alike."""
    request = convert.request_from(message, uuid.uuid4().hex)
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        drawn = replace(sampling, seed=secrets.randbits(64))
        return replace(request, sampling=drawn, seed_is_free=True)
    return request
