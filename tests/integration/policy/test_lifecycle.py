"""A policy in service over real gRPC: reports, refitting, new versions, a shadow; and its process."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc
import pytest
import yaml
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from asd.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from policy_service import instruments as instruments_module
from policy_service.artifact import load_usable
from policy_service.drift import DriftMonitor, DriftRule
from policy_service.instruments import PolicyInstruments
from policy_service.reports import ReportLog
from policy_service.servicer import PolicyServicer
from policy_service.shadow import Shadow, read_shadow
from policy_service.store import PolicyStore, PolicyWatch, open_policy
from policy_service.train import cli
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from services.common.telemetry import Metrics
from tests.limits import CALL_S, PROCESS_S
from tests.unit.policy.tiny_policy import make_artifact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parents[3]
CASCADE = ["small", "large"]
STOP, ESCALATE = policy_pb2.DECISION_ACTION_STOP, policy_pb2.DECISION_ACTION_ESCALATE


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    store = PolicyStore(tmp_path / "store")
    store.publish(make_artifact(tmp_path / "v1", "v1"))
    return store


class Service(NamedTuple):
    """A running policy service on a store."""

    stub: policy_pb2_grpc.PolicyServiceAsyncStub
    servicer: PolicyServicer
    watch: PolicyWatch
    monitor: DriftMonitor

    def follow(self) -> None:
        """Do what `store.follow` does once between two sleeps."""
        loaded = self.watch.poll()
        if loaded is not None:
            self.servicer.use(loaded.policy, loaded.document)


@asynccontextmanager
async def running(store: PolicyStore, reports: Path, shadow: Shadow | None = None) -> AsyncIterator[Service]:
    loaded, opened = open_policy(store.directory)
    assert opened is not None
    monitor = DriftMonitor(DriftRule())
    servicer = PolicyServicer(
        loaded.policy,
        loaded.document,
        ReportLog(reports, monitor.add),
        monitor=monitor,
        shadow=shadow,
        known_versions=opened.names,
    )
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield Service(
            policy_pb2_grpc.PolicyServiceStub(channel), servicer, PolicyWatch(opened, loaded), monitor
        )
    await server.stop(None)


def decide(logprob: float, request_id: str = "") -> policy_pb2.DecideRequest:
    return policy_pb2.DecideRequest(
        prompt="What?",
        cascade=CASCADE,
        stage="small",
        draft=policy_pb2.DraftEvidence(
            text="x",
            logprobs=[logprob] * 2,
            entropies=[0.1] * 2,
            top2_margins=[0.5] * 2,
            finish_reason=common_pb2.FINISH_REASON_EOS,
        ),
        request_id=request_id,
    )


def report(
    request_id: str, p_correct: float, *, correct: bool, version: str = "v1"
) -> policy_pb2.ReportRequest:
    return policy_pb2.ReportRequest(
        request_id=request_id, stage="small", p_correct=p_correct, policy_version=version, correct=correct
    )


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["asd-policy", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


async def describe(service: Service) -> policy_pb2.PolicyServiceDescribeResponse:
    return await service.stub.Describe(policy_pb2.PolicyServiceDescribeRequest(), timeout=CALL_S)


async def test_feedback_from_report_to_a_refitted_policy_and_back(
    store: PolicyStore, tmp_path: Path, monkeypatch, capsys
):
    """Answers turn out worse than predicted: an alarm, a refit, a service that follows, and a rollback."""
    rng = random.Random(0)
    reports = tmp_path / "reports.jsonl"
    async with running(store, reports) as service:
        for index in range(400):
            judged = await service.stub.Decide(decide(-rng.random()), timeout=CALL_S)
            assert judged.policy_version == "v1"
            # Odds of a third of what was predicted.
            odds = judged.p_correct / (1 - judged.p_correct) / 3
            correct = rng.random() < odds / (1 + odds)
            await service.stub.Report(report(f"r{index}", judged.p_correct, correct=correct), timeout=CALL_S)
        (told,) = (await describe(service)).calibration
        assert (told.stage, told.reports, told.drifted) == ("small", 400, True)
        assert told.observed < told.expected - 0.1
        assert told.calibration_error > 0.1
        assert told.drift_evidence >= 10_000

        before = await service.stub.Decide(decide(-0.4), timeout=CALL_S)
        assert before.action == STOP
        assert run_cli(monkeypatch, "drift", reports) == 0
        assert run_cli(monkeypatch, "refit", store.directory, "--reports", reports) == 0
        assert store.current() == "v1"
        assert run_cli(monkeypatch, "refit", store.directory, "--reports", reports, "--publish") == 0
        version = store.current()
        assert version != "v1"
        assert capsys.readouterr().out.count(version) == 1

        service.follow()
        after = await service.stub.Decide(decide(-0.4), timeout=CALL_S)
        assert (after.policy_version, after.action) == (version, ESCALATE)
        odds = before.p_correct / (1 - before.p_correct) / 3
        # Standard error of the offset at 400 reports: some 0.12 of log-odds, 0.03 of P(correct).
        assert after.p_correct == pytest.approx(odds / (1 + odds), abs=0.08)
        # The new policy has a clean sheet; late reports of the old one are taken and not held against it.
        assert list((await describe(service)).calibration) == []
        late = await service.stub.Report(report("late", 0.9, correct=False), timeout=CALL_S)
        assert late.reports == 401
        assert list((await describe(service)).calibration) == []
        await service.stub.Report(report("new", 0.9, correct=True, version=version), timeout=CALL_S)
        assert [each.reports for each in (await describe(service)).calibration] == [1]

        assert run_cli(monkeypatch, "versions", store.directory) == 0
        listed = capsys.readouterr().out
        assert f"{version} *" in listed
        assert [line.split()[1] for line in listed.splitlines() if version in line] == ["*"]
        assert any(line.split()[:3] == [version, "*", "v1"] for line in listed.splitlines())
        assert run_cli(monkeypatch, "rollback", store.directory) == 0
        service.follow()
        again = await service.stub.Decide(decide(-0.4), timeout=CALL_S)
        assert (again.policy_version, again.p_correct) == ("v1", before.p_correct)
        # What was known against it is known still.
        assert (await describe(service)).calibration[0].drifted


async def test_a_bad_new_version_leaves_the_last_good_one(store: PolicyStore, tmp_path: Path, caplog):
    async with running(store, tmp_path / "r.jsonl") as service:
        store.publish(make_artifact(tmp_path / "v2", "v2"))
        store.artifact("v2").write_bytes(b"PK")
        service.follow()
        assert (await service.stub.Decide(decide(-0.4), timeout=CALL_S)).policy_version == "v1"
    assert "v1 stays in force" in caplog.text


async def test_reports_of_a_version_that_nobody_knows_are_refused(store: PolicyStore, tmp_path: Path):
    from asd.errors import NotFound
    from asd.transport.channel import call_unary

    store.publish(make_artifact(tmp_path / "v2", "v2"))
    async with running(store, tmp_path / "r.jsonl") as service:
        # v1 was in force before the service started.
        await service.stub.Report(report("a", 0.5, correct=True, version="v1"), timeout=CALL_S)
        with pytest.raises(NotFound, match="v2 is in force"):
            await call_unary(
                service.stub.Report,
                report("b", 0.5, correct=True, version="v9"),
                timeout_ms=CALL_S * 1e3,
                peer="policy",
            )


async def test_reports_are_taken_of_a_version_that_only_other_replicas_serve_yet(
    store: PolicyStore, tmp_path: Path
):
    async with running(store, tmp_path / "r.jsonl") as service:
        first = report("a", 0.5, correct=True, version="v2")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Report(first, timeout=CALL_S)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        store.publish(make_artifact(tmp_path / "v2", "v2"))
        # The service has not looked at the store since.
        assert (await service.stub.Decide(decide(-0.4), timeout=CALL_S)).policy_version == "v1"
        assert (await service.stub.Report(first, timeout=CALL_S)).reports == 1


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(instruments_module.telemetry, "meter", lambda: provider.get_meter("asd"))
    yield reader
    provider.shutdown()


def measured(reader: InMemoryMetricReader) -> dict[str, dict[tuple[object, ...], float]]:
    """Return by metric and attribute values what a reader sees."""
    data = reader.get_metrics_data()
    found: dict[str, dict[tuple[object, ...], float]] = {}
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] = {
                    tuple(sorted((point.attributes or {}).values())): point.value  # type: ignore[union-attr, type-var]
                    for point in metric.data.data_points
                }
    return found


async def test_calibration_shows_as_metrics_of_the_policy_in_force(
    store: PolicyStore, tmp_path: Path, metrics: InMemoryMetricReader
):
    async with running(store, tmp_path / "r.jsonl") as service:
        PolicyInstruments().watch_calibration(service.servicer.calibration)
        for index in range(60):
            await service.stub.Report(report(f"r{index}", 0.9, correct=index % 2 == 0), timeout=CALL_S)
        seen = measured(metrics)
        assert seen[Metrics.REPORTS] == {("small",): 60}
        assert seen[Metrics.REPORTED_P_CORRECT][("small",)] == pytest.approx(0.9)
        assert seen[Metrics.REPORTED_ACCURACY] == {("small",): 0.5}
        assert seen[Metrics.REPORTED_ECE][("small",)] == pytest.approx(0.4)
        assert seen[Metrics.DRIFT_EVIDENCE][("small",)] >= 10_000
        assert seen[Metrics.DRIFT_ALARM] == {("small",): 1.0}
        store.publish(make_artifact(tmp_path / "v2", "v2"))
        service.follow()
        assert Metrics.DRIFT_ALARM not in measured(metrics)


async def test_a_shadow_decides_beside_the_live_policy_and_is_only_recorded(
    store: PolicyStore, tmp_path: Path, metrics: InMemoryMetricReader, monkeypatch, capsys
):
    candidate = load_usable(make_artifact(tmp_path / "c", "candidate", offset=-2.0))
    path = tmp_path / "shadow.jsonl"
    with Shadow(candidate.policy, path, PolicyInstruments()) as shadow:
        async with running(store, tmp_path / "r.jsonl", shadow) as service:
            planned = await service.stub.Plan(
                policy_pb2.PlanRequest(prompt="What?", cascade=CASCADE), timeout=CALL_S
            )
            sure = await service.stub.Decide(decide(0.0, "sure"), timeout=CALL_S)
            unsure = await service.stub.Decide(decide(-0.4, "unsure"), timeout=CALL_S)
    assert {each.policy_version for each in (planned, sure, unsure)} == {"v1"}
    assert (sure.action, unsure.action) == (STOP, STOP)
    plan, stop, go = read_shadow(path)
    assert (plan.step, plan.live_action, plan.live_version) == ("plan", planned.first_stage, "v1")
    assert (stop.request_id, stop.live_action, stop.shadow_action) == ("sure", "stop", "stop")
    assert (go.request_id, go.live_action, go.shadow_action) == ("unsure", "stop", "large")
    assert go.live_p_correct == unsure.p_correct
    assert go.shadow_p_correct < 0.2
    # large costs 3 whatever is escalated.
    assert (go.cost_change_by_live, go.cost_change_by_shadow) == (3.0, 3.0)
    told = measured(metrics)[Metrics.SHADOW_DECISIONS]
    assert told[("agreed", "decide", "small")] == told[("decide", "differed", "small")] == 1
    assert run_cli(monkeypatch, "shadow", path) == 0
    printed = capsys.readouterr().out
    assert "candidate beside v1: 3 records" in printed
    row = next(line.split() for line in printed.splitlines() if "decide" in line)
    assert row[:4] == ["decide", "small", "2", "50.0%"]
    assert row[-1] == "+1.500"


async def test_a_shadow_that_fails_or_hangs_touches_no_answer(
    store: PolicyStore, tmp_path: Path, monkeypatch
):
    async with running(store, tmp_path / "r.jsonl") as service:
        alone = await service.stub.Decide(decide(-0.4), timeout=CALL_S)
    leave = threading.Event()
    candidate = load_usable(make_artifact(tmp_path / "c", "candidate")).policy

    def fail(*_: object) -> None:
        raise RuntimeError("broken candidate")

    def hang(*_: object) -> None:
        leave.wait(CALL_S)

    for behaviour in (fail, hang):
        monkeypatch.setattr(candidate, "decide", behaviour)
        with Shadow(candidate, None, PolicyInstruments(), capacity=1, closing_s=0.01) as shadow:
            async with running(store, tmp_path / "r.jsonl", shadow) as service:
                for _ in range(4):
                    beside = await service.stub.Decide(decide(-0.4), timeout=CALL_S)
                    alone.predict_us = beside.predict_us
                    assert beside == alone
                told = (await describe(service)).shadow
                assert told.policy_version == "candidate"
                assert told.decisions == 0
        counts = shadow.counts
        # One hangs and one waits.
        wanted = (4, 0) if behaviour is fail else (0, 2)
        assert (counts.failures + counts.dropped, counts.dropped) >= wanted
    leave.set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["versions", "nowhere"], "no policy was published in nowhere"),
        (["publish", "nowhere", "store"], "no policy in nowhere"),
        (["publish", "v1", "v1"], "v1 is a file: name a directory"),
        (["rollback", "store"], "there is no version before v1"),
        (["rollback", "store", "--to", "v9"], "holds no version 'v9'"),
        (["refit", "store", "--reports", "nowhere"], "nowhere: no such file"),
        (["refit", "nowhere", "--reports", "empty"], "no policy was published in nowhere"),
        (["refit", "store", "--reports", "empty"], "too few reports of policy v1"),
        (["drift", "nowhere"], "nowhere: no such file"),
        (["shadow", "nowhere"], "nowhere: no such file"),
    ],
)
def test_a_command_that_cannot_says_why(arguments, message, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    assert run_cli(monkeypatch, *arguments) == (2 if "--to" in arguments else 1)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert store.history() == ("v1",)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[object]:
    """Starts the service's process with settings; gives its READY address, or None where it ended."""
    started = []

    def start(**settings: object) -> tuple[subprocess.Popen[str], str]:
        config = tmp_path / "policy.yaml"
        config.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **settings}))
        command = [sys.executable, "-m", "policy_service", "--config", str(config)]
        errors = (tmp_path / "errors.log").open("w")
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(os.environ)
        )
        errors.close()
        started.append(child)
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], 60)
        assert ready
        return child, child.stdout.readline().strip().removeprefix("READY policy ")

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


async def test_the_process_follows_its_store_and_keeps_a_shadow(store, process, tmp_path):
    make_artifact(tmp_path / "v2", "v2", offset=-2.0)
    child, address = process(
        artifact=str(store.directory),
        artifact_poll_seconds=0.05,
        cascade=CASCADE,
        reports_path=str(tmp_path / "reports.jsonl"),
        shadow_artifact=str(tmp_path / "v2"),
        shadow_path=str(tmp_path / "shadow.jsonl"),
    )
    async with open_channel(address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        assert (await stub.Decide(decide(-0.4), timeout=CALL_S)).policy_version == "v1"
        store.publish(tmp_path / "v2")
        until = time.monotonic() + CALL_S
        while (answer := await stub.Decide(decide(-0.4), timeout=CALL_S)).policy_version == "v1":
            assert time.monotonic() < until, (tmp_path / "errors.log").read_text()
        assert (answer.policy_version, answer.action) == ("v2", ESCALATE)
    child.send_signal(signal.SIGTERM)
    assert child.wait(PROCESS_S) == 0
    first, *_, last = read_shadow(tmp_path / "shadow.jsonl")
    assert (first.live_version, first.agrees) == ("v1", False)
    assert (last.live_version, last.agrees) == ("v2", True)
    assert "v2 is in force" in (tmp_path / "errors.log").read_text()


async def test_a_shadow_that_cannot_be_had_does_not_keep_the_process_from_serving(store, process, tmp_path):
    other = make_artifact(tmp_path / "other", "other", stages=("small", "medium", "large"))
    _, address = process(artifact=str(store.directory), shadow_artifact=str(other))
    async with open_channel(address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        assert (await stub.Decide(decide(-0.4), timeout=CALL_S)).policy_version == "v1"
        described = await stub.Describe(policy_pb2.PolicyServiceDescribeRequest(), timeout=CALL_S)
        assert not described.HasField("shadow")
    log = (tmp_path / "errors.log").read_text()
    assert "no shadow" in log
    assert "cascade small, medium, large" in log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cascade": ["small", "medium", "large"]}, "policy v1 was made for the cascade small, large, but"),
        ({"shadow_path": "s.jsonl"}, "shadow_path needs shadow_artifact"),
        ({"artifact_poll_seconds": 0}, "artifact_poll_seconds: Input should be greater than 0"),
        ({"drift_tolerance": 0.5}, "drift_tolerance: Input should be less than 0.5"),
        ({"drift_run_length": 1}, "drift_run_length: Input should be greater than 1"),
        ({"shadow_max_mb": -1}, "shadow_max_mb: Input should be greater than 0"),
    ],
)
def test_the_process_refuses_what_does_not_fit(settings, message, store, process, tmp_path):
    child, ready = process(artifact=str(store.directory), **settings)
    assert ready == ""
    assert child.wait(PROCESS_S) != 0
    said = (tmp_path / "errors.log").read_text()
    assert message in said
    assert "Traceback" not in said
