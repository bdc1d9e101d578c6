# ruff: noqa: ASYNC110 - what ends by itself is awaited by asking again
"""What an operator sees of a request: spans with marks and errors, and metrics in their units."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asd.errors import Unavailable
from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2, policy_pb2
from services.common import telemetry
from services.router.planning.draft_selection import DraftChoice, DraftSelection, SkipReason
from tests.limits import CALL_S, HANGS_MS

ASK = cascade_pb2.GenerateRequest(prompt="hi")
POLICY, STATIC = cascade_pb2.PLAN_SOURCE_POLICY, cascade_pb2.PLAN_SOURCE_STATIC


class Ending(SpanProcessor):
    """Sets its event when a request's span has ended."""

    def __init__(self):
        self.event = asyncio.Event()

    def on_end(self, span):
        if span.name == "asd.cascade":
            self.event.set()


class Recorded:
    """The spans that were recorded, by the order in which they started."""

    def __init__(self, exporter, ending):
        self._exporter, self.ended = exporter, ending.event

    def spans(self, name):
        found = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time)

    def values(self, name, attribute):
        return [span.attributes.get(attribute) for span in self.spans(name)]

    def status(self, name):
        return [(span.status.status_code, span.attributes.get("error.type")) for span in self.spans(name)]


@pytest.fixture
def recorded():
    """Record spans of everything that `world` starts."""
    exporter, ending, provider = InMemorySpanExporter(), Ending(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.add_span_processor(ending)
    telemetry.use_tracer_provider(provider)
    yield Recorded(exporter, ending)
    telemetry.use_tracer_provider(None)
    provider.shutdown()


@pytest.fixture
def metered(monkeypatch):
    """Record metrics of the routers that `world` builds; return what reads them: by name, unit and points."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    monkeypatch.setattr(telemetry, "meter", lambda: provider.get_meter("asd"))
    monkeypatch.setattr(telemetry, "metrics_enabled", lambda: True)

    def read():
        data = reader.get_metrics_data()
        # None: nothing was measured.
        scopes = [scope for each in (data.resource_metrics if data else ()) for scope in each.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    yield read
    provider.shutdown()


def counts(metric):
    """Return a counter's points, by the values of their attributes in the order of their names."""
    return {
        tuple(value for _, value in sorted(point.attributes.items())): point.value
        for point in metric.data.data_points
    }


def sums(metric):
    """Return the number and the sum of a histogram's values, by the values of their attributes."""
    return {
        tuple(value for _, value in sorted(point.attributes.items())): (point.count, point.sum)
        for point in metric.data.data_points
    }


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_plan_without_the_policy_is_marked_and_counted(world, recorded, metered):
    w = await world(policy=world.policy(), dead=("policy",))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.plan_source == STATIC
    assert response.trace_id == f"{recorded.spans('asd.cascade')[0].context.trace_id:032x}"
    for name in ("asd.plan", "asd.cascade"):
        assert recorded.values(name, "asd.plan.source") == ["static"]
    assert recorded.values("asd.plan", "asd.plan.first_stage") == ["medium"]
    # Of the draft, and of the last stage's answer.
    assert recorded.values("asd.decide", "asd.plan.source") == ["static", "static"]
    assert recorded.values("asd.decide", "asd.decision.reason") == ["static_plan", "static_plan"]
    assert counts(metered()["asd.static_plans"]) == {("plan",): 1}
    await w.stub.Generate(ASK, timeout=CALL_S)
    assert counts(metered()["asd.static_plans"]) == {("plan",): 2}


async def test_a_decision_without_the_policy_is_marked_and_counted(world, recorded, metered):
    # The plan is the policy's, which then goes away.
    w = await world(policy=world.policy(decide_failure=Unavailable("going away")))
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.plan_source == POLICY
    assert [record.stage for record in response.stages] == ["small", "large"]
    assert recorded.values("asd.plan", "asd.plan.source") == ["policy"]
    # The static plan holds from there on: it decides twice, and stands in once.
    assert recorded.values("asd.decide", "asd.plan.source") == ["static", "static"]
    assert recorded.values("asd.decide", "asd.decision.outcome") == ["escalate", "stop"]
    assert recorded.values("asd.decide", "asd.decision.p_correct") == [None, None]
    assert counts(metered()["asd.static_plans"]) == {("decide",): 1}


async def test_decisions_of_the_policy_are_marked_as_its_own(world, recorded, metered):
    w = await world(policy=world.policy(script={"small": "large"}))
    await w.stub.Generate(ASK, timeout=CALL_S)
    for name in ("asd.plan", "asd.cascade"):
        assert recorded.values(name, "asd.plan.source") == ["policy"]
    assert recorded.values("asd.decide", "asd.plan.source") == ["policy", "policy"]
    assert recorded.values("asd.decide", "asd.decision.p_correct") == [0.5, 0.9]
    assert recorded.values("asd.decide", "asd.stage.name") == ["small", "large"]
    assert recorded.values("asd.decide", "asd.policy.version") == ["v7", "v7"]
    assert not {"asd.static_plans", "asd.stage.failures"} & metered().keys()


async def test_a_policy_that_is_lost_on_the_way_is_marked_from_there_on(world, recorded, metered):
    def lose(step):
        if step == "decide" and len(policy.decisions) == 2:
            policy.decide_failure = Unavailable("going away")

    policy = world.policy(script={"small": "medium"}, on_call=lose)
    w = await world(policy=policy)
    await w.stub.Generate(ASK, timeout=CALL_S)
    assert recorded.values("asd.decide", "asd.plan.source") == ["policy", "static", "static"]
    assert counts(metered()["asd.static_plans"]) == {("decide",): 1}


async def test_a_fixed_stage_is_no_static_plan(world, recorded, metered):
    w = await world(policy=world.policy())
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="large"), timeout=CALL_S)
    for name in ("asd.plan", "asd.decide", "asd.cascade"):
        assert recorded.values(name, "asd.plan.source") == ["fixed"]
    assert "asd.static_plans" not in metered()


async def test_durations_reach_the_histograms_in_seconds(world, clock, metered):
    def wait(step):
        clock.advance({"plan": 0.25, "decide": 0.5}[step])

    # The clock passes by hand: 250 ms for the plan, 2 s for small, 3 s for large, 500 ms for each decision.
    small = world.stage("small", on_call=lambda: clock.advance(2.0))
    large = world.stage("large", on_call=lambda: clock.advance(3.0))
    policy = world.policy(script={"small": "large"}, on_call=wait)
    w = await world(small, world.stage("medium"), large, policy=policy)
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.latency_ms == pytest.approx(6250.0)
    metrics = metered()
    for name in ("gen_ai.server.request.duration", "asd.stage.duration", "asd.policy.duration"):
        assert metrics[name].unit == "s"
    assert sums(metrics["gen_ai.server.request.duration"]) == {
        ("chat", "asd", "large"): (1, pytest.approx(6.25))
    }
    assert sums(metrics["asd.stage.duration"]) == {
        ("generate", "small"): (1, pytest.approx(2.0)),
        ("verify", "large"): (1, pytest.approx(3.0)),
    }
    assert sums(metrics["asd.policy.duration"]) == {(): (1, pytest.approx(1.25))}


async def test_requests_stages_and_tokens_are_counted(world, metered):
    w = await world(policy=world.policy(script={"small": "large"}))
    escalated = await w.stub.Generate(ASK, timeout=CALL_S)
    fixed = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"), timeout=CALL_S)
    metrics = metered()
    assert counts(metrics["asd.requests"]) == {("policy", "large"): 1, ("fixed", "small"): 1}
    assert counts(metrics["asd.early_stops"]) == {("fixed", "small"): 1}
    assert counts(metrics["asd.stage.requests"]) == {("generate", "small"): 2, ("verify", "large"): 1}
    # Three tokens and the end of the sequence, all accepted.
    assert counts(metrics["asd.verify.proposed_tokens"]) == {("large",): 4}
    assert counts(metrics["asd.verify.accepted_tokens"]) == {("large",): 4}
    assert sums(metrics["asd.request.cost"]) == {(): (2, pytest.approx(escalated.cost + fixed.cost))}


async def test_a_prompt_that_the_policy_does_not_know_is_marked_and_counted(world, recorded, metered):
    unlike = policy_pb2.DecideResponse(
        action=policy_pb2.DECISION_ACTION_STOP,
        reason=policy_pb2.DECISION_REASON_OUT_OF_FAMILY,
        policy_version="v1",
    )
    w = await world(policy=world.policy(decide_response=unlike))
    response = await w.stub.Generate(ASK, timeout=5)
    assert response.out_of_family
    assert not response.HasField("p_correct")
    assert recorded.values("asd.decide", "asd.decision.out_of_family") == [True]
    assert recorded.values("asd.decide", "asd.plan.source") == ["policy"]
    metrics = metered()
    assert counts(metrics["asd.out_of_family"]) == {(response.stage,): 1}
    assert counts(metrics["asd.requests"]) == {("policy", response.stage): 1}


async def test_a_stage_that_fails_marks_its_span_and_the_requests(world, recorded, metered):
    w = await world(world.stage("small", fail_after=2), static_plan=("small",))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert recorded.status("asd.stage") == [(StatusCode.ERROR, "Unavailable")]
    assert recorded.status("asd.cascade") == [(StatusCode.ERROR, "Unavailable")]
    assert f"stage small at {w.targets['small']}" in recorded.spans("asd.stage")[0].status.description
    assert counts(metered()["asd.stage.failures"]) == {("small", "Unavailable"): 1}


async def test_a_failed_escalation_marks_its_span_alone(world, recorded, metered):
    medium = world.stage("medium", fail_after=0)
    w = await world(
        *(world.stage("small"), medium, world.stage("large")), policy=world.policy(script={"small": "medium"})
    )
    response = await w.stub.Generate(ASK, timeout=CALL_S)
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE
    assert recorded.values("asd.stage", "asd.stage.name") == ["small", "medium"]
    assert recorded.status("asd.stage") == [(StatusCode.UNSET, None), (StatusCode.ERROR, "Unavailable")]
    assert recorded.status("asd.cascade") == [(StatusCode.UNSET, None)]
    assert recorded.values("asd.cascade", "asd.decision.reason") == ["stage_unavailable"]


async def test_a_stage_out_of_time_marks_its_span(world, recorded):
    w = await world(world.stage("small", pause_after=0), static_plan=("small",), stage_timeout_ms=HANGS_MS)
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert recorded.status("asd.stage") == [(StatusCode.ERROR, "BudgetSpent")]


async def test_a_policy_that_answers_nonsense_marks_the_decision(world, recorded):
    nonsense = policy_pb2.DecideResponse(action=9, reason=1, p_correct=0.5)
    w = await world(policy=world.policy(decide_response=nonsense))
    error = await failure(w.stub.Generate(ASK, timeout=CALL_S))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert recorded.status("asd.decide") == [(StatusCode.ERROR, "AsdError")]
    assert recorded.status("asd.stage") == [(StatusCode.UNSET, None)]


@pytest.mark.parametrize("fields", [{}, {"chain": ["small", "large"]}], ids=["one stage", "chain"])
async def test_a_caller_who_cancels_marks_no_error(world, recorded, metered, fields):
    small, large = world.stage("small", pause_after=1), world.stage("large", pause_after=1)
    w = await world(small, large, static_plan=("small",))
    working = [small, large] if fields else [small]
    # Not the traced channel of `w`: OpenTelemetry's interceptor keeps a cancellation to itself.
    async with grpc.aio.insecure_channel(f"127.0.0.1:{w.port}") as channel:
        ask = cascade_pb2.GenerateRequest(prompt="hi", **fields)
        call = cascade_pb2_grpc.CascadeServiceStub(channel).Generate(ask, timeout=CALL_S)
        await asyncio.wait_for(asyncio.gather(*(stage.started.wait() for stage in working)), CALL_S)
        call.cancel()
        await asyncio.wait_for(recorded.ended.wait(), CALL_S)
    # Work downstream stops, though every channel on the way is traced.
    async with asyncio.timeout(CALL_S):
        while any(stage.running for stage in working):
            await asyncio.sleep(0)
    assert recorded.status("asd.stage") == [(StatusCode.UNSET, None)] * len(working)
    assert recorded.status("asd.cascade") == [(StatusCode.UNSET, None)]
    assert "asd.requests" not in metered()


@pytest.mark.parametrize("traced", [False, True], ids=["untraced", "traced"])
@pytest.mark.parametrize("step", ["plan", "prefill"])
async def test_unary_calls_stop_with_what_they_were_made_for(world, request, traced, step):
    if traced:
        request.getfixturevalue("recorded")
    began, ended, never = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def hang(*_):
        began.set()
        try:
            await never.wait()
        finally:
            ended.set()

    small, large = world.stage("small", pause_after=1), world.stage("large")
    policy = world.policy(likely_next="large", p_escalate=0.9)
    if step == "plan":
        policy.Plan = hang
    else:
        large.Prefill = hang
    w = await world(small, world.stage("medium"), large, policy=policy, policy_timeout_ms=CALL_S * 1e3)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{w.port}") as channel:
        call = cascade_pb2_grpc.CascadeServiceStub(channel).Generate(ASK, timeout=CALL_S)
        await asyncio.wait_for(began.wait(), CALL_S)
        if step == "plan":
            call.cancel()
        else:
            # Small's answer stands, so that nothing needs large.
            small.gate.set()
            assert (await call).stage == "small"
        await asyncio.wait_for(ended.wait(), CALL_S)


async def test_a_draft_that_a_target_does_without_is_marked_and_counted(
    world, recorded, metered, monkeypatch
):
    choices = iter([DraftChoice(SkipReason.PROBE), DraftChoice(), DraftChoice(SkipReason.LOAD)])
    monkeypatch.setattr(DraftSelection, "choose", lambda *_, **__: next(choices))
    policy = world.policy(script={"small": "large"})
    w = await world(world.stage("small"), world.stage("medium"), world.stage("large"), policy=policy)
    actions = []
    for _ in range(3):
        response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
        actions.append(response.stages[-1].action)
    generate, verify = common_pb2.STAGE_ACTION_GENERATE, common_pb2.STAGE_ACTION_VERIFY
    assert actions == [generate, verify, generate]
    skipped = [value for value in recorded.values("asd.stage", "asd.draft.skipped") if value]
    assert skipped == ["probe", "load"]
    assert counts(metered()["asd.drafts_skipped"]) == {("probe", "large"): 1, ("load", "large"): 1}


async def test_whether_a_stage_has_an_adapter_for_a_task_is_marked_and_counted(world, recorded, metered):
    policy = world.policy(script={"small": "large"})
    large = world.stage("large", adapters=("math",))
    w = await world(world.stage("small"), world.stage("medium"), large, policy=policy)
    for task in ("math", "poetry", ""):
        await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", task=task), timeout=CALL_S)
    assert recorded.values("asd.stage", "asd.request.task") == [
        "math",
        "math",
        "poetry",
        "poetry",
        None,
        None,
    ]
    assert recorded.values("asd.stage", "gen_ai.response.model")[:4] == [
        "small",
        "large/math",
        "small",
        "large",
    ]
    assert counts(metered()["asd.stage.tasks"]) == {
        ("small", "none"): 2,
        ("large", "used"): 1,
        ("large", "none"): 1,
    }


@pytest.mark.parametrize("settings", [{}, {"medium": {"model": "org/math"}}], ids=["default", "named"])
async def test_a_model_whose_own_name_ends_like_a_task_is_no_adapter_for_it(world, metered, settings, clock):
    medium = world.stage("medium")
    w = await world(medium, stage_settings=settings)
    medium.name = "org/math"
    for adapters in ((), ("math",)):
        medium.adapters = adapters
        # What adapters there are is asked again after a while.
        clock.now += 3600.0
        request = cascade_pb2.GenerateRequest(prompt="hi", stage="medium", task="math")
        await w.stub.Generate(request, timeout=CALL_S)
    assert [request.model for request in medium.requests][1] == "org/math/math"
    assert counts(metered()["asd.stage.tasks"]) == {("medium", "none"): 1, ("medium", "used"): 1}


async def running(stage, count):
    while stage.running < count:
        await asyncio.sleep(0)
