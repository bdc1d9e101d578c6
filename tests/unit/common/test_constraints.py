"""What is refused of constraints and tools before a model sees them, with the field at fault."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest

from asd.errors import InvalidRequest
from asd.v1 import cascade_pb2, common_pb2
from services.common.constraints import MOST_CHOICE, MOST_REGEX, MOST_SCHEMA_BYTES
from services.common.validation import check_call_is_free, check_input, check_sampling

Message = common_pb2.Message
USER = Message(role=common_pb2.ROLE_USER, content="What is the weather in Rome?")
WEATHER = common_pb2.Tool(name="weather", parameters='{"type": "object"}')


def _called(name: str = "weather", arguments: str = "{}", call_id: str = "c1") -> Message:
    call = common_pb2.ToolCall(id=call_id, name=name, arguments=arguments)
    return Message(role=common_pb2.ROLE_ASSISTANT, tool_calls=[call])


def _result(call_id: str = "c1") -> Message:
    return Message(role=common_pb2.ROLE_TOOL, content="rain", tool_call_id=call_id)


def _fault_of(*turns: Message, tools: common_pb2.Tools | None = None) -> str:
    conversation = common_pb2.Conversation(messages=turns, tools=tools)
    with pytest.raises(InvalidRequest) as refused:
        check_input(cascade_pb2.GenerateRequest(conversation=conversation))
    return refused.value.field.removeprefix("conversation.")


def test_a_conversation_may_end_with_a_tools_result() -> None:
    tools = common_pb2.Tools(tools=[WEATHER], choice=common_pb2.TOOL_CHOICE_NAMED, name="weather")
    conversation = common_pb2.Conversation(messages=[USER, _called(), _result()], tools=tools)
    check_input(cascade_pb2.GenerateRequest(conversation=conversation))


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([USER, _called(call_id="")], "messages[1].tool_calls[0].id"),
        ([USER, _called(call_id="x" * 257)], "messages[1].tool_calls[0].id"),
        ([USER, _called("no name")], "messages[1].tool_calls[0].name"),
        ([USER, _called(arguments="[]")], "messages[1].tool_calls[0].arguments"),
        ([USER, _called(arguments="{")], "messages[1].tool_calls[0].arguments"),
        ([USER, _called(), _called()], "messages[2].tool_calls[0].id"),
        ([USER, _called(), _result("other")], "messages[2].tool_call_id"),
        ([_result()], "messages[0].tool_call_id"),
        ([USER, _called()], "messages[1].role"),
        ([Message(role=common_pb2.ROLE_USER, content="a", tool_call_id="c1")], "messages[0].tool_call_id"),
        (
            [Message(role=common_pb2.ROLE_USER, content="a", tool_calls=_called().tool_calls)],
            "messages[0].tool_calls",
        ),
        (
            [Message(role=common_pb2.ROLE_ASSISTANT, tool_calls=[*_called().tool_calls] * 129), USER],
            "messages[0].tool_calls",
        ),
        ([Message(role=common_pb2.ROLE_SYSTEM), USER], "messages[0].content"),
    ],
)
def test_faults_of_tool_calls_are_named(turns: list[Message], field: str) -> None:
    assert _fault_of(*turns) == field


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        (common_pb2.Tools(), "tools.tools"),
        (common_pb2.Tools(tools=[common_pb2.Tool()]), "tools.tools[0].name"),
        (common_pb2.Tools(tools=[WEATHER, WEATHER]), "tools.tools[1].name"),
        (common_pb2.Tools(tools=[common_pb2.Tool(name="a", parameters="[]")]), "tools.tools[0].parameters"),
        (
            common_pb2.Tools(tools=[common_pb2.Tool(name="a", parameters='{"type": "string"}')]),
            "tools.tools[0].parameters",
        ),
        (common_pb2.Tools(tools=[WEATHER], choice=common_pb2.TOOL_CHOICE_NAMED, name="time"), "tools.name"),
        (common_pb2.Tools(tools=[WEATHER], name="weather"), "tools.name"),
        (
            common_pb2.Tools(tools=[common_pb2.Tool(name=f"t{index}") for index in range(129)]),
            "tools.tools",
        ),
    ],
)
def test_faults_of_tools_are_named(tools: common_pb2.Tools, field: str) -> None:
    assert _fault_of(USER, tools=tools) == field


def _refused(constraint: common_pb2.Constraint) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        check_sampling(common_pb2.Sampling(constraint=constraint))
    return refused.value


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("", "not JSON"),
        ('{"type": }', "line 1, column 10"),
        ('{"a": 1, "a": 2}', "a"),
        ("[]", "an object"),
        ("[" * 101 + "]" * 101, "nests more"),
        (json.dumps({"properties": {"a": {"$ref": "https://example.org/a.json"}}}), "#/properties/a/$ref"),
        (json.dumps({"description": "x" * MOST_SCHEMA_BYTES}), "smaller"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_the_place(schema: str, said: str) -> None:
    error = _refused(common_pb2.Constraint(json_schema=schema))
    assert said in error.message
    assert error.field == "sampling.constraint.json_schema"


def test_a_schema_may_refer_to_itself() -> None:
    schema = json.dumps(
        {"$defs": {"n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"}
    )
    check_sampling(common_pb2.Sampling(constraint=common_pb2.Constraint(json_schema=schema)))


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (common_pb2.Constraint(), ""),
        (common_pb2.Constraint(regex=""), ".regex"),
        (common_pb2.Constraint(regex="a" * (MOST_REGEX + 1)), ".regex"),
        (common_pb2.Constraint(choice=common_pb2.Choice()), ".choice.texts"),
        (common_pb2.Constraint(choice=common_pb2.Choice(texts=["a", ""])), ".choice.texts[1]"),
        (common_pb2.Constraint(choice=common_pb2.Choice(texts=["a", "a"])), ".choice.texts[1]"),
        (common_pb2.Constraint(choice=common_pb2.Choice(texts=["a" * (MOST_CHOICE + 1)])), ".choice.texts"),
    ],
)
def test_other_constraints_are_checked_too(constraint: common_pb2.Constraint, field: str) -> None:
    assert _refused(constraint).field == f"sampling.constraint{field}"


def test_more_likeliest_tokens_than_the_contract_allows_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_sampling(common_pb2.Sampling(top_logprobs=21))
    assert refused.value.field == "sampling.top_logprobs"


@pytest.mark.parametrize(
    ("choice", "is_refused"),
    [
        (common_pb2.TOOL_CHOICE_UNSPECIFIED, True),
        (common_pb2.TOOL_CHOICE_REQUIRED, True),
        (common_pb2.TOOL_CHOICE_NONE, False),
    ],
)
def test_a_constraint_beside_tools_that_may_be_called_is_refused(choice: Any, is_refused: bool) -> None:
    conversation = common_pb2.Conversation(
        messages=[USER], tools=common_pb2.Tools(tools=[WEATHER], choice=choice)
    )
    sampling = common_pb2.Sampling(constraint=common_pb2.Constraint(regex="a"))
    request = cascade_pb2.GenerateRequest(conversation=conversation, sampling=sampling)
    with pytest.raises(InvalidRequest, match="tool call") if is_refused else nullcontext():
        check_call_is_free(request)
