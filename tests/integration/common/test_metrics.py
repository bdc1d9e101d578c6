"""What Prometheus finds at each service: names by its rules, and figures that follow what was done."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from asd.errors import QueueFull, Unavailable
from asd.v1 import (
    cascade_pb2,
    cascade_pb2_grpc,
    common_pb2,
    policy_pb2,
    policy_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
)
from services.common.server import ServiceRegistration, start_server
from tests.integration.common.conftest import CALL_S, PROCESS_S, running
from tests.integration.common.test_tls import failing, router_config
from tests.integration.router.conftest import COSTS, NAMES, FakePolicy, FakeStage, free_port

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "telemetry.md"
PROMPT = cascade_pb2.GenerateRequest(prompt="hi")
# Of the process itself, by Prometheus's own client; and of the exporter.
FOREIGN = ("process_", "target_info")


async def scrape(address: str) -> str:
    def fetch() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=CALL_S) as response:
            return response.read().decode()  # type: ignore[no-any-return]

    return await asyncio.to_thread(fetch)


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(text: str, name: str) -> dict[tuple[str, ...], float]:
    """Return a metric's samples by the values of their labels, in the order of the labels' names."""
    return {
        tuple(value for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def check_names(text: str) -> None:
    """Check what `promtool check metrics` checks; by promtool itself where it is at hand."""
    for name, family in families(text).items():
        if name == "target_info":
            continue
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert family.documentation, f"{name} says nothing of itself"
        # A counter's total is stripped by the parser; durations and sizes are in base units.
        assert not re.search(r"_(total|count|sum|bucket|info|ms|milliseconds|kb|mb|counter|gauge)$", name), (
            name
        )
        assert not re.search(r"_(milliseconds|kilobytes|mebibytes)_", name), name
        for sample in family.samples:
            assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", label) for label in sample.labels), sample
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{name}_total", f"{name}_created"}
    promtool = shutil.which("promtool")
    if promtool is not None:
        checked = subprocess.run(
            [promtool, "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            timeout=PROCESS_S,
            check=False,
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def documented(service: str) -> dict[str, str]:
    """Return the metrics of a service by the table of docs/telemetry.md: their types by name."""
    rows = re.findall(
        r"^\| `(asd_\w+|gen_ai_\w+)` \| (\w+) \|[^|]*\| (\w+) \|", DOCS.read_text(), re.MULTILINE
    )
    return {name: kind for name, kind, where in rows if where == service}


def found(text: str) -> dict[str, str]:
    """Return the metrics of a scrape: their types by the names that a query uses."""
    return {
        f"{name}_total" if family.type == "counter" else name: family.type
        for name, family in families(text).items()
        if not name.startswith(FOREIGN)
    }


@pytest.fixture
async def router(tmp_path: Path) -> Any:
    """A router's process with metrics; small is not enough, medium is. Yields stub, fakes and address."""
    policy = FakePolicy(script={"small": "medium"}, p_escalate=1.0, likely_next="medium")
    stages = [FakeStage(name) for name in NAMES]
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        targets = []
        for fake in (*stages, policy):
            server, port = await start_server("127.0.0.1:0", [ServiceRegistration(fake.full_name, fake.add)])
            stack.push_async_callback(server.stop, 0)
            targets.append(f"127.0.0.1:{port}")
        metrics = f"127.0.0.1:{free_port()}"
        config = router_config(
            stages=[
                {"name": name, "target": target, "cost": cost}
                for name, target, cost in zip(NAMES, targets, COSTS, strict=False)
            ],
            static_plan=["large"],
            policy={"target": targets[-1], "timeout_ms": CALL_S * 1e3},
            metrics_listen=metrics,
        )
        process = await stack.enter_async_context(running("services.router", config, tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.target))
        yield cascade_pb2_grpc.CascadeServiceStub(channel), stages, policy, metrics


async def test_a_routers_metrics_follow_what_it_does(router: Any) -> None:
    stub, (small, medium, _), policy, address = router
    for _ in range(3):
        await stub.Generate(PROMPT, timeout=CALL_S)
    policy.script, policy.likely_next = {}, ""
    await stub.Generate(PROMPT, timeout=CALL_S)
    small.fail_after, small.failure = 0, Unavailable("gone")
    medium.fail_after, medium.failure = 0, Unavailable("gone")
    await stub.Generate(PROMPT, timeout=CALL_S)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"), timeout=CALL_S)
    policy.plan_failure = Unavailable("gone")
    await stub.Generate(PROMPT, timeout=CALL_S)

    text = await scrape(address)
    check_names(text)
    # Early-stop rate, and where answers came from.
    assert values(text, "asd_requests_total") == {
        ("policy", "medium"): 3.0,
        ("policy", "small"): 1.0,
        ("policy", "large"): 1.0,
        ("static", "large"): 1.0,
    }
    assert values(text, "asd_early_stops_total") == {
        ("policy", "medium"): 3.0,
        ("policy", "small"): 1.0,
    }
    # Escalations, by reason, from and to.
    assert values(text, "asd_escalations_total") == {("value", "small", "medium"): 3.0}
    # Three tokens and the end of each draft were proposed, and all of it accepted.
    assert values(text, "asd_verify_proposed_tokens_total") == {("medium",): 12.0}
    assert values(text, "asd_verify_accepted_tokens_total") == {("medium",): 12.0}
    # Throughput: three tokens for each answer of a stage.
    assert values(text, "asd_stage_completion_tokens_total") == {
        ("small",): 12.0,
        ("medium",): 9.0,
        ("large",): 6.0,
    }
    # Latency and wait by stage: the fakes say 0.25 ms each time.
    assert values(text, "asd_stage_queue_duration_seconds_count")["small",] == 4.0
    assert values(text, "asd_stage_queue_duration_seconds_sum")["small",] == pytest.approx(4 * 0.25e-3)
    assert values(text, "asd_stage_decode_duration_seconds_sum")["medium",] == pytest.approx(3 * 2e-3)
    assert values(text, "asd_stage_prefill_duration_seconds_sum")["medium",] == pytest.approx(3 * 1e-3)
    assert values(text, "asd_stage_duration_seconds_count") == {
        ("generate", "small"): 4.0,
        ("verify", "medium"): 3.0,
        ("generate", "large"): 2.0,
    }
    # Failures, of stages and of requests; nothing is under way.
    assert values(text, "asd_stage_failures_total") == {
        ("small", "Unavailable"): 2.0,
        ("medium", "Unavailable"): 1.0,
    }
    assert values(text, "asd_request_failures_total") == {("UNAVAILABLE",): 1.0}
    assert values(text, "asd_active_requests") == {(): 0.0}
    assert values(text, "asd_static_plans_total") == {("plan",): 1.0}
    # Six answers, each with its cost.
    assert values(text, "asd_request_cost_count") == {(): 6.0}
    assert values(text, "asd_request_cost_sum")[()] > 3 * COSTS[0] + COSTS[0] + 2 * COSTS[2]
    assert values(text, "gen_ai_server_request_duration_seconds_count")["chat", "asd", "medium"] == 3.0
    assert values(text, "process_resident_memory_bytes")[()] > 0
    (info,) = families(text)["target_info"].samples
    assert (info.labels["service_name"], info.labels["service_namespace"]) == ("asd-router", "asd")


async def test_a_request_under_way_is_counted(router: Any) -> None:
    stub, (small, *_), _, address = router
    small.pause_after = 1
    call = stub.Generate(PROMPT, timeout=CALL_S)
    await small.started.wait()
    assert values(await scrape(address), "asd_active_requests") == {(): 1.0}
    call.cancel()
    while values(await scrape(address), "asd_active_requests") != {(): 0.0}:
        pass
    # Whoever leaves has no failure.
    assert values(await scrape(address), "asd_request_failures_total") == {}


async def test_a_stages_metrics_follow_its_models(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    config = {
        "models": [
            {"name": "small", "path": str(ROOT / "models" / "small")},
            {"name": "medium", "path": str(ROOT / "models" / "medium"), "preload": False},
        ],
        "memory_budget_mb": 512,
        "metrics_listen": address,
    }
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        stage = await stack.enter_async_context(running("services.stage", config, tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(stage.target))
        stub = stage_pb2_grpc.StageServiceStub(channel)
        prompt = stage_pb2.StageServiceGenerateRequest(prompt="True or false? 3 plus 22 is more than 24.")
        async for _ in stub.Generate(prompt, timeout=CALL_S):
            pass
        # Any draft is verified, whatever becomes of it.
        verified = stage_pb2.VerifyRequest(prompt=prompt.prompt)
        verified.draft.text = "The answer is"
        verified.draft.finish_reason = common_pb2.FINISH_REASON_LENGTH
        async for _ in stub.Verify(verified, timeout=CALL_S):
            pass
        draft: Any = stub.VerifyStream(timeout=CALL_S)
        start = stage_pb2.VerifyStreamStart(prompt="True or false? 3 plus 22 is more than 24.")
        await draft.write(stage_pb2.VerifyStreamRequest(start=start))
        await draft.read()
        busy = await scrape(address)
        draft.cancel()
        status = await stub.Status(stage_pb2.StatusRequest(), timeout=CALL_S)
        text = await scrape(address)
    check_names(text)
    assert found(text) == documented("stage")
    assert values(busy, "asd_stage_running_requests") == {("small",): 1.0, ("medium",): 0.0}
    assert values(busy, "asd_stage_kv_cache_bytes")["small",] > 0
    assert values(busy, "asd_stage_idle_seconds") == {(): 0.0}
    assert values(busy, "asd_stage_queue_depth") == {("small",): 0.0, ("medium",): 0.0}
    assert values(text, "asd_stage_models_loaded") == {("small",): 1.0, ("medium",): 0.0}
    assert values(text, "asd_stage_completed_requests_total") == {("small",): 2.0, ("medium",): 0.0}
    assert values(text, "asd_stage_verifications_total") == {("outside", "small"): 1.0}
    assert values(text, "asd_stage_model_memory_bytes") == {
        ("small",): float(status.models[0].memory_bytes),
        ("medium",): 0.0,
    }
    assert values(text, "asd_stage_model_memory_budget_bytes") == {(): 512.0 * 2**20}


async def test_a_policys_metrics_are_served(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    artifact = str(ROOT / "policy_service" / "policy.zip")
    config = {
        "artifact": artifact,
        "shadow_artifact": artifact,
        "reports_path": str(tmp_path / "reports.jsonl"),
        "metrics_listen": address,
    }
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        policy = await stack.enter_async_context(running("policy_service", config, tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(policy.target))
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        plan = await stub.Plan(policy_pb2.PlanRequest(prompt="hi", cascade=NAMES), timeout=CALL_S)
        for index, correct in enumerate((True, True, True, False)):
            report = policy_pb2.ReportRequest(
                request_id=f"r{index}",
                stage="small",
                p_correct=0.5,
                policy_version=plan.policy_version,
                correct=correct,
            )
            await stub.Report(report, timeout=CALL_S)
        text = await scrape(address)
    check_names(text)
    seen = documented("policy")
    # What became of the shadow's question is counted when it has been asked.
    assert seen.pop("asd_policy_shadow_decisions_total") == "counter"
    assert {name: kind for name, kind in found(text).items() if "shadow" not in name} == seen
    assert values(text, "asd_policy_reports") == {("small",): 4.0}
    assert values(text, "asd_policy_reported_p_correct") == {("small",): 0.5}
    assert values(text, "asd_policy_reported_accuracy") == {("small",): 0.75}
    (info,) = families(text)["target_info"].samples
    assert info.labels["service_name"] == "asd-policy"


async def test_every_metric_of_a_router_is_in_the_documents(router: Any) -> None:
    stub, (small, *_), policy, address = router
    await stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", task="math"), timeout=CALL_S)
    # After eight drafts that saved nothing, the next one is left out.
    small.pieces = (b"x", b"y", b"z")
    for _ in range(9):
        chain = cascade_pb2.GenerateRequest(prompt="hi", chain=(NAMES[0], NAMES[2]))
        await stub.Generate(chain, timeout=CALL_S)
    policy.likely_next = ""
    policy.decide_response = policy_pb2.DecideResponse(
        action=policy_pb2.DECISION_ACTION_STOP, reason=policy_pb2.DECISION_REASON_OUT_OF_FAMILY
    )
    await stub.Generate(PROMPT, timeout=CALL_S)
    small.fail_after, small.failure = 0, Unavailable("gone")
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"), timeout=CALL_S)
    small.failure = QueueFull("full")
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"), timeout=CALL_S)
    policy.plan_failure = Unavailable("gone")
    await stub.Generate(PROMPT, timeout=CALL_S)
    seen = found(await scrape(address))
    # Only a router with a manager knows which stages sleep.
    assert seen == {name: kind for name, kind in documented("router").items() if name != "asd_stage_asleep"}


async def test_an_address_that_is_taken_is_said_at_the_start(tmp_path: Path) -> None:
    server, port = await start_server("127.0.0.1:0", [])
    config = router_config(metrics_listen=f"127.0.0.1:{port}")
    code, line = await failing("services.router", config, tmp_path)
    assert code == 1
    assert line == f"asd: metrics_listen: cannot listen on 127.0.0.1:{port}: address already in use"
    code, line = await failing("services.router", router_config(metrics_listen="9464"), tmp_path)
    assert (code, line.endswith(" 9464: not host:port")) == (1, True)
    code, line = await failing("services.router", router_config(metrics_listen="no.such:99"), tmp_path)
    assert code == 1
    assert line.startswith("asd: metrics_listen: ")
    assert "no.such:99: " in line
    await server.stop(0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("[::1]", ("[::1]",)),
        ("127.0.0.1", ("127.0.0.1",)),
        ("localhost", ("localhost",)),
        ("[::]", ("[::1]", "127.0.0.1")),
        ("0.0.0.0", ("[::1]", "127.0.0.1")),
    ],
)
async def test_metrics_are_served_where_grpc_would_listen(
    host: str, reached: tuple[str, ...], tmp_path: Path
) -> None:
    port = free_port()
    config = router_config(metrics_listen=f"{host}:{port}", listen=f"{host}:0")
    async with asyncio.timeout(PROCESS_S), running("services.router", config, tmp_path) as router:
        grpc_port = router.target.rpartition(":")[2]
        for address in reached:
            assert "process_max_fds" in await scrape(f"{address}:{port}")
            async with grpc.aio.insecure_channel(f"{address}:{grpc_port}") as channel:
                await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=CALL_S
                )
