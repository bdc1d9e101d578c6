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
from services.common.wire import MAX_ENTRIES

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper as EnumTypeWrapper

MAX_SESSION_ID_BYTES = 256
MAX_REQUEST_BYTES = convert.MAX_REQUEST_BYTES
MAX_STOP_SEQUENCES = MAX_ENTRIES["asd.v1.Sampling.stop"]
# Names of adapters, as in the stages' settings: they are parts of models' names.
TASK = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
MAX_TEMPERATURE = 2.0
# Chosen: above any sensible value, and low enough that sums and products of a few stay exact and finite.
MAX_COST_UNITS = 1e9
# One day.
MAX_LATENCY_MS = 86_400_000.0

_ROLES = frozenset(common_pb2.Role.values())
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
    """Check that there is a prompt or a conversation, with text in it and the user's message last."""
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
    for index, turn in enumerate(turns):
        where = f"{path}conversation.messages[{index}]"
        check_enum(common_pb2.Role, _ROLES, turn.role, f"{where}.role")
        if not turn.content:
            raise InvalidRequest("content is empty: send at least one byte of text", field=f"{where}.content")
    if turns[-1].role != common_pb2.ROLE_USER:
        raise InvalidRequest(
            "the last message must be the user's (ROLE_USER)",
            field=f"{path}conversation.messages[{len(turns) - 1}].role",
        )


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
