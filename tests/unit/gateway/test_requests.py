"""Bodies of every API as requests of the contract."""

from __future__ import annotations

import pytest

from asd.values import Message, Objective, Preference, Request, Sampling
from services.gateway.models import Models
from services.gateway.request import api_field
from tests.unit.gateway.samples import CHAT, COMPLETIONS, MESSAGES, RESPONSES, USER, parse

HI = (Message("user", "Hi"),)


def only(call):
    (request,) = call.requests
    return request


def test_a_least_body_asks_for_what_the_contract_does_by_default():
    for api in (CHAT, RESPONSES):
        assert only(parse(api)) == Request(HI)
    assert only(parse(COMPLETIONS)) == Request("Hi")
    assert only(parse(MESSAGES)) == Request(HI, Sampling(9))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("asd", Request(HI)),
        ("asd-fastest", Request(HI, objective=Objective(preference=Preference.FASTEST))),
        ("asd-best", Request(HI, objective=Objective(preference=Preference.BEST))),
        ("asd-exact", Request(HI, chain=("small", "medium", "large"))),
        ("medium", Request(HI, stage="medium")),
    ],
)
def test_a_model_names_an_objective_or_stages(model, expected):
    assert only(parse(CHAT, {"model": model})) == expected


def test_the_exact_model_of_a_single_stage_is_that_stage():
    assert Models(["alone"]).route("asd-exact").stage == "alone"


def test_roles_and_parts_of_text_become_turns():
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "In"}, {"type": "text", "text": "French."}],
        },
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Salut", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "Encore"},
    ]
    assert only(parse(CHAT, {"messages": turns})).input == (
        Message("system", "Be brief."),
        Message("system", "In\nFrench."),
        Message("user", "Hi"),
        Message("assistant", "Salut"),
        Message("user", "Encore"),
    )


def test_an_answer_of_the_responses_api_can_be_sent_back():
    said = {
        "id": "msg_1",
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Salut", "annotations": [{}], "logprobs": []}],
    }
    call = parse(RESPONSES, {"input": [USER, said, USER], "instructions": "Be brief."})
    assert [turn.content for turn in only(call).input] == ["Be brief.", "Hi", "Salut", "Hi"]


def test_a_system_text_comes_before_the_messages():
    call = parse(MESSAGES, {"system": [{"type": "text", "text": "Be brief.", "cache_control": {}}]})
    assert only(call).input == (Message("system", "Be brief."), *HI)


def test_sampling_is_passed_on():
    given = {"temperature": 0.5, "top_p": 0.25, "seed": 7, "stop": ["a", "b"], "max_tokens": 5}
    expected = Sampling(5, 0.5, 0.25, 7, ("a", "b"))
    assert only(parse(CHAT, given)).sampling == expected
    assert only(parse(COMPLETIONS, given)).sampling == expected
    newer = {name: value for name, value in given.items() if name != "max_tokens"}
    assert only(parse(CHAT, newer | {"max_completion_tokens": 5})).sampling == expected
    assert only(parse(CHAT, {"stop": "a", "seed": -1})).sampling == Sampling(seed=2**64 - 1, stop=("a",))


def test_choices_have_seeds_that_differ_and_begin_with_the_callers():
    seeds = [each.sampling.seed for each in parse(CHAT, {"n": 8, "seed": 2**64 - 1}).requests]
    assert seeds[0] == 2**64 - 1
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seeds == [each.sampling.seed for each in parse(CHAT, {"n": 8, "seed": 2**64 - 1}).requests]
    # The router draws a seed for each.
    assert [each.sampling.seed for each in parse(CHAT, {"n": 2}).requests] == [None, None]


def test_choices_of_a_prompt_follow_each_other():
    call = parse(COMPLETIONS, {"prompt": ["a", "b"], "n": 2})
    assert [each.input for each in call.requests] == ["a", "a", "b", "b"]


def test_an_objective_comes_from_headers_and_the_body_wins():
    headers = {"x-asd-lambda": "5", "x-asd-max-cost": "9", "x-asd-task": "math", "x-asd-session-id": "s"}
    request = only(parse(CHAT, {"asd": {"lambda": 6, "min_quality": 0.5, "task": None}}, headers))
    assert request.objective == Objective(6.0, 9.0, None, 0.5)
    assert (request.task, request.session_id) == ("math", "s")


@pytest.mark.parametrize(
    ("api", "changes", "headers", "field", "param"),
    [
        (CHAT, {}, {}, "conversation.messages[3].content", "messages[3].content"),
        (CHAT, {}, {}, "request.sampling.max_new_tokens", "max_tokens"),
        (CHAT, {"max_completion_tokens": 5}, {}, "sampling.max_new_tokens", "max_completion_tokens"),
        (CHAT, {}, {}, "sampling.stop[1]", "stop"),
        (CHAT, {"asd": {"max_cost": 5}}, {}, "objective.max_cost", "asd.max_cost"),
        (CHAT, {}, {"x-asd-max-cost": "5"}, "objective.max_cost", "x-asd-max-cost"),
        (CHAT, {}, {}, "chain[1]", "model"),
        (COMPLETIONS, {}, {}, "prompt", "prompt"),
        # Instructions and the system's text come before the messages, so places within them would mislead.
        (RESPONSES, {}, {}, "conversation.messages[3].content", "input"),
        (MESSAGES, {}, {}, "conversation.messages[3].content", "messages"),
        (RESPONSES, {}, {}, "sampling.max_new_tokens", "max_output_tokens"),
        (MESSAGES, {}, {}, "sampling.stop", "stop_sequences"),
        (CHAT, {}, {}, "acceptance.mode", ""),
    ],
)
def test_a_field_of_the_contract_has_the_apis_name(api, changes, headers, field, param):
    assert api_field(parse(api, changes, headers).fields, field) == param
