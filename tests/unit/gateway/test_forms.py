"""Constraints, log-probabilities and predictions of the APIs."""

from __future__ import annotations

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from asd.values import Candidate, Constraint, StageAction, TokenDetail, Tokens
from services.gateway.request import api_field
from tests.unit.gateway.samples import CHAT, COMPLETIONS, LEAST, MESSAGES, RESPONSES, answer, parse, record

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OF_SCHEMA = Constraint(json_schema=SCHEMA)
OF_OBJECTS = Constraint(json_schema={"type": "object"})
TYPED = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("api", "changes", "constraint", "name"),
    [
        (CHAT, {"response_format": {"type": "text"}}, None, ""),
        (CHAT, {"response_format": {"type": "json_object"}}, OF_OBJECTS, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True,
          "schema": SCHEMA}}}, OF_SCHEMA, "response_format"),
        (RESPONSES, {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, None, ""),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}, OF_OBJECTS, "text.format"),
        (RESPONSES, {"text": {"format": TYPED | {"name": "a", "strict": True}}}, OF_SCHEMA, "text.format"),
        (MESSAGES, {"output_config": {"format": TYPED}}, OF_SCHEMA, "output_config.format"),
        *((api, {"asd": {"regex": "a+"}}, Constraint(regex="a+"), "asd.regex") for api in LEAST),
        *((api, {"asd": {"choice": ["a"]}}, Constraint(choice=("a",)), "asd.choice") for api in LEAST),
    ],
)  # fmt: skip
def test_the_form_of_an_answer_is_a_constraint(api, changes, constraint, name):
    call = parse(api, changes)
    assert call.requests[0].sampling.constraint == constraint
    if name:
        assert api_field(call.fields, "request.sampling.constraint.json_schema") == name


def test_a_constraint_may_stand_beside_tools_that_are_not_to_be_called():
    tools = {"tools": [{"type": "function", "function": {"name": "now"}}], "tool_choice": "none"}
    changes = tools | {"response_format": {"type": "json_object"}}
    assert parse(CHAT, changes).requests[0].sampling.constraint == OF_OBJECTS


def test_a_refused_field_of_a_tool_has_the_parameters_name():
    call = parse(CHAT, {"tools": [{"type": "function", "function": {"name": "now"}}]})
    assert api_field(call.fields, "conversation.tools.tools[0].name") == "tools"
    assert api_field(call.fields, "conversation.tools.choice") == "tool_choice"
    assert api_field(call.fields, "conversation.messages[1].tool_call_id") == "messages[1].tool_call_id"


@pytest.mark.parametrize(
    ("api", "changes", "count"),
    [
        (CHAT, {}, None),
        (CHAT, {"logprobs": False, "top_logprobs": 0}, None),
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20),
        (COMPLETIONS, {"logprobs": 0}, 0),
        (COMPLETIONS, {"logprobs": 5}, 5),
        (RESPONSES, {}, None),
        (RESPONSES, {"top_logprobs": 3}, 3),
        (RESPONSES, {"include": ["message.output_text.logprobs"]}, 0),
        (RESPONSES, {"include": []}, None),
    ],
)
def test_log_probabilities_are_asked_for(api, changes, count):
    assert parse(api, changes).requests[0].sampling.top_logprobs == count


# "ü!" in two tokens, of which the first one ends within the character.
SCORED = Tokens(
    (7, 8),
    "ü!",
    (-0.5, -0.25),
    (
        TokenDetail(b"\xc3", (Candidate(7, b"\xc3", -0.5), Candidate(9, b"no", -1.0))),
        TokenDetail(b"\xbc!", (Candidate(8, b"\xbc!", -0.25),)),
    ),
)
CHAT_SCORES = [
    {
        "token": "\ufffd",
        "bytes": [0xC3],
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "\ufffd", "bytes": [0xC3], "logprob": -0.5},
            {"token": "no", "bytes": [0x6E, 0x6F], "logprob": -1.0},
        ],
    },
    {
        "token": "\ufffd!",
        "bytes": [0xBC, 0x21],
        "logprob": -0.25,
        "top_logprobs": [{"token": "\ufffd!", "bytes": [0xBC, 0x21], "logprob": -0.25}],
    },
]
OLD_SCORES = {
    "tokens": ["\ufffd", "\ufffd!"],
    "token_logprobs": [-0.5, -0.25],
    "top_logprobs": [{"\ufffd": -0.5, "no": -1.0}, {"\ufffd!": -0.25}],
    # The character belongs to the token that completes it.
    "text_offset": [0, 0],
}


def test_an_answer_has_its_tokens_log_probabilities():
    scored = answer("ü!", scored_tokens=SCORED)
    asks = {
        CHAT: {"logprobs": True, "top_logprobs": 2},
        COMPLETIONS: {"logprobs": 2},
        RESPONSES: {"top_logprobs": 2},
    }
    bodies = {api: api.answer(parse(api, asks[api]), (scored,), 99) for api in asks}
    assert bodies[CHAT]["choices"][0]["logprobs"] == {"content": CHAT_SCORES, "refusal": None}
    assert bodies[COMPLETIONS]["choices"][0]["logprobs"] == OLD_SCORES
    assert bodies[RESPONSES]["output"][0]["content"][0]["logprobs"] == CHAT_SCORES
    for api, kind in {CHAT: ChatCompletion, COMPLETIONS: Completion, RESPONSES: Response}.items():
        TypeAdapter(kind).validate_python(bodies[api], strict=True)


def _parts():
    yield Tokens(SCORED.token_ids[:1], "", SCORED.logprobs[:1], SCORED.details[:1])
    yield Tokens(SCORED.token_ids[1:], "ü!", SCORED.logprobs[1:], SCORED.details[1:])


def _events(api, changes):
    writer = api.writer(parse(api, {"stream": True} | changes), "id", 99)
    events = writer.begin()
    for each in _parts():
        events += writer.text(0, each)
    return [each.data for each in [*events, *writer.finish(0, answer("ü!", scored_tokens=SCORED))]]


def test_a_stream_has_the_log_probabilities_of_each_piece():
    events = _events(CHAT, {"logprobs": True})
    parts = [each["choices"][0]["logprobs"] for each in events]
    assert [part["content"] for part in parts if part] == [CHAT_SCORES[:1], CHAT_SCORES[1:]]
    for each in events:
        TypeAdapter(ChatCompletionChunk).validate_python(each, strict=True)
    old = [each["choices"][0]["logprobs"] for each in _events(COMPLETIONS, {"logprobs": 2})]
    assert [part["text_offset"] for part in old if part] == [[0], [0]]
    events = _events(RESPONSES, {"top_logprobs": 2})
    deltas = [each["logprobs"] for each in events if each["type"] == "response.output_text.delta"]
    assert deltas == [CHAT_SCORES[:1], CHAT_SCORES[1:]]
    (done,) = [each["logprobs"] for each in events if each["type"] == "response.output_text.done"]
    assert done == CHAT_SCORES
    for each in events:
        TypeAdapter(ResponseStreamEvent).validate_python(each, strict=True)


@pytest.mark.parametrize("content", ["As before.", [{"type": "text", "text": "As before."}]])
def test_a_prediction_is_asked_and_its_tokens_are_told(content):
    call = parse(CHAT, {"prediction": {"type": "content", "content": content}})
    assert call.requests[0].prediction == "As before."
    verified = record("small", 0, StageAction.VERIFY, proposed_tokens=9, accepted_tokens=7)
    usage = CHAT.answer(call, (answer(stages=(verified, answer().stages[1])),), 99)["usage"]
    details = usage["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (7, 2)


def test_a_switch_of_stages_is_allowed_in_the_body_or_a_header():
    assert not parse(CHAT).requests[0].allow_switch
    assert parse(CHAT, {"model": "small", "asd": {"allow_switch": True}}).requests[0].allow_switch
    assert parse(CHAT, headers={"x-asd-allow-switch": "true"}).requests[0].allow_switch
