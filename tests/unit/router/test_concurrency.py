"""What a router says that has as many requests under way as it runs: when to call again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, Overloaded
from asd.v1 import cascade_pb2
from services.router.cascade import Cascade
from services.router.servicer import CascadeServicer
from tests.unit.router.small_cascade import Observer, SmallCascade

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Instruments(Observer):
    def request_under_way(self) -> AbstractContextManager[None]:
        return nullcontext()


class Context:
    """Of a call whose caller reads nothing while reads is clear."""

    def __init__(self) -> None:
        self.reads, self.has_come = asyncio.Event(), asyncio.Event()
        self.reads.set()

    def time_remaining(self) -> float:
        return 60.0

    async def write(self, message: object) -> None:
        self.has_come.set()
        await self.reads.wait()


class Router:
    """Runs one request at a time, and has a clock by hand."""

    def __init__(self) -> None:
        self._small = SmallCascade(static_plan=(0,))
        self._stage = self._small.stages["small"]
        instruments: Any = Instruments()
        directory: Any = None
        cascade = Cascade(
            tuple(self._small.stages.values()), self._small.planner, instruments, self._small.clock
        )
        self._servicer = CascadeServicer(
            cascade,
            directory,
            self._small.clock,
            instruments,
            max_concurrent=1,
            batch_concurrency=1,
            default_deadline_ms=60_000.0,
        )
        self._context: Any = Context()

    def takes(self, seconds: float, failure: AsdError | None = None) -> None:
        """From now on requests take so long, and fail."""

        def pass_time() -> None:
            self._small.clock.now += seconds

        self._stage.on_call = pass_time
        self._stage.fail_after, self._stage.failure = (0, failure) if failure else (None, None)

    async def ask(self) -> None:
        await self._servicer.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"), self._context)

    async def stream(self) -> None:
        await self._servicer.GenerateStream(self._streamed(), self._context)

    async def batch(self, count: int) -> None:
        requests = [cascade_pb2.GenerateRequest(prompt="hi", stage="small")] * count
        batch = cascade_pb2.GenerateBatchRequest(requests=requests)
        async with aclosing(self._servicer.GenerateBatch(batch, self._context)) as answers:
            async for _ in answers:
                pass

    async def outcomes(self, count: int) -> list[cascade_pb2.GenerateBatchResponse]:
        """Return what becomes of the requests of a batch."""
        requests = [cascade_pb2.GenerateRequest(prompt="hi", stage="small")] * count
        batch = cascade_pb2.GenerateBatchRequest(requests=requests)
        async with aclosing(self._servicer.GenerateBatch(batch, self._context)) as answers:
            return [each async for each in answers]

    async def delay(self) -> float | None:
        """Return how long the one who comes while another request is under way is told to wait."""
        context: Any = Context()
        context.reads.clear()
        stream = asyncio.create_task(self._servicer.GenerateStream(self._streamed(), context))
        await context.has_come.wait()
        with pytest.raises(Overloaded) as caught:
            await self.ask()
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        return caught.value.retry_after_s

    @staticmethod
    def _streamed() -> cascade_pb2.GenerateStreamRequest:
        return cascade_pb2.GenerateStreamRequest(
            request=cascade_pb2.GenerateRequest(prompt="hi", stage="small")
        )


async def test_the_delay_is_what_whole_requests_took() -> None:
    router = Router()
    router.takes(4.0)
    await router.ask()
    # The first ones count alike.
    assert await router.delay() == pytest.approx(4.0)
    router.takes(2.0)
    await router.stream()
    assert await router.delay() == pytest.approx(3.0)


async def test_neither_batches_nor_failures_say_how_long_a_request_takes() -> None:
    router = Router()
    router.takes(4.0)
    await router.ask()
    await router.batch(8)
    router.takes(0.0, AsdError("it failed"))
    for _ in range(8):
        with pytest.raises(AsdError):
            await router.ask()
    router.takes(0.0)
    # Nor do those that their callers leave.
    for _ in range(8):
        assert await router.delay() == pytest.approx(4.0)


async def test_what_a_batch_leaves_no_time_for_is_refused_with_a_delay_and_the_rest_answered():
    router = Router()
    # Of the batch's 60 s; one of its requests is under way at a time.
    router.takes(25.0)
    found = sorted(await router.outcomes(5), key=lambda each: each.index)
    assert [each.WhichOneof("outcome") for each in found] == ["response"] * 3 + ["error"] * 2
    assert {each.error.code for each in found[3:]} == {8}
    assert all(each.error.retry_after_ms > 0.0 for each in found[3:])
