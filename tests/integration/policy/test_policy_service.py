"""The policy service over real gRPC with the committed policy, and its process with unfit artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from asd.errors import ResourceExhausted
from asd.transport.channel import call_unary
from asd.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from policy_service.artifact import load_artifact
from policy_service.reports import ReportLog, read_reports
from policy_service.servicer import PolicyServicer
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from suites import split
from tests.limits import CALL_S, PROCESS_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from policy_service.document import PolicyDocument

ROOT = Path(__file__).parents[3]
ARTIFACT = ROOT / "policy_service" / "policy.zip"
CASCADE = ["small", "medium", "large"]
NAN = float("nan")


class Service(NamedTuple):
    """A running policy service."""

    target: str
    stub: policy_pb2_grpc.PolicyServiceAsyncStub
    document: PolicyDocument
    reports: Path


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    policy, document, _ = load_artifact(ARTIFACT)
    reports = tmp_path / "reports" / "reports.jsonl"
    servicer = PolicyServicer(policy, document, ReportLog(reports))
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    target = f"127.0.0.1:{port}"
    async with open_channel(target) as channel:
        yield Service(target, policy_pb2_grpc.PolicyServiceStub(channel), document, reports)
    await server.stop(None)


def evidence(*logprobs: float) -> policy_pb2.DraftEvidence:
    signals = logprobs or (-0.01, -0.02)
    return policy_pb2.DraftEvidence(
        text="10+3=13. Answer: 13",
        logprobs=signals,
        entropies=[-x for x in signals],
        top2_margins=[1.0] * len(signals),
        finish_reason=common_pb2.FINISH_REASON_EOS,
    )


def decide(**fields: object) -> policy_pb2.DecideRequest:
    given = {
        "prompt": "Ivo has 10 keys. Ivo finds 3 more. How many keys does Ivo have now?",
        "cascade": CASCADE,
        "stage": "small",
    }
    return policy_pb2.DecideRequest(**{**given, "draft": evidence(), **fields})  # type: ignore[arg-type]


def plan(**fields: object) -> policy_pb2.PlanRequest:
    return policy_pb2.PlanRequest(**{"prompt": "What?", "cascade": CASCADE, **fields})  # type: ignore[arg-type]


def verification(**fields: object) -> policy_pb2.VerificationEvidence:
    given = {"proposed_tokens": 2, "accepted_tokens": 1, "ranks": [0, 1], "draft_stage": "small"}
    return policy_pb2.VerificationEvidence(**{**given, **fields})  # type: ignore[arg-type]


async def test_a_sure_draft_stops_and_a_lost_one_escalates(service: Service) -> None:
    tasks = [task for task in split("demo", 120) if task.suite == "arithmetic"]
    easy, hard = tasks[0], max(tasks, key=lambda task: task.level)
    sure = await service.stub.Decide(decide(prompt=easy.prompt), timeout=CALL_S)
    unsure = evidence(*[-0.9, -0.4, -1.3] * 12)
    lost = await service.stub.Decide(decide(prompt=hard.prompt, draft=unsure), timeout=CALL_S)
    assert sure.action == policy_pb2.DECISION_ACTION_STOP
    assert lost.action == policy_pb2.DECISION_ACTION_ESCALATE
    assert lost.next_stage in {"medium", "large"}
    assert lost.p_correct < sure.p_correct
    assert [estimate.stage for estimate in lost.estimates] == CASCADE
    assert lost.policy_version == service.document.policy_version
    assert lost.escalate_value > lost.stop_value


async def test_more_lambda_never_asks_less_of_the_cascade(service: Service) -> None:
    asked = []
    for quality_value in (0.0, 5.0, 50.0, 5000.0):
        objective = common_pb2.Objective(**{"lambda": quality_value})
        request = decide(draft=evidence(-0.4, -0.2, -0.9), objective=objective)
        response = await service.stub.Decide(request, timeout=CALL_S)
        asked.append(response.action == policy_pb2.DECISION_ACTION_ESCALATE)
    assert asked == sorted(asked)
    assert set(asked) == {False, True}


async def test_a_verified_answer_is_judged_by_its_verification(service: Service) -> None:
    whole = verification(proposed_tokens=3, accepted_tokens=3, ranks=[0, 0, 0])
    broken = verification(proposed_tokens=3, accepted_tokens=0, ranks=[9, 4, 5])
    p_correct = []
    for check in (whole, broken):
        request = decide(stage="medium", verification=check)
        p_correct.append((await service.stub.Decide(request, timeout=CALL_S)).p_correct)
    assert p_correct[0] > p_correct[1]


async def test_every_kind_of_prompt_is_planned(service: Service) -> None:
    first_stages = set()
    for task in split("demo", 120):
        response = await service.stub.Plan(plan(prompt=task.prompt), timeout=CALL_S)
        first_stages.add(response.first_stage)
        assert 0.0 <= response.p_escalate <= 1.0
        assert [estimate.stage for estimate in response.estimates] == CASCADE
    assert "small" in first_stages


INVALID, MISSING, UNFIT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
)
BAD: dict[str, tuple[object, grpc.StatusCode, str]] = {
    "no prompt": (plan(prompt=None), INVALID, "prompt"),
    "an empty prompt": (plan(prompt=""), INVALID, "prompt"),
    "another cascade": (plan(cascade=["small", "large"]), UNFIT, "cascade"),
    "no cascade": (decide(cascade=[]), UNFIT, "cascade"),
    "a negative lambda": (
        plan(objective=common_pb2.Objective(**{"lambda": -1.0})),
        INVALID,
        "objective.lambda",
    ),
    "a NaN lambda": (decide(objective=common_pb2.Objective(**{"lambda": NAN})), INVALID, "objective.lambda"),
    "a budget that no stage meets": (
        plan(objective=common_pb2.Objective(max_cost=0.1)),
        INVALID,
        "objective.max_cost",
    ),
    "an unknown stage": (decide(stage="huge"), MISSING, "stage"),
    "an unknown stage's condition": (
        plan(conditions=[policy_pb2.StageCondition(stage="huge")]),
        MISSING,
        "conditions[0].stage",
    ),
    "a NaN queue": (
        plan(conditions=[policy_pb2.StageCondition(stage="small", expected_queue_ms=NAN)]),
        INVALID,
        "conditions[0].expected_queue_ms",
    ),
    "a share below none": (plan(min_accuracy_share=-0.1), INVALID, "min_accuracy_share"),
    "a NaN share": (decide(min_accuracy_share=NAN), INVALID, "min_accuracy_share"),
    "no draft": (decide(draft=None), INVALID, "draft"),
    "no finish reason": (decide(draft=policy_pb2.DraftEvidence(text="x")), INVALID, "draft.finish_reason"),
    "a NaN log-probability": (decide(draft=evidence(NAN, -1.0)), INVALID, "draft.logprobs"),
    "too few entropies": (
        decide(draft=policy_pb2.DraftEvidence(text="x", logprobs=[-1.0], finish_reason=1)),
        INVALID,
        "draft.entropies",
    ),
    "negative spending": (decide(spent_cost=-1.0), INVALID, "spent_cost"),
    "infinite time": (decide(spent_ms=float("inf")), INVALID, "spent_ms"),
    "a draft from nowhere": (
        decide(stage="medium", verification=verification(draft_stage="")),
        MISSING,
        "verification.draft_stage",
    ),
    "a draft from a later stage": (
        decide(stage="medium", verification=verification(draft_stage="large")),
        INVALID,
        "verification.draft_stage",
    ),
    "too few ranks": (
        decide(stage="medium", verification=verification(ranks=[0])),
        INVALID,
        "verification.ranks",
    ),
    "more accepted than proposed": (
        decide(stage="medium", verification=verification(accepted_tokens=3)),
        INVALID,
        "verification.accepted_tokens",
    ),
    "a report without an id": (policy_pb2.ReportRequest(stage="small"), INVALID, "request_id"),
    "a report of another policy": (
        policy_pb2.ReportRequest(request_id="r", stage="small", p_correct=0.5, policy_version="old"),
        MISSING,
        "policy_version",
    ),
    "a report of no probability": (
        policy_pb2.ReportRequest(request_id="r", stage="small", p_correct=1.5),
        INVALID,
        "p_correct",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_names_its_field_and_harms_nothing(service: Service, case: str) -> None:
    request, code, field = BAD[case]
    calls = {
        policy_pb2.PlanRequest: service.stub.Plan,
        policy_pb2.DecideRequest: service.stub.Decide,
        policy_pb2.ReportRequest: service.stub.Report,
    }
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calls[type(request)](request, timeout=CALL_S)  # type: ignore[index]
    assert caught.value.code() is code
    assert field_at_fault(caught.value) == field
    assert (await service.stub.Decide(decide(), timeout=CALL_S)).p_correct > 0


def field_at_fault(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    return bad.field_violations[0].field


@pytest.mark.parametrize("limit", [2**23, 2**24], ids=["refused by the caller", "refused by the service"])
@pytest.mark.parametrize("method", ["Plan", "Decide"])
async def test_a_prompt_of_9_mb_is_refused_with_what_to_change(
    service: Service, method: str, limit: int
) -> None:
    prompt = "x" * 9_000_000
    request = plan(prompt=prompt) if method == "Plan" else decide(prompt=prompt)
    async with open_channel(service.target, max_message_bytes=limit) as channel:
        call = getattr(policy_pb2_grpc.PolicyServiceStub(channel), method)
        with pytest.raises(ResourceExhausted) as caught:
            await call_unary(call, request, timeout_ms=CALL_S * 1e3, peer="policy")
    assert caught.value.message == (
        f"policy: the request has {request.ByteSize()} bytes, and 8388608 are the most that a message may "
        "have: shorten the prompt or the conversation, or split the batch"
    )
    assert (await service.stub.Decide(decide(), timeout=CALL_S)).p_correct > 0


async def test_a_prompt_that_the_policy_does_not_know_has_no_p_correct(service: Service) -> None:
    plan = await service.stub.Plan(
        policy_pb2.PlanRequest(prompt="hello", cascade=decide().cascade), timeout=10
    )
    assert plan.out_of_family
    assert not any(each.HasField("p_correct") for each in plan.estimates)
    request = decide()
    request.prompt = "hello"
    decision = await service.stub.Decide(request, timeout=10)
    assert decision.reason == policy_pb2.DECISION_REASON_OUT_OF_FAMILY
    assert (decision.next_stage, decision.HasField("p_correct")) == ("large", False)
    report = policy_pb2.ReportRequest(
        request_id="a", stage="large", policy_version=decision.policy_version, correct=True
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.Report(report, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "p_correct is required" in (caught.value.details() or "")
    assert not list(read_reports(service.reports))


async def test_a_second_report_of_a_request_is_kept_and_not_counted(service: Service) -> None:
    def report(request_id: str, *, correct: bool) -> policy_pb2.ReportRequest:
        version = service.document.policy_version
        return policy_pb2.ReportRequest(
            request_id=request_id, stage="small", p_correct=0.5, policy_version=version, correct=correct
        )

    receipts = [
        await service.stub.Report(report(name, correct=right), timeout=CALL_S)
        for name, right in (("a", True), ("b", True), ("a", False))
    ]
    assert [each.reports for each in receipts] == [1, 2, 2]
    assert [each.reported_before for each in receipts] == [False, False, True]
    kept = {each.request_id: each.correct for each in read_reports(service.reports)}
    assert kept == {"a": False, "b": True}


async def test_a_full_disk_is_told_to_who_reports_and_not_with_a_traceback(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.reports.unlink()
    service.reports.symlink_to("/dev/full")
    request = policy_pb2.ReportRequest(
        request_id="a", stage="small", p_correct=0.5, policy_version=service.document.policy_version
    )
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await service.stub.Report(request, timeout=10)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(service.reports) in (raised.value.details() or "")
    assert len(caplog.records) == 1


async def test_reports_outlive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = {
        "request_id": "a",
        "stage": "small",
        "p_correct": 0.5,
        "policy_version": "v",
        "correct": True,
        "reported_at": 1.0,
    }
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "request_id": "b"})[:30])
    log = ReportLog(path)
    from policy_service.reports import OutcomeReport, Receipt

    assert await log.add(OutcomeReport("c", "small", 0.5, "v", True, 2.0)) == Receipt(
        2, reported_before=False
    )
    assert [each.request_id for each in read_reports(path)] == ["a", "c"]


async def test_it_describes_the_policy(service: Service) -> None:
    described = await service.stub.Describe(policy_pb2.PolicyServiceDescribeRequest(), timeout=CALL_S)
    assert [stage.stage for stage in described.stages] == CASCADE
    assert [stage.cost for stage in described.stages] == [1.6, 4.2, 8.8]
    assert described.lambda_fastest < described.lambda_balanced < described.lambda_best
    assert described.train_prompts == service.document.train.prompts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("artifact: nowhere", "no policy in nowhere"),
        ("{}", "artifact: Field required"),
        (f"{{artifact: {ARTIFACT}, reports_path: /proc/none/r.jsonl}}", "choose a file that can be written"),
        (f"{{artifact: {ARTIFACT}, colour: red}}", "colour"),
    ],
)
def test_the_process_says_what_is_wrong_and_exits(tmp_path: Path, settings: str, message: str) -> None:
    config = tmp_path / "policy.yaml"
    config.write_text(settings)
    command = [sys.executable, "-m", "policy_service", "--config", str(config)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=PROCESS_S, cwd=tmp_path, check=False
    )
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
