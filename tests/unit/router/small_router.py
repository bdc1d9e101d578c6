"""A router's servicer before a small cascade, called without sockets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from asd.v1 import cascade_pb2
from services.router.instruments import RouterInstruments
from services.router.servicer import CascadeServicer
from tests.unit.router.small_cascade import Policy, SmallCascade

ASK = cascade_pb2.GenerateRequest(prompt="hi")


class SmallRouter:
    """Answers messages. default_deadline_ms: of a call without a deadline. options: of the cascade."""

    def __init__(
        self, policy: Policy | None = None, *, default_deadline_ms: float = 60_000.0, **options: Any
    ) -> None:
        instruments = RouterInstruments()
        self.cascade = SmallCascade(policy, instruments=instruments, **options)
        self.clock, self.stages = self.cascade.clock, self.cascade.stages
        no_directory: Any = None
        self._servicer = CascadeServicer(
            self.cascade.cascade,
            no_directory,
            self.clock,
            instruments,
            max_concurrent=100,
            batch_concurrency=10,
            default_deadline_ms=default_deadline_ms,
        )

    async def generate(
        self, request: cascade_pb2.GenerateRequest = ASK, left_s: float | None = None
    ) -> cascade_pb2.GenerateResponse:
        """Answer a request. left_s: to the caller's deadline; None: it has none."""
        return await self._servicer.Generate(request, _context(left_s))

    async def stream(
        self, request: cascade_pb2.GenerateRequest = ASK, left_s: float | None = None
    ) -> cascade_pb2.GenerateResponse:
        """Answer a request by a stream, and return the response that ends it."""
        written: list[cascade_pb2.GenerateStreamResponse] = []

        async def write(message: cascade_pb2.GenerateStreamResponse) -> None:
            written.append(message)

        message = cascade_pb2.GenerateStreamRequest(request=request)
        await self._servicer.GenerateStream(message, _context(left_s, write))
        return written[-1].response

    async def batch(
        self, request: cascade_pb2.GenerateRequest = ASK, left_s: float | None = None
    ) -> cascade_pb2.GenerateResponse:
        """Answer a request as the only one of a batch."""
        message = cascade_pb2.GenerateBatchRequest(requests=[request])
        (only,) = [each async for each in self._servicer.GenerateBatch(message, _context(left_s))]
        return only.response


def _context(left_s: float | None, write: Any = None) -> Any:
    return SimpleNamespace(time_remaining=lambda: left_s, write=write)
