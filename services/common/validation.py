"""Checks of request fields, for the router and the stages.

Each takes a received message and raises InvalidRequest with the path of the field at fault. Numbers that are
not finite are refused, so no NaN gets past this module.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Protocol

from asd import convert
from asd.errors import InvalidRequest
from asd.v1 import common_pb2
from services.common.constraints import (
    TOOL_NAME,
    check_arguments,
    check_choice,
    check_parameters,
    check_regex,
    check_schema,
)
from services.common.wire import MAX_ENTRIES

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper as EnumTypeWrapper

MAX_SESSION_ID_BYTES = 256
MAX_REQUEST_BYTES = convert.MAX_REQUEST_BYTES
MAX_STOP_SEQUENCES = MAX_ENTRIES["asd.v1.Sampling.stop"]
# Names of adapters, as in the stages' settings: they are parts of models' names.
TASK = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
MAX_CALL_ID_BYTES = 256
# Chosen: above any sensible value, and low enough that sums and products of a few stay exact and finite.
MAX_COST_UNITS = 1e9
# One day.
MAX_LATENCY_MS = 86_400_000.0

_NAMES = 'it has 1 to 64 characters of a-z, A-Z, 0-9, "_" and "-"'
_ROLES = frozenset(common_pb2.Role.values())
_TOOL_CHOICES = frozenset(common_pb2.ToolChoice.values())
_PREFERENCES = frozenset(common_pb2.Preference.values())
_ACCEPTANCE_MODES = frozenset(common_pb2.AcceptanceMode.values())
_FINISH_REASONS = frozenset(common_pb2.FinishReason.values())


class HasInput(Protocol):
    """A message with the oneof `input` of `prompt` and `conversation`."""

    @property
    def prompt(self) -> str:
        """A single user message."""

    @property
    def conversation(self) -> common_pb2.Conversation:
        """Turns, oldest first."""


def check_input(message: HasInput, path: str = "") -> None:
    """Check that there is a prompt or a conversation, with text, and the user's or a tool's message last."""
    kind = message.WhichOneof("input")  # type: ignore[attr-defined]
    if kind is None:
        raise InvalidRequest("set prompt or conversation", field=f"{path}prompt")
    if kind == "prompt":
        if not message.prompt:
            raise InvalidRequest("prompt is empty: send at least one byte of text", field=f"{path}prompt")
        return
    turns = message.conversation.messages
    if not turns:
        raise InvalidRequest(
            "conversation has no messages: send at least the user's", field=f"{path}conversation.messages"
        )
    called: set[str] = set()
    for index, turn in enumerate(turns):
        where = f"{path}conversation.messages[{index}]"
        check_enum(common_pb2.Role, _ROLES, turn.role, f"{where}.role")
        # A tool may return nothing, and a model may have written nothing.
        may_be_empty = turn.role in {common_pb2.ROLE_TOOL, common_pb2.ROLE_ASSISTANT}
        if not (turn.content or may_be_empty):
            raise InvalidRequest("content is empty: send at least one byte of text", field=f"{where}.content")
        if turn.tool_calls or turn.tool_call_id or turn.role == common_pb2.ROLE_TOOL:
            _check_calls(turn, called, where)
    if turns[-1].role not in {common_pb2.ROLE_USER, common_pb2.ROLE_TOOL}:
        raise InvalidRequest(
            "the last message must be the user's (ROLE_USER), or a tool's (ROLE_TOOL)",
            field=f"{path}conversation.messages[{len(turns) - 1}].role",
        )
    if message.conversation.HasField("tools"):
        check_tools(message.conversation.tools, f"{path}conversation.tools")


def _check_calls(turn: common_pb2.Message, called: set[str], where: str) -> None:
    """Check a message's tool calls, and the call that it answers. called: ids so far; new ones are added."""
    if turn.tool_calls and turn.role != common_pb2.ROLE_ASSISTANT:
        raise InvalidRequest(
            "only the assistant's messages (ROLE_ASSISTANT) have tool calls", field=f"{where}.tool_calls"
        )
    most = MAX_ENTRIES["asd.v1.Message.tool_calls"]
    if len(turn.tool_calls) > most:
        raise InvalidRequest(
            f"a message has at most {most} tool calls, not {len(turn.tool_calls)}",
            field=f"{where}.tool_calls",
        )
    for index, call in enumerate(turn.tool_calls):
        place = f"{where}.tool_calls[{index}]"
        if not 1 <= len(call.id.encode()) <= MAX_CALL_ID_BYTES:
            raise InvalidRequest(f"a call's id has 1 to {MAX_CALL_ID_BYTES} bytes", field=f"{place}.id")
        if call.id in called:
            raise InvalidRequest(f"an earlier call has the id {call.id!r} already", field=f"{place}.id")
        if not TOOL_NAME.fullmatch(call.name):
            raise InvalidRequest(f"{call.name!r} is not a tool's name: {_NAMES}", field=f"{place}.name")
        check_arguments(call.arguments, f"{place}.arguments")
        called.add(call.id)
    if turn.role == common_pb2.ROLE_TOOL:
        if turn.tool_call_id not in called:
            raise InvalidRequest(
                f"no earlier message calls a tool with the id {turn.tool_call_id!r}: send the assistant's "
                "message with its tool_calls before the result",
                field=f"{where}.tool_call_id",
            )
    elif turn.tool_call_id:
        raise InvalidRequest(
            "only a tool's message (ROLE_TOOL) answers a call", field=f"{where}.tool_call_id"
        )


def check_tools(tools: common_pb2.Tools, path: str = "tools") -> None:
    """Check names and parameters of tools, and the choice among them."""
    most = MAX_ENTRIES["asd.v1.Tools.tools"]
    if not 1 <= len(tools.tools) <= most:
        raise InvalidRequest(f"there are 1 to {most} tools, not {len(tools.tools)}", field=f"{path}.tools")
    names: set[str] = set()
    for index, tool in enumerate(tools.tools):
        where = f"{path}.tools[{index}]"
        if not TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{tool.name!r} is not a tool's name: {_NAMES}", field=f"{where}.name")
        if tool.name in names:
            raise InvalidRequest(f"two tools have the name {tool.name}", field=f"{where}.name")
        names.add(tool.name)
        if tool.parameters:
            check_parameters(tool.parameters, f"{where}.parameters")
    if tools.choice:
        check_enum(common_pb2.ToolChoice, _TOOL_CHOICES, tools.choice, f"{path}.choice")
    if tools.choice == common_pb2.TOOL_CHOICE_NAMED and tools.name not in names:
        raise InvalidRequest(
            f"there is no tool {tools.name!r} to call: the tools are {', '.join(sorted(names))}",
            field=f"{path}.name",
        )
    if tools.name and tools.choice != common_pb2.TOOL_CHOICE_NAMED:
        raise InvalidRequest("name belongs to TOOL_CHOICE_NAMED", field=f"{path}.name")


def check_call_is_free(request: Any, path: str = "") -> None:
    """Check that a request whose answer may be a tool call has no constraint, which a call would break."""
    has_tools = request.WhichOneof("input") == "conversation" and request.conversation.HasField("tools")
    may_call = has_tools and request.conversation.tools.choice != common_pb2.TOOL_CHOICE_NONE
    if may_call and request.sampling.HasField("constraint"):
        raise InvalidRequest(
            "a tool call would not keep the constraint: leave the tools or the constraint out, or set "
            "TOOL_CHOICE_NONE",
            field=f"{path}sampling.constraint",
        )


def check_constraint(constraint: common_pb2.Constraint, path: str) -> None:
    """Check the form of a constraint. Call it only if the message is set."""
    match constraint.WhichOneof("rule"):
        case "json_schema":
            check_schema(constraint.json_schema, f"{path}.json_schema")
        case "regex":
            check_regex(constraint.regex, f"{path}.regex")
        case "choice":
            check_choice(constraint.choice.texts, f"{path}.choice.texts")
        case _:
            raise InvalidRequest("set json_schema, regex or choice", field=path)


def check_sampling(sampling: common_pb2.Sampling, path: str = "sampling") -> None:
    """Check the ranges of sampling. An empty message is valid."""
    if sampling.HasField("max_new_tokens") and sampling.max_new_tokens < 1:
        raise InvalidRequest("max_new_tokens must be 1 or more", field=f"{path}.max_new_tokens")
    if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature must be 0 to {MAX_TEMPERATURE:g}, not {sampling.temperature:g}",
            field=f"{path}.temperature",
        )
    if sampling.HasField("top_p") and not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(
            f"top_p must be above 0 and at most 1, not {sampling.top_p:g}", field=f"{path}.top_p"
        )
    if len(sampling.stop) > MAX_STOP_SEQUENCES:
        raise InvalidRequest(
            f"at most {MAX_STOP_SEQUENCES} stop sequences, not {len(sampling.stop)}", field=f"{path}.stop"
        )
    for index, sequence in enumerate(sampling.stop):
        if not sequence:
            raise InvalidRequest("a stop sequence is empty", field=f"{path}.stop[{index}]")
    if sampling.HasField("constraint"):
        check_constraint(sampling.constraint, f"{path}.constraint")
    if sampling.top_logprobs > MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}, not {sampling.top_logprobs}",
            field=f"{path}.top_logprobs",
        )


def check_objective(objective: common_pb2.Objective, path: str = "objective") -> None:
    """Check the ranges of an objective, and that lambda and preference are not both set. Empty is valid."""
    quality_value = getattr(objective, "lambda")
    if objective.HasField("lambda"):
        if not 0.0 <= quality_value <= MAX_COST_UNITS:
            raise InvalidRequest(
                f"lambda must be 0 to {MAX_COST_UNITS:g} cost units, not {quality_value:g}",
                field=f"{path}.lambda",
            )
        if objective.HasField("preference"):
            raise InvalidRequest(
                "lambda and preference exclude each other: set one of them", field=f"{path}.preference"
            )
    if objective.HasField("max_cost"):
        _check_budget(objective.max_cost, MAX_COST_UNITS, "max_cost", path)
    if objective.HasField("max_latency_ms"):
        _check_budget(objective.max_latency_ms, MAX_LATENCY_MS, "max_latency_ms", path)
    if objective.HasField("min_quality") and not 0.0 < objective.min_quality <= 1.0:
        raise InvalidRequest(
            f"min_quality must be above 0 and at most 1, not {objective.min_quality:g}",
            field=f"{path}.min_quality",
        )
    if objective.HasField("preference"):
        check_enum(common_pb2.Preference, _PREFERENCES, objective.preference, f"{path}.preference")


def check_acceptance(acceptance: common_pb2.Acceptance, path: str = "acceptance") -> None:
    """Check the rule of acceptance. Call it only if the message is set: absent means EXACT."""
    check_enum(common_pb2.AcceptanceMode, _ACCEPTANCE_MODES, acceptance.mode, f"{path}.mode")
    has_threshold = acceptance.HasField("threshold")
    if acceptance.mode == common_pb2.ACCEPTANCE_MODE_EXACT:
        if has_threshold:
            raise InvalidRequest("threshold is for ACCEPTANCE_MODE_TOLERANT only", field=f"{path}.threshold")
    elif not has_threshold or not 0.0 < acceptance.threshold <= 1.0:
        raise InvalidRequest(
            "ACCEPTANCE_MODE_TOLERANT needs a threshold above 0 and at most 1", field=f"{path}.threshold"
        )


def check_session_id(session_id: str, path: str = "session_id") -> None:
    """Check the length of a session id. Empty is valid."""
    # A string of 64 characters or fewer cannot be longer than 256 bytes of UTF-8.
    if len(session_id) > MAX_SESSION_ID_BYTES // 4:
        size = len(session_id.encode())
        if size > MAX_SESSION_ID_BYTES:
            raise InvalidRequest(f"session_id may have {MAX_SESSION_ID_BYTES} bytes, not {size}", field=path)


def check_task(task: str, path: str = "task") -> None:
    """Check the name of a type of task. Empty is valid."""
    if task and not TASK.fullmatch(task):
        raise InvalidRequest(
            "task may have 64 characters of a-z, 0-9, '_', '.' and '-', and must begin with a letter or a "
            "digit: name it as the stages' adapters are named, such as math, or leave it out",
            field=path,
        )


def check_draft(draft: common_pb2.Draft, path: str = "draft") -> None:
    """Check that a draft has text or ids, a fingerprint if it has ids, and a finish reason."""
    check_finish_reason(draft.finish_reason, f"{path}.finish_reason")
    if draft.token_ids and not draft.tokenizer_fingerprint:
        raise InvalidRequest(
            "tokenizer_fingerprint is required with token_ids", field=f"{path}.tokenizer_fingerprint"
        )


def check_finish_reason(number: int, path: str) -> None:
    """Check that a number is a known finish reason."""
    check_enum(common_pb2.FinishReason, _FINISH_REASONS, number, path)


def check_enum(enum: EnumTypeWrapper[Any], known: frozenset[int], number: int, field: str) -> None:
    """Check that an enum's number is known to this version, and not the unspecified zero."""
    if number == 0 or number not in known:
        allowed = ", ".join(name for name, value in enum.items() if value != 0)
        given = enum.Name(number) if number in known else str(number)
        raise InvalidRequest(f"{given} is not allowed here: use one of {allowed}", field=field)


def _check_budget(value: float, most: float, name: str, path: str) -> None:
    if not (math.isfinite(value) and 0.0 < value <= most):
        raise InvalidRequest(
            f"{name} must be above 0 and at most {most:g}, not {value:g}", field=f"{path}.{name}"
        )
