"""Calls the router in the name of the gateway's callers."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections import OrderedDict
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from asd.errors import AsdError, NotFound, Unauthenticated
from asd.values import Answer, Committed
from services.gateway.models import Models

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from asd.client import AsyncClient
    from asd.values import Description, Request

logger = logging.getLogger(__name__)

# After this time tokens are tried and the stages' names read again. Chosen: they change when the router is
# configured anew, and a name that is missing is asked for at once.
_FRESH_S = 60.0
# Names read so lately are not read again for one that is missing. Chosen.
_JUST_NOW_S = 1.0
# Most time for a description. Chosen: the router asks all stages, and those that hang cost it a second.
_DESCRIBE_MS = 10_000.0
# Callers whose tokens are kept with their clients. Chosen.
_CALLERS = 256
# Events of all choices that wait for a slow caller. Chosen: a few packets' worth of text.
_WAITING_EVENTS = 64

# The index of a choice, and what it sent: a text, its answer at last, or the error that ended it.
Piece = tuple[int, str | Answer | Exception]


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
        self._models = Models(())
        # -inf: the models are not known, or not any more.
        self._read_at = -math.inf
        # Times at which the router last took a token, the latest last. "": it wants none.
        self._admitted: OrderedDict[str, float] = OrderedDict()
        self._reading: dict[str, asyncio.Task[Description]] = {}

    def admits(self, token: str) -> bool:
        """Return whether the router has taken a token before. One that it took long ago is tried again."""
        known = "" if "" in self._admitted else token
        read_at = self._admitted.get(known)
        is_old = read_at is not None and self._clock() - read_at > _FRESH_S
        if is_old and known not in self._reading:
            self._read(known).add_done_callback(_log_failure)
        return read_at is not None

    async def describe(self, token: str) -> Description:
        """Return the cascade's description; callers of one token at the same time share it.

        Raises PreconditionFailed if a stage has a taken name.
        """
        # A caller that leaves does not end it for the others.
        return await asyncio.shield(self._read(token))

    async def models(self, token: str, model: object) -> Models:
        """Return the models; read again if one is missing, unless they were read just now."""
        age_s = self._clock() - self._read_at
        is_missing = isinstance(model, str) and model not in self._models
        if age_s == math.inf or (is_missing and age_s > _JUST_NOW_S):
            await self.describe(token)
        return self._models

    def _read(self, token: str) -> asyncio.Task[Description]:
        task = self._reading.get(token)
        if task is None:
            self._reading[token] = task = asyncio.create_task(self._describe(token))
            task.add_done_callback(lambda _: self._reading.pop(token))
        return task

    async def _describe(self, token: str) -> Description:
        try:
            with self._unnamed():
                timeout_ms = min(self._timeout_ms, _DESCRIBE_MS)
                described = await self._client_of(token).describe(timeout_ms=timeout_ms)
        except Unauthenticated:
            self._admitted.pop(token, None)
            raise
        stages = described.stages
        self._models = Models([each.stage for each in stages], [each.context_length for each in stages])
        self._read_at = self._clock()
        if not token or "" not in self._admitted:
            self._admitted[token] = self._read_at
            self._admitted.move_to_end(token)
            if len(self._admitted) > _CALLERS:
                self._admitted.popitem(last=False)
        return described

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
        end: Answer | Exception = AsdError("the cascade's stream ended without an answer")
        try:
            with self._unnamed():
                async with aclosing(client.stream(request, timeout_ms=self._timeout_ms)) as events:
                    async for event in events:
                        if isinstance(event, Committed):
                            if event.tokens.text:
                                await queue.put((index, event.tokens.text))
                        elif isinstance(event, Answer):
                            end = event
        except Exception as error:
            end = error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            # gRPC ended the call by itself.
        await queue.put((index, end))

    @contextmanager
    def _unnamed(self) -> Iterator[None]:
        """Take the router's address out of errors: callers are not to learn it."""
        try:
            yield
        except AsdError as error:
            if isinstance(error, NotFound):
                # A stage is gone: the names are old.
                self._read_at = -math.inf
            target = self._target
            message = error.message.removeprefix(f"cascade at {target}: ")
            message = message.replace(f"cascade at {target}", "the cascade").replace(f" at {target}", "")
            message = message.replace(target, "the router")
            if message == error.message:
                raise
            told = type(error)(message, field=error.field, retry_after_s=error.retry_after_s)
            raise told from error


def _is_cancelled() -> bool:
    """Return whether somebody cancels this task. A task in a local variable would outlive its own error."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _log_failure(task: asyncio.Task[Description]) -> None:
    """Say why the names are old, which no caller may hear."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, Unauthenticated):
        logger.warning("the stages' names were not read: %s", error)


@asynccontextmanager
async def _ended(tasks: Sequence[asyncio.Task[object]]) -> AsyncIterator[None]:
    """End tasks when the block is left."""
    try:
        yield
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
