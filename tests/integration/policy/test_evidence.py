"""What the committed policy makes of what the router tells it: conditions, spending, budgets."""

from __future__ import annotations

import bisect
import json
import math
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from asd.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from policy_service.artifact import load_artifact
from policy_service.servicer import PolicyServicer
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from suites import split
from tests.limits import CALL_S
from tests.unit.policy.tiny_policy import files_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

ARTIFACT = Path(__file__).parents[3] / "policy_service" / "policy.zip"
CASCADE = ["small", "medium", "large"]
STOP, ESCALATE = policy_pb2.DECISION_ACTION_STOP, policy_pb2.DECISION_ACTION_ESCALATE
LAST_STAGE = policy_pb2.DECISION_REASON_LAST_STAGE
MAX_COST, MAX_LATENCY = policy_pb2.DECISION_REASON_MAX_COST, policy_pb2.DECISION_REASON_MAX_LATENCY
TASKS = [task for task in split("demo", 120) if task.suite == "arithmetic"]
HARD = max(TASKS, key=lambda task: task.level).prompt
EASY = TASKS[0].prompt
# A later stage that is right gains so much that nothing but a budget or its absence keeps a bad draft.
DEAR = 5000.0
# Above any of these models' latencies, and any budget of these tests.
LONG_MS = 2000.0


@pytest.fixture
async def stub() -> AsyncIterator[policy_pb2_grpc.PolicyServiceAsyncStub]:
    policy, document, _ = load_artifact(ARTIFACT)
    servicer = PolicyServicer(policy, document, None)
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel)
    await server.stop(None)


def objective(**fields: float) -> common_pb2.Objective:
    return common_pb2.Objective(**{"lambda": DEAR, **fields})  # type: ignore[arg-type]


def away(*stages: str) -> list[policy_pb2.StageCondition]:
    return [policy_pb2.StageCondition(stage=stage, available=False) for stage in stages]


def queues(**expected_ms: float) -> list[policy_pb2.StageCondition]:
    return [
        policy_pb2.StageCondition(stage=stage, available=True, queue_depth=3, expected_queue_ms=queue_ms)
        for stage, queue_ms in expected_ms.items()
    ]


def draft(*logprobs: float) -> policy_pb2.DraftEvidence:
    return policy_pb2.DraftEvidence(
        text="10+3=13. Answer: 13",
        logprobs=logprobs,
        entropies=[-x for x in logprobs],
        top2_margins=[1.0] * len(logprobs),
        finish_reason=common_pb2.FINISH_REASON_EOS,
    )


LOST, SURE = draft(*[-0.9, -0.4, -1.3] * 12), draft(-0.01, -0.02)


def decide(**fields: object) -> policy_pb2.DecideRequest:
    given = {"prompt": HARD, "cascade": CASCADE, "stage": "small", "draft": LOST, "objective": objective()}
    return policy_pb2.DecideRequest(**{**given, **fields})  # type: ignore[arg-type]


def plan(**fields: object) -> policy_pb2.PlanRequest:
    return policy_pb2.PlanRequest(**{"prompt": EASY, "cascade": CASCADE, **fields})  # type: ignore[arg-type]


def latencies(estimates: Iterable[policy_pb2.StageEstimate]) -> dict[str, float]:
    return {each.stage: each.latency_ms for each in estimates}


@pytest.mark.parametrize("stage", ["small", "medium"])
@pytest.mark.parametrize("evidence", [LOST, SURE], ids=["lost", "sure"])
async def test_decide_never_chooses_a_stage_that_is_away(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub, stage: str, evidence: policy_pb2.DraftEvidence
) -> None:
    later = CASCADE[CASCADE.index(stage) + 1 :]
    subsets = list(chain.from_iterable(combinations(later, size) for size in range(len(later) + 1)))
    chosen = set()
    for task in TASKS[:10]:
        for missing in subsets:
            request = decide(prompt=task.prompt, stage=stage, draft=evidence, conditions=away(*missing))
            response = await stub.Decide(request, timeout=CALL_S)
            assert response.next_stage not in missing
            if len(missing) == len(later):
                assert (response.action, response.reason) == (STOP, LAST_STAGE)
            chosen.add((missing, response.next_stage))
    if evidence is LOST:
        # What is there is asked: the others went unchosen for their absence alone.
        assert {names for names, name in chosen if name} == set(subsets) - {tuple(later)}


async def test_plan_never_chooses_a_stage_that_is_away(stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
    for task in TASKS[:10]:
        for missing in chain.from_iterable(combinations(CASCADE, size) for size in (1, 2)):
            response = await stub.Plan(plan(prompt=task.prompt, conditions=away(*missing)), timeout=CALL_S)
            assert response.first_stage not in missing
            assert response.likely_next_stage not in missing


async def test_a_queue_makes_a_latency_budget_fail(stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
    idle = await stub.Decide(decide(objective=objective(max_latency_ms=1000.0)), timeout=CALL_S)
    assert idle.action == ESCALATE
    everywhere = decide(
        objective=objective(max_latency_ms=1000.0), conditions=queues(medium=LONG_MS, large=LONG_MS)
    )
    full = await stub.Decide(everywhere, timeout=CALL_S)
    assert (full.action, full.reason) == (STOP, MAX_LATENCY)


async def test_waiting_has_a_price(stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
    idle = await stub.Decide(decide(objective=objective(**{"lambda": 20.0})), timeout=CALL_S)
    assert idle.action == ESCALATE
    values = []
    for wait_ms in (0.0, 100.0, 1000.0, LONG_MS):
        request = decide(
            objective=objective(**{"lambda": 20.0}), conditions=queues(medium=wait_ms, large=wait_ms)
        )
        values.append((await stub.Decide(request, timeout=CALL_S)).escalate_value)
    assert values == sorted(values, reverse=True)
    assert values[0] == idle.escalate_value
    # It costs more than any answer is worth to this caller; to one who values it at 5000, it does not.
    request = decide(
        objective=objective(**{"lambda": 20.0}), conditions=queues(medium=LONG_MS, large=LONG_MS)
    )
    full = await stub.Decide(request, timeout=CALL_S)
    assert (full.action, full.reason) == (STOP, policy_pb2.DECISION_REASON_VALUE)
    patient = decide(conditions=queues(medium=LONG_MS, large=LONG_MS))
    assert (await stub.Decide(patient, timeout=CALL_S)).action == ESCALATE


@pytest.mark.parametrize(("more_ms", "is_asked"), [(-1.0, True), (1.0, False)])
@pytest.mark.parametrize("what", ["queue", "spent"])
async def test_waiting_and_time_spent_count_to_the_millisecond(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub, what: str, more_ms: float, is_asked: bool
) -> None:
    only_large = await stub.Decide(decide(conditions=away("medium")), timeout=CALL_S)
    assert only_large.next_stage == "large"
    budget = objective(max_latency_ms=latencies(only_large.estimates)["large"] + 100.0)
    if what == "queue":
        request = decide(objective=budget, conditions=[*away("medium"), *queues(large=100.0 + more_ms)])
    else:
        request = decide(objective=budget, conditions=away("medium"), spent_ms=100.0 + more_ms)
    response = await stub.Decide(request, timeout=CALL_S)
    assert response.next_stage == ("large" if is_asked else "")
    assert (response.reason == MAX_LATENCY) is not is_asked


async def test_a_queue_leaves_the_other_stages_eligible(stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
    budget = objective(max_latency_ms=1000.0)
    for busy, other in (("medium", "large"), ("large", "medium")):
        request = decide(objective=budget, conditions=queues(**{busy: LONG_MS}))
        response = await stub.Decide(request, timeout=CALL_S)
        assert response.next_stage == other


async def test_plans_arrival_includes_the_queue(stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
    idle = await stub.Plan(plan(), timeout=CALL_S)
    assert idle.first_stage == "small"
    # Waiting for two answers of small and for a fifth of one of medium: small is still the better value.
    budget = common_pb2.Objective(max_latency_ms=latencies(idle.estimates)["small"] + 12.5)
    for queue_ms, is_asked in ((12.4, True), (12.6, False)):
        request = plan(objective=budget, conditions=queues(small=queue_ms, medium=3.0))
        response = await stub.Plan(request, timeout=CALL_S)
        assert (response.first_stage == "small") is is_asked
    # Without a budget, the stage whose queue is shorter is asked, were it the dearer one.
    impatient = await stub.Plan(plan(conditions=queues(small=LONG_MS)), timeout=CALL_S)
    assert impatient.first_stage != "small"


@pytest.mark.parametrize("free", CASCADE)
async def test_where_no_stage_is_in_time_the_shortest_queue_comes_closest(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub, free: str
) -> None:
    waits = {stage: LONG_MS for stage in CASCADE if stage != free}
    request = plan(objective=common_pb2.Objective(max_latency_ms=0.5), conditions=queues(**waits))
    assert (await stub.Plan(request, timeout=CALL_S)).first_stage == free


# 1.6 + 8.8 is exactly 10.4, in floating point too; 1.6 + 4.2 is 8.9e-16 above 5.8.


@pytest.mark.parametrize(
    ("only", "max_cost", "is_asked"),
    [
        ("large", 10.4, True),
        ("large", 10.399, False),
        ("medium", 5.8, True),
        ("medium", 5.799, False),
    ],
)
async def test_decide_spends_max_cost_to_the_last(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub, only: str, max_cost: float, is_asked: bool
) -> None:
    other = "medium" if only == "large" else "large"
    request = decide(objective=objective(max_cost=max_cost), spent_cost=1.6, conditions=away(other))
    response = await stub.Decide(request, timeout=CALL_S)
    assert response.next_stage == (only if is_asked else "")
    assert (response.reason == MAX_COST) is not is_asked


async def test_plan_spends_max_cost_to_the_last(stub: policy_pb2_grpc.PolicyServiceAsyncStub) -> None:
    request = plan(prompt=HARD, objective=common_pb2.Objective(max_cost=1.6))
    assert (await stub.Plan(request, timeout=CALL_S)).first_stage == "small"
    request = plan(prompt=HARD, objective=common_pb2.Objective(max_cost=1.599))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Plan(request, timeout=CALL_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_standard_errors_are_those_of_the_calibration(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub,
) -> None:
    views = json.loads(files_of(ARTIFACT)["policy.json"])["views"]
    (heads,) = [view["heads"] for view in views if (view["stage"], view["origin"]) == ("small", None)]
    for evidence in (LOST, SURE):
        response = await stub.Decide(decide(draft=evidence), timeout=CALL_S)
        assert response.p_correct_stderr == response.estimates[0].p_correct_stderr
        for each, head in zip(response.estimates, heads, strict=True):
            # A binomial share's, with one success and one failure more than its bin has (Agresti and Coull).
            count = head["counts"][bisect.bisect_left(head["edges"], each.p_correct)] + 2
            share = (each.p_correct * (count - 2) + 1) / count
            assert each.p_correct_stderr == pytest.approx(math.sqrt(share * (1 - share) / count))
            assert 0.0 < each.p_correct_stderr < 0.1
    planned = await stub.Plan(plan(), timeout=CALL_S)
    assert all(0.0 < each.p_correct_stderr < 0.1 for each in planned.estimates)
