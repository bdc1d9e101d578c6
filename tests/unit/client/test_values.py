"""The text of a stream against a list of chunks, and values against the messages of the contract."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asd import convert
from asd.errors import InvalidRequest
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from asd.values import (
    Acceptance,
    AcceptanceMode,
    Answer,
    Committed,
    Drafted,
    Failure,
    Message,
    Objective,
    Preference,
    Request,
    Revised,
    Role,
    Sampling,
    StageStarted,
    StreamedText,
    Tokens,
)
from services.router import convert as router_convert


def _tokens(text: str, count: int = 1) -> Tokens:
    return Tokens(tuple(range(count)), text)


def test_a_revised_draft_is_replaced_by_what_is_committed():
    text = StreamedText()
    shown = []
    for event in (
        StageStarted("small", 0, "generate"),
        Drafted(_tokens("é = 4", 3)),
        Drafted(_tokens(", so 5", 2)),
        StageStarted("medium", 1, "verify"),
        Committed(3),
        Revised(3, 6),
        Committed(4, _tokens(", so 6")),
    ):
        text = text.after(event)
        shown.append((text.final, text.draft))
    assert shown == [
        ("", ""),
        ("", "é = 4"),
        ("", "é = 4, so 5"),
        ("", "é = 4, so 5"),
        ("é = 4", ", so 5"),
        ("é = 4", ""),
        ("é = 4, so 6", ""),
    ]


def test_a_commit_inside_a_chunk_waits_for_its_end():
    text = StreamedText().after(Drafted(_tokens("ab", 2))).after(Drafted(_tokens("cd", 2)))
    assert text.after(Committed(3)).final == "ab"
    assert text.after(Committed(4)).final == "abcd"


_CHUNK = st.tuples(st.text("aé🎈", max_size=3), st.integers(1, 3))


@given(st.lists(st.one_of(_CHUNK, st.tuples(st.sampled_from(["commit", "revise"]), st.integers(0, 5)))))
@example([("éé", 1), ("revise", 0), ("a", 1), ("b", 1), ("commit", 1)])
def test_streamed_text_equals_the_chunks_that_stand(steps):
    text, chunks, committed = StreamedText(), [], 0
    for what, number in steps:
        if what == "commit":
            committed = min(max(committed, number), len(chunks))
            event = Committed(sum(count for _, count in chunks[:committed]))
        elif what == "revise":
            del chunks[max(committed, number) :]
            event = Revised(
                sum(count for _, count in chunks), len("".join(each for each, _ in chunks).encode())
            )
        else:
            chunks.append((what, number))
            event = Drafted(_tokens(what, number))
        text = text.after(event)
        assert text.text == "".join(each for each, _ in chunks)
        assert text.final == "".join(each for each, _ in chunks[:committed])
        assert text.final + text.draft == text.text


_FULL = Request(
    (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Ho"),
        Message("user", "é?"),
    ),
    Sampling(7, 0.5, 0.25, 2**64 - 1, ("\n", "END")),
    Objective(None, 3.5, 250.0, 0.75, "best"),
    Acceptance("tolerant", 0.5),
    "session",
    "medium",
    task="math",
)


@pytest.mark.parametrize(
    ("enumeration", "proto", "prefix"),
    [
        (convert.ROLES, common_pb2.Role, "ROLE_"),
        (convert.PREFERENCES, common_pb2.Preference, "PREFERENCE_"),
        (convert.ACCEPTANCE_MODES, common_pb2.AcceptanceMode, "ACCEPTANCE_MODE_"),
        (convert.FINISH_REASONS, common_pb2.FinishReason, "FINISH_REASON_"),
        (convert.STAGE_ACTIONS, common_pb2.StageAction, "STAGE_ACTION_"),
        (convert.DECISION_ACTIONS, policy_pb2.DecisionAction, "DECISION_ACTION_"),
        (convert.DECISION_REASONS, policy_pb2.DecisionReason, "DECISION_REASON_"),
        (convert.PLAN_SOURCES, cascade_pb2.PlanSource, "PLAN_SOURCE_"),
    ],
)
def test_enumerations_have_the_contracts_members(enumeration, proto, prefix):
    names = {number: name.removeprefix(prefix).lower() for name, number in proto.items() if number != 0}
    assert enumeration.members == names
    assert enumeration.numbers == {name: number for number, name in names.items()}


def test_the_router_reads_every_field_of_a_request():
    read = router_convert.request_from(convert.request_to(_FULL), "id")
    assert read.input == (
        Message(Role.SYSTEM, "Be brief."),
        Message(Role.USER, "Hi"),
        Message(Role.ASSISTANT, "Ho"),
        Message(Role.USER, "é?"),
    )
    sampling, objective = read.sampling, read.objective
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.25)
    assert (sampling.seed, sampling.stop) == (2**64 - 1, ("\n", "END"))
    assert (objective.quality_value, objective.max_cost, objective.max_latency_ms) == (None, 3.5, 250.0)
    assert (objective.min_quality, objective.preference) == (0.75, Preference.BEST)
    assert (read.acceptance.mode, read.acceptance.threshold) == (AcceptanceMode.TOLERANT, 0.5)
    assert (read.session_id, read.stage, read.task) == ("session", "medium", "math")


def test_what_a_request_leaves_open_stays_open():
    message = convert.request_to(Request("Hi", objective=Objective(quality_value=0.0)))
    assert message == cascade_pb2.GenerateRequest(
        prompt="Hi", sampling=common_pb2.Sampling(), objective=common_pb2.Objective(**{"lambda": 0.0})
    )


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request("\udcff"), "prompt"),
        (Request((Message("user", "a"), Message("user", "\udcff"))), "conversation.messages[1].content"),
        (Request("a", Sampling(max_new_tokens=-1)), "sampling.max_new_tokens"),
        (Request("a", Sampling(seed=2**64)), "sampling.seed"),
        (Request("a", Sampling(stop=("x", "\udcff"))), "sampling.stop[1]"),
        (Request("a", session_id="\udcff"), "session_id"),
        (Request("a", task="\udcff"), "task"),
        (Request("a", stage="\udcff"), "stage"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_field(request_, field):
    with pytest.raises(InvalidRequest) as refused:
        convert.request_to(request_)
    assert refused.value.field == field


_RESPONSE = cascade_pb2.GenerateResponse(
    request_id="r1",
    text="42",
    token_ids=[4, 2],
    tokenizer_fingerprint="f" * 64,
    finish_reason=common_pb2.FINISH_REASON_STOP,
    stage="medium",
    stage_index=1,
    p_correct=0.0,
    cost=5.5,
    latency_ms=12.5,
    policy_ms=0.5,
    plan_source=cascade_pb2.PLAN_SOURCE_POLICY,
    policy_version="v7",
    trace_id="t" * 32,
    out_of_family=True,
    stages=[
        cascade_pb2.StageRecord(
            stage="small",
            stage_index=0,
            action=common_pb2.STAGE_ACTION_GENERATE,
            usage=common_pb2.Usage(prompt_tokens=3, completion_tokens=2, forward_passes=4),
            timing=common_pb2.StageTiming(queue_ms=1, prefill_ms=2, decode_ms=3, total_ms=6),
            latency_ms=7,
            cost=1.5,
            p_correct=0.25,
            p_correct_stderr=0.125,
            decision=policy_pb2.DECISION_ACTION_ESCALATE,
            reason=policy_pb2.DECISION_REASON_VALUE,
            text="41",
        ),
        cascade_pb2.StageRecord(
            stage="medium",
            stage_index=1,
            action=common_pb2.STAGE_ACTION_VERIFY,
            usage=common_pb2.Usage(proposed_tokens=3, accepted_tokens=1),
            decision=policy_pb2.DECISION_ACTION_STOP,
            reason=policy_pb2.DECISION_REASON_LAST_STAGE,
            text="42",
            model="medium/math",
            adapted=True,
        ),
    ],
)


def test_an_answer_has_every_field_of_the_message():
    answer = convert.answer_from(_RESPONSE)
    first, second = answer.stages
    assert asdict(replace(answer, stages=())) == {
        "request_id": "r1",
        "text": "42",
        "token_ids": (4, 2),
        "tokenizer_fingerprint": "f" * 64,
        "finish_reason": "stop",
        "stage": "medium",
        "stage_index": 1,
        "p_correct": 0.0,
        "cost": 5.5,
        "latency_ms": 12.5,
        "policy_ms": 0.5,
        "plan_source": "policy",
        "policy_version": "v7",
        "trace_id": "t" * 32,
        "out_of_family": True,
        "stages": (),
        "scored_tokens": None,
        "tool_calls": (),
        "content": "42",
    }
    assert (first.action, first.decision, first.reason) == ("generate", "escalate", "value")
    assert (first.p_correct, first.p_correct_stderr, first.latency_ms, first.cost) == (0.25, 0.125, 7.0, 1.5)
    assert (first.prompt_tokens, first.completion_tokens, first.forward_passes) == (3, 2, 4)
    assert (first.queue_ms, first.prefill_ms, first.decode_ms, first.text) == (1.0, 2.0, 3.0, "41")
    assert (second.action, second.decision, second.reason) == ("verify", "stop", "last_stage")
    assert (second.proposed_tokens, second.accepted_tokens, second.p_correct) == (3, 1, None)
    assert (first.model, first.adapted) == ("", False)
    assert (second.model, second.adapted) == ("medium/math", True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"chain": "small"}, "chain is a tuple of strings, not 'small'"),
        ({"chain": ("small", 2)}, "chain is a tuple of strings"),
        ({"stage": 3}, "stage is a string, not 3"),
        ({"task": None}, "task is a string, not None"),
    ],
)
def test_requests_of_other_types_name_their_field(fields, words):
    with pytest.raises(TypeError, match=words):
        Request("hi", **fields)


def test_an_enum_of_a_newer_server_becomes_its_number():
    answer = convert.answer_from(cascade_pb2.GenerateResponse(plan_source=99))
    assert (answer.plan_source, answer.finish_reason) == ("99", "unspecified")


def test_a_batch_item_is_an_answer_or_a_failure():
    answered = cascade_pb2.GenerateBatchResponse(index=1, response=_RESPONSE)
    assert isinstance(convert.batch_item_from(answered).outcome, Answer)
    failed = cascade_pb2.GenerateBatchResponse(
        index=2, error=cascade_pb2.BatchError(code=3, message="no", field="prompt")
    )
    item = convert.batch_item_from(failed)
    assert (item.index, item.outcome) == (2, Failure(3, "no", "prompt"))
    full = cascade_pb2.BatchError(code=8, message="full", retry_after_ms=1500.0)
    refused = convert.batch_item_from(cascade_pb2.GenerateBatchResponse(error=full)).outcome
    assert refused == Failure(8, "full", "", 1.5)


def test_an_event_of_a_newer_server_is_passed_over():
    assert convert.event_from(cascade_pb2.GenerateStreamResponse()) is None


def test_a_report_repeats_what_the_policy_said():
    known = replace(convert.answer_from(_RESPONSE), out_of_family=False)
    message = convert.report_to(known, correct=True)
    assert message == policy_pb2.ReportRequest(
        request_id="r1", stage="medium", p_correct=0.0, policy_version="v7", correct=True
    )


def test_an_answer_that_no_policy_judged_cannot_be_reported():
    answer = replace(
        convert.answer_from(_RESPONSE), p_correct=None, plan_source="static", out_of_family=False
    )
    with pytest.raises(InvalidRequest, match="static") as refused:
        convert.report_to(answer, correct=True)
    assert refused.value.field == "p_correct"


def test_an_answer_without_a_predicted_quality_cannot_be_reported():
    message = cascade_pb2.GenerateResponse(plan_source="PLAN_SOURCE_POLICY", out_of_family=True)
    with pytest.raises(InvalidRequest, match="no predicted quality") as refused:
        convert.report_to(convert.answer_from(message), correct=True)
    assert refused.value.field == "p_correct"


def test_an_option_that_there_is_none_of_is_named_beside_those_there_are():
    with pytest.raises(TypeError, match=r"no option nonsense: .*min_quality"):
        Request.of("x", nonsense=1)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request.of("x", preference="quickest"), "objective.preference"),
        (Request.of("x", acceptance=Acceptance("loose")), "acceptance.mode"),
        (Request.of([Message("narrator", "x")]), "conversation.messages[0].role"),
    ],
)
def test_a_word_that_the_contract_does_not_have_is_refused_with_those_it_has(request_, field):
    with pytest.raises(InvalidRequest, match="is one of") as refused:
        convert.request_to(request_)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_cost": "3"}, "max_cost"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"seed": True}, "seed"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_a_value_of_another_type_is_named(options, name):
    with pytest.raises(TypeError, match=f"^{name} is a "):
        Request.of("x", **options)


@pytest.mark.parametrize("question", [None, 3, [{"role": "user", "content": "x"}]])
def test_what_is_no_question_is_refused_before_a_call(question):
    with pytest.raises(TypeError, match="a question is"):
        Request.of(question)
