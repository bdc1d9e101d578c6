"""Messages of the APIs as turns of a conversation. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import Message, Role
from services.gateway.request import invalid
from services.gateway.tools import read_openai_call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from asd.values import ToolCall

# The contract's bound on turns.
_MOST_TURNS = 4096
# What SDKs repeat of a part of an earlier answer.
_IN_PARTS_OF_ANSWERS = {"annotations", "citations", "logprobs", "parsed"}
# What SDKs repeat of an earlier answer, if it has a value that says nothing.
_EMPTY_IN_ANSWERS = {"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"}


def read_turns(
    value: object, where: str, read_turn: Callable[[object, str], Sequence[Message]]
) -> list[Message]:
    """Return the turns of a list of messages, of which the last is the user's or a tool's.

    where: the parameter's name. read_turn: reads one, at a place. Raises InvalidRequest, naming the place.
    """
    if not isinstance(value, list):
        raise invalid(where, "must be a list of messages")
    if not 1 <= len(value) <= _MOST_TURNS:
        raise invalid(where, f"must have 1 to {_MOST_TURNS} messages, not {len(value)}")
    turns = [turn for index, each in enumerate(value) for turn in read_turn(each, f"{where}[{index}]")]
    if turns[-1].role not in (Role.USER, Role.TOOL):
        raise invalid(f"{where}[{len(value) - 1}].role", "the last message must be the user's, or a tool's")
    return turns


def read_text(
    value: object,
    where: str,
    kinds: Sequence[str] = ("text",),
    *,
    is_answer: bool = False,
    may_be_empty: bool = False,
) -> str:
    """Return a content's text: a string, or parts of text, which are joined by line breaks.

    kinds: the allowed types of parts. is_answer: whether it is an earlier answer. Raises InvalidRequest,
    naming the place.
    """
    if may_be_empty and value is None:
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list):
        parts = enumerate(value)
        text = "\n".join(_read_part(each, f"{where}[{index}]", kinds, is_answer) for index, each in parts)
    else:
        raise invalid(where, "must be a text, or a list of parts of text")
    # A model may have written nothing.
    if not (text or is_answer or may_be_empty):
        raise invalid(where, "is empty: send at least one character")
    return text


def read_message(
    value: object, where: str, roles: Mapping[str, Role], inert: Collection[str] = ()
) -> Message:
    """Return a message of OpenAI's form. roles: those that are allowed. inert: fields without effect."""
    if not isinstance(value, dict):
        raise invalid(where, "must be an object with role and content")
    role = value.get("role")
    found = roles.get(role) if isinstance(role, str) else None
    if found is None:
        raise invalid(f"{where}.role", f"must be one of {', '.join(roles)}")
    is_answer, is_result = found is Role.ASSISTANT, found is Role.TOOL
    calls = _read_calls(value.get("tool_calls"), f"{where}.tool_calls") if is_answer else ()
    call_id = value.get("tool_call_id") if is_result else None
    if is_result and (not isinstance(call_id, str) or not call_id):
        raise invalid(f"{where}.tool_call_id", "must be the id of the call that this is the result of")
    # A result needs no name: its call has it.
    known = {"role", "content", *inert, *(("tool_call_id", "name") if is_result else ())}
    if is_answer:
        # OpenAI's SDK adds what it made of the content.
        known.add("parsed")
    for name, each in value.items():
        if name in known or (name == "tool_calls" and calls):
            continue
        is_repeated = is_answer and name in _EMPTY_IN_ANSWERS
        if (is_repeated and each in (None, [], "")) or (
            each is None and name in {"name", *_EMPTY_IN_ANSWERS}
        ):
            continue
        raise invalid(f"{where}.{name}", "is not honoured here: a message has a role and a content")
    content = read_text(
        value.get("content"),
        f"{where}.content",
        ("text", "output_text" if is_answer else "input_text"),
        is_answer=is_answer,
        may_be_empty=bool(calls) or is_result,
    )
    return Message(found, content, calls, call_id or "")


def _read_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise invalid(where, "must be a list of calls")
    return tuple(read_openai_call(each, f"{where}[{index}]") for index, each in enumerate(value))


def _read_part(value: object, where: str, kinds: Sequence[str], is_answer: bool) -> str:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object")
    if value.get("type") not in kinds:
        raise invalid(f"{where}.type", "must be text: the models read text alone")
    text: Any = value.get("text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text", "must be a text")
    for name, each in value.items():
        is_repeated = name in _IN_PARTS_OF_ANSWERS and (is_answer or each == [])
        # Stages cache without marks.
        if name not in {"type", "text", "cache_control"} and each is not None and not is_repeated:
            raise invalid(f"{where}.{name}", "is not honoured here: a part has a type and a text")
    return text
