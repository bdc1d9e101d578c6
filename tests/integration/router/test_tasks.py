"""Types of task: stages answer with their adapters for it, and others without."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from asd.errors import NotFound, Unavailable
from asd.v1 import cascade_pb2, common_pb2
from tests.limits import CALL_S, HANGS_MS

GENERATE, PREFILL = "generate", "prefill"


def ask(task: str = "math", **fields) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", task=task, **fields)


def models(stage) -> list[str]:
    return [request.model for request in stage.requests]


async def test_stages_with_an_adapter_answer_with_it_and_others_without(world):
    large = world.stage("large", adapters=("code", "math"))
    policy = world.policy(script={"small": "large"}, p_escalate=0.9, likely_next="large")
    w = await world(world.stage("small"), world.stage("medium", adapters=("law",)), large, policy=policy)
    response = await w.stub.Generate(ask(), timeout=CALL_S)
    assert response.stage == "large"
    assert models(w.stages["small"]) == [""]
    # The prompt is read ahead where it will be needed.
    assert dict(zip(large.calls, models(large), strict=True)) == {
        PREFILL: "large/math",
        "verify": "large/math",
    }
    records = [record for record in response.stages if record.action != common_pb2.STAGE_ACTION_PREFILL]
    assert [(record.model, record.adapted) for record in records] == [("small", False), ("large/math", True)]
    plain = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert plain.text == response.text
    assert models(large)[2:] == ["", ""]
    # What the stages say of their models is asked once.
    assert [stage.statuses for stage in w.stages.values()] == [1, 0, 1]


@pytest.mark.parametrize("pipelined", [False, True])
async def test_chains_verify_with_adapters(world, pipelined):
    stages = [world.stage(name, adapters=("math",)) for name in ("small", "medium", "large")]
    w = await world(*stages, speculation={"pipelined": pipelined})
    response = await w.stub.Generate(ask(chain=["small", "medium", "large"]), timeout=CALL_S)
    assert response.text == stages[-1].text
    assert [models(stage) for stage in stages] == [["small/math"], ["medium/math"], ["large/math"]]


async def test_a_task_that_no_stage_knows_is_answered_without_an_adapter(world):
    w = await world(world.stage("medium", adapters=("math",)))
    response = await w.stub.Generate(ask("poetry", stage="medium"), timeout=CALL_S)
    assert response.text
    assert models(w.stages["medium"]) == [""]


@pytest.mark.parametrize("task", ["Math", "a/b", "math ", "math\n", "-math", "é", "m" * 65])
async def test_names_that_no_adapter_can_have_are_refused(world, task):
    w = await world()
    for call in (
        w.stub.Generate(ask(task), timeout=CALL_S),
        w.stub.GenerateStream(cascade_pb2.GenerateStreamRequest(request=ask(task)), timeout=CALL_S).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith("task may have 64 ")
    assert not any(stage.calls for stage in w.stages.values())


async def test_settings_stand_in_for_what_a_stage_says(world):
    settings = {"medium": {"model": "medium", "adapters": ["code"]}}
    w = await world(world.stage("medium", adapters=("math", "code")), stage_settings=settings)
    for task in ("math", "code"):
        await w.stub.Generate(ask(task, stage="medium"), timeout=CALL_S)
    assert models(w.stages["medium"]) == ["medium", "medium/code"]
    assert w.stages["medium"].statuses == 0


async def test_an_adapter_that_is_not_there_after_all_is_done_without(world):
    settings = {"medium": {"model": "medium", "adapters": ["math"]}}
    w = await world(world.stage("medium"), stage_settings=settings)
    for _ in range(2):
        assert (await w.stub.Generate(ask(stage="medium"), timeout=CALL_S)).text == w.stages["medium"].text
    # A while without another try.
    assert models(w.stages["medium"]) == ["medium/math", "medium", "medium"]


@pytest.mark.parametrize("gone", ["medium", "large"])
async def test_a_pipelined_target_without_its_adapter_is_asked_without(world, gone):
    settings = {gone: {"model": gone, "adapters": ["math"]}}
    w = await world(
        world.stage("small"), world.stage("medium"), world.stage("large"), stage_settings=settings
    )
    for _ in range(2):
        response = await w.stub.Generate(ask(chain=["small", "medium", "large"]), timeout=CALL_S)
        assert (response.text, response.stage) == (w.stages["large"].text, "large")
        assert [record.stage for record in response.stages] == ["small", "medium", "large"]
    asked = models(w.stages[gone])
    assert asked[-2:] == [gone, gone]
    # Once more where the refusal was lost in sending.
    assert asked[:-2] in ([f"{gone}/math"], [f"{gone}/math"] * 2)


async def test_a_draft_that_went_to_an_adapter_that_is_gone_is_verified_without(world):
    small, large = world.stage("small"), world.stage("large")
    verify_stream = large.VerifyStream

    async def late(requests, context):
        steps = aiter(requests)
        first = await anext(steps)
        if first.start.model == "large/math":
            # The whole draft has come when it is refused.
            async for step in steps:
                if step.HasField("end"):
                    raise NotFound("no such model")

        async def again():
            yield first
            async for step in steps:
                yield step

        async for response in verify_stream(again(), context):
            yield response

    large.VerifyStream = late
    settings = {"large": {"model": "large", "adapters": ["math"]}}
    w = await world(small, world.stage("medium"), large, stage_settings=settings)
    response = await w.stub.Generate(ask(chain=["small", "large"]), timeout=CALL_S)
    assert response.text == large.text
    (chunks,) = large.streamed_drafts
    assert "".join(chunk.text for chunk in chunks) == small.text


async def test_an_answer_that_has_begun_is_not_started_again_without_the_adapter(world):
    medium = world.stage(
        "medium", adapters=("math",), fail_after=2, failure=NotFound("the model was unloaded")
    )
    w = await world(medium)
    call = w.stub.GenerateStream(
        cascade_pb2.GenerateStreamRequest(request=ask(stage="medium")), timeout=CALL_S
    )
    committed = ""

    async def read() -> None:
        nonlocal committed
        async for event in call:
            committed += event.commit.tokens.text

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert committed == "one two"
    assert models(medium) == ["medium/math"]


async def test_asking_for_adapters_is_part_of_a_calls_time(world, clock):
    large = world.stage("large", adapters=("math",))
    status = large.Status

    async def slow(request, context):
        clock.advance(15.0)
        return await status(request, context)

    large.Status = slow
    policy = world.policy(script={"small": "large"}, p_escalate=0.9, likely_next="large")
    small = world.stage("small", pause_after=0)
    large.on_call = small.gate.set
    fields = {"stage_timeout_ms": 40_000}
    w = await world(small, world.stage("medium"), large, policy=policy, **fields)
    await w.stub.Generate(ask(), timeout=100)
    assert large.calls == [PREFILL, "verify"]
    pipelined = await world(world.stage("small"), world.stage("medium"), large, **fields)
    await pipelined.stub.Generate(ask(chain=["small", "large"]), timeout=100)
    plain = await world(large, static_plan=("large",), **fields)
    await plain.stub.Generate(ask(stage="large"), timeout=100)
    assert large.calls[2:] == ["verify_stream", GENERATE]
    # Of the 40 seconds that each may take; the verification after the prefill did not ask.
    assert [left_s < 26.0 for left_s in large.left_s] == [True, False, True, True]
    assert set(models(large)) == {"large/math"}


async def test_a_stage_that_is_slow_to_say_what_it_has_answers_without(world):
    medium = world.stage("medium", adapters=("math",))
    never = asyncio.Event()

    async def hang(request, context):
        await never.wait()

    medium.Status = hang
    w = await world(medium, stage_timeout_ms=2 * HANGS_MS)
    assert (await w.stub.Generate(ask(stage="medium"), timeout=CALL_S)).text == medium.text
    assert models(medium) == [""]


async def test_a_stage_that_does_not_say_what_it_has_answers_without(world):
    medium = world.stage("medium", adapters=("math",))

    async def away(request, context):
        raise Unavailable("not now")

    medium.Status = away
    w = await world(medium)
    assert (await w.stub.Generate(ask(stage="medium"), timeout=CALL_S)).text == medium.text
    assert models(medium) == [""]


async def test_describe_names_the_tasks_that_stages_have_adapters_for(world):
    w = await world(world.stage("medium", adapters=("math", "code")), world.stage("large"))
    description = await w.stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_S)
    assert [list(stage.adapters) for stage in description.stages] == [["math", "code"], []]
