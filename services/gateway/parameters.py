"""Every parameter of every API: honoured, refused, or without effect. Pure.

The translators check bodies against these tables, /openapi.json is made of them, and the documentation is
tested against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from services.gateway.request import MOST_CHOICES, MOST_STOPS, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "chat/completions", "completions", "responses", "messages"


class Effect(StrEnum):
    """What a parameter does."""

    HONOURED = "honoured"
    REFUSED = "refused"
    NONE = "without effect"


@dataclass(frozen=True)
class Parameter:
    """A parameter of an API.

    note: what it does, or why it is refused. schema: JSON Schema of what is taken. neutral: values that ask
    for nothing, and are therefore taken of a refused parameter; null always is.
    """

    name: str
    effect: Effect
    note: str
    schema: Mapping[str, Any] = field(default_factory=dict)
    neutral: tuple[Any, ...] = ()


def _honoured(name: str, note: str, **schema: Any) -> Parameter:
    return Parameter(name, Effect.HONOURED, note, schema)


def _refused(name: str, note: str, *neutral: Any) -> Parameter:
    return Parameter(name, Effect.REFUSED, note, neutral=neutral)


def _inert(name: str, note: str) -> Parameter:
    return Parameter(name, Effect.NONE, note)


_OBJECT = {"type": "object"}
_TEXT = {"type": "string", "minLength": 1}
_PARTS = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["type", "text"]}}
_CONTENT = {"anyOf": [_TEXT, _PARTS]}


def _turns(*more: str) -> dict[str, Any]:
    """Return the schema of messages. more: roles of some APIs."""
    roles = {"enum": ["user", "assistant", "system", *more]}
    properties = {"role": roles, "content": _CONTENT}
    return {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "required": ["role", "content"], "properties": properties},
    }


def _stream_options(*flags: str) -> dict[str, Any]:
    """Return the schema of a stream's options. flags: those that may be true."""
    taken: dict[str, Any] = {"include_obfuscation": {"enum": [False, None]}}
    taken |= {name: {"type": ["boolean", "null"]} for name in flags}
    return {"type": "object", "properties": taken, "additionalProperties": False}


_NOT_YET = "not supported yet"
_NO_SUCH_SAMPLING = "the stages have no such way of sampling"
_NO_STATE = "the gateway keeps no state"
_NO_TOOLS = "tools are not supported yet"
_CACHED_ANYWAY = "stages cache prefixes by themselves"

_STOP = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MOST_STOPS},
    ]
}

_MODEL = _honoured("model", "a virtual model, or a stage's name", type="string", minLength=1)
_TEMPERATURE = _honoured("temperature", "0 by default: greedy", type="number", minimum=0, maximum=2)
_TOP_P = _honoured("top_p", "nucleus mass", type="number", exclusiveMinimum=0, maximum=1)
_STREAM = _honoured("stream", "server-sent events", type="boolean")
_ASD = _honoured("asd", "objective, task and session: see x-asd-* headers", **_OBJECT)
_N = _honoured(
    "n", f"choices, up to {MOST_CHOICES}, by seeds", type="integer", minimum=1, maximum=MOST_CHOICES
)
_SEED = _honoured("seed", "of the random choice above temperature 0", type="integer")
_METADATA = _inert("metadata", "labels for the caller")
_USER = _inert("user", "the caller's name for its user")

# What /v1/chat/completions and /v1/responses have in common.
_OPENAI_INERT = (
    _inert("safety_identifier", "the caller's name for its user"),
    _inert("prompt_cache_key", _CACHED_ANYWAY),
    _inert("prompt_cache_retention", _CACHED_ANYWAY),
    _inert("prompt_cache_options", _CACHED_ANYWAY),
)

# What /v1/chat/completions and /v1/completions have in common.
_OPENAI_OLD = (
    _MODEL,
    _TEMPERATURE,
    _TOP_P,
    _N,
    _SEED,
    _honoured("stop", f"up to {MOST_STOPS} sequences, none empty", **_STOP),
    _STREAM,
    _honoured(
        "stream_options",
        "include_usage; include_obfuscation only as false",
        **_stream_options("include_usage"),
    ),
    _ASD,
    _USER,
    _refused("frequency_penalty", _NO_SUCH_SAMPLING, 0),
    _refused("presence_penalty", _NO_SUCH_SAMPLING, 0),
    _refused("logit_bias", _NO_SUCH_SAMPLING, {}),
)

_MAX_TOKENS = _honoured(
    "max_tokens", "most tokens of the answer; by default the stage's own bound", type="integer", minimum=1
)

PARAMETERS: Mapping[str, tuple[Parameter, ...]] = {
    CHAT: (
        *_OPENAI_OLD,
        _honoured("messages", "text of roles system, developer, user, assistant", **_turns("developer")),
        _MAX_TOKENS,
        _honoured("max_completion_tokens", "the newer name of max_tokens", type="integer", minimum=1),
        _METADATA,
        _refused("store", _NO_STATE, False),
        *_OPENAI_INERT,
        _refused("tools", _NO_TOOLS, []),
        _refused("tool_choice", _NO_TOOLS, "none"),
        _refused("parallel_tool_calls", _NO_TOOLS, True, False),
        _refused("functions", "tools are not supported yet, nor their older form", []),
        _refused("function_call", "tools are not supported yet, nor their older form", "none"),
        _refused("response_format", _NOT_YET, {"type": "text"}),
        _refused("logprobs", _NOT_YET, False),
        _refused("top_logprobs", _NOT_YET, 0),
        _refused("prediction", _NOT_YET),
        _refused("modalities", "the models write text", ["text"]),
        _refused("audio", "the models write text"),
        _refused("moderation", "there is no moderation"),
        _refused("reasoning_effort", "the models have no such setting", "none"),
        _refused("verbosity", "the models have no such setting", "medium"),
        _refused("service_tier", "there are no tiers: use asd.max_latency_ms or a model", "auto", "default"),
        _refused("web_search_options", "there is no search"),
    ),
    COMPLETIONS: (
        *_OPENAI_OLD,
        _honoured(
            "prompt",
            "a user's message, or several, of which each is answered; token ids are refused",
            anyOf=[
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            ],
        ),
        _MAX_TOKENS,
        _refused("best_of", "all choices are returned: use n", 1),
        _refused("echo", "the prompt is not repeated", False),
        _refused("logprobs", _NOT_YET),
        _refused("suffix", "the models do not fill gaps"),
    ),
    RESPONSES: (
        _MODEL,
        _TEMPERATURE,
        _TOP_P,
        _STREAM,
        _ASD,
        _USER,
        _METADATA,
        _honoured("input", "a text, or messages of text", anyOf=[_TEXT, _turns("developer")]),
        _honoured("instructions", "a system message before the input", type="string", minLength=1),
        _honoured("max_output_tokens", "most tokens of the answer", type="integer", minimum=1),
        _honoured("stream_options", "include_obfuscation only as false", **_stream_options()),
        _refused("store", _NO_STATE, False),
        _refused("previous_response_id", _NO_STATE),
        _refused("conversation", _NO_STATE),
        _refused("background", _NO_STATE, False),
        _refused("background_options", _NO_STATE),
        _refused("prompt", _NO_STATE),
        _refused("context_management", "conversations are not shortened", []),
        _refused("truncation", "conversations are not shortened", "disabled"),
        *_OPENAI_INERT,
        _refused("tools", _NO_TOOLS, []),
        _refused("tool_choice", _NO_TOOLS, "none"),
        _refused("parallel_tool_calls", _NO_TOOLS, True, False),
        _refused("max_tool_calls", _NO_TOOLS),
        _refused("text", _NOT_YET, {}, {"format": {"type": "text"}}),
        _refused("include", _NOT_YET, []),
        _refused("top_logprobs", _NOT_YET, 0),
        _refused("reasoning", "the models have no such setting", {}),
        _refused("moderation", "there is no moderation"),
        _refused("image", "the models read and write text"),
        _refused("access_programs", "there are no access programs"),
        _refused("service_tier", "there are no tiers: use asd.max_latency_ms or a model", "auto", "default"),
    ),
    MESSAGES: (
        _MODEL,
        _honoured("messages", "text of roles user, assistant, system", **_turns()),
        _honoured("system", "a system message before the others", **_CONTENT),
        _honoured("max_tokens", "most tokens of the answer; required", type="integer", minimum=1),
        _honoured("temperature", "0 by default: greedy", type="number", minimum=0, maximum=1),
        _TOP_P,
        _honoured(
            "stop_sequences",
            f"up to {MOST_STOPS}, none empty",
            type="array",
            items={"type": "string", "minLength": 1},
            maxItems=MOST_STOPS,
        ),
        _STREAM,
        _ASD,
        _METADATA,
        _inert("cache_control", _CACHED_ANYWAY),
        _refused("top_k", _NO_SUCH_SAMPLING),
        _refused("tools", _NO_TOOLS, []),
        _refused("tool_choice", _NO_TOOLS, {"type": "none"}),
        _refused("thinking", "the models have no such setting", {"type": "disabled"}),
        _refused("output_config", _NOT_YET, {}),
        _refused("container", _NO_STATE),
        _refused("mcp_servers", _NO_TOOLS, []),
        _refused("context_management", "conversations are not shortened"),
        _refused("diagnostics", "no diagnostics are returned"),
        _refused("inference_geo", "the stages run where their operator placed them"),
        _refused("speed", "use the model asd-fastest", "standard"),
        _refused(
            "service_tier", "there are no tiers: use asd.max_latency_ms or a model", "auto", "standard_only"
        ),
        _refused("user_profile_id", _NO_STATE),
        _refused("workspace_id", _NO_STATE),
    ),
}

# Fields of the body's object `asd`, each with its header.
ASD_FIELDS: Mapping[str, Parameter] = {
    each.name: each
    for each in (
        _honoured("lambda", "worth of a right answer, in cost units", type="number", minimum=0),
        _honoured("max_cost", "the answer's bound on cost", type="number", exclusiveMinimum=0),
        _honoured("max_latency_ms", "the answer's bound on time", type="number", exclusiveMinimum=0),
        _honoured(
            "min_quality", "certified share of right answers", type="number", exclusiveMinimum=0, maximum=1
        ),
        _honoured("task", "type of task, for stages with an adapter for it", type="string"),
        _honoured("session_id", "the same one stays on the replica that holds its prefix", type="string"),
    )
}


class Body:
    """A request's body, checked against an API's table: every field is known, and none is refused.

    Raises InvalidRequest, naming the parameter. The getters take null for an absent parameter.
    """

    def __init__(self, api: str, fields: Mapping[str, Any]) -> None:
        known = {each.name: each for each in PARAMETERS[api]}
        self._fields = fields
        for name, value in fields.items():
            parameter = known.get(name)
            if parameter is None:
                raise invalid(name, "there is no such parameter")
            if parameter.effect is Effect.REFUSED and not _asks_nothing(value, parameter.neutral):
                raise invalid(name, f"is not honoured here: {parameter.note}")

    def get(self, name: str) -> Any:
        """Return a parameter as it is; None if it is absent."""
        return self._fields.get(name)

    def text(self, name: str, *, is_required: bool = False, may_be_empty: bool = False) -> str | None:
        """Return a text."""
        value = self._required(name) if is_required else self._fields.get(name)
        if value is not None and not (isinstance(value, str) and (value or may_be_empty)):
            raise invalid(name, f"must be a text{'' if may_be_empty else ', and not an empty one'}")
        return value

    def labels(self, name: str) -> dict[str, str]:
        """Return an object of texts; an empty one if it is absent."""
        value = self._fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise invalid(name, "must be an object of texts")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean; False if it is absent."""
        value = self._fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise invalid(name, "must be true or false")
        return bool(value)

    def whole(self, name: str, least: int, most: int, *, is_required: bool = False) -> int | None:
        """Return a whole number in a range."""
        value = self._required(name) if is_required else self._fields.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise invalid(name, "must be a whole number")
        if not least <= value <= most:
            raise invalid(name, f"must be {least} to {most}")
        return int(value)

    def number(self, name: str, most: float, *, is_positive: bool = False) -> float | None:
        """Return a number from 0, or above 0, to the most."""
        value = self._fields.get(name)
        if value is None:
            return None
        number = finite(value, name)
        if not 0 <= number <= most or (is_positive and number == 0):
            raise invalid(name, f"must be {'above 0 and at most' if is_positive else '0 to'} {most:g}")
        return number

    def stops(self, name: str, *, may_be_text: bool) -> tuple[str, ...]:
        """Return stop sequences: a list, or also one text."""
        value = self._fields.get(name)
        if value is None:
            return ()
        sequences = [value] if may_be_text and isinstance(value, str) else value
        if not isinstance(sequences, list) or not all(isinstance(each, str) for each in sequences):
            raise invalid(name, "must be a list of texts")
        if len(sequences) > MOST_STOPS:
            raise invalid(name, f"may have {MOST_STOPS} sequences, not {len(sequences)}")
        if "" in sequences:
            raise invalid(name, "a stop sequence is empty")
        return tuple(sequences)

    def includes_usage(self) -> bool:
        """Return whether `stream_options` asks for usage. Other options are refused."""
        options = self._fields.get("stream_options")
        if options is None:
            return False
        if not isinstance(options, dict):
            raise invalid("stream_options", "must be an object")
        if not self._fields.get("stream"):
            raise invalid("stream_options", "is for streams alone: set stream to true")
        for name, value in options.items():
            if name not in {"include_usage", "include_obfuscation"}:
                raise invalid(f"stream_options.{name}", "there is no such parameter")
            if value is not None and not isinstance(value, bool):
                raise invalid(f"stream_options.{name}", "must be true or false")
        if options.get("include_obfuscation"):
            raise invalid("stream_options.include_obfuscation", "is not honoured here: nothing is padded")
        return bool(options.get("include_usage"))

    def _required(self, name: str) -> Any:
        value = self._fields.get(name)
        if value is None:
            raise invalid(name, "is required")
        return value


def finite(value: object, name: str) -> float:
    """Return a number. Raises InvalidRequest for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(name, "must be a number")
    return float(value)


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 0 equals False in Python, and not in JSON.
    return value is None or any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )
