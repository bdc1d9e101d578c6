# ruff: noqa: ASYNC110, PT017 - recovery is awaited by asking again, and until then each failure is checked
"""What goes wrong around the router, and what callers see of it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from asd.convert import event_from
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from asd.values import StreamedText
from services.common.errors import (
    AsdError,
    BudgetSpent,
    ConversationRefused,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    PromptTooLong,
    QueueFull,
    Unavailable,
)
from services.common.server import ServiceRegistration, start_server
from services.common.status import from_rpc_error
from tests.integration.router.conftest import FakeStage
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


async def test_static_plan_escalates_by_verification_until_its_last_stage(world):
    w = await world(static_plan=("small", "medium"))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert [record.stage for record in response.stages] == ["small", "medium"]
    assert w.stages["medium"].calls == ["verify"]
    assert [record.reason for record in response.stages] == [policy_pb2.DECISION_REASON_STATIC_PLAN] * 2


async def test_static_plan_keeps_to_max_cost(world):
    w = await world(static_plan=("small", "medium"))
    ask = cascade_pb2.GenerateRequest(prompt="hi", objective=common_pb2.Objective(max_cost=5.0))
    response = await w.stub.Generate(ask, timeout=CALL_S)
    assert response.stage == "small"
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_MAX_COST


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
    assert f"the policy service at {w.targets['policy']}" in away
    await w.start("policy")
    async with asyncio.timeout(CALL_S):
        while (await w.stub.Generate(ASK, timeout=CALL_S)).plan_source != POLICY:
            clock.advance(1.0)
            await asyncio.sleep(0.02)
    _, back = [record.getMessage() for record in caplog.records]
    assert f"the policy service at {w.targets['policy']}" in back


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
    assert "the policy service at" in error.details()
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
    assert "the policy service at" in error.details()


async def test_policy_that_refuses_the_cascade_surfaces(world):
    refusal = PreconditionFailed("made for other stages")
    w = await world(policy=world.policy(plan_failure=refusal))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "made for other stages" in error.details()


@pytest.mark.parametrize(
    ("first", "static_plan", "stages"),
    [
        ("medium", ("medium",), ["medium", "large"]),
        ("large", ("medium",), ["large"]),
        ("small", ("medium",), ["small", "large"]),
        ("small", ("small", "large"), ["small", "large"]),
    ],
)
async def test_policy_lost_between_plan_and_decide(world, first, static_plan, stages):
    policy = world.policy(first=first, decide_failure=Unavailable("going away"))
    w = await world(policy=policy, static_plan=static_plan)
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert [record.stage for record in response.stages] == stages
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


async def test_first_stage_away_asks_the_policy_for_another(world, clock):
    w = await world(policy=world.policy(), dead=("small",))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert (response.stage, response.plan_source) == ("medium", POLICY)
    assert [record.stage for record in response.stages] == ["medium"]
    conditions = w.policy.plans[1].conditions
    assert [(each.stage, each.available) for each in conditions] == [("small", False)]
    # The next request knows it from the start.
    await w.stub.Generate(ASK, timeout=CALL_S)
    assert [each.stage for each in w.policy.plans[2].conditions] == ["small"]
    assert len(w.policy.plans) == 3


async def test_first_stage_away_without_policy_takes_the_next(world):
    w = await world(dead=("medium",))
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"


async def test_fixed_stage_away_is_not_replaced(world):
    w = await world(dead=("large",))
    error = await failure(
        w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="large"), timeout=CALL_S)
    )
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "stage large at" in error.details()


async def test_all_stages_away_names_each(world):
    w = await world(dead=("small", "medium", "large"))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    for name, target in w.targets.items():
        assert f"stage {name} at {target}" in error.details()


async def stream(w, drafts):
    request = cascade_pb2.GenerateStreamRequest(request=ASK, include_drafts=drafts)
    return [event async for event in w.stub.GenerateStream(request, timeout=CALL_S)]


@pytest.mark.parametrize("dead", [True, False])
async def test_escalation_to_a_stage_that_is_away_keeps_the_answer(world, dead):
    medium = world.stage("medium", fail_after=0)
    w = await world(
        *(world.stage("small"), medium, world.stage("large")),
        policy=world.policy(script={"small": "medium"}),
        dead=("medium",) if dead else (),
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert (response.stage, response.text, response.p_correct) == ("small", "one two three", 0.5)
    assert [(r.stage, r.decision, r.reason) for r in response.stages] == [
        ("small", policy_pb2.DECISION_ACTION_STOP, policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE)
    ]
    for drafts in (False, True):
        events = await stream(w, drafts)
        assert events[-1].response.text == "one two three"
        assert events[-2].commit.committed_tokens == 3
        assert events[-2].commit.HasField("tokens") is not drafts


OTHER = (b"one", b" other", b" x")
AWAY = {
    "dead": {},
    "refuses": {"fail_after": 0},
    "full": {"fail_after": 0, "failure": QueueFull("the queue is full")},
    "dies": {"fail_after": 2},
    "dies after a change": {"pieces": OTHER, "fail_after": 2},
    "hangs": {"pause_after": 0},
    "hangs after a change": {"pieces": OTHER, "pause_after": 2},
}


@pytest.mark.parametrize("options", AWAY.values(), ids=AWAY)
@pytest.mark.parametrize("has_policy", [True, False])
async def test_an_escalation_goes_past_a_stage_that_is_away(world, clock, options, has_policy):
    policy = world.policy(script={"small": ("medium", "large")}) if has_policy else None
    medium = world.stage("medium", **options)
    w = await world(
        *(world.stage("small"), medium, world.stage("large", pieces=(b"one", b" two", b" five"))),
        policy=policy,
        static_plan=("small", "medium", "large"),
        dead=() if options else ("medium",),
        stage_settings={"medium": {"timeout_ms": HANGS_MS}},
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert (response.stage, response.text) == ("large", "one two five")
    assert [(r.stage, r.decision) for r in response.stages] == [
        ("small", policy_pb2.DECISION_ACTION_ESCALATE),
        ("large", policy_pb2.DECISION_ACTION_STOP),
    ]
    verified = w.stages["large"].requests[-1]
    assert verified.draft.text == "one two three"
    for drafts in (False, True):
        # The stage is tried again, and what is shown of it is taken back.
        clock.advance(60.0)
        text = StreamedText()
        # But for the response, which says the text once more.
        for event in (await stream(w, drafts))[:-1]:
            text = text.after(event_from(event))
        assert (text.final, text.draft) == ("one two five", "")


async def test_a_stage_that_hangs_is_not_escalated_to_for_a_while(world, clock):
    policy = world.policy(script={"small": ("medium", "large")})
    medium = world.stage("medium", pause_after=0)
    w = await world(
        *(world.stage("small"), medium, world.stage("large")),
        policy=policy,
        stage_settings={"medium": {"timeout_ms": HANGS_MS}},
    )
    for _ in range(3):
        assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    assert len(medium.calls) == 1
    clock.now += 1.1
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    assert len(medium.calls) == 2
    # Twice as long this time.
    clock.now += 1.1
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    assert len(medium.calls) == 2
    clock.now += 1.1
    medium.gate.set()
    medium.pause_after = None
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "medium"
    # It has answered, so that the next time is the first one.
    medium.gate.clear()
    medium.pause_after = 0
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    medium.calls.clear()
    clock.now += 1.1
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    assert medium.calls == ["verify"]


async def test_a_stage_that_has_answered_is_avoided_no_longer(world, clock):
    medium = world.stage("medium", fail_after=0)
    w = await world(
        *(world.stage("small"), medium, world.stage("large")),
        policy=world.policy(script={"small": ("medium", "large")}),
    )
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    medium.fail_after = None
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    fixed = cascade_pb2.GenerateRequest(prompt="hi", stage="medium")
    assert (await w.stub.Generate(fixed, timeout=CALL_S)).stage == "medium"
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "medium"


class LateTogether(FakeStage):
    """Its calls are late once six of them have begun, not after a time in which some may not have."""

    async def Verify(self, request, context):  # noqa: N802 - the proto's name
        self.calls.append("verify")
        if len(self.calls) == 6:
            self.gate.set()
        await self.gate.wait()
        raise BudgetSpent("late")
        yield


async def test_calls_that_hang_together_are_one_time(world, clock):
    medium = LateTogether("medium")
    w = await world(
        *(world.stage("small"), medium, world.stage("large")),
        policy=world.policy(script={"small": ("medium", "large")}),
    )
    answers = await asyncio.gather(*(w.stub.Generate(ASK, timeout=CALL_S) for _ in range(6)))
    assert {answer.stage for answer in answers} == {"large"}
    assert len(medium.calls) == 6
    medium.calls.clear()
    clock.now += 1.1
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
    assert len(medium.calls) == 1


async def test_a_caller_in_a_hurry_does_not_take_a_stage_from_others(world):
    medium = world.stage("medium")
    w = await world(
        *(world.stage("small"), medium, world.stage("large")),
        policy=world.policy(script={"small": ("medium", "large")}),
    )
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "medium"
    # As seen so far, it takes longer than the caller has.
    w.load.answered(1, 1, 0.0, 4000.0)
    medium.pause_after = 0
    assert (await w.stub.Generate(ASK, timeout=2)).stage == "large"
    medium.pause_after = None
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "medium"


async def test_a_drafter_that_dies_after_some_tokens_is_avoided(world, clock):
    small = world.stage("small", fail_after=2)
    w = await world(small, world.stage("medium"), world.stage("large"), static_plan=("small",))
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", chain=["small", "large"]), timeout=CALL_S)
    small.calls.clear()
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage != "small"
    assert small.calls == []


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


async def test_a_policy_that_refuses_after_a_failure_leaves_the_earlier_answer(world):
    policy = world.policy(script={"small": ("medium", "large")})

    def refuse_the_second(kind):
        if len(policy.decisions) == 2:
            policy.decide_failure = QueueFull("the queue is full")

    policy.on_call = refuse_the_second
    w = await world(
        world.stage("small"), world.stage("medium", fail_after=0), world.stage("large"), policy=policy
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert (response.stage, response.text) == ("small", "one two three")
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE


async def test_a_stage_that_no_available_one_follows_is_not_called_the_last(world):
    policy = world.policy()
    policy.decide_response = policy_pb2.DecideResponse(
        action=policy_pb2.DECISION_ACTION_STOP,
        reason=policy_pb2.DECISION_REASON_LAST_STAGE,
        policy_version="v7",
    )
    w = await world(policy=policy)
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE
    policy.first = "large"
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_LAST_STAGE


async def test_without_a_policy_a_stage_that_is_avoided_is_what_stops(world):
    w = await world(static_plan=("small", "large"), dead=("large",))
    for _ in range(2):
        response = await w.stub.Generate(ASK, timeout=CALL_S)
        assert response.stage == "small"
        assert response.stages[-1].reason == policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE


async def test_a_stage_that_refuses_is_tried_every_second(world, clock):
    """So that one that was restarted is asked again at once, however long it was away."""
    policy = world.policy(script={"small": ("medium", "large")})
    medium = world.stage("medium", fail_after=0)
    w = await world(*(world.stage("small"), medium, world.stage("large")), policy=policy)
    for _ in range(5):
        tried = []
        for _ in range(2):
            medium.calls.clear()
            assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "large"
            tried.append(bool(medium.calls))
        assert tried == [True, False]
        clock.now += 1.1
    medium.fail_after = None
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "medium"


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("target", ["medium", "large"])
async def test_stage_dying_within_what_it_accepted_keeps_the_answer(world, drafts, target):
    dying = world.stage(target, pieces=(b"one", b" two", b" other"), fail_after=2)
    others = {name: world.stage(name) for name in ("small", "medium", "large")} | {target: dying}
    w = await world(*others.values(), policy=world.policy(script={"small": target}))
    events = await stream(w, drafts)
    assert events[-1].response.stage == "small"
    assert events[-1].response.text == "one two three"
    held = [chunk.text for chunk in map(chunk_of, events) if chunk is not None]
    kinds = [event.WhichOneof("event") for event in events]
    if not drafts:
        assert "".join(held) == "one two three"
        assert "revise" not in kinds
    assert events[-2].commit.committed_tokens == 3


def chunk_of(event):
    if event.WhichOneof("event") == "commit" and event.commit.HasField("tokens"):
        return event.commit.tokens
    return event.draft if event.WhichOneof("event") == "draft" else None


@pytest.mark.parametrize("drafts", [False, True])
async def test_stage_dying_after_it_changed_committed_text_fails_the_stream(world, drafts):
    large = world.stage("large", pieces=(b"one", b" other", b" x"), fail_after=2)
    w = await world(
        world.stage("small"), world.stage("medium"), large, policy=world.policy(script={"small": "large"})
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(w, drafts)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    # The caller of the unary method holds nothing yet, so the earlier answer is given.
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "small"


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


async def test_a_fault_of_one_stage_is_not_the_requests(world):
    w = await world(
        world.stage("small", fail_after=1, failure=AsdError("it failed")),
        *(world.stage("medium"), world.stage("large", fail_after=1, failure=AsdError("it failed"))),
        policy=world.policy(script={"medium": "large"}),
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert (response.stage, response.text) == ("medium", "one two three")
    events = await stream(w, drafts=True)
    assert events[-1].response.stage == "medium"


async def test_full_queue_at_escalation_keeps_the_answer(world):
    medium = world.stage("medium", fail_after=0, failure=QueueFull("the queue is full"))
    w = await world(
        world.stage("small"), medium, world.stage("large"), policy=world.policy(script={"small": "medium"})
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE


async def test_stage_without_a_result_is_an_internal_error(world):
    w = await world(world.stage("small", sends_result=False), static_plan=("small",))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "stage small at" in error.details()


async def test_escalation_that_cannot_fit_is_not_started(world):
    w = await world(policy=world.policy(script={"small": "large"}, expected_ms=2 * CALL_S * 1e3))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.stage == "small"
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_DEADLINE
    assert not w.stages["large"].calls


async def test_caller_without_deadline_gets_the_default_one(world):
    w = await world(
        policy=world.policy(script={"small": "large"}, expected_ms=60_000), default_deadline_ms=20_000
    )
    response = await w.stub.Generate(ASK)
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_DEADLINE


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


async def test_a_stage_that_hangs_is_replaced_within_the_deadline_and_avoided_after(world, clock):
    small = world.stage("small", pause_after=0)
    w = await world(
        *(small, world.stage("medium")),
        static_plan=("small", "medium"),
        stage_settings={"small": {"timeout_ms": HANGS_MS}},
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert [record.stage for record in response.stages] == ["medium"]
    assert (await w.stub.Generate(ASK, timeout=CALL_S)).stage == "medium"
    # The second request did not try it again.
    assert small.calls == ["generate"]


@pytest.mark.parametrize("hangs_after", [0, 1], ids=["silent", "in the midst"])
@pytest.mark.parametrize("call", ["unary", "committed", "drafts"])
async def test_a_last_stage_that_hangs_costs_no_answer_and_is_avoided_after(world, clock, call, hangs_after):
    large = world.stage("large", pause_after=hangs_after)
    policy = world.policy(script={"small": ("large",)})
    w = await world(
        world.stage("small"), world.stage("medium"), large, policy=policy, stage_timeout_ms=60_000
    )

    async def ask():
        if call == "unary":
            return await w.stub.Generate(ASK, timeout=4)
        request = cascade_pb2.GenerateStreamRequest(request=ASK, include_drafts=call == "drafts")
        return [event async for event in w.stub.GenerateStream(request, timeout=4)][-1].response

    response = await ask()
    assert (response.stage, response.text) == ("small", "one two three")
    assert response.stages[0].reason == DEADLINE
    # What the hanging call holds, ends.
    await asyncio.wait_for(large.cancelled.wait(), CALL_S)
    assert (await ask()).stage == "small"
    assert large.calls == ["verify"]
    assert [each.stage for each in policy.plans[1].conditions] == ["large"]


async def test_a_stage_that_others_can_replace_gets_half_of_the_time(world):
    small = world.stage("small", pause_after=0)
    w = await world(small, world.stage("medium"), static_plan=("small", "medium"), stage_timeout_ms=60_000)
    response = await w.stub.Generate(ASK, timeout=2)
    assert response.stage == "medium"


async def test_static_plan_starts_with_a_stage_within_max_cost(world):
    w = await world(static_plan=("medium",))
    ask = cascade_pb2.GenerateRequest(prompt="hi", objective=common_pb2.Objective(max_cost=2.0))
    assert (await w.stub.Generate(ask, timeout=CALL_S)).stage == "small"
    ask.objective.max_cost = 0.5
    error = await failure(w.stub.Generate(ask, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "below the cheapest stage (small: 1.6)" in error.details()


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
