# ruff: noqa: ASYNC110, PT017 - recovery is awaited by asking again, and until then each failure is checked
"""What goes wrong around the router, and what callers see of it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from asd.errors import (
    ConversationRefused,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    PromptTooLong,
    QueueFull,
    Unavailable,
)
from asd.transport.status import from_rpc_error
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from services.common.server import ServiceRegistration, start_server
from tests.limits import CALL_S, HANGS_MS

ASK = cascade_pb2.GenerateRequest(prompt="hi")
STATIC = cascade_pb2.PLAN_SOURCE_STATIC
POLICY = cascade_pb2.PLAN_SOURCE_POLICY
DEADLINE = policy_pb2.DECISION_REASON_DEADLINE


async def failure(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_policy_down_uses_static_plan(world):
    w = await world(policy=world.policy(), dead=("policy",))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert (response.stage, response.plan_source, response.policy_version) == ("large", STATIC, "")
    # The static plan's stage drafts.
    assert [record.stage for record in response.stages] == ["medium", "large"]
    assert {record.reason for record in response.stages} == {policy_pb2.DECISION_REASON_STATIC_PLAN}
    assert not response.HasField("p_correct")
    ask = cascade_pb2.GenerateRequest(
        prompt="hi", objective=common_pb2.Objective(preference=common_pb2.PREFERENCE_FASTEST)
    )
    assert (await w.stub.Generate(ask, timeout=CALL_S)).stage == "medium"


async def test_slow_policy_uses_static_plan_and_is_spared_after_repeated_failures(world, clock):
    w = await world(policy=world.policy(gate=asyncio.Event()), policy_timeout_ms=HANGS_MS)
    sources = [(await w.stub.Generate(ASK, timeout=CALL_S)).plan_source for _ in range(5)]
    assert sources == [STATIC] * 5
    # Three failures open the breaker: the other two requests did not wait.
    assert len(w.policy.plans) == 3


async def test_policy_that_comes_back_is_asked_again(world):
    w = await world(policy=world.policy(), dead=("policy",))
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).plan_source == STATIC
    await w.start("policy")
    async with asyncio.timeout(CALL_S):
        while (await w.stub.Generate(ASK, timeout=CALL_S)).plan_source != POLICY:
            await asyncio.sleep(0.02)


async def test_the_log_tells_of_the_policy_and_not_of_each_request(world, clock, caplog):
    caplog.set_level("INFO", logger="services.router.planning.health")
    w = await world(policy=world.policy(), dead=("policy",))
    for _ in range(5):
        assert (await w.stub.Generate(ASK, timeout=CALL_S)).plan_source == STATIC
    (away,) = [record.getMessage() for record in caplog.records]
    assert w.targets["policy"] in away
    await w.start("policy")
    async with asyncio.timeout(CALL_S):
        while (await w.stub.Generate(ASK, timeout=CALL_S)).plan_source != POLICY:
            clock.advance(1.0)
            await asyncio.sleep(0.02)
    _, back = [record.getMessage() for record in caplog.records]
    assert w.targets["policy"] in back


@pytest.mark.parametrize(
    "plan",
    [
        policy_pb2.PlanResponse(first_stage="huge", policy_version="v7"),
        policy_pb2.PlanResponse(policy_version="v7"),
    ],
)
async def test_malformed_plan_surfaces(world, plan):
    w = await world(policy=world.policy(plan_response=plan))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert w.targets["policy"] in error.details()
    assert not any(stage.calls for stage in w.stages.values())


def decision(**fields) -> policy_pb2.DecideResponse:
    return policy_pb2.DecideResponse(
        **{
            "action": policy_pb2.DECISION_ACTION_STOP,
            "reason": policy_pb2.DECISION_REASON_VALUE,
            "p_correct": 0.5,
            **fields,
        }
    )


@pytest.mark.parametrize(
    "response",
    [
        decision(action=0),
        decision(action=9),
        decision(reason=0),
        decision(p_correct=float("nan")),
        decision(p_correct=1.5),
        decision(action=policy_pb2.DECISION_ACTION_ESCALATE, next_stage="small"),
        decision(action=policy_pb2.DECISION_ACTION_ESCALATE, next_stage="huge"),
        decision(action=policy_pb2.DECISION_ACTION_ESCALATE),
    ],
)
async def test_malformed_decision_surfaces(world, response):
    w = await world(policy=world.policy(decide_response=response))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert w.targets["policy"] in error.details()


async def test_policy_that_refuses_the_cascade_surfaces(world):
    refusal = PreconditionFailed("other stages")
    w = await world(policy=world.policy(plan_failure=refusal))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "other stages" in error.details()


async def test_policy_lost_between_plan_and_decide(world):
    policy = world.policy(decide_failure=Unavailable("going away"))
    w = await world(policy=policy)
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert [record.stage for record in response.stages] == ["small", "large"]
    assert {record.reason for record in response.stages} == {policy_pb2.DECISION_REASON_STATIC_PLAN}
    assert response.plan_source == POLICY
    # Another replica might have been there.
    assert len(policy.decisions) == 2


@pytest.fixture
async def two_policies(world):
    """Two replicas of a policy service, the first of which is going away, and where they are."""
    leaving, staying = world.policy(), world.policy()
    leaving.plan_failure = leaving.decide_failure = Unavailable("going away")
    servers, ports = [], []
    for policy in (leaving, staying):
        server, port = await start_server("127.0.0.1:0", [ServiceRegistration(policy.full_name, policy.add)])
        servers.append(server)
        ports.append(f"127.0.0.1:{port}")
    yield leaving, staying, f"ipv4:{','.join(ports)}"
    await asyncio.gather(*(server.stop(0) for server in servers))


async def test_a_policy_replica_that_is_going_away_is_replaced_by_another(world, two_policies):
    leaving, staying, target = two_policies
    w = await world(policy_target=target)
    async with asyncio.timeout(CALL_S):
        # The second connection may come later than the first answers.
        while not (leaving.plans and staying.plans):
            await w.stub.Generate(ASK, timeout=CALL_S)
        leaving.plans.clear()
        leaving.decisions.clear()
        while len(leaving.plans) + len(leaving.decisions) < 6:
            response = await w.stub.Generate(ASK, timeout=CALL_S)
            assert response.plan_source == POLICY
            assert response.stages[0].reason == policy_pb2.DECISION_REASON_VALUE


async def test_stage_away_names_stage_and_target_and_recovers(world):
    w = await world(world.stage("small"), static_plan=("small",), dead=("small",))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert f"stage small at {w.targets['small']}" in error.details()
    await w.start("small")
    async with asyncio.timeout(CALL_S):
        while True:
            try:
                response = await w.stub.Generate(ASK, timeout=CALL_S)
                break
            except grpc.aio.AioRpcError as again:
                assert again.code() == grpc.StatusCode.UNAVAILABLE
                await asyncio.sleep(0.02)
    assert response.text == "one two three"


async def stream(w, drafts):
    request = cascade_pb2.GenerateStreamRequest(request=ASK, include_drafts=drafts)
    return [event async for event in w.stub.GenerateStream(request, timeout=CALL_S)]


@pytest.mark.parametrize("pipelined", [True, False])
async def test_a_stage_whose_answers_cannot_be_read_is_unavailable(world, caplog, pipelined):
    async def answer(request, context):
        yield b"no message"

    handlers = {
        "Verify": grpc.unary_stream_rpc_method_handler(answer),
        "VerifyStream": grpc.stream_stream_rpc_method_handler(answer),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("asd.v1.StageService", handlers),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        w = await world(
            static_plan=("small", "large"),
            stage_settings={"large": {"target": target}},
            speculation={"pipelined": pipelined},
        )
        chain = cascade_pb2.GenerateRequest(prompt="hi", chain=["small", "large"])
        for _ in range(3):
            error = await failure(w.stub.Generate(chain, timeout=CALL_S))
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert f"stage large at {target}" in error.details()
    finally:
        await server.stop(0)
    # One line, without a trace.
    (line,) = caplog.records
    assert f"stage large at {target}" in line.getMessage()
    assert line.exc_info is None


async def test_only_stage_dying_mid_stream_is_unavailable(world):
    w = await world(world.stage("small", fail_after=2), static_plan=("small",))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(w, drafts=False)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "stage small at" in caught.value.details()


async def test_drafting_stage_dying_mid_stream_is_replaced(world):
    w = await world(
        *(world.stage("small", fail_after=2), world.stage("medium", pieces=(b"new",)), world.stage("large")),
        policy=world.policy(),
    )
    events = await stream(w, drafts=True)
    assert [event.WhichOneof("event") for event in events] == [
        *["stage_started", "draft", "draft"],
        *["stage_started", "revise", "draft", "commit", "response"],
    ]
    assert events[4].revise.kept_tokens == 0
    assert events[-1].response.text == "new"


@pytest.mark.parametrize(
    ("refusal", "code", "text"),
    [
        (
            InvalidRequest("the prompt has 600 tokens; 512 fit", field="prompt"),
            "INVALID_ARGUMENT",
            "600 tokens",
        ),
        (QueueFull("the queue is full (256)"), "RESOURCE_EXHAUSTED", "queue is full"),
        (PreconditionFailed("the model is not loaded"), "FAILED_PRECONDITION", "not loaded"),
        # These are the router's configuration, not the caller's input.
        (NotFound("no model x", field="model"), "FAILED_PRECONDITION", "no model x"),
        (InvalidRequest("model is bad", field="model"), "INTERNAL", "model is bad"),
    ],
)
async def test_first_stage_refusing_passes_through(world, refusal, code, text):
    stages = [world.stage(name, fail_after=0, failure=refusal) for name in ("small", "medium", "large")]
    w = await world(*stages, policy=world.policy())
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code().name == code
    assert text in error.details()


@pytest.mark.parametrize(
    "refusal",
    [
        PromptTooLong("prompt has 600 tokens; 511 fit", field="prompt"),
        ConversationRefused("no system role", field="conversation"),
    ],
    ids=["too long", "no form"],
)
async def test_what_one_model_refuses_another_is_asked(world, refusal):
    small = world.stage("small", fail_after=0, failure=refusal)
    medium = world.stage("medium")
    w = await world(small, medium, world.stage("large"), policy=world.policy(script={"medium": "large"}))
    for _ in range(2):
        # It is not avoided: the next request may be shorter.
        assert [record.stage for record in (await w.stub.Generate(ASK, timeout=CALL_S)).stages] == [
            "medium",
            "large",
        ]
    assert small.calls == ["generate"] * 2
    # An answer that is there is kept.
    w.stages["large"].fail_after, w.stages["large"].failure = 0, refusal
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert [(r.stage, r.reason) for r in response.stages] == [
        ("medium", policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE)
    ]
    # Where no stage can take it, the caller is told as of a mistake of its own.
    medium.fail_after, medium.failure = 0, refusal
    for path, call in {"": w.stub.Generate(ASK, timeout=CALL_S), "request.": stream(w, drafts=False)}.items():
        error = from_rpc_error(await failure(call))
        assert (type(error), error.field) == (type(refusal), path + refusal.field)


async def test_stage_without_a_result_is_an_internal_error(world):
    w = await world(world.stage("small", sends_result=False), static_plan=("small",))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "stage small at" in error.details()


async def test_stage_budget_bounds_a_stage_call(world):
    stage = world.stage("small", pause_after=0)
    w = await world(stage, static_plan=("small",), stage_timeout_ms=HANGS_MS)
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "stage small at" in error.details()
    assert f"{HANGS_MS:g} ms" in error.details()
    await asyncio.wait_for(stage.cancelled.wait(), CALL_S)


async def test_escalated_stage_out_of_time_keeps_the_answer(world):
    large = world.stage("large", pause_after=0)
    w = await world(
        *(world.stage("small"), world.stage("medium"), large),
        policy=world.policy(script={"small": "large"}),
        stage_settings={"large": {"timeout_ms": HANGS_MS}},
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.stage == "small"
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_DEADLINE
    await asyncio.wait_for(large.cancelled.wait(), CALL_S)


async def test_callers_deadline_reaches_the_stage(world):
    stage = world.stage("small", pause_after=0)
    w = await world(stage, static_plan=("small",))
    # A deadline may pass on the way, where other programs have the cores.
    while not stage.started.is_set():
        error = await failure(w.stub.Generate(ASK, timeout=HANGS_MS / 1e3))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(stage.cancelled.wait(), CALL_S)


async def test_draining_router_refuses_new_requests(world):
    w = await world()
    await w.servicer.drain()
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_static_plan_starts_with_a_stage_within_max_cost(world):
    w = await world(static_plan=("medium",))
    ask = cascade_pb2.GenerateRequest(prompt="hi", objective=common_pb2.Objective(max_cost=2.0))
    assert (await w.stub.Generate(ask, timeout=CALL_S)).stage == "small"
    ask.objective.max_cost = 0.5
    error = await failure(w.stub.Generate(ask, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "(small: 1.6)" in error.details()


async def test_evidence_that_no_model_should_show_is_not_the_callers_fault(world):
    refusal = InvalidRequest("logprobs must be finite", field="draft.logprobs")
    w = await world(policy=world.policy(decide_failure=refusal))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INTERNAL


async def test_errors_of_a_streamed_request_name_its_fields(world):
    w = await world()
    request = cascade_pb2.GenerateStreamRequest(request=cascade_pb2.GenerateRequest(prompt="hi", stage="no"))
    call = w.stub.GenerateStream(request, timeout=CALL_S)
    error = await failure(anext(aiter(call)))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert b"request.stage" in details
