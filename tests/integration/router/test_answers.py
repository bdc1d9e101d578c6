"""Whole answers through a real router between real servers."""

from __future__ import annotations

from zlib import crc32

import pytest

from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from tests.limits import CALL_S

ASK = cascade_pb2.GenerateRequest(prompt="2 + 2?", session_id="s-1")


async def test_early_stop_answers_from_the_planned_stage(world):
    w = await world(policy=world.policy())
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.text == "one two three"
    assert (response.stage, response.stage_index) == ("small", 0)
    assert response.finish_reason == common_pb2.FINISH_REASON_EOS
    assert response.plan_source == cascade_pb2.PLAN_SOURCE_POLICY
    assert response.policy_version == "v7"
    assert response.p_correct == 0.9
    assert response.cost == pytest.approx(1.6)
    assert list(response.token_ids) == [crc32(piece) % 50_000 for piece in (b"one", b" two", b" three")]
    assert [record.stage for record in response.stages] == ["small"]
    assert len(response.request_id) == 32
    assert response.trace_id == ""
    assert not w.stages["medium"].calls
    assert w.stages["small"].requests[0].session_id == "s-1"


async def test_escalation_verifies_the_draft(world):
    small = world.stage("small", pieces=(b"one", b" two", b" four"))
    medium = world.stage("medium")
    large = world.stage("large")
    w = await world(small, medium, large, policy=world.policy(script={"small": "large"}))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.text == "one two three"
    assert [r.stage for r in response.stages] == ["small", "large"]
    assert [r.action for r in response.stages] == [
        common_pb2.STAGE_ACTION_GENERATE,
        common_pb2.STAGE_ACTION_VERIFY,
    ]
    first, last = response.stages
    assert (first.decision, first.reason, first.p_correct, first.text) == (
        policy_pb2.DECISION_ACTION_ESCALATE,
        policy_pb2.DECISION_REASON_VALUE,
        0.5,
        "one two four",
    )
    assert (last.usage.proposed_tokens, last.usage.accepted_tokens, last.usage.forward_passes) == (4, 2, 3)
    # A scoring pass over 4 tokens and 2 further passes, of the 4 that the answer takes: 8.8 * 3.088 / 4.
    assert last.cost == pytest.approx(6.7936)
    assert response.cost == pytest.approx(1.6 + 6.7936)
    draft = large.requests[0].draft
    assert draft.text == "one two four"
    assert list(draft.token_ids) == [crc32(piece) % 50_000 for piece in (b"one", b" two", b" four")]
    assert draft.tokenizer_fingerprint == "f" * 64
    assert draft.finish_reason == common_pb2.FINISH_REASON_EOS
    judged = w.policy.decisions[1]
    assert (judged.stage, judged.verification.proposed_tokens, judged.verification.accepted_tokens) == (
        "large",
        4,
        2,
    )
    assert list(judged.verification.ranks) == [0, 0, 3, 3]
    assert judged.spent_cost == pytest.approx(1.6 + 6.7936)
    assert list(w.policy.decisions[0].draft.logprobs) == [-0.25] * 3
    assert list(judged.cascade) == ["small", "medium", "large"]


async def test_sampled_answers_are_verified_under_one_seed(world):
    w = await world(policy=world.policy(script={"small": "medium"}))
    for sampling in (common_pb2.Sampling(temperature=0.7, seed=3), common_pb2.Sampling(temperature=0.7)):
        response = await w.stub.Generate(
            cascade_pb2.GenerateRequest(prompt="x", sampling=sampling), timeout=CALL_S
        )
        assert response.stages[1].action == common_pb2.STAGE_ACTION_VERIFY
        seeds = {w.stages[name].requests[-1].sampling.seed for name in ("small", "medium")}
        assert len(seeds) == 1
        assert w.stages["small"].requests[-1].sampling.HasField("seed")
        # A seed that the router drew may be replaced by a stage.
        assert w.stages["medium"].requests[-1].seed_is_free is not sampling.HasField("seed")


async def test_fixed_stage_is_asked_without_the_policy(world):
    w = await world(policy=world.policy())
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="x", stage="large"), timeout=CALL_S)
    assert response.stage == "large"
    assert response.plan_source == cascade_pb2.PLAN_SOURCE_FIXED
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_FIXED_STAGE
    assert not response.HasField("p_correct")
    assert not w.policy.plans
    assert not w.policy.decisions


async def test_objective_conversation_and_acceptance_are_passed_on(world):
    w = await world(policy=world.policy(script={"small": "medium"}))
    request = cascade_pb2.GenerateRequest(
        conversation=common_pb2.Conversation(
            messages=[
                common_pb2.Message(role=common_pb2.ROLE_SYSTEM, content="be brief"),
                common_pb2.Message(role=common_pb2.ROLE_USER, content="hi"),
            ]
        ),
        sampling=common_pb2.Sampling(max_new_tokens=9, stop=["\n"]),
        objective=common_pb2.Objective(
            max_cost=5, max_latency_ms=900, min_quality=0.5, preference=common_pb2.PREFERENCE_BEST
        ),
        acceptance=common_pb2.Acceptance(mode=common_pb2.ACCEPTANCE_MODE_TOLERANT, threshold=0.5),
    )
    await w.stub.Generate(request, timeout=CALL_S)
    assert w.policy.plans[0].objective == request.objective
    assert w.policy.decisions[0].objective == request.objective
    assert w.policy.plans[0].conversation == request.conversation
    assert w.policy.decisions[0].conversation == request.conversation
    assert w.stages["small"].requests[0].conversation == request.conversation
    assert w.stages["small"].requests[0].sampling == request.sampling
    assert w.stages["medium"].requests[0].sampling == request.sampling
    assert w.stages["medium"].requests[0].acceptance == request.acceptance
    lambda_request = cascade_pb2.GenerateRequest(
        prompt="x", objective=common_pb2.Objective(**{"lambda": 0.0})
    )
    await w.stub.Generate(lambda_request, timeout=CALL_S)
    assert w.policy.plans[1].objective == lambda_request.objective


async def test_describe_tells_who_is_there(world):
    w = await world(policy=world.policy(), dead=("large",))
    response = await w.stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_S)
    assert [(s.stage, s.available, s.cost, s.engine, s.context_length) for s in response.stages] == [
        ("small", True, 1.6, "fake", 512),
        ("medium", True, 4.2, "fake", 512),
        ("large", False, 8.8, "", 0),
    ]
    assert response.stages[0].queue_depth == 1
    assert response.policy.policy_version == "v7"
    assert list(response.static_plan) == ["medium"]
    await w.stop("policy")
    assert not (await w.stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_S)).HasField("policy")
