"""The models of a process under one memory budget. The least recently used model is unloaded first."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from asd.errors import NotFound, PreconditionFailed, QueueFull, ResourceExhausted
from services.stage.engines.engine import ModelState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from services.stage.engines.engine import Engine


@dataclass(frozen=True, slots=True)
class Loaded:
    """Outcome of a load. load_ms is 0 if the model was loaded already."""

    model: str
    memory_bytes: int
    unloaded: tuple[str, ...]
    load_ms: float


@dataclass(slots=True)
class _Entry:
    engine: Engine
    users: int = 0
    used: float = 0.0


class ModelPool:
    """The models of one process, loaded on demand.

    budget_bytes bounds the memory of loaded models; 0: no bound. A model with calls in flight is never
    unloaded. damaged: why a model cannot be served, by name.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        default: str,
        budget_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
        damaged: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._damaged = damaged
        self._entries = {name: _Entry(engine) for name, engine in engines.items()}
        # Calls in flight, by caller.
        self._calls: Counter[int] = Counter()
        self._default = default
        self._budget = budget_bytes
        self._clock = clock
        self._changing = asyncio.Lock()
        self._opened = clock()

    @property
    def budget_bytes(self) -> int:
        """The bound on the memory of loaded models; 0: none."""
        return self._budget

    def others_of(self, caller: int) -> int:
        """Return how many calls of other callers are in flight, on all models.

        caller: id of a caller with a call in flight; 0: unknown. Two unknown callers count as different.
        """
        return self._calls.total() - (self._calls[caller] if caller else 1)

    def idle_ms(self) -> float:
        """Return the time since the last call ended, or since start-up; 0 while calls are in flight."""
        entries = self._entries.values()
        if any(entry.users for entry in entries):
            return 0.0
        return (self._clock() - max(self._opened, *(entry.used for entry in entries))) * 1e3

    @property
    def engines(self) -> dict[str, Engine]:
        """Every configured model, the default one first."""
        names = sorted(self._entries, key=lambda name: name != self._default)
        return {name: self._entries[name].engine for name in names}

    def used_bytes(self) -> int:
        """Memory of the loaded models."""
        return sum(
            status.memory_bytes
            for entry in self._entries.values()
            if (status := entry.engine.status()).state is ModelState.READY
        )

    @asynccontextmanager
    async def use(self, name: str, caller: int = 0) -> AsyncIterator[tuple[str, Engine]]:
        """Hold a model for one call of a caller, loading it first if needed. "" names the default model.

        Raises as `load` does.
        """
        name, entry = self._find(name)
        entry.users += 1
        self._calls[caller] += 1
        try:
            entry.used = self._clock()
            if entry.engine.status().state is not ModelState.READY:
                await self._load(name)
            yield name, entry.engine
        finally:
            entry.users -= 1
            entry.used = self._clock()
            self._calls[caller] -= 1
            if not self._calls[caller]:
                del self._calls[caller]

    async def load(self, name: str) -> Loaded:
        """Load a model, and unload other models if the budget requires it.

        Raises NotFound for an unknown name, PreconditionFailed for a model that is damaged, too large for the
        budget or fails to load. Raises QueueFull if every model that could make room is in use.
        """
        name, entry = self._find(name)
        entry.users += 1
        try:
            return await self._load(name)
        finally:
            entry.users -= 1

    async def unload(self, name: str) -> tuple[str, int]:
        """Unload a model; return its name and the bytes that it freed (0 if it was not loaded).

        Raises NotFound for an unknown name, PreconditionFailed for a damaged model, ResourceExhausted while
        it has calls in flight.
        """
        name, entry = self._find(name)
        async with self._changing:
            status = entry.engine.status()
            if status.state is not ModelState.READY:
                return name, 0
            if entry.users:
                raise ResourceExhausted(f"model {name} has {entry.users} calls under way: try again later")
            await entry.engine.unload()
            return name, status.memory_bytes

    async def _load(self, name: str) -> Loaded:
        async with self._changing:
            entry = self._entries[name]
            status = entry.engine.status()
            if status.state is ModelState.READY:
                return Loaded(name, status.memory_bytes, (), 0.0)
            started = self._clock()
            unloaded = await self._make_room(name, status.memory_bytes)
            await entry.engine.load()
            entry.used = self._clock()
            return Loaded(name, entry.engine.status().memory_bytes, unloaded, (self._clock() - started) * 1e3)

    async def _make_room(self, name: str, needed: int) -> tuple[str, ...]:
        if not self._budget:
            return ()
        if needed > self._budget:
            raise PreconditionFailed(
                f"model {name} needs {needed >> 20} MiB, the budget is {self._budget >> 20} MiB: "
                "raise memory_budget_mb"
            )
        unloaded: list[str] = []
        while self.used_bytes() + needed > self._budget:
            idle = [
                other
                for other, entry in self._entries.items()
                if not entry.users and entry.engine.status().state is ModelState.READY
            ]
            if not idle:
                raise QueueFull(f"model {name} does not fit beside models that are in use: try again later")
            oldest = min(idle, key=lambda other: self._entries[other].used)
            await self._entries[oldest].engine.unload()
            unloaded.append(oldest)
        return tuple(unloaded)

    def _find(self, name: str) -> tuple[str, _Entry]:
        name = name or self._default
        if name in self._damaged:
            raise PreconditionFailed(f"model {name} is not served: {self._damaged[name]}")
        if name not in self._entries:
            raise NotFound(f"no model {name!r} here: choose one of {', '.join(self.engines)}", field="model")
        return name, self._entries[name]
