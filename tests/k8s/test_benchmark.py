"""The benchmark script: its figures by hand, its page, and a run as the Job makes it with a real router."""

# ruff: noqa: N802 - methods have the protos' names

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import suites
from asd.client import AsyncClient
from asd.transport.tls import Tls
from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2, policy_pb2
from services.common.server import ServiceRegistration, start_server
from tests.integration.common.certificates import Authority
from tests.integration.gateway.conftest import running
from tests.integration.router.conftest import FakePolicy, FakeStage, world  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SCRIPT = Path(__file__).parents[2] / "k8s" / "benchmark" / "benchmark.py"
_spec = importlib.util.spec_from_file_location("k8s_benchmark", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
benchmark: Any = importlib.util.module_from_spec(_spec)
sys.modules["k8s_benchmark"] = benchmark
_spec.loader.exec_module(benchmark)


def outcome(stage: str = "small", **fields: Any) -> Any:
    given = {
        "is_right": True,
        "is_early": stage != "large",
        "latency_ms": 10.0,
        "cost": 1.0,
        "plan_source": "policy",
    }
    return benchmark.Outcome(stage=stage, **{**given, **fields})


def pair(cascade: Any, largest: Any, suite: str = "arithmetic") -> Any:
    return benchmark.Pair(suite, 1, cascade, largest)


LARGEST = {"stage": "large", "latency_ms": 40.0, "cost": 8.0}
PAIRS = [
    pair(outcome(latency_ms=10.0, cost=1.0), outcome(**LARGEST)),
    pair(outcome(latency_ms=20.0, cost=2.0, is_right=False), outcome(**LARGEST)),
    pair(outcome("large", latency_ms=50.0, cost=9.0), outcome(**LARGEST), "truth"),
    pair(
        outcome(latency_ms=20.0, cost=4.0, plan_source="static"), outcome(**LARGEST, is_right=False), "truth"
    ),
]


def test_figures_are_those_of_a_hand_calculation() -> None:
    result = benchmark.compare(PAIRS)
    assert result["early_stop_share"] == 0.75
    assert result["cascade"]["share_right"] == 0.75
    assert result["cascade"]["mean_cost"] == 4.0
    assert result["largest"]["mean_cost"] == 8.0
    assert result["ratios"]["cost"]["value"] == pytest.approx(0.5)
    assert result["ratios"]["mean_latency"]["value"] == pytest.approx(25 / 40)
    assert result["ratios"]["share_right"]["value"] == pytest.approx(1.0)
    assert result["ratios"]["p95_latency"]["value"] == pytest.approx(50 / 40)
    assert result["cascade"]["answering_stage"] == {"small": 3, "large": 1}
    assert result["cascade"]["plan_source"] == {"policy": 3, "static": 1}
    assert result["suites"]["truth"] == {
        "requests": 2,
        "early_stop_share": 0.5,
        "share_right": 1.0,
        "share_right_largest": 0.5,
        "cost_ratio": 13 / 16,
    }


def test_percentiles_are_nearest_ranks() -> None:
    latency = benchmark.compare(PAIRS)["cascade"]["latency_ms"]
    # Of 10, 20, 20 and 50 ms.
    assert [latency["percentiles"][share] for share in (0, 25, 26, 75, 76, 100)] == [10, 10, 20, 20, 50, 50]
    assert (latency["p50"], latency["p99"]) == (20.0, 50.0)


def test_an_interval_holds_its_ratio_and_narrows_with_the_tasks() -> None:
    few = benchmark.compare(PAIRS)["ratios"]["cost"]
    many = benchmark.compare(PAIRS * 50)["ratios"]["cost"]
    assert few["low"] < few["value"] < few["high"]
    assert many["value"] == pytest.approx(few["value"])
    # Fifty times the tasks, about a seventh of the width.
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 4


def test_no_right_answer_of_the_largest_stage_leaves_no_ratio() -> None:
    wrong = [pair(outcome(), outcome(**LARGEST, is_right=False))]
    assert benchmark.compare(wrong)["ratios"]["share_right"]["value"] is None


class FakeCascade(cascade_pb2_grpc.CascadeServiceServicer):
    """Small answers levels 1 and 2 at a cost of 1, large the others at 10; alone it costs 8. All is right."""

    def __init__(self, tasks: list[suites.Task], version: str = "v7") -> None:
        self.tasks = {task.prompt: task for task in tasks}
        self.version = version
        self.asked: list[tuple[str, str]] = []
        self.preferences: list[int] = []
        self.fail: set[tuple[str, str]] = set()

    async def Describe(self, request: Any, context: Any) -> cascade_pb2.DescribeResponse:
        return cascade_pb2.DescribeResponse(
            stages=[
                cascade_pb2.StageDescription(stage=name, stage_index=place, model=f"m-{name}", cost=cost)
                for place, (name, cost) in enumerate((("small", 1), ("large", 8)))
            ],
            policy=policy_pb2.PolicyServiceDescribeResponse(policy_version=self.version),
            version="9",
        )

    async def Generate(self, request: Any, context: Any) -> cascade_pb2.GenerateResponse:
        self.asked.append((request.prompt, request.stage))
        if not request.stage:
            self.preferences.append(request.objective.preference)
        if (request.prompt, request.stage) in self.fail:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        task = self.tasks[request.prompt]
        is_early = not request.stage and task.level <= 2
        return cascade_pb2.GenerateResponse(
            text=task.solution,
            stage="small" if is_early else "large",
            stage_index=0 if is_early else 1,
            cost=8 if request.stage else 1 if is_early else 10,
            plan_source=cascade_pb2.PLAN_SOURCE_FIXED if request.stage else cascade_pb2.PLAN_SOURCE_POLICY,
            policy_version="" if request.stage else self.version,
            finish_reason=common_pb2.FINISH_REASON_EOS,
        )


def registration(fake: FakeCascade) -> ServiceRegistration:
    return ServiceRegistration(
        "asd.v1.CascadeService",
        lambda server: cascade_pb2_grpc.add_CascadeServiceServicer_to_server(fake, server),
    )


@asynccontextmanager
async def serve(fake: FakeCascade) -> AsyncIterator[AsyncClient]:
    server, port = await start_server(
        "127.0.0.1:0",
        [registration(fake)],
    )
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        await server.stop(0)


def options(*more: str) -> Any:
    return benchmark.parse(
        ["--target=x:1", "--requests=40", "--warmup=6", "--concurrency=1", "--seed=3", *more]
    )


def tasks_of(run: Any) -> list[suites.Task]:
    return list(suites.split("evaluation", run.warmup + run.requests, seed=run.seed))


async def test_a_run_compares_the_same_tasks_both_ways() -> None:
    run = options("--label=policy-version=v7", "--label=pod=a")
    tasks = tasks_of(run)
    fake = FakeCascade(tasks)
    async with serve(fake) as client:
        result = await benchmark.measure(client, run)
    measured = tasks[6:]
    early = sum(task.level <= 2 for task in measured)
    assert 0 < early < 40
    assert result["requests"] == 40
    assert result["early_stop_share"] == early / 40
    assert result["ratios"]["cost"]["value"] == pytest.approx((early + 10 * (40 - early)) / (8 * 40))
    assert result["ratios"]["share_right"]["value"] == 1.0
    assert (result["policy_version"], result["asd_version"], result["baseline"]) == ("v7", "9", "large")
    assert result["labels"] == {"policy-version": "v7", "pod": "a"}
    assert result["failures"] == {}
    # Each task both ways, the ways taking turns at going first.
    assert [prompt for prompt, _ in fake.asked] == [task.prompt for task in tasks for _ in range(2)]
    assert [stage for _, stage in fake.asked[:8]] == ["", "large", "large", "", "", "large", "large", ""]


class Upstream:
    """A cascade as the gateway's tests start their router."""

    target = ""

    def __init__(self, fake: FakeCascade) -> None:
        self.fake = fake

    async def start(self) -> tuple[Any, int]:
        server, port = await start_server("127.0.0.1:0", [registration(self.fake)])
        self.target = f"127.0.0.1:{port}"
        return server, port


async def test_a_run_through_the_gateway_has_the_same_figures() -> None:
    run = options("--through=gateway", "--gateway=x:1", "--preference=best")
    tasks = tasks_of(run)
    fake = FakeCascade(tasks)
    fake.fail = {(tasks[10].prompt, "")}
    upstream = Upstream(fake)
    async with running(upstream) as gateway, AsyncClient(upstream.target) as client:
        asking = benchmark.HttpClient(f"127.0.0.1:{gateway.port}", run, None, "a-token")
        with contextlib.closing(asking):
            result = await benchmark.measure(client, run, asking)
    measured = [task for task in tasks[6:] if task.prompt != tasks[10].prompt]
    early = sum(task.level <= 2 for task in measured)
    assert result["through"] == "gateway"
    assert result["requests"] == len(measured)
    assert result["early_stop_share"] == early / len(measured)
    assert result["ratios"]["share_right"]["value"] == 1.0
    assert result["largest"]["mean_cost"] == 8.0
    assert result["cascade"]["plan_source"] == {"policy": len(measured)}
    assert result["failures"] == {"cascade: HTTP 429": 1}
    assert [prompt for prompt, _ in fake.asked] == [task.prompt for task in tasks for _ in range(2)]
    assert set(fake.preferences) == {common_pb2.PREFERENCE_BEST}


async def test_a_gateway_is_asked_over_tls_with_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway", "127.0.0.1")
    served = {"cert_file": cert, "key_file": key, "client_ca_file": authority.file}
    shown = Tls(ca_file=authority.file, cert_file=cert, key_file=key)
    run = options("--through=gateway", "--gateway=x:1")
    upstream = Upstream(FakeCascade(tasks_of(run)))
    async with running(upstream, tls=served) as gateway, AsyncClient(upstream.target) as client:
        asking = benchmark.HttpClient(f"127.0.0.1:{gateway.port}", run, shown, "")
        with contextlib.closing(asking):
            result = await benchmark.measure(client, run, asking)
    assert (result["requests"], result["failures"]) == (40, {})


async def test_a_gateway_that_is_not_there_ends_the_run() -> None:
    run = options("--through=gateway", "--gateway=x:1")
    async with serve(FakeCascade(tasks_of(run))) as client:
        asking = benchmark.HttpClient("127.0.0.1:9", run, None, "")
        with (
            contextlib.closing(asking),
            pytest.raises(benchmark.Refused, match="cascade: ConnectionRefusedError"),
        ):
            await benchmark.measure(client, run, asking)


async def test_a_failed_call_is_counted_and_its_task_left_out_of_both_ways() -> None:
    run = options()
    tasks = tasks_of(run)
    fake = FakeCascade(tasks)
    fake.fail = {(tasks[10].prompt, ""), (tasks[2].prompt, "")}
    async with serve(fake) as client:
        result = await benchmark.measure(client, run)
    # The warm-up's failure is not counted.
    assert result["failures"] == {"cascade: RESOURCE_EXHAUSTED": 1}
    assert result["requests"] == sum(task.prompt != tasks[10].prompt for task in tasks[6:])
    assert "FAILED calls: 1 × cascade: RESOURCE_EXHAUSTED" in benchmark.summary(result)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--label=policy-version=v6"], "the label policy-version says v6, but the policy in force is v7"),
        (["--baseline=huge"], "the cascade has the stages small, large"),
    ],
)
async def test_what_cannot_be_measured_is_refused_before_it_is(more: list[str], said: str) -> None:
    run = options(*more)
    fake = FakeCascade(tasks_of(run))
    async with serve(fake) as client:
        with pytest.raises(benchmark.Refused, match=said):
            await benchmark.measure(client, run)
    assert fake.asked == []


async def test_a_cascade_without_a_policy_is_labelled_none() -> None:
    run = options("--label=policy-version=none")
    async with serve(FakeCascade(tasks_of(run), version="")) as client:
        assert (await benchmark.measure(client, run))["policy_version"] == ""


def a_result(**changes: Any) -> Any:
    return {
        "schema": "asd.benchmark/1",
        "asd_version": "9",
        "started": "2026-01-01T00:00:00Z",
        "labels": {"pod": "</script><b>x"},
        "stages": [{"name": "small", "model": "m", "cost": 1.0}, {"name": "large", "model": "", "cost": 8.0}],
        "policy_version": "v7",
        "preference": "balanced",
        "baseline": "large",
        "seed": 0,
        "warmup": 0,
        "requests": len(PAIRS),
        "concurrency": 1,
        "seconds": 1.0,
        "requests_per_second": 8.0,
        "failures": {},
        **benchmark.compare(PAIRS),
        **changes,
    }


def test_the_summary_says_what_matters() -> None:
    text = benchmark.summary(a_result())
    assert re.search(r"mean cost, units +4\.00 +8\.00 +0\.50 \(", text)
    assert "75.0% of the answers came before the last stage (small 3, large 1)" in text
    assert "1 of 4 answers followed the static plan: the policy was away, or later than " in text
    assert "policy.timeoutMs (100 by default)" in text
    assert "FAILED" not in text


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [name for name, _ in attrs if name in {"src", "href"}]
        if tag not in {"meta", "line", "rect", "polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [name for name, _ in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data


def test_the_page_is_whole_loads_nothing_and_holds_the_result() -> None:
    result = a_result()
    text = benchmark.page(result)
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.sources == []
    assert "@import" not in text
    assert "url(" not in text
    assert json.loads(page.data) == json.loads(json.dumps(result))
    assert "50% of the cost" in re.sub(r"<[^>]+>", "", text).replace("%of", "% of")
    for number in re.findall(r'points="([^"]+)"', text):
        assert all(math.isfinite(float(each)) for each in re.split("[ ,]", number))


def test_a_page_is_made_of_a_log_without_asd(tmp_path: Path) -> None:
    result = a_result()
    log = tmp_path / "run.log"
    log.write_text(f"{benchmark.summary(result)}\n\n{json.dumps(result)}\n")
    # -S -I: neither asd nor anything else that is installed.
    run = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--render", str(log)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == benchmark.page(result)
    whole = tmp_path / "result.json"
    whole.write_text(json.dumps(result, indent=2) + "\n")
    assert benchmark.read_result(whole) == benchmark.read_result(log)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--target=x:1", "--render=y"], ["--target=x:1", "--requests=0"], ["--target=x:1", "--label=x"]],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


async def test_the_job_writes_summary_json_and_page_of_a_real_router(world: Any, tmp_path: Path) -> None:  # noqa: F811
    names = ("small", "medium", "large")
    running = await world(*(FakeStage(name) for name in names), policy=FakePolicy())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), f"--target=127.0.0.1:{running.port}", "--requests=8", "--warmup=2"),
        *("--label=policy-version=v7", f"--out={tmp_path / 'run'}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    lines = out.decode().splitlines()
    assert [line for line in lines if line.startswith("measured: ")] == [
        f"measured: {count} of 8 tasks" for count in range(1, 9)
    ]
    assert "warm-up: 2 of 2 tasks" in lines
    result = json.loads(lines[-1])
    assert result["requests"] == 8
    assert [each["name"] for each in result["stages"]] == list(names)
    # The fake policy stops at small, whose answer costs 1.6 and large's 8.8, by the router's own settings.
    assert result["early_stop_share"] == 1.0
    assert result["cascade"]["answering_stage"] == {"small": 8}
    assert result["largest"]["answering_stage"] == {"large": 8}
    assert result["ratios"]["cost"]["value"] < 1.0
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")


def test_a_router_that_is_not_there_ends_the_run_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "READY_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--target=127.0.0.1:9"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value.code).startswith("127.0.0.1:9: ")
    assert "RELEASE" not in str(stopped.value.code)
    # Of the Job's ConfigMap.
    monkeypatch.setenv("RELEASE", "nope")
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value.code).endswith("RELEASE in parameters.env your release?")
