"""Messages of the APIs as turns of a conversation. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import Message, Role
from services.gateway.request import invalid

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

# The contract's bound on turns.
_MOST_TURNS = 4096
# What SDKs repeat of a part of an earlier answer.
_IN_PARTS_OF_ANSWERS = {"annotations", "citations", "logprobs"}
# What SDKs repeat of an earlier answer, if it has a value that says nothing.
_EMPTY_IN_ANSWERS = {"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"}


def read_turns(
    value: object, where: str, roles: Mapping[str, Role], inert: Collection[str] = ()
) -> list[Message]:
    """Return the turns of a list of messages, of which the last is the user's.

    where: the parameter's name. roles: those that are allowed. inert: fields of a message that have no
    effect. Raises InvalidRequest, naming the place.
    """
    if not isinstance(value, list):
        raise invalid(where, "must be a list of messages")
    if not 1 <= len(value) <= _MOST_TURNS:
        raise invalid(where, f"must have 1 to {_MOST_TURNS} messages, not {len(value)}")
    turns = [_read_turn(each, f"{where}[{index}]", roles, inert) for index, each in enumerate(value)]
    if turns[-1].role is not Role.USER:
        raise invalid(f"{where}[{len(turns) - 1}].role", "the last message must be the user's")
    return turns


def read_text(value: object, where: str, kinds: Sequence[str] = ("text",), *, is_answer: bool = False) -> str:
    """Return a content's text: a string, or parts of text, which are joined by line breaks.

    kinds: the allowed types of parts. is_answer: whether it is an earlier answer. Raises InvalidRequest,
    naming the place.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, list):
        parts = enumerate(value)
        text = "\n".join(_read_part(each, f"{where}[{index}]", kinds, is_answer) for index, each in parts)
    else:
        raise invalid(where, "must be a text, or a list of parts of text")
    if not text:
        raise invalid(where, "is empty: send at least one character")
    return text


def _read_turn(value: object, where: str, roles: Mapping[str, Role], inert: Collection[str]) -> Message:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object with role and content")
    role = value.get("role")
    found = roles.get(role) if isinstance(role, str) else None
    if found is None:
        wanted = f"must be one of {', '.join(roles)}"
        is_tool = role in ("tool", "function")
        raise invalid(f"{where}.role", f"{wanted}{': tools are not supported yet' if is_tool else ''}")
    for name, each in value.items():
        if name in {"role", "content"} or name in inert:
            continue
        is_repeated = found is Role.ASSISTANT and name in _EMPTY_IN_ANSWERS
        if (is_repeated and each in (None, [], "")) or (
            each is None and name in {"name", *_EMPTY_IN_ANSWERS}
        ):
            continue
        raise invalid(f"{where}.{name}", "is not honoured here: a message has a role and a content")
    is_answer = found is Role.ASSISTANT
    kinds = ("text", "output_text" if is_answer else "input_text")
    return Message(found, read_text(value.get("content"), f"{where}.content", kinds, is_answer=is_answer))


def _read_part(value: object, where: str, kinds: Sequence[str], is_answer: bool) -> str:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object")
    if value.get("type") not in kinds:
        raise invalid(f"{where}.type", f"must be {' or '.join(kinds)}: the models read text alone")
    text: Any = value.get("text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text", "must be a text")
    for name, each in value.items():
        is_repeated = name in _IN_PARTS_OF_ANSWERS and (is_answer or each == [])
        # Stages cache without marks.
        if name not in {"type", "text", "cache_control"} and each is not None and not is_repeated:
            raise invalid(f"{where}.{name}", "is not honoured here: a part has a type and a text")
    return text
