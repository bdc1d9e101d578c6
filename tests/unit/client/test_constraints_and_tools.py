"""Constraints, tools, predictions and log-probabilities, from the client's values to messages and back."""

from __future__ import annotations

import copy
import pickle

import pytest

from asd import Constraint, Conversation, Message, Request, Tool, ToolCall, Tools
from asd.convert import answer_from, input_from, request_to, sampling_from
from asd.v1 import cascade_pb2, common_pb2

CALL = ToolCall("c1", "weather", '{"city": "Rome"}')
TURNS = (
    Message("user", "Rain in Rome?"),
    Message("assistant", "", (CALL,)),
    Message("tool", "rain", (), "c1"),
)
TOOLS = Tools((Tool("weather", "Tells it.", '{"type": "object"}'),), "named", "weather", single_call=True)


def test_a_conversation_keeps_its_tools_and_calls() -> None:
    message = request_to(Request.of(list(TURNS), tools=TOOLS))
    read = input_from(message)
    assert read == Conversation(TURNS, TOOLS)
    assert read != TURNS, "without its tools it is another one"


def test_a_text_with_tools_becomes_a_conversation() -> None:
    request = Request.of("Rain in Rome?", tools=[Tool("weather")])
    assert request.input == Conversation((Message("user", "Rain in Rome?"),), Tools((Tool("weather"),)))
    assert Request.of("Rain in Rome?", tools=[]).input == "Rain in Rome?"


def test_a_conversation_without_tools_is_its_turns() -> None:
    assert input_from(request_to(Request.of([Message("user", "Hi")]))) == (Message("user", "Hi"),)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(json_schema={"type": "object"}),
        Constraint(json_schema='{"type":"object"}'),
        Constraint(json_schema=True),
        Constraint(regex="[0-9]+"),
        Constraint(choice=("yes", "no")),
    ],
)
def test_a_constraint_is_read_as_it_was_written(constraint: Constraint) -> None:
    message = request_to(Request.of("a", constraint=constraint, top_logprobs=0))
    sampling = sampling_from(message.sampling)
    assert (sampling.constraint, sampling.top_logprobs) == (constraint, 0)


def test_exactly_one_rule_makes_a_constraint() -> None:
    with pytest.raises(TypeError, match="exactly one"):
        Constraint()
    with pytest.raises(TypeError, match="exactly one"):
        Constraint(regex="a", choice=("a",))


def test_a_prediction_and_the_leave_to_switch_are_sent() -> None:
    message = request_to(Request.of("a", prediction="42", allow_switch=True))
    assert (message.prediction, message.allow_switch) == ("42", True)


def test_an_answer_with_calls_is_a_turn_of_the_conversation() -> None:
    call = common_pb2.ToolCall(id="c1", name="weather", arguments="{}")
    answer = answer_from(
        cascade_pb2.GenerateResponse(text="Let me see. <call>", content="Let me see.", tool_calls=[call])
    )
    assert answer.message == Message("assistant", "Let me see.", (ToolCall("c1", "weather", "{}"),))
    assert answer_from(cascade_pb2.GenerateResponse(text="42")).message == Message("assistant", "42")


def test_log_probabilities_come_with_the_bytes_of_their_tokens() -> None:
    detail = common_pb2.TokenDetail(
        text=b"\xc3", likeliest=[common_pb2.Candidate(token_id=7, text=b"\xc3", logprob=-0.5)]
    )
    chunk = common_pb2.TokenChunk(token_ids=[7], logprobs=[-0.5], details=[detail])
    scored = answer_from(cascade_pb2.GenerateResponse(scored_tokens=chunk)).scored_tokens
    assert scored is not None
    assert (scored.details[0].text, scored.details[0].likeliest[0].logprob) == (b"\xc3", -0.5)
    assert answer_from(cascade_pb2.GenerateResponse()).scored_tokens is None


def test_a_conversation_can_be_copied_with_its_tools() -> None:
    conversation = Conversation(TURNS, TOOLS)
    assert copy.deepcopy(conversation) == conversation
    assert pickle.loads(pickle.dumps(conversation)) == conversation
