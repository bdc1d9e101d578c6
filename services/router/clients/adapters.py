"""Chooses a stage's model for a type of task: its adapter, if there is one. No gRPC, no protobuf."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from asd.errors import AsdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

logger = logging.getLogger(__name__)

# How long a stage's list of models is kept. Chosen: adapters arrive with a new pod.
FRESH_SECONDS = 60.0
# Pause before a stage that did not answer is asked again. Chosen.
RETRY_SECONDS = 1.0
# Share of a call's time that may pass until the stage has listed its adapters. Chosen: in the rest, its model
# can answer without one.
_SHARE_OF_TIME = 0.5


class Adapters:
    """The adapters of one stage's model. Close it when done.

    model: answers requests without a task; "": the stage's default model. tasks: types of task that it has
    adapters for; None: the stage is asked when a request first names a task. list_models: returns the names
    of the stage's models, the default one first, adapters as MODEL/TASK; it raises AsdError. clock: monotonic
    seconds.
    """

    def __init__(
        self,
        model: str,
        tasks: Collection[str] | None,
        list_models: Callable[[], Awaitable[Sequence[str]]],
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._list_models = list_models
        self._clock = clock
        self._is_asked = tasks is None
        self._names = {task: f"{model}/{task}" for task in tasks or ()}
        self._next_time = clock()
        self._update: asyncio.Task[None] | None = None
        # Time until which the stage is assumed to lack an adapter, by task.
        self._lacking: dict[str, float] = {}

    async def model_for(self, task: str, timeout_ms: float) -> str:
        """Return the adapter for a task; the plain model if there is none, and for "".

        timeout_ms: for this and the call. If the stage does not list its adapters in half of that, this
        returns the plain model.
        """
        if not task:
            return self._model
        if self._is_asked and self._clock() >= self._next_time:
            if self._update is None or self._update.done():
                self._update = asyncio.create_task(self._ask())
            if not self._names:
                # No adapter is known yet, so wait. An update of a known list can wait.
                await asyncio.wait([self._update], timeout=timeout_ms / 1000.0 * _SHARE_OF_TIME)
        if self._clock() < self._lacking.get(task, -math.inf):
            return self._model
        return self._names.get(task, self._model)

    def lacks(self, task: str, name: str) -> None:
        """The stage has no such adapter: use the plain model for a while.

        name: the adapter that was called. A newer list of models may no longer have it.
        """
        logger.warning("%s is not there: tasks of that type are answered without", name)
        self._lacking[task] = self._clock() + FRESH_SECONDS

    async def close(self) -> None:
        """Cancel an update that is in flight."""
        if self._update is not None:
            self._update.cancel()
            await asyncio.wait([self._update])

    async def _ask(self) -> None:
        try:
            models = await self._list_models()
        except AsdError:
            # The call that waits for this will report the error.
            self._next_time = self._clock() + RETRY_SECONDS
            return
        self._next_time = self._clock() + FRESH_SECONDS
        self._names = tasks_of(self._model, models)


def tasks_of(model: str, models: Sequence[str]) -> dict[str, str]:
    """Return adapters by task. model: their model; "": the first. models: all models of a stage."""
    base = f"{model or next(iter(models), '')}/"
    return {name.removeprefix(base): name for name in models if name.startswith(base)}
