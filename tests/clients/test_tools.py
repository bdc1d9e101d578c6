"""Tools and structured output with every client, by trained models whose chat template knows tools.

The models are too small to choose a tool. So the answers have to be calls, and are held against the schemas.
"""

from __future__ import annotations

from typing import Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

QUESTION = "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"
TURNS = [{"role": "user", "content": QUESTION}]
# The first one drafts, the second one verifies.
MODELS = ["asd-exact", "small"]


class Sum(BaseModel):
    """Two numbers to add."""

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)
    unit: Literal["beads", "bells"]


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["beads", "bells"]},
    },
    "required": ["a", "unit"],
    "additionalProperties": False,
}


@pytest.fixture
def client(tools_url):
    with openai.OpenAI(base_url=f"{tools_url}/v1", api_key="none", timeout=60) as made:
        yield made


@pytest.mark.parametrize("model", MODELS)
def test_openais_parse(client, model):
    answer = client.chat.completions.parse(model=model, messages=TURNS, response_format=Sum)
    assert isinstance(answer.choices[0].message.parsed, Sum)
    response = client.responses.parse(model=model, input=QUESTION, text_format=Sum)
    assert isinstance(response.output_parsed, Sum)


@pytest.mark.parametrize("model", MODELS)
def test_openais_tools(client, model):
    tool = {"type": "function", "function": {"name": "add", "parameters": SCHEMA, "strict": True}}
    asked = {"model": model, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat.completions.create(messages=TURNS, **asked)
    with client.chat.completions.stream(messages=TURNS, **asked) as stream:
        streamed = stream.get_final_completion()
    for each in (answer, streamed):
        (call,) = each.choices[0].message.tool_calls
        assert each.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "add"
    result = {"role": "tool", "tool_call_id": answer.choices[0].message.tool_calls[0].id, "content": "19"}
    turns = [*TURNS, answer.choices[0].message, result]
    # Which schema holds is not said without a choice.
    tool = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
    after = client.chat.completions.create(model="asd", messages=turns, tools=[tool])
    # The stage that asked for the call goes on.
    assert after.asd["stage"] == answer.asd["stage"]


@pytest.mark.parametrize("model", MODELS)
def test_anthropics_tools(tools_url, model):
    asked = {"model": model, "max_tokens": 100, "tools": [{"name": "add", "input_schema": SCHEMA}]}
    asked["tool_choice"] = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=tools_url, api_key="none", timeout=60) as client:
        message = client.messages.create(messages=TURNS, **asked)
        with client.messages.stream(messages=TURNS, **asked) as stream:
            assert stream.get_final_message().content[-1].input == message.content[-1].input
        (use,) = message.content
        assert (message.stop_reason, set(use.input)) == ("tool_use", {"a", "unit"})
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "19"}
        turns = [
            *TURNS,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        assert client.messages.create(messages=turns, model="asd", max_tokens=50).content


@pytest.mark.parametrize("model", MODELS)
def test_langchain(tools_url, model):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=f"{tools_url}/v1", api_key="none", temperature=0)
    assert isinstance(chat.with_structured_output(Sum).invoke(QUESTION), Sum)
    assert isinstance(chat.with_structured_output(Sum, method="function_calling").invoke(QUESTION), Sum)
    bound = chat.bind_tools([Sum], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    (call,) = answer.tool_calls
    assert Sum(**call["args"])
    chunks = list(bound.stream(QUESTION))
    whole = sum(chunks[1:], chunks[0])
    assert [each["args"] for each in whole.tool_calls] == [call["args"]]
