"""Conversations in the form that chat templates take: Hugging Face's dictionaries. Pure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from asd.values import Role, ToolChoice, tools_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asd.values import Message, Tool

    # Marks a text by its origin.
    Mark = Callable[[str], str]

# Choices that leave the model no other answer than a call.
MUST_CALL = frozenset({ToolChoice.REQUIRED, ToolChoice.NAMED})


def offered(turns: Sequence[Message]) -> tuple[Tool, ...]:
    """Return the tools that the model is told of."""
    tools = tools_of(turns)
    return () if tools is None or tools.choice == ToolChoice.NONE else tools.tools


def has_tools(turns: Sequence[Message]) -> bool:
    """Return whether a conversation offers tools, or holds calls or their results."""
    return bool(offered(turns)) or any(turn.tool_calls or turn.role == Role.TOOL for turn in turns)


def characters(turns: Sequence[Message]) -> int:
    """Return the length of what the caller wrote."""
    calls = [call for turn in turns for call in turn.tool_calls]
    return (
        sum(len(turn.content) for turn in turns)
        + sum(len(call.id) + len(call.name) + len(call.arguments) for call in calls)
        + sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in offered(turns))
    )


def message_values(turns: Sequence[Message], own: Mark, given: Mark) -> list[dict[str, Any]]:
    """Return the messages. own, given: mark the template's words, and the caller's."""
    names = {call.id: call.name for turn in turns for call in turn.tool_calls}
    messages = []
    for turn in turns:
        message: dict[str, Any] = {"role": own(str(turn.role)), "content": given(turn.content)}
        if turn.tool_calls:
            message["tool_calls"] = [
                {
                    "type": own("function"),
                    "id": given(call.id),
                    "function": {
                        "name": given(call.name),
                        "arguments": _marked(json.loads(call.arguments), given),
                    },
                }
                for call in turn.tool_calls
            ]
        if turn.role == Role.TOOL:
            message["tool_call_id"] = given(turn.tool_call_id)
            message["name"] = given(names.get(turn.tool_call_id, ""))
        messages.append(message)
    return messages


def tool_values(tools: Sequence[Tool], own: Mark, given: Mark) -> list[dict[str, Any]] | None:
    """Return the tools; None if there are none."""
    nothing = '{"type": "object", "properties": {}}'
    return [
        {
            "type": own("function"),
            "function": {
                "name": given(tool.name),
                "description": given(tool.description),
                "parameters": _marked(json.loads(tool.parameters or nothing), given),
            },
        }
        for tool in tools
    ] or None


def _marked(value: Any, given: Mark) -> Any:
    """Return a JSON value with its texts marked, names included."""
    if isinstance(value, str):
        return given(value)
    if isinstance(value, list):
        return [_marked(each, given) for each in value]
    if isinstance(value, dict):
        return {given(name): _marked(each, given) for name, each in value.items()}
    return value
