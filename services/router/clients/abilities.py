"""What a stage's models can do beyond plain answers, by their Status. No gRPC, no protobuf."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asd.errors import AsdError, ConversationRefused, ModelRefusal
from asd.values import Role, ToolChoice, tools_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from asd.values import Request

# How long a stage's answer is kept, as of its adapters, and the pause before it is asked again after none.
FRESH_SECONDS = 60.0
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ModelAbilities:
    """What one model can do; see the contract's ModelStatus."""

    constrains: bool = False
    takes_tools: bool = False
    most_top_logprobs: int = 0


class Abilities:
    """The abilities of a stage's models, asked for when a request first needs one.

    ask: returns them by model, the default one first; it raises AsdError. clock:
    monotonic seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Mapping[str, ModelAbilities]]],
        clock: Callable[[], float],
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._known: Mapping[str, ModelAbilities] = {}
        self._next_time = clock()
        self._asking = asyncio.Lock()

    async def check(self, request: Request, model: str) -> None:
        """Raise ModelRefusal for a request that a model is known not to serve. model: "": the default one.

        A stage that does not say what it can do is called: it refuses by itself.
        """
        if not _needs_abilities(request):
            return
        async with self._asking:
            if self._clock() >= self._next_time:
                try:
                    self._known = await self._ask()
                    self._next_time = self._clock() + FRESH_SECONDS
                except AsdError:
                    # The call that follows will report the error.
                    self._next_time = self._clock() + RETRY_SECONDS
        found = self._known.get(model or next(iter(self._known), ""))
        if found is not None:
            self._refuse(request, found)

    def _refuse(self, request: Request, able: ModelAbilities) -> None:
        sampling = request.sampling
        if sampling.constraint is not None and not able.constrains:
            raise ModelRefusal("the model keeps no constraints", field="sampling.constraint")
        if sampling.top_logprobs is not None and sampling.top_logprobs > able.most_top_logprobs:
            raise ModelRefusal(
                f"the model reports the {able.most_top_logprobs} likeliest tokens at most, not "
                f"{sampling.top_logprobs}",
                field="sampling.top_logprobs",
            )
        if _has_tools(request) and not able.takes_tools:
            raise ConversationRefused("the model's chat template knows no tools", field="conversation.tools")


def _needs_abilities(request: Request) -> bool:
    sampling = request.sampling
    return sampling.constraint is not None or sampling.top_logprobs is not None or _has_tools(request)


def _has_tools(request: Request) -> bool:
    turns, tools = request.input, tools_of(request.input)
    if tools is not None and tools.choice != ToolChoice.NONE:
        return True
    return not isinstance(turns, str) and any(turn.tool_calls or turn.role == Role.TOOL for turn in turns)
