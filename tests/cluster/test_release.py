"""A release on a real cluster: installed, asked, disturbed, upgraded, rolled back, traced and removed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from services.common.telemetry import Attributes, Spans
from tests.cluster.release import (
    HERE,
    QUESTION,
    STAGES,
    Cluster,
    Disruption,
    Jaeger,
    Release,
    Span,
    disrupt,
    install_to_answer,
    load,
    poll,
    run_benchmark_job,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_default_values_answer_and_leave_nothing_behind(cluster: Cluster) -> None:
    release = Release(cluster, namespace="asd-default")
    _, answer = install_to_answer(release)
    try:
        assert answer["plan_source"] == "policy"
        assert answer["stages"][-1]["text"].endswith("Answer: 19")
        assert len(release.remains()) > 10
    finally:
        release.uninstall()
    assert release.remains() == []
    cluster.remove_namespace(release.namespace)


@pytest.fixture(scope="module")
def disruption(installed: Release) -> Disruption:
    return disrupt(installed)


def test_no_request_fails_while_pods_are_deleted_upgraded_and_rolled_back(disruption: Disruption) -> None:
    assert disruption.failures == ()
    assert disruption.requests >= 1000
    assert len(disruption.during_ms) >= 200


def test_an_upgrade_reaches_the_router_and_a_roll_back_takes_it_back(disruption: Disruption) -> None:
    assert disruption.config_upgraded["batch_concurrency"] == 15
    assert disruption.config_before["batch_concurrency"] != 15
    assert disruption.config_after == disruption.config_before


def test_no_container_was_restarted(installed: Release, disruption: Disruption) -> None:
    restarted = {
        name: status["restartCount"]
        for component in ("router", "gateway", "policy", *(f"stage-{stage}" for stage in STAGES))
        for name, pod in installed.pods(component).items()
        for status in pod["status"]["containerStatuses"]
        if status["restartCount"]
    }
    assert restarted == {}


def test_the_trace_of_an_answer_leads_through_policy_and_stage(installed: Release, jaeger: Jaeger) -> None:
    answer = installed.ask()
    pods = {answer["stage"]: set(installed.pods(f"stage-{answer['stage']}"))}
    spans = _complete_trace(jaeger, answer["trace_id"], {"asd-router", "asd-policy", "asd-stage"}, pods)
    _assert_connected(spans)
    cascade = _one(spans, lambda span: span.name == Spans.CASCADE)
    assert _served(spans, "asd-policy", below=cascade)
    stage = _one(spans, lambda span: span.name == Spans.STAGE)
    assert stage.attributes[Attributes.STAGE_NAME] == answer["stage"]
    assert float(stage.attributes[Attributes.STAGE_LATENCY_MS]) == pytest.approx(
        answer["stages"][0]["latency_ms"]
    )


def test_the_trace_of_a_chain_holds_every_stage_with_its_latency(installed: Release, jaeger: Jaeger) -> None:
    chain = [word for stage in STAGES for word in ("--chain", stage)]
    answer = installed.ask(*chain)
    pods = {stage: set(installed.pods(f"stage-{stage}")) for stage in STAGES}
    spans = _complete_trace(jaeger, answer["trace_id"], {"asd-router", "asd-stage"}, pods)
    _assert_connected(spans)
    ran = {span.attributes[Attributes.STAGE_NAME]: span for span in spans if span.name == Spans.STAGE}
    assert set(ran) == set(STAGES)
    for name, span in ran.items():
        reported = next(each["latency_ms"] for each in answer["stages"] if each["stage"] == name)
        assert float(span.attributes[Attributes.STAGE_LATENCY_MS]) == pytest.approx(reported)


@pytest.mark.parametrize(("component", "service"), [("stage-small", "asd-stage"), ("router", "asd-router")])
def test_every_replica_gets_requests(
    installed: Release, jaeger: Jaeger, component: str, service: str
) -> None:
    """Clients that were there before find the new pods too."""
    with load(installed, requests=1, rate=20.0, name=f"client-{component}") as running:
        running.wait_answered(20, timeout_s=30)
        pods = installed.scale(component, 3)
        assert len(pods) == 3
        poll(
            lambda: jaeger.served(service, pods) == pods,
            90.0,
            lambda: f"calls of {sorted(pods - jaeger.served(service, pods))} of {sorted(pods)}",
        )
    installed.scale(component, 1)
    assert [each["error"] for each in running.answered() if each["error"]] == []


CHAT: dict[str, Any] = {"model": "asd", "messages": [{"role": "user", "content": QUESTION}]}


def test_the_gateway_answers_chat_completions(installed: Release) -> None:
    found = installed.chat(CHAT)
    assert found["status"] == 200, found
    answer = json.loads(found["body"])
    (choice,) = answer["choices"]
    assert choice["message"]["content"].endswith("Answer: 19")
    assert answer["asd"]["plan_source"] == "policy"
    assert found["headers"]["x-asd-stage"] == answer["asd"]["stage"]
    assert answer["asd"]["stage"] in STAGES


def test_the_gateway_streams_the_answer_that_it_gives_whole(installed: Release) -> None:
    asked = {**CHAT, "model": "large"}
    whole = json.loads(installed.chat(asked)["body"])["choices"][0]["message"]["content"]
    found = installed.chat({**asked, "stream": True})
    assert found["status"] == 200, found
    assert found["headers"]["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in found["body"].splitlines() if line]
    assert events[-1] == "[DONE]"
    choices = [each for event in events[:-1] for each in json.loads(event)["choices"]]
    assert "".join(each["delta"].get("content") or "" for each in choices) == whole
    assert whole.endswith("Answer: 19")


def test_the_gateway_names_the_parameter_that_it_refuses(installed: Release) -> None:
    found = installed.chat({**CHAT, "model": "unknown"})
    assert found["status"] == 404, found
    assert json.loads(found["body"])["error"]["param"] == "model"


def test_idle_stages_sleep_and_are_woken_by_the_requests_that_need_them(cluster: Cluster) -> None:
    rule = "stageDefaults.scaleToZero.idleSeconds=5,stageDefaults.scaleToZero.minAwakeSeconds=1"
    release = Release(
        cluster,
        namespace="asd-sleeping",
        arguments=(f"--values={HERE / 'values.yaml'}", f"--set=manager.enabled=true,{rule}"),
    )
    release.install()
    try:
        poll(
            lambda: not any(release.pods(f"stage-{stage}") for stage in STAGES),
            120.0,
            lambda: "every stage to sleep",
        )
        answer = release.ask("--stage", "large")
        assert answer["stage"] == "large"
        assert answer["stages"][-1]["text"].endswith("Answer: 19")
    finally:
        release.uninstall()
        cluster.remove_namespace(release.namespace)


@pytest.mark.parametrize("through", ["router", "gateway"])
def test_the_benchmark_job_runs_to_its_end(installed: Release, through: str) -> None:
    result = run_benchmark_job(installed, requests=100, through=through)
    assert (result["requests"], result["through"]) == (100, through)
    assert result["failures"] == {}
    assert [stage["name"] for stage in result["stages"]] == list(STAGES)


def _complete_trace(
    jaeger: Jaeger, trace_id: str, services: set[str], stage_pods: dict[str, set[str]]
) -> list[Span]:
    """Return a trace's spans once all services and parents are there, and a pod below the span of each stage.

    stage_pods: the names of each stage's pods. Processes send every few seconds, each at its own times, and a
    stage that was drafting may end after the answer. Below a stage's span lie other stages' too: those that
    draft for it meanwhile, and what is read ahead.
    """
    spans: list[Span] = []

    def is_complete() -> bool:
        spans[:] = jaeger.spans(trace_id)
        known = {span.id for span in spans}
        missing = [span for span in spans if span.parent and span.parent not in known]
        ran = {
            span.attributes.get(Attributes.STAGE_NAME)
            for span in spans
            if span.name == Spans.STAGE and not missing and served_itself(span)
        }
        return {span.service for span in spans} >= services and ran == stage_pods.keys() and not missing

    def served_itself(span: Span) -> bool:
        served = {each.resource["k8s.pod.name"] for each in _served(spans, "asd-stage", below=span)}
        return not served.isdisjoint(stage_pods.get(span.attributes[Attributes.STAGE_NAME], ()))

    def shown() -> str:
        tree = "\n".join(
            f"{each.service} {each.name} {each.id} of {each.parent or '-'}"
            f" {each.attributes.get(Attributes.STAGE_NAME, '')} {each.resource.get('k8s.pod.name', '')}"
            for each in spans
        )
        return f"the whole trace {trace_id} of {sorted(services)} and {stage_pods}; there is\n{tree}"

    poll(is_complete, 30.0, shown)
    return spans


def _assert_connected(spans: list[Span]) -> None:
    """Every span descends from one: the router's answer to its caller."""
    roots = [span for span in spans if not span.parent]
    assert [(root.service, root.attributes["span.kind"]) for root in roots] == [("asd-router", "server")]
    # Work of another service is begun by a call of the router, never by something else.
    by_id = {span.id: span for span in spans}
    for span in spans:
        if span.attributes.get("span.kind") == "server" and span.parent:
            caller = by_id[span.parent]
            assert (caller.service, caller.attributes["span.kind"]) == ("asd-router", "client"), span


def _served(spans: list[Span], service: str, *, below: Span) -> list[Span]:
    """Return a service's server spans that descend from a span."""
    by_id = {span.id: span for span in spans}

    def descends(span: Span) -> bool:
        while span.parent:
            if span.parent == below.id:
                return True
            span = by_id[span.parent]
        return False

    return [
        span
        for span in spans
        if span.service == service and span.attributes.get("span.kind") == "server" and descends(span)
    ]


def _one(spans: list[Span], wanted: Callable[[Span], bool]) -> Span:
    (found,) = [span for span in spans if wanted(span)]
    return found
