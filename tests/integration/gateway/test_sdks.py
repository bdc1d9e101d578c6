"""Tools, schemas and log-probabilities as the SDKs' own helpers send and read them."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from pydantic import BaseModel

from asd.v1 import common_pb2

ASK = [{"role": "user", "content": "How warm is it in Ulm?"}]
CALL = common_pb2.ToolCall(id="call_0123456789", name="weather", arguments='{"city": "Ulm"}')
WRITTEN = ("I look. ", "<tool_call>", '{"name": "weather", "arguments": {"city": "Ulm"}}', "</tool_call>")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Weather(BaseModel):
    """An answer."""

    city: str
    degrees: int


@pytest.fixture
def calls_a_tool(gateway):
    """A gateway whose router's answers call a tool."""
    gateway.router.words = WRITTEN
    gateway.router.fields = {"text": "".join(WRITTEN), "content": "I look.", "tool_calls": [CALL]}
    return gateway


def _openai(gateway):
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)


def _conversation(gateway):
    """Return what the router was last asked."""
    return gateway.router.requests[-1].conversation


def _check_result(gateway):
    """Check that the last request goes on with the result of the call."""
    call, result = _conversation(gateway).messages[-2:]
    assert [(each.id, each.name) for each in call.tool_calls] == [("call_0123456789", "weather")]
    assert json.loads(call.tool_calls[0].arguments) == {"city": "Ulm"}
    assert (result.role, result.content, result.tool_call_id) == (
        common_pb2.ROLE_TOOL,
        "19",
        "call_0123456789",
    )


async def test_openais_parse_gives_an_object_of_the_model(gateway):
    gateway.router.fields = {"text": '{"city": "Ulm", "degrees": 19}'}
    async with _openai(gateway) as client:
        answer = await client.chat.completions.parse(model="asd", messages=ASK, response_format=Weather)
        assert answer.choices[0].message.parsed == Weather(city="Ulm", degrees=19)
        response = await client.responses.parse(model="asd", input="How warm?", text_format=Weather)
        assert response.output_parsed == Weather(city="Ulm", degrees=19)
    for each in gateway.router.requests:
        assert set(json.loads(each.sampling.constraint.json_schema)["properties"]) == {"city", "degrees"}


@pytest.mark.parametrize("streamed", [False, True])
async def test_openais_chat_calls_a_tool_and_takes_its_result(calls_a_tool, streamed):
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    async with _openai(calls_a_tool) as client:
        if streamed:
            async with client.chat.completions.stream(model="asd", messages=ASK, tools=[tool]) as stream:
                completion = await stream.get_final_completion()
        else:
            completion = await client.chat.completions.create(model="asd", messages=ASK, tools=[tool])
        (choice,) = completion.choices
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        assert (call.id, call.function.name, call.function.arguments) == (CALL.id, CALL.name, CALL.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "19"}
        turns = [*ASK, choice.message.to_dict(), result]
        await client.chat.completions.create(model="asd", messages=turns, tools=[tool])
    _check_result(calls_a_tool)


@pytest.mark.parametrize("streamed", [False, True])
async def test_openais_responses_call_a_tool_and_take_its_result(calls_a_tool, streamed):
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    async with _openai(calls_a_tool) as client:
        if streamed:
            async with client.responses.stream(model="asd", input=ASK, tools=[tool]) as stream:
                response = await stream.get_final_response()
        else:
            response = await client.responses.create(model="asd", input=ASK, tools=[tool])
        assert response.output_text == "I look."
        (call,) = [each for each in response.output if each.type == "function_call"]
        assert (call.call_id, call.name, call.arguments) == (CALL.id, CALL.name, CALL.arguments)
        said = [each.to_dict() for each in response.output]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "19"}
        await client.responses.create(model="asd", input=[*ASK, *said, result], tools=[tool])
    _check_result(calls_a_tool)


@pytest.mark.parametrize("streamed", [False, True])
async def test_anthropics_messages_use_a_tool_and_take_its_result(calls_a_tool, streamed):
    asked = {
        "model": "asd",
        "max_tokens": 50,
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
    }
    async with anthropic.AsyncAnthropic(base_url=calls_a_tool.url, api_key="x", max_retries=0) as client:
        if streamed:
            async with client.messages.stream(messages=ASK, **asked) as stream:
                message = await stream.get_final_message()
        else:
            message = await client.messages.create(messages=ASK, **asked)
        text, use = message.content
        assert (message.stop_reason, text.text) == ("tool_use", "I look.")
        assert (use.id, use.name, use.input) == (CALL.id, CALL.name, {"city": "Ulm"})
        said = {"role": "assistant", "content": [each.to_dict() for each in message.content]}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "19"}
        await client.messages.create(messages=[*ASK, said, {"role": "user", "content": [result]}], **asked)
    _check_result(calls_a_tool)


async def test_openais_client_reads_log_probabilities(gateway):
    half = common_pb2.TokenDetail(text=b"\xc3", likeliest=[common_pb2.Candidate(text=b"\xc3", logprob=-0.5)])
    scored = common_pb2.TokenChunk(token_ids=[1], logprobs=[-0.5], details=[half])
    gateway.router.fields = {"scored_tokens": scored}
    async with _openai(gateway) as client:
        answer = await client.chat.completions.create(
            model="asd", messages=ASK, logprobs=True, top_logprobs=1
        )
    (token,) = answer.choices[0].logprobs.content
    assert (token.bytes, token.logprob, token.top_logprobs[0].logprob) == ([0xC3], -0.5, -0.5)
    assert gateway.router.requests[0].sampling.top_logprobs == 1
