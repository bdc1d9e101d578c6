"""Which model of a stage answers a type of task: the adapter for it, where there is one. Pure."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from asd.errors import AsdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

logger = logging.getLogger(__name__)

# For how long what a stage said of its models is taken as it is. Chosen: adapters come with a new pod.
FRESH_SECONDS = 60.0
# For how long a stage that did not answer is not asked again. Chosen.
RETRY_SECONDS = 1.0
# Share of a call's time that may pass until the stage says which adapters it has. Chosen: in the rest it can
# answer without.
_SHARE_OF_TIME = 0.5


class Adapters:
    """The adapters of one stage's model. Close it when done.

    model: what the stage is asked for without a task; "": its default model. tasks: types of task that it has
    adapters for; None: the stage is asked, when a task is first named. list_models: returns the names of the
    stage's models, the default one first, adapters as MODEL/TASK; it raises AsdError. clock: monotonic
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
        # Until when the stage is taken to lack an adapter, by task.
        self._lacking: dict[str, float] = {}

    async def model_for(self, task: str, timeout_ms: float) -> str:
        """Return the model to ask for a task; without an adapter for it, and for "", the one without.

        timeout_ms: the time that is left for this and the call. Where half of it does not do for the stage to
        say what it has, it is asked for the model without.
        """
        if not task:
            return self._model
        if self._is_asked and self._clock() >= self._next_time:
            if self._update is None or self._update.done():
                self._update = asyncio.create_task(self._ask())
            if not self._names:
                # It may well have the adapter. Where it has some, news can wait.
                await asyncio.wait([self._update], timeout=timeout_ms / 1000.0 * _SHARE_OF_TIME)
        if self._clock() < self._lacking.get(task, -math.inf):
            return self._model
        return self._names.get(task, self._model)

    def lacks(self, task: str, name: str) -> None:
        """The stage says that it has no such adapter: for a while, ask its model without.

        name: what it was asked for. What it said of its models meanwhile may not have that any longer.
        """
        logger.warning("%s is not there: tasks of that type are answered without", name)
        self._lacking[task] = self._clock() + FRESH_SECONDS

    async def close(self) -> None:
        """Stop asking."""
        if self._update is not None:
            self._update.cancel()
            await asyncio.wait([self._update])

    async def _ask(self) -> None:
        try:
            models = await self._list_models()
        except AsdError:
            # The call that waits for this will say what is wrong.
            self._next_time = self._clock() + RETRY_SECONDS
            return
        self._next_time = self._clock() + FRESH_SECONDS
        self._names = tasks_of(self._model, models)


def tasks_of(model: str, models: Sequence[str]) -> dict[str, str]:
    """Return names of adapters by task. model: whose; "": of the first. models: every name of a stage."""
    base = f"{model or next(iter(models), '')}/"
    return {name.removeprefix(base): name for name in models if name.startswith(base)}
