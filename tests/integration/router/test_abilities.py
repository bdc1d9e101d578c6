"""Stages are asked only for what they say they can do; a caller's own draft is verified by the first one."""

from __future__ import annotations

import grpc
import pytest

from asd.errors import InvalidRequest
from asd.transport.status import from_rpc_error
from asd.v1 import cascade_pb2, common_pb2
from tests.limits import CALL_S

CONSTRAINED = common_pb2.Sampling(constraint=common_pb2.Constraint(regex="[a-z ]+"))


def ask(**fields) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", **fields)


async def test_a_stage_that_keeps_no_constraints_is_not_asked(world):
    policy = world.policy(script={"small": "medium"})
    w = await world(world.stage("small"), world.stage("medium", constrains=True), policy=policy)
    response = await w.stub.Generate(ask(sampling=CONSTRAINED), timeout=CALL_S)
    assert response.stage == "medium"
    assert w.stages["small"].calls == []
    assert w.stages["medium"].requests[-1].sampling == CONSTRAINED
    # What the stages can do is asked once.
    await w.stub.Generate(ask(sampling=CONSTRAINED), timeout=CALL_S)
    assert [stage.statuses for stage in w.stages.values()] == [1, 1]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": CONSTRAINED}, "sampling.constraint"),
        ({"sampling": common_pb2.Sampling(top_logprobs=1)}, "sampling.top_logprobs"),
    ],
)
async def test_where_no_stage_can_the_request_is_refused(world, fields, field):
    w = await world(world.stage("small"), world.stage("medium"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await w.stub.Generate(ask(**fields), timeout=CALL_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(refused.value).field == field
    assert [stage.calls for stage in w.stages.values()] == [[], []]


async def test_the_first_stage_verifies_what_the_caller_expects(world):
    policy = world.policy(script={"small": "medium"})
    w = await world(world.stage("small"), world.stage("medium"), policy=policy)
    response = await w.stub.Generate(ask(prediction="one two"), timeout=CALL_S)
    small, medium = (w.stages[name] for name in ("small", "medium"))
    assert (small.calls, medium.calls) == (["verify"], ["verify"])
    first, second = small.requests[0], medium.requests[0]
    assert (first.draft.text, list(first.draft.token_ids), first.is_prediction) == ("one two", [], True)
    assert (second.draft.text, second.is_prediction) == (small.text, False)
    assert response.text == medium.text
    assert response.stages[0].action == common_pb2.STAGE_ACTION_VERIFY
    # The policy was fitted to drafts of stages.
    assert not policy.decisions[0].HasField("verification")


async def test_a_chain_begins_with_what_the_caller_expects(world):
    w = await world(world.stage("small"), world.stage("medium"))
    await w.stub.Generate(ask(prediction="one two", chain=["small", "medium"]), timeout=CALL_S)
    assert [w.stages[name].calls for name in ("small", "medium")] == [["verify"], ["verify"]]
    assert w.stages["small"].requests[0].is_prediction


async def test_a_refused_prediction_is_told_by_the_callers_name_of_it(world):
    refusal = InvalidRequest("the draft breaks the constraint", field="draft")
    w = await world(world.stage("medium", fail_after=0, failure=refusal))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await w.stub.Generate(ask(prediction="one"), timeout=CALL_S)
    assert from_rpc_error(refused.value).field == "prediction"


async def test_tools_that_must_not_be_called_need_no_template_for_them(world):
    tools = common_pb2.Tools(tools=[common_pb2.Tool(name="weather")], choice=common_pb2.TOOL_CHOICE_NONE)
    turns = [common_pb2.Message(role=common_pb2.ROLE_USER, content="hi")]
    conversation = common_pb2.Conversation(messages=turns, tools=tools)
    w = await world(world.stage("medium"))
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(conversation=conversation), timeout=CALL_S)
    assert response.stage == "medium"
    conversation.tools.choice = common_pb2.TOOL_CHOICE_AUTO
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await w.stub.Generate(cascade_pb2.GenerateRequest(conversation=conversation), timeout=CALL_S)
    assert from_rpc_error(refused.value).field == "conversation.tools"


async def test_an_answer_that_a_stage_did_not_constrain_is_not_given(world):
    forgetful = world.stage("small", constrains=True, keeps_constraints=False)
    w = await world(forgetful, world.stage("medium", constrains=True), policy=world.policy())
    response = await w.stub.Generate(ask(sampling=CONSTRAINED), timeout=CALL_S)
    assert (forgetful.calls, response.stage) == (["generate"], "medium")
    assert response.stages[-1].constrained
