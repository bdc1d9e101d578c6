"""Tools in both directions: what bodies offer and hold, and the calls in answers and streams."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from asd.values import Conversation, Message, Role, TokenDetail, Tokens, Tool, ToolCall, ToolChoice, Tools
from tests.unit.gateway.samples import CHAT, MESSAGES, RESPONSES, USER, answer, parse

SCHEMA = {"type": "object", "properties": {"zone": {"type": "integer"}}}
FUNCTION = {"name": "now", "description": "Tells the time.", "parameters": SCHEMA}
OFFERED = {
    CHAT: {"tools": [{"type": "function", "function": FUNCTION}]},
    RESPONSES: {"tools": [{"type": "function", **FUNCTION}]},
    MESSAGES: {"tools": [{"name": "now", "description": "Tells the time.", "input_schema": SCHEMA}]},
}
NOW = Tool("now", "Tells the time.", json.dumps(SCHEMA))
CALL = ToolCall("call_1", "now", '{"zone": 1}')
OTHER = ToolCall("call_2", "now", "{}")
# The conversation that goes on with the results of two calls.
LOOP = (
    Message(Role.USER, "Hi"),
    Message(Role.ASSISTANT, "I look.", (CALL, OTHER)),
    Message(Role.TOOL, "5", tool_call_id="call_1"),
    Message(Role.TOOL, "6", tool_call_id="call_2"),
)
WRITTEN = {
    CHAT: {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "now", "arguments": '{"zone": 1}'},
                    },
                    {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "name": "now", "content": "5"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "6"}]},
        ]
    },
    RESPONSES: {
        "input": [
            USER,
            {"type": "message", "role": "assistant", "content": "I look.", "id": "msg_1"},
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "now",
                "arguments": '{"zone": 1}',
                "id": "fc_1",
            },
            {"type": "function_call", "call_id": "call_2", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "5"},
            {
                "type": "function_call_output",
                "call_id": "call_2",
                "output": [{"type": "input_text", "text": "6"}],
            },
        ]
    },
    MESSAGES: {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "call_1", "name": "now", "input": {"zone": 1}},
                    {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "5"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2",
                        "content": [{"type": "text", "text": "6"}],
                        "is_error": True,
                    },
                ],
            },
        ]
    },
}
TEXT = 'I look. <tool_call>{"name": "now", "arguments": {"zone": 1}}</tool_call>'
CALLED = answer(TEXT, tool_calls=(CALL, OTHER), content="I look.")
CALLS_ALONE = answer(TEXT.removeprefix("I look. "), tool_calls=(CALL,))
APIS = list(OFFERED)


def asked(api, changes=None):
    """Return what the cascade is asked."""
    (request,) = parse(api, changes).requests
    return request


def _same(turns):
    """Return turns whose arguments are values: their JSON may be spaced in another way."""
    return [
        (
            turn.role,
            turn.content,
            turn.tool_call_id,
            [(call.id, call.name, json.loads(call.arguments)) for call in turn.tool_calls],
        )
        for turn in turns
    ]


@pytest.mark.parametrize("api", APIS)
def test_tools_are_offered_with_the_conversation(api):
    assert asked(api, OFFERED[api]).input == Conversation((Message(Role.USER, "Hi"),), Tools((NOW,)))
    assert not isinstance(asked(api, {"tools": []}).input, Conversation)


NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("api", "changes", "tools"),
    [
        (CHAT, {"tool_choice": "none"}, Tools((NOW,), ToolChoice.NONE)),
        (CHAT, {"tool_choice": "required"}, Tools((NOW,), ToolChoice.REQUIRED)),
        (CHAT, {"tool_choice": NAMED}, Tools((NOW,), ToolChoice.NAMED, "now")),
        (CHAT, {"parallel_tool_calls": False}, Tools((NOW,), single_call=True)),
        (RESPONSES, {"tool_choice": "required"}, Tools((NOW,), ToolChoice.REQUIRED)),
        (RESPONSES, {"tool_choice": {"type": "function", "name": "now"}},
         Tools((NOW,), ToolChoice.NAMED, "now")),
        (RESPONSES, {"parallel_tool_calls": False}, Tools((NOW,), single_call=True)),
        (MESSAGES, {"tool_choice": {"type": "none"}}, Tools((NOW,), ToolChoice.NONE)),
        (MESSAGES, {"tool_choice": {"type": "any"}}, Tools((NOW,), ToolChoice.REQUIRED)),
        (MESSAGES, {"tool_choice": {"type": "tool", "name": "now"}}, Tools((NOW,), ToolChoice.NAMED, "now")),
        (MESSAGES, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
         Tools((NOW,), single_call=True)),
    ],
)  # fmt: skip
def test_the_choice_of_a_tool_is_the_contracts(api, changes, tools):
    assert asked(api, OFFERED[api] | changes).input.tools == tools


def test_a_strict_tool_is_taken_where_its_schema_is_kept():
    tools = {"tools": [{"type": "function", "function": FUNCTION | {"strict": True}}]}
    assert asked(CHAT, tools | {"tool_choice": "required"}).input.tools.tools == (NOW,)


@pytest.mark.parametrize("api", APIS)
def test_calls_and_results_of_a_conversation_are_turns(api):
    assert _same(asked(api, WRITTEN[api]).input) == _same(LOOP)


@pytest.mark.parametrize("api", APIS)
def test_an_answer_goes_back_into_the_conversation_as_it_came(api):
    """What an API answers is what the same API takes as an earlier answer."""
    body = api.answer(parse(api, OFFERED[api]), (CALLED,), 99)
    turns = {
        CHAT: lambda: [body["choices"][0]["message"]],
        RESPONSES: lambda: body["output"],
        MESSAGES: lambda: [{"role": "assistant", "content": body["content"]}],
    }[api]()
    name = "input" if api is RESPONSES else "messages"
    (_, said, _) = asked(api, {name: [USER, *turns, USER]}).input
    assert _same([said]) == _same(LOOP[1:2])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("finish", "reasons"),
    [
        ("eos", {CHAT: "tool_calls", RESPONSES: "completed", MESSAGES: "tool_use"}),
        # A further call may have been cut off.
        ("length", {CHAT: "length", RESPONSES: "incomplete", MESSAGES: "max_tokens"}),
    ],
)
def test_an_answer_says_that_it_ends_with_calls(api, finish, reasons):
    called = replace(CALLED, finish_reason=finish)
    body = api.answer(parse(api, OFFERED[api]), (called,), 99)
    told = {
        CHAT: lambda: body["choices"][0]["finish_reason"],
        RESPONSES: lambda: body["status"],
        MESSAGES: lambda: body["stop_reason"],
    }[api]()
    assert told == reasons[api]


def _stream(api, pieces, whole):
    writer = api.writer(parse(api, OFFERED[api] | {"stream": True}), "id", 99)
    events = writer.begin()
    for piece in pieces:
        events += writer.text(0, Tokens(text=piece))
        events += writer.keep_alive()
    events += writer.finish(0, whole)
    return [each.data for each in [*events, *writer.end()] if isinstance(each.data, dict)]


SPLIT = ["I lo", "ok. ", "<tool", '_call>{"name": "now", "argum', 'ents": {"zone": 1}}</tool_call>']


def _read_chat(events):
    deltas = [part["delta"] for event in events for part in event["choices"]]
    calls = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"arguments": ""})
            call.update({name: part[name] for name in ("id",) if name in part})
            function = part["function"]
            call["name"] = function.get("name") or call["name"]
            call["arguments"] += function["arguments"]
    written = [(each["id"], each["name"], each["arguments"]) for each in calls.values()]
    return "".join(delta.get("content", "") for delta in deltas), written


def _read_responses(events):
    text = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
    last = next(each for each in events if each["type"] == "response.completed")["response"]["output"]
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == last
    places = [each["output_index"] for each in events if each["type"] == "response.output_item.added"]
    assert places == list(range(len(last)))
    calls = [each for each in last if each["type"] == "function_call"]
    deltas = [each["delta"] for each in events if each["type"] == "response.function_call_arguments.delta"]
    assert deltas == [each["arguments"] for each in calls]
    return text, [(each["call_id"], each["name"], each["arguments"]) for each in calls]


def _read_messages(events):
    texts, calls = "", []
    for event in events:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls.append([event["content_block"]["id"], event["content_block"]["name"], ""])
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "text_delta":
                texts += delta["text"]
            else:
                calls[-1][2] += delta["partial_json"]
    opened = [each["index"] for each in events if each["type"] == "content_block_start"]
    assert opened == [each["index"] for each in events if each["type"] == "content_block_stop"]
    assert opened == list(range(len(opened)))
    return texts, [tuple(each) for each in calls]


READ = {CHAT: _read_chat, RESPONSES: _read_responses, MESSAGES: _read_messages}
PART = {CHAT: ChatCompletionChunk, RESPONSES: ResponseStreamEvent, MESSAGES: RawMessageStreamEvent}
WHOLE = {CHAT: ChatCompletion, RESPONSES: Response, MESSAGES: AnthropicMessage}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("pieces", "whole", "text", "calls"),
    [
        (SPLIT, CALLED, "I look.", [CALL, OTHER]),
        (SPLIT[2:], CALLS_ALONE, "", [CALL]),
        (["a <", "b"], answer("a <b"), "a <b", []),
        (["<tool_call>{"], answer("<tool_call>{"), "<tool_call>{", []),
        ([], answer(""), "", []),
    ],
)
def test_a_stream_has_the_text_first_and_then_the_calls(api, pieces, whole, text, calls):
    events = _stream(api, pieces, whole)
    found, written = READ[api](events)
    assert found == text
    assert [(each[0], each[1], json.loads(each[2])) for each in written] == [
        (each.id, each.name, json.loads(each.arguments)) for each in calls
    ]
    for event in events:
        if event != {"type": "ping"}:
            TypeAdapter(PART[api]).validate_python(event, strict=True)


def test_tokens_of_a_call_open_no_message():
    """What is held back may have log-probabilities."""
    asks = OFFERED[RESPONSES] | {"stream": True, "top_logprobs": 0}
    writer = RESPONSES.writer(parse(RESPONSES, asks), "id", 99)
    events = writer.begin()
    for piece in SPLIT[2:]:
        events += writer.text(0, Tokens((1,), piece, (-0.5,), (TokenDetail(piece.encode()),)))
    events += writer.finish(0, CALLS_ALONE)
    assert _read_responses([each.data for each in events]) == ("", [("call_1", "now", '{"zone": 1}')])


@pytest.mark.parametrize("api", APIS)
def test_an_answer_with_calls_has_its_type(api):
    for each in (CALLED, CALLS_ALONE):
        body = api.answer(parse(api, OFFERED[api] | WRITTEN[api]), (each,), 99)
        TypeAdapter(WHOLE[api]).validate_python(body, strict=True)
