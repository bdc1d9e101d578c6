"""Tools of the APIs: what bodies offer and choose, and the calls in answers. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.values import Tool, ToolCall, ToolChoice, Tools, tools_of
from services.common.tool_calls import ToolCallReader
from services.gateway.request import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.gateway.parameters import Body
    from services.gateway.request import Call

# The APIs' names of the contract's fields, of which the first that fits counts.
TOOL_FIELDS = {
    "conversation.tools.choice": "tool_choice",
    "conversation.tools.name": "tool_choice",
    "conversation.tools": "tools",
}
# Choices under which a stage keeps the tools' schemas.
_KEPT = (ToolChoice.REQUIRED, ToolChoice.NAMED)
_CHOICES = {"auto": ToolChoice.AUTO, "none": ToolChoice.NONE, "required": ToolChoice.REQUIRED}
_ANTHROPIC_CHOICES = {"auto": ToolChoice.AUTO, "none": ToolChoice.NONE, "any": ToolChoice.REQUIRED}


@dataclass(frozen=True)
class ToolForm:
    """How an API writes a tool. kind: its type, which may be left out unless it is nested.

    nested: the key of the object that holds the rest; "": none. schema: the key of the parameters' schema.
    """

    kind: str
    nested: str
    schema: str


@dataclass(frozen=True)
class Choice:
    """Which tool is to be called. name: of the one that must be. is_single: whether one call is the most."""

    kind: ToolChoice = ToolChoice.AUTO
    name: str = ""
    is_single: bool = False


def read_tools(fields: Body, form: ToolForm, choice: Choice) -> Tools | None:
    """Return a body's tools; None if there are none. Raises InvalidRequest, naming the place."""
    value = fields.get("tools")
    if value is not None and not isinstance(value, list):
        raise invalid("tools", "must be a list")
    if not value:
        if choice.kind in _KEPT:
            raise invalid("tool_choice", "needs tools: there are none")
        return None
    tools = [_read_tool(each, f"tools[{index}]", form, choice) for index, each in enumerate(value)]
    return Tools(tuple(tools), choice.kind, choice.name, choice.is_single)


def read_choice(fields: Body, nested: str) -> Choice:
    """Return OpenAI's `tool_choice` and `parallel_tool_calls`. nested: as in ToolForm."""
    is_parallel = fields.flag("parallel_tool_calls", default=True)
    value = fields.get("tool_choice")
    if value is None:
        return Choice(is_single=not is_parallel)
    if isinstance(value, str) and value in _CHOICES:
        return Choice(_CHOICES[value], is_single=not is_parallel)
    within = value.get(nested) if nested and isinstance(value, dict) else value
    name = within.get("name") if isinstance(within, dict) else None
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(name, str):
        raise invalid("tool_choice", "must be auto, none, required, or a function with its name")
    return Choice(ToolChoice.NAMED, name, not is_parallel)


def read_anthropic_choice(fields: Body) -> Choice:
    """Return Anthropic's `tool_choice`."""
    value = fields.get("tool_choice")
    if value is None:
        return Choice()
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or (kind != "tool" and kind not in _ANTHROPIC_CHOICES):
        raise invalid("tool_choice.type", "must be auto, any, tool or none")
    is_single = value.get("disable_parallel_tool_use") or False
    if not isinstance(is_single, bool):
        raise invalid("tool_choice.disable_parallel_tool_use", "must be true or false")
    known(value, "tool_choice", ("type", "disable_parallel_tool_use", "name"))
    if kind != "tool":
        return Choice(_ANTHROPIC_CHOICES[kind], is_single=is_single)
    return Choice(ToolChoice.NAMED, required_text(value, "name", "tool_choice"), is_single)


def read_openai_call(value: object, where: str) -> ToolCall:
    """Return a call of an earlier answer, in the form of chat completions."""
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise invalid(where, "must be a call of a function")
    function = value.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function", "must be an object")
    known(value, where, ("id", "type", "function", "index"))
    known(function, f"{where}.function", ("name", "arguments", "parsed_arguments"))
    return ToolCall(
        required_text(value, "id", where),
        required_text(function, "name", f"{where}.function"),
        read_arguments(function, f"{where}.function"),
    )


def read_arguments(value: Mapping[str, Any], where: str) -> str:
    """Return the arguments of a call as JSON: some clients send an empty text for none."""
    return required_text(value, "arguments", where, may_be_empty=True) or "{}"


def openai_call(call: ToolCall) -> dict[str, Any]:
    """Return a call in the form of chat completions."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class ShownText:
    """The text of a stream without what may become a tool call."""

    def __init__(self, call: Call) -> None:
        tools = tools_of(call.requests[0].input)
        self.has_tools = tools is not None and tools.choice != ToolChoice.NONE
        names = [tool.name for tool in tools.tools] if tools is not None else []
        self._readers = [ToolCallReader(names) for _ in call.requests]

    def take(self, index: int, text: str) -> str:
        """Take a text of a choice, and return what can be shown."""
        return self._readers[index].read(text) if self.has_tools else text

    def rest(self, index: int) -> str:
        """Return what is left to show at the end of a choice."""
        return self._readers[index].end()


def _read_tool(value: object, where: str, form: ToolForm, choice: Choice) -> Tool:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object")
    if value.get("type", None if form.nested else form.kind) != form.kind:
        raise invalid(f"{where}.type", f"must be {form.kind}: the cascade runs no tools of its own")
    about: Any = value
    if form.nested:
        known(value, where, ("type", form.nested))
        where, about = f"{where}.{form.nested}", value.get(form.nested)
        if not isinstance(about, dict):
            raise invalid(where, "must be an object")
    # Stages cache without marks.
    known(about, where, ("type", "name", "description", form.schema, "strict", "cache_control"))
    if about.get("strict") and choice.kind not in _KEPT:
        raise invalid(
            f"{where}.strict", "is kept only where tool_choice makes the model call a tool: leave it out"
        )
    schema = about.get(form.schema)
    if schema is not None and not isinstance(schema, dict):
        raise invalid(f"{where}.{form.schema}", "must be a JSON Schema, an object")
    description = about.get("description")
    if description is not None and not isinstance(description, str):
        raise invalid(f"{where}.description", "must be a text")
    parameters = "" if schema is None else json.dumps(schema, ensure_ascii=False)
    return Tool(required_text(about, "name", where), description or "", parameters)


def required_text(value: Mapping[str, Any], name: str, where: str, *, may_be_empty: bool = False) -> str:
    """Return a text of an object."""
    text = value.get(name)
    if not isinstance(text, str) or not (text or may_be_empty):
        raise invalid(f"{where}.{name}", f"must be a text{'' if may_be_empty else ', and not an empty one'}")
    return text


def known(value: Mapping[str, Any], where: str, names: tuple[str, ...]) -> None:
    """Raise InvalidRequest for a field of an object that is not among the names, unless it is null."""
    for name, each in value.items():
        if name not in names and each is not None:
            raise invalid(f"{where}.{name}", "is not honoured here")
