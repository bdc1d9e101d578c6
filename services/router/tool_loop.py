"""Tool calls of answers, and the stage that goes on with their results. Pure.

The id of a call carries a mark of the stage that asked for it. So the router keeps no state, and any of its
replicas can go on.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from asd.values import Role, ToolCall, ToolChoice, tools_of
from services.common.tool_calls import read_tool_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asd.values import Message
    from services.router.domain import RoutedAnswer, RoutedRequest

_PREFIX = "call_"
# Hexadecimal digits of the mark. Chosen: two stages of a cascade have the same one once in 2**32.
_MARK = 8


def held(request: RoutedRequest, stages: Sequence[str]) -> RoutedRequest:
    """Return a request that goes on from a tool's result as one to the stage that asked for it.

    It stays as it is if it names stages, allows a switch, or if the last calls are not of one stage of the
    cascade. stages: their names.
    """
    turns = request.input
    if isinstance(turns, str) or not _goes_on(turns):
        return request
    if request.allow_switch or request.stage or request.chain:
        return request
    calls: tuple[ToolCall, ...] = next((turn.tool_calls for turn in reversed(turns) if turn.tool_calls), ())
    by_mark = {_mark(name): name for name in stages}
    found = {by_mark.get(call.id.removeprefix(_PREFIX)[:_MARK]) for call in calls}
    stage = found.pop() if len(found) == 1 else None
    return replace(request, stage=stage, is_held=True) if stage else request


def _goes_on(turns: Sequence[Message]) -> bool:
    """Return whether a tool's result follows the model's last message. Text of the user may be beside it."""
    later = itertools.takewhile(lambda turn: turn.role != Role.ASSISTANT, reversed(turns))
    return any(turn.role == Role.TOOL for turn in later)


def with_calls(outcome: RoutedAnswer, request: RoutedRequest) -> RoutedAnswer:
    """Return an outcome with the tool calls in its text: the first alone if the request wants one at most."""
    tools = tools_of(request.input)
    if tools is None or tools.choice == ToolChoice.NONE:
        return outcome
    content, written = read_tool_calls(outcome.answer.result.text, [tool.name for tool in tools.tools])
    if not written:
        return outcome
    prefix = _PREFIX + _mark(outcome.answer.stage.name)
    calls = [ToolCall(prefix + secrets.token_hex(8), each.name, each.arguments) for each in written]
    return replace(outcome, tool_calls=tuple(calls[:1] if tools.single_call else calls), content=content)


def _mark(stage: str) -> str:
    return hashlib.sha256(stage.encode()).hexdigest()[:_MARK]
