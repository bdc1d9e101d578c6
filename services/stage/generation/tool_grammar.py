"""The form in which a model writes tool calls, and the grammar of an answer that is one. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asd.values import Message, Role, Tool, ToolCall, ToolChoice
from services.stage.generation.constraint import Grammar, json_rule

if TYPE_CHECKING:
    from asd.values import Tools

# What a template is asked to write, to see how it does.
PROBE_TOOL = Tool(
    "asd_probe", "Finds a word.", '{"type": "object", "properties": {"key": {"type": "string"}}}'
)
PROBE_CALL = (
    Message(Role.USER, "Hello"),
    Message(Role.ASSISTANT, "", (ToolCall("call_asd00", PROBE_TOOL.name, '{"key": "word"}'),)),
    Message(Role.TOOL, "Hi.", tool_call_id="call_asd00"),
)
# Keywords beside which additionalProperties would refuse what they allow.
_OPEN = frozenset({"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "patternProperties"})
_FIELD = "conversation.tools"
_WRITTEN = re.compile(
    r'(?P<before>(?:<tool_call>\s*)?)\{"name": ?"asd_probe", ?"(?P<key>arguments|parameters)": ?'
    r'\{"key": ?"word"\}\}(?P<after>(?:\s*</tool_call>)?)'
)


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call: its object between two texts. key: the name of the arguments.

    between: what stands between two calls.
    """

    before: str
    key: str
    after: str
    between: str


def find_form(rendered: str) -> CallForm | None:
    """Return the form of the call in the text that a template makes of PROBE_CALL; None if it is unknown."""
    found = _WRITTEN.search(rendered)
    if found is None:
        return None
    between = "\n" if found["after"] else "; "
    return CallForm(found["before"], found["key"], found["after"], between)


def call_grammar(form: CallForm, tools: Tools) -> Grammar:
    """Return the grammar of an answer that calls tools as `tools.choice` wants it.

    One or more of the tools, or the named one; at most one call with `single_call`. Each call's arguments
    follow its own schema, whose references are to that schema. Raises InvalidRequest as json_rule does.
    """
    named = tools.choice == ToolChoice.NAMED
    allowed = [each for each in enumerate(tools.tools) if not named or each[1].name == tools.name]
    more = "" if tools.single_call else f" ({json.dumps(form.between)} call)*"
    rules = [f"start: call{more}", f"call: {' | '.join(f'call_{index}' for index, _ in allowed)}"]
    for index, tool in allowed:
        opening = f'{form.before}{{"name": {json.dumps(tool.name)}, "{form.key}": '
        rule = json_rule(_schema(tool), f"{_FIELD}.tools[{index}].parameters")
        rules += [
            f"call_{index}: {json.dumps(opening)} arguments_{index} {json.dumps('}' + form.after)}",
            f"arguments_{index}: {rule}",
        ]
    return Grammar("\n".join(rules), _FIELD)


def _schema(tool: Tool) -> dict[str, object]:
    """Return the schema of a tool's arguments, which are an object.

    Arguments that a plain schema does not name are left out, though JSON Schema would allow them: functions
    take none, and a small model that may invent names need not end.
    """
    schema = json.loads(tool.parameters) if tool.parameters else {}
    required, named = schema.get("required", []), schema.get("properties", {})
    is_plain = (
        not _OPEN & schema.keys() and isinstance(required, list) and all(each in named for each in required)
    )
    closed = {"additionalProperties": False} if is_plain else {}
    return {"type": "object", **closed, **schema}
