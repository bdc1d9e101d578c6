"""Models under a budget: loaded on demand, the least recently used unloaded, those in use left alone."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from asd.errors import NotFound, PreconditionFailed, ResourceExhausted
from services.stage.engines.engine import EngineStatus, ModelState
from services.stage.model_pool import ModelPool

_IDLE = EngineStatus(ModelState.UNLOADED, 1, 8, "f", 0, 0, 0, 0, 0, 0, 0, "")


class _Model:
    """An engine of which only its memory matters."""

    kind = "onnx"

    def __init__(self, memory_mb: int) -> None:
        self.unloads = 0
        self._status = replace(_IDLE, memory_bytes=memory_mb << 20)

    async def load(self) -> None:
        self._status = replace(self._status, state=ModelState.READY)

    async def unload(self) -> None:
        self._status = replace(self._status, state=ModelState.UNLOADED)
        # A real one waits for its thread.
        await asyncio.sleep(0)
        self.unloads += 1

    def status(self) -> EngineStatus:
        return self._status


def _pool(budget_mb: int, **memory_mb: int) -> ModelPool:
    clock = itertools.count(1.0)
    engines = {name: _Model(size) for name, size in memory_mb.items()}
    return ModelPool(engines, next(iter(engines)), budget_mb << 20, lambda: next(clock))  # type: ignore[arg-type]


def _loaded(pool: ModelPool) -> set[str]:
    return {name for name, e in pool.engines.items() if e.status().state is ModelState.READY}


async def test_the_least_recently_used_model_gives_way() -> None:
    pool = _pool(10, a=4, b=4, c=4)
    for name in ("a", "b", "a"):
        async with pool.use(name):
            pass
    loaded = await pool.load("c")
    assert loaded.unloaded == ("b",)
    assert _loaded(pool) == {"a", "c"}
    assert pool.used_bytes() == 8 << 20


async def test_a_model_in_use_is_never_unloaded() -> None:
    pool = _pool(10, a=4, b=4, c=8)
    async with pool.use("a"), pool.use("b"):
        with pytest.raises(ResourceExhausted):
            await pool.load("c")
        with pytest.raises(ResourceExhausted):
            await pool.unload("a")
        assert _loaded(pool) == {"a", "b"}
    loaded = await pool.load("c")
    assert set(loaded.unloaded) == {"a", "b"}


async def test_a_model_larger_than_the_budget_is_refused_with_both_sizes() -> None:
    pool = _pool(3, a=4)
    with pytest.raises(PreconditionFailed, match=r"4 MiB.* 3 MiB.* memory_budget_mb"):
        await pool.load("a")


async def test_no_budget_means_no_bound() -> None:
    pool = _pool(0, a=400, b=400)
    await pool.load("a")
    assert (await pool.load("b")).unloaded == ()
    assert _loaded(pool) == {"a", "b"}


async def test_an_empty_name_is_the_default_and_a_wrong_one_is_refused() -> None:
    pool = _pool(0, a=1, b=1)
    async with pool.use("") as (name, _):
        assert name == "a"
    with pytest.raises(NotFound, match="a, b"):
        await pool.load("z")


async def test_loading_and_unloading_twice_does_nothing() -> None:
    pool = _pool(0, a=5)
    await pool.load("a")
    assert (await pool.load("a")).load_ms == 0
    assert await pool.unload("a") == ("a", 5 << 20)
    assert await pool.unload("a") == ("a", 0)


async def test_a_model_that_is_giving_way_is_loaded_again_for_whoever_asks_meanwhile() -> None:
    pool = _pool(5, a=4, b=4)
    async with pool.use("a"):
        pass

    async def use(name: str) -> None:
        async with pool.use(name) as (_, engine):
            assert engine.status().state is ModelState.READY
            await asyncio.sleep(0)

    outcomes = await asyncio.gather(*(use(name) for name in "babab"), return_exceptions=True)
    # Both do not fit at once: some are refused, none gets a model that is not there.
    assert all(outcome is None or isinstance(outcome, ResourceExhausted) for outcome in outcomes)
    assert outcomes[0] is None
