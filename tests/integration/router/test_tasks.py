"""Types of task: stages answer with their adapters for it, and others without."""

from __future__ import annotations

import grpc
import pytest

from asd.v1 import cascade_pb2
from services.common.errors import Unavailable

GENERATE, PREFILL = "generate", "prefill"


def ask(task: str = "math", **fields) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", task=task, **fields)


def models(stage) -> list[str]:
    return [request.model for request in stage.requests]


async def test_stages_with_an_adapter_answer_with_it_and_others_without(world):
    large = world.stage("large", adapters=("code", "math"))
    policy = world.policy(script={"small": "large"}, p_escalate=0.9, likely_next="large")
    w = await world(world.stage("small"), world.stage("medium", adapters=("law",)), large, policy=policy)
    response = await w.stub.Generate(ask(), timeout=5)
    assert response.stage == "large"
    assert models(w.stages["small"]) == [""]
    # The prompt is read ahead where it will be needed.
    assert dict(zip(large.calls, models(large), strict=True)) == {
        PREFILL: "large/math",
        "verify": "large/math",
    }
    plain = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=5)
    assert plain.text == response.text
    assert models(large)[2:] == ["", ""]
    # What the stages say of their models is asked once.
    assert [stage.statuses for stage in w.stages.values()] == [1, 0, 1]


@pytest.mark.parametrize("pipelined", [False, True])
async def test_chains_verify_with_adapters(world, pipelined):
    stages = [world.stage(name, adapters=("math",)) for name in ("small", "medium", "large")]
    w = await world(*stages, speculation={"pipelined": pipelined})
    response = await w.stub.Generate(ask(chain=["small", "medium", "large"]), timeout=5)
    assert response.text == stages[-1].text
    assert [models(stage) for stage in stages] == [["small/math"], ["medium/math"], ["large/math"]]


async def test_a_task_that_no_stage_knows_is_answered_without_an_adapter(world):
    w = await world(world.stage("medium", adapters=("math",)))
    response = await w.stub.Generate(ask("poetry", stage="medium"), timeout=5)
    assert response.text
    assert models(w.stages["medium"]) == [""]


@pytest.mark.parametrize("task", ["Math", "a/b", "math ", "math\n", "-math", "é", "m" * 65])
async def test_names_that_no_adapter_can_have_are_refused(world, task):
    w = await world()
    for call in (
        w.stub.Generate(ask(task), timeout=5),
        w.stub.GenerateStream(cascade_pb2.GenerateStreamRequest(request=ask(task)), timeout=5).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith("task may have 64 characters of a-z, 0-9")
    assert not any(stage.calls for stage in w.stages.values())


async def test_settings_stand_in_for_what_a_stage_says(world):
    settings = {"medium": {"model": "medium", "adapters": ["code"]}}
    w = await world(world.stage("medium", adapters=("math", "code")), stage_settings=settings)
    for task in ("math", "code"):
        await w.stub.Generate(ask(task, stage="medium"), timeout=5)
    assert models(w.stages["medium"]) == ["medium", "medium/code"]
    assert w.stages["medium"].statuses == 0


async def test_an_adapter_that_is_not_there_after_all_is_done_without(world):
    settings = {"medium": {"model": "medium", "adapters": ["math"]}}
    w = await world(world.stage("medium"), stage_settings=settings)
    for _ in range(2):
        assert (await w.stub.Generate(ask(stage="medium"), timeout=5)).text == w.stages["medium"].text
    # A while without another try.
    assert models(w.stages["medium"]) == ["medium/math", "medium", "medium"]


async def test_a_pipelined_target_without_its_adapter_is_asked_without_from_then_on(world):
    settings = {"large": {"model": "large", "adapters": ["math"]}}
    w = await world(
        world.stage("small"), world.stage("medium"), world.stage("large"), stage_settings=settings
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.stub.Generate(ask(chain=["small", "large"]), timeout=5)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "no model 'large/math' here" in caught.value.details()
    assert (await w.stub.Generate(ask(chain=["small", "large"]), timeout=5)).stage == "large"


async def test_a_stage_that_does_not_say_what_it_has_answers_without(world):
    medium = world.stage("medium", adapters=("math",))

    async def away(request, context):
        raise Unavailable("not now")

    medium.Status = away
    w = await world(medium)
    assert (await w.stub.Generate(ask(stage="medium"), timeout=5)).text == medium.text
    assert models(medium) == [""]


async def test_describe_names_the_tasks_that_stages_have_adapters_for(world):
    w = await world(world.stage("medium", adapters=("math", "code")), world.stage("large"))
    description = await w.stub.Describe(cascade_pb2.DescribeRequest(), timeout=5)
    assert [list(stage.adapters) for stage in description.stages] == [["math", "code"], []]
