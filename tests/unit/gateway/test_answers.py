"""Answers and streams in each API's form."""

from __future__ import annotations

import json

import pytest

from asd.values import FinishReason, StageAction
from services.gateway.answers import fingerprint, headers, usage_of
from services.gateway.errors import Problem
from services.gateway.streaming import encode_events
from tests.unit.gateway.samples import CHAT, COMPLETIONS, MESSAGES, RESPONSES, answer, parse, record

STREAMED = {"stream": True}


def stream(api, changes, pieces):
    """Return the events of a stream: (choice, text) or (choice, answer) in order, and then the end."""
    writer = api.writer(parse(api, STREAMED | changes), "id", 99)
    events = writer.begin()
    for index, piece in pieces:
        events += writer.text(index, piece) if isinstance(piece, str) else writer.finish(index, piece)
    return [event.data for event in [*events, *writer.end()]]


def test_a_chat_completion_has_openais_fields_and_asds():
    body = CHAT.answer(parse(CHAT), (answer(),), 99)
    assert (body["id"], body["object"], body["created"], body["model"]) == (
        "chatcmpl-r1",
        "chat.completion",
        99,
        "asd",
    )
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "Forty-two."
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (12, 4, 16)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 8
    details = usage["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (3, 2)
    assert body["asd"]["policy_version"] == "p7"
    assert [each["stage"] for each in body["asd"]["stages"]] == ["small", "large"]
    assert all("text" not in each for each in body["asd"]["stages"])
    json.dumps(body)


def test_choices_count_their_prompt_once_and_costs_add_up():
    body = CHAT.answer(parse(CHAT, {"n": 2}), (answer(), answer(request_id="r2")), 99)
    assert [each["index"] for each in body["choices"]] == [0, 1]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (12, 8)
    assert body["asd"]["cost"] == 7.0
    assert [each["request_id"] for each in body["asd"]["choices"]] == ["r1", "r2"]
    two = COMPLETIONS.answer(parse(COMPLETIONS, {"prompt": ["a", "b"]}), (answer(), answer()), 99)
    assert two["usage"]["prompt_tokens"] == 24


def test_a_prefill_is_not_the_answering_stage():
    stages = (*answer().stages, record("large", 2, StageAction.PREFILL, prompt_tokens=99))
    assert usage_of([answer(stages=stages)]).prompt == 12


def test_headers_say_what_happened_and_hold_nothing_else():
    assert dict(headers([answer(), answer(request_id="r2", p_correct=None)])) == {
        b"x-asd-request-id": b"r1,r2",
        b"x-asd-stage": b"large,large",
        b"x-asd-p-correct": b"0.75,",
        b"x-asd-cost": b"7",
        b"x-asd-policy": b"p7",
    }
    assert b"x-asd-p-correct" not in dict(headers([answer(p_correct=None)] * 2))
    unsendable = dict(headers([answer(stage="a\r\nset-cookie: b", policy_version="naïve")]))
    assert not {b"x-asd-stage", b"x-asd-policy"} & unsendable.keys()


def test_the_fingerprint_changes_with_the_policy_and_with_a_model():
    known = fingerprint([answer()])
    assert fingerprint([answer(text="x", request_id="r9")]) == known
    assert fingerprint([answer(policy_version="p8")]) != known
    other = record("small", 0, StageAction.GENERATE, model="another")
    assert fingerprint([answer(stages=(other, *answer().stages[1:]))]) != known


def test_a_chat_stream_goes_from_the_role_to_the_end():
    first, one, two, last, usage, done = stream(
        CHAT, {"stream_options": {"include_usage": True}}, [(0, "Forty"), (0, "-two."), (0, answer())]
    )
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert [each["choices"][0]["delta"] for each in (one, two)] == [
        {"content": "Forty"},
        {"content": "-two."},
    ]
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert "asd" not in last
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert usage["asd"]["stage"] == "large"
    assert all(each["usage"] is None for each in (first, one, two, last))
    assert {each["id"] for each in (first, one, two, last, usage)} == {"chatcmpl-id"}
    assert done == "[DONE]"


def test_without_usage_the_last_choice_says_what_happened():
    *_, first_end, last_end, done = stream(
        CHAT, {"n": 2}, [(1, "a"), (0, "b"), (1, answer(request_id="r2")), (0, answer())]
    )
    assert (first_end["choices"][0]["index"], last_end["choices"][0]["index"]) == (1, 0)
    assert "asd" not in first_end
    # In order of the choices, not of their ends.
    assert [each["request_id"] for each in last_end["asd"]["choices"]] == ["r1", "r2"]
    assert "usage" not in last_end
    assert done == "[DONE]"


def test_a_completions_stream_has_texts_alone():
    one, last, done = stream(COMPLETIONS, {}, [(0, "Hi"), (0, answer(finish=FinishReason.LENGTH))])
    assert one["choices"] == [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None}]
    assert last["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"


def test_a_responses_stream_has_openais_events_in_order():
    events = stream(RESPONSES, {}, [(0, "Forty"), (0, "-two."), (0, answer())])
    assert [each["type"].removeprefix("response.") for each in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [each["sequence_number"] for each in events] == list(range(10))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Forty-two."
    cut = stream(RESPONSES, {}, [(0, answer(finish=FinishReason.LENGTH))])[-1]
    assert cut["type"] == "response.incomplete"
    assert cut["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_messages_stream_has_anthropics_events_in_order():
    events = stream(MESSAGES, {}, [(0, "Forty"), (0, answer())])
    assert [each["type"] for each in events] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    # Cached tokens are no input tokens there.
    assert (events[-2]["usage"]["input_tokens"], events[-2]["usage"]["cache_read_input_tokens"]) == (4, 8)
    assert events[-2]["asd"]["request_id"] == "r1"


def test_a_message_names_its_stop_sequence_if_there_was_only_one():
    stopped = (answer(finish=FinishReason.STOP),)
    one = MESSAGES.answer(parse(MESSAGES, {"stop_sequences": ["a"]}), stopped, 99)
    two = MESSAGES.answer(parse(MESSAGES, {"stop_sequences": ["a", "b"]}), stopped, 99)
    assert (one["stop_reason"], one["stop_sequence"]) == ("stop_sequence", "a")
    assert (two["stop_reason"], two["stop_sequence"]) == ("stop_sequence", None)


def test_keep_alives_are_events_without_text():
    empty = {
        api: api.writer(parse(api, STREAMED), "id", 99).keep_alive()[0].data
        for api in (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
    }
    assert empty[CHAT]["choices"][0]["delta"] == {}
    assert empty[COMPLETIONS]["choices"][0]["text"] == ""
    assert (empty[RESPONSES]["type"], empty[RESPONSES]["delta"]) == ("response.output_text.delta", "")
    assert empty[MESSAGES] == {"type": "ping"}


def test_a_keep_alive_does_not_reopen_a_choice_that_has_ended():
    writer = CHAT.writer(parse(CHAT, STREAMED | {"n": 3}), "id", 99)
    writer.begin()
    writer.finish(0, answer())
    writer.finish(2, answer())
    assert writer.keep_alive()[0].data["choices"][0]["index"] == 1


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("RESOURCE_EXHAUSTED", "rate_limit_exceeded"),
        ("INVALID_ARGUMENT", "invalid_prompt"),
        ("UNAVAILABLE", "server_error"),
    ],
)
def test_a_failed_response_has_a_code_that_openais_clients_know(kind, code):
    (event,) = RESPONSES.writer(parse(RESPONSES, STREAMED), "id", 99).failed(Problem(kind, "no"))
    assert event.data["response"]["error"]["code"] == code


def test_a_response_repeats_the_callers_labels():
    labels = {
        "metadata": {"a": "b"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    body = RESPONSES.answer(parse(RESPONSES, labels), (answer(),), 99)
    assert {name: body[name] for name in labels} == labels


def test_an_error_in_a_stream_has_the_apis_form():
    problem = Problem("UNAVAILABLE", "large is away")

    def failed(api):
        return [each.data for each in api.writer(parse(api, STREAMED), "id", 99).failed(problem)]

    for api in (CHAT, COMPLETIONS):
        error, done = failed(api)
        assert error["error"]["message"] == "large is away"
        assert done == "[DONE]"
    (event,) = failed(RESPONSES)
    assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
    (event,) = failed(MESSAGES)
    assert (event["type"], event["error"]["type"]) == ("error", "overloaded_error")


def test_events_go_over_the_wire_one_line_each():
    wire = encode_events(MESSAGES.writer(parse(MESSAGES, STREAMED), "id", 99).text(0, "a\nb\r\n\u2028ö"))
    name, data, *rest = wire.decode().split("\n")
    assert name == "event: content_block_delta"
    assert json.loads(data.removeprefix("data: "))["delta"]["text"] == "a\nb\r\n\u2028ö"
    assert rest == ["", ""]
