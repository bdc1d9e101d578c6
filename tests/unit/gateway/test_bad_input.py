"""Every fault of a body is refused with the name of the parameter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd.errors import InvalidRequest, NotFound, PreconditionFailed
from asd.values import Tokens
from services.common.validation import MAX_REQUEST_BYTES, MAX_STOP_SEQUENCES
from services.gateway.models import Models
from services.gateway.parameters import PARAMETERS, Effect
from services.gateway.request import MOST_BYTES, MOST_STOPS
from services.gateway.streaming import encode, encode_events
from tests.unit.gateway.samples import CHAT, COMPLETIONS, LEAST, MESSAGES, RESPONSES, USER, answer, parse

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
PART = {"type": "text", "text": "Hi"}


def message(**fields):
    return {"messages": [USER | fields]}


def called(call):
    """Return a conversation with a call of an earlier answer."""
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER]}


def tool(**fields):
    return {"tools": [{"type": "function", "function": {"name": "now"} | fields}]}


def blocks(role, *content):
    return {"messages": [{"role": role, "content": list(content)}]}


CASES = [
    (CHAT, {"model": 5}, "model"),
    (CHAT, {"model": ""}, "model"),
    (CHAT, {"model": None}, "model"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role"),
    (CHAT, message(role="function"), "messages[0].role"),
    (CHAT, message(role="tool"), "messages[0].tool_call_id"),
    (CHAT, message(role="king"), "messages[0].role"),
    (CHAT, message(role=["user"]), "messages[0].role"),
    (CHAT, message(content=""), "messages[0].content"),
    (CHAT, message(content=None), "messages[0].content"),
    (CHAT, message(content=[]), "messages[0].content"),
    (CHAT, message(content=[IMAGE]), "messages[0].content[0].type"),
    (CHAT, message(content=[{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    (CHAT, message(content=["Hi"]), "messages[0].content[0]"),
    (CHAT, message(content=[PART | {"citations": {"enabled": True}}]), "messages[0].content[0].citations"),
    (CHAT, message(content=[PART | {"logprobs": [{}]}]), "messages[0].content[0].logprobs"),
    (MESSAGES, {"system": [PART | {"citations": [{}]}]}, "system[0].citations"),
    (CHAT, message(name="Ann"), "messages[0].name"),
    (CHAT, message(tool_calls=[{}]), "messages[0].tool_calls"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 9}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"n": 1.5}, "n"),
    (CHAT, {"temperature": -0.1}, "temperature"),
    (CHAT, {"temperature": 2.1}, "temperature"),
    (CHAT, {"temperature": "1"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_p": 1.1}, "top_p"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 2**32}, "max_tokens"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    (CHAT, {"seed": 1.5}, "seed"),
    (CHAT, {"seed": 2**64}, "seed"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"stop": ["a"] * (MOST_STOPS + 1)}, "stop"),
    (CHAT, {"stop": [5]}, "stop"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (CHAT, {"stream": True, "stream_options": {"more": True}}, "stream_options.more"),
    (
        CHAT,
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    (CHAT, {"store": True}, "store"),
    (CHAT, called({}), "messages[1].tool_calls[0].function"),
    (CHAT, called({"type": "custom"}), "messages[1].tool_calls[0]"),
    (CHAT, called({"function": {"name": "now", "arguments": "{}"}}), "messages[1].tool_calls[0].id"),
    (CHAT, called({"id": "a", "function": {"name": "now"}}), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, called({"id": "a", "function": {}, "more": 1}), "messages[1].tool_calls[0].more"),
    (CHAT, {"tools": {}}, "tools"),
    (CHAT, {"tools": [5]}, "tools[0]"),
    (CHAT, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, tool(name=""), "tools[0].function.name"),
    (CHAT, tool(description=5), "tools[0].function.description"),
    (CHAT, tool(parameters="{}"), "tools[0].function.parameters"),
    (CHAT, tool(more=5), "tools[0].function.more"),
    (CHAT, tool(strict=True), "tools[0].function.strict"),
    (CHAT, tool() | {"tool_choice": "maybe"}, "tool_choice"),
    (CHAT, tool() | {"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"parallel_tool_calls": 0}, "parallel_tool_calls"),
    (CHAT, {"response_format": "json"}, "response_format.type"),
    (CHAT, {"response_format": {"type": "grammar"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (CHAT, tool() | {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, tool() | {"asd": {"regex": "a"}}, "asd.regex"),
    (CHAT, {"asd": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, "asd.choice"),
    (CHAT, {"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "scheme": {}}}},
        "response_format.json_schema.scheme",
    ),
    (CHAT, {"asd": {"choice": ["a"], "regex": "a"}}, "asd.regex"),
    (CHAT, {"asd": {"choice": "a"}}, "asd.choice"),
    (CHAT, {"asd": {"choice": []}}, "asd.choice"),
    (CHAT, {"asd": {"regex": ""}}, "asd.regex"),
    (CHAT, {"asd": {"allow_switch": 1}}, "asd.allow_switch"),
    (CHAT, {"logprobs": 0}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"prediction": {"type": "text"}}, "prediction.type"),
    (CHAT, {"prediction": {"type": "content", "content": ""}}, "prediction.content"),
    (CHAT, {"prediction": {"type": "content", "content": [IMAGE]}}, "prediction.content[0].type"),
    (CHAT, {"top_k": 5}, "top_k"),
    (CHAT, {"asd": 5}, "asd"),
    (CHAT, {"asd": {"lamda": 5}}, "asd.lamda"),
    (CHAT, {"asd": {"lambda": "5"}}, "asd.lambda"),
    (CHAT, {"asd": {"task": 5}}, "asd.task"),
    (CHAT, {"model": "asd-best", "asd": {"lambda": 5}}, "asd.lambda"),
    (CHAT, {"model": "small", "asd": {"min_quality": 0.9}}, "asd.min_quality"),
    (CHAT, {"model": "asd-exact", "asd": {"max_cost": 9}}, "asd.max_cost"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, 2]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["a"] * 9, "n": 8}, "prompt"),
    (COMPLETIONS, {"echo": True}, "echo"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (RESPONSES, {"input": None}, "input"),
    (RESPONSES, {"input": ""}, "input"),
    (RESPONSES, {"input": [{"type": "reasoning"}]}, "input[0].type"),
    (RESPONSES, {"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
    (RESPONSES, {"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    (
        RESPONSES,
        {"input": [{"type": "function_call_output", "call_id": "a", "output": 5}]},
        "input[0].output",
    ),
    (RESPONSES, {"tools": [{"type": "function"}]}, "tools[0].name"),
    (RESPONSES, {"tools": [{"type": "mcp"}]}, "tools[0].type"),
    (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    (RESPONSES, {"text": {"more": 1}}, "text.more"),
    (RESPONSES, {"include": ["file_search_call.results"]}, "include"),
    (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].type",
    ),
    (RESPONSES, {"metadata": [1]}, "metadata"),
    (RESPONSES, {"metadata": {"a": 5}}, "metadata"),
    (RESPONSES, {"user": {}}, "user"),
    (RESPONSES, {"safety_identifier": 5}, "safety_identifier"),
    (RESPONSES, {"store": True}, "store"),
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
    (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
    (RESPONSES, {"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    (MESSAGES, {"max_tokens": None}, "max_tokens"),
    (MESSAGES, {"temperature": 1.5}, "temperature"),
    (MESSAGES, {"stop_sequences": "a"}, "stop_sequences"),
    (MESSAGES, {"system": ""}, "system"),
    (MESSAGES, {"system": [{"type": "image"}]}, "system[0].type"),
    (MESSAGES, {"top_k": 5}, "top_k"),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    (MESSAGES, {"n": 2}, "n"),
    (MESSAGES, {"tools": [{"name": "now", "type": "bash_20250124"}]}, "tools[0].type"),
    (MESSAGES, {"tools": [{"name": "now"}], "tool_choice": {"type": "required"}}, "tool_choice.type"),
    (MESSAGES, {"tools": [{"name": "now"}], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    (MESSAGES, {"tools": [{"name": "now"}], "tool_choice": {"type": ["auto"]}}, "tool_choice.type"),
    (MESSAGES, {"output_config": {"effort": "low"}}, "output_config.effort"),
    (MESSAGES, blocks("user", {"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
    (MESSAGES, blocks("assistant", {"type": "tool_use", "id": "a"}), "messages[0].content[0].input"),
    (MESSAGES, blocks("user", {"type": "tool_use", "id": "a"}), "messages[0].content[0].type"),
    (MESSAGES, blocks("user", {"type": ["text"]}), "messages[0].content[0].type"),
]


@pytest.mark.parametrize(("api", "changes", "param"), CASES)
def test_a_fault_is_refused_with_its_parameter(api, changes, param):
    with pytest.raises(InvalidRequest) as refused:
        parse(api, changes)
    assert refused.value.field == param
    assert refused.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-asd-lamda": "5"}, "x-asd-lamda"),
        ({"x-asd-lambda": "five"}, "x-asd-lambda"),
        ({"x-asd-max-cost": "nan"}, "x-asd-max-cost"),
        ({"x-asd-max-cost": "inf"}, "x-asd-max-cost"),
        ({"x-asd-max-cost": "1e999"}, "x-asd-max-cost"),
        ({"x-asd-lambda": "1_0"}, "x-asd-lambda"),
        ({"x-asd-lambda": "١"}, "x-asd-lambda"),
    ],
)
def test_a_header_at_fault_is_refused_with_its_name(headers, param):
    with pytest.raises(InvalidRequest) as refused:
        parse(CHAT, headers=headers)
    assert refused.value.field == param


@pytest.mark.parametrize("api", LEAST)
def test_an_unknown_model_is_not_found(api):
    with pytest.raises(NotFound) as refused:
        parse(api, {"model": "gpt-4"})
    assert refused.value.field == "model"


@pytest.mark.parametrize(("model", "most"), [("asd", 900), ("asd-exact", 500), ("small", 100)])
def test_more_tokens_than_the_context_are_refused(model, most):
    models = Models(["small", "medium", "large"], [100, 900, 500])
    models.check_length(parse(CHAT, {"model": model, "max_tokens": most}))
    with pytest.raises(InvalidRequest) as refused:
        models.check_length(parse(CHAT, {"model": model, "max_completion_tokens": most + 1}))
    assert refused.value.field == "max_completion_tokens"
    # What a stage that does not answer now has room for is not known.
    Models(["small", "medium"], [100, 0]).check_length(parse(CHAT, {"max_tokens": 901}))


def test_a_stage_named_like_a_virtual_model_is_refused():
    with pytest.raises(PreconditionFailed, match="asd-best"):
        Models(["small", "asd-best"])


@pytest.mark.parametrize(
    ("api", "name"),
    [(api, each.name) for api in LEAST for each in PARAMETERS[api.name] if each.effect is Effect.REFUSED],
)
def test_a_refused_parameter_is_refused_unless_it_asks_for_nothing(api, name):
    (parameter,) = [each for each in PARAMETERS[api.name] if each.name == name]
    with pytest.raises(InvalidRequest) as refused:
        parse(api, {name: {"never": "neutral"}})
    assert refused.value.field == name
    for value in (None, *parameter.neutral):
        parse(api, {name: value})


@pytest.mark.parametrize("api", LEAST)
def test_what_has_no_effect_is_taken(api):
    names = [each.name for each in PARAMETERS[api.name] if each.effect is Effect.NONE]
    inert = {name: {"a": "x"} if name == "metadata" else "x" for name in names}
    assert parse(api, inert).requests == parse(api).requests


def test_bounds_are_the_contracts():
    assert MOST_STOPS == MAX_STOP_SEQUENCES
    assert MOST_BYTES == MAX_REQUEST_BYTES


_KEYS = ["role", "content", "type", "text", "tool_calls", "function", "name", "format", "schema", "x"]
_NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=8,
)
_HEADERS = st.dictionaries(st.sampled_from(["x-asd-lambda", "x-asd-task"]), st.text(), max_size=1)


def taken(api, changes, headers):
    """Return the call of a body; None if it is refused with a parameter's name."""
    try:
        return parse(api, changes, headers)
    except (InvalidRequest, NotFound) as error:
        refused = error
    assert refused.field
    return None


@pytest.mark.parametrize("api", LEAST)
@given(data=st.data())
def test_any_body_is_answered_or_refused_with_a_parameter(api, data):
    names = [*(each.name for each in PARAMETERS[api.name]), "unknown"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), _JSON, max_size=3))
    call = taken(api, changes, data.draw(_HEADERS))
    if call is None:
        return
    answers = tuple(answer() for _ in call.requests)
    encode(api.answer(call, answers, 99))
    writer = api.writer(call, "id", 99)
    for index, each in enumerate(answers):
        text = writer.text(index, Tokens(text="x"))
        encode_events([*writer.begin(), *text, *writer.finish(index, each)])
