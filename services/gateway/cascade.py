"""Calls the router in the name of the gateway's callers."""

from __future__ import annotations

import asyncio
import functools
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from asd.errors import AsdError, NotFound
from asd.values import Answer, Committed, Tokens
from services.gateway.models import Models

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from asd.client import AsyncClient
    from asd.values import Description, Request

# After this time the stages' names are asked for again. Chosen: they change when the router is configured
# anew, and a name that is missing is asked for at once.
_FRESH_S = 60.0
# Most time for a description. Chosen: the router asks all stages, and those that hang cost it a second.
_DESCRIBE_MS = 10_000.0
# Callers whose tokens are kept with their clients. Chosen.
_CALLERS = 256
# Events of all choices that wait for a slow caller. Chosen: a few packets' worth of text.
_WAITING_EVENTS = 64

# The index of a choice, and what it sent: tokens, its answer at last, or the error that ended it.
Piece = tuple[int, Tokens | Answer | Exception]


class Cascade:
    """The router, and the names of its stages. target: the client's. clock: monotonic seconds."""

    def __init__(
        self, client: AsyncClient, target: str, timeout_ms: float, clock: Callable[[], float]
    ) -> None:
        # A client of a token costs as much as the rest of a small request's conversion.
        self._client_of = functools.lru_cache(maxsize=_CALLERS)(client.with_token)
        self._target = target
        self._timeout_ms = timeout_ms
        self._clock = clock
        self._models: Models | None = None
        self._read_at = 0.0
        self._refreshing: asyncio.Task[None] | None = None

    async def describe(self, token: str) -> Description:
        """Return the cascade's description. Raises PreconditionFailed if a stage has a taken name."""
        with self._unnamed():
            described = await self._client_of(token).describe(timeout_ms=min(self._timeout_ms, _DESCRIBE_MS))
        stages = described.stages
        self._models = Models([each.stage for each in stages], [each.context_length for each in stages])
        self._read_at = self._clock()
        return described

    async def models(self, token: str, model: object) -> Models:
        """Return the models; read again if one is missing, and behind the request if they are old."""
        known = self._models
        if known is None or (isinstance(model, str) and model not in known):
            await self.describe(token)
            assert self._models is not None
            return self._models
        is_old = self._clock() - self._read_at > _FRESH_S
        if is_old and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh(token))
        return known

    async def _refresh(self, token: str) -> None:
        # A caller without a right, or a router that is away, leaves the names as they are.
        with suppress(AsdError):
            await self.describe(token)

    async def ask(self, token: str, requests: Sequence[Request]) -> tuple[Answer, ...]:
        """Return the answers to requests, which are under way together. One failure ends them all."""
        client = self._client_of(token)
        with self._unnamed():
            if len(requests) == 1:
                return (await client.ask(requests[0], timeout_ms=self._timeout_ms),)
            tasks = [asyncio.create_task(client.ask(each, timeout_ms=self._timeout_ms)) for each in requests]
            async with _ended(tasks):
                return tuple(await asyncio.gather(*tasks))

    @asynccontextmanager
    async def stream(self, token: str, requests: Sequence[Request]) -> AsyncIterator[asyncio.Queue[Piece]]:
        """Yield a queue of what the requests' streams send. Leaving the block ends the calls."""
        queue: asyncio.Queue[Piece] = asyncio.Queue(_WAITING_EVENTS)
        client = self._client_of(token)
        tasks = [
            asyncio.create_task(self._follow(client, index, each, queue))
            for index, each in enumerate(requests)
        ]
        async with _ended(tasks):
            yield queue

    async def _follow(
        self, client: AsyncClient, index: int, request: Request, queue: asyncio.Queue[Piece]
    ) -> None:
        try:
            with self._unnamed():
                async with aclosing(client.stream(request, timeout_ms=self._timeout_ms)) as events:
                    async for event in events:
                        if isinstance(event, Committed):
                            if event.tokens.text or event.tokens.details:
                                await queue.put((index, event.tokens))
                        elif isinstance(event, Answer):
                            await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))

    @contextmanager
    def _unnamed(self) -> Iterator[None]:
        """Take the router's address out of errors: callers are not to learn it."""
        try:
            yield
        except AsdError as error:
            if isinstance(error, NotFound):
                # A stage is gone: the names are old.
                self._models = None
            target = self._target
            message = error.message.removeprefix(f"cascade at {target}: ")
            message = message.replace(f"cascade at {target}", "the cascade").replace(f" at {target}", "")
            message = message.replace(target, "the router")
            if message == error.message:
                raise
            told = type(error)(message, field=error.field, retry_after_s=error.retry_after_s)
            raise told from error


@asynccontextmanager
async def _ended(tasks: Sequence[asyncio.Task[object]]) -> AsyncIterator[None]:
    """End tasks when the block is left."""
    try:
        yield
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
