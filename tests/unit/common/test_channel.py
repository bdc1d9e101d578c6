"""Unary calls whose caller goes away: they are ended, and waited for to their end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from asd.transport.channel import result_of

if TYPE_CHECKING:
    from collections.abc import Generator


class Core:
    """What cancels a call without its waiter."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def done(self) -> bool:
        return False

    def cancel(self, details: str) -> None:
        self.is_cancelled = True


class Call:
    """A unary call of grpc.aio, as far as its end goes."""

    def __init__(self) -> None:
        self._cython_call = Core()
        self.core = self._cython_call
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[object, None, str]:
        return self.answer.__await__()


async def test_a_call_without_its_caller_is_ended_and_its_waiter_is_not_cancelled():
    call = Call()
    waiting = asyncio.create_task(result_of(call))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert call.core.is_cancelled
    # Else gRPC would never free what the call holds.
    assert not call.answer.cancelled()
    call.answer.set_exception(ConnectionError("ended"))


async def test_an_answer_and_an_error_are_the_caller_s():
    for is_error in (False, True):
        call = Call()
        waiting = asyncio.create_task(result_of(call))
        await asyncio.sleep(0)
        if is_error:
            call.answer.set_exception(ConnectionError("ended"))
            with pytest.raises(ConnectionError):
                await waiting
        else:
            call.answer.set_result("ok")
            assert await waiting == "ok"
        assert not call.core.is_cancelled


async def test_a_call_that_is_cancelled_by_its_channel_is_so_to_its_caller():
    call = Call()
    waiting = asyncio.create_task(result_of(call))
    await asyncio.sleep(0)
    call.answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not call.core.is_cancelled
