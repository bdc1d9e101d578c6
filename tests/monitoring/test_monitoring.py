"""Alerts and dashboard against what the services export, against promtool, and as the chart renders them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tools.get_promtool import find_promtool
from tools.kubernetes_programs import find_helm

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "charts" / "alerts" / "asd.yaml"
DASHBOARD = ROOT / "charts" / "dashboards" / "asd.json"
RUNBOOK = ROOT / "docs" / "runbook.md"
UNIT_TESTS = Path(__file__).with_name("alerts.test.yaml")

# Labels that the scrape adds: Prometheus' own, and those of charts/templates/monitoring.yaml.
SCRAPED = {"namespace", "pod", "release", "component"}
SCOPE = 'namespace="models",release="demo"'
ON = {
    "telemetry": {"metricsPort": 9464},
    "monitoring": {
        "podMonitor": {"enabled": True},
        "serviceMonitor": {"enabled": False},
        "rules": {"enabled": True},
        "dashboard": {"enabled": True},
    },
}


@pytest.fixture(scope="session")
def promtool() -> Path:
    try:
        return find_promtool()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@cache
def exported() -> dict[str, set[str]]:
    """Return the labels of every series that asd exports, by its name."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.monitoring.exported"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    labels: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(run.stdout):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def check_names(query: str) -> None:
    """Fail where a series of a query is not exported, or a label is neither its series' nor the scrape's."""
    # Strings, durations and numbers name nothing.
    bare = re.sub(r'"[^"]*"|\[[^]]*\]|#.*', " ", query)
    series = set(re.findall(r"\b(?:asd|gen_ai)_\w+(?=\s*(?:\{|\)|$))|\bup\b", bare))
    series -= {label for names in exported().values() for label in names}
    assert series, query
    assert series <= set(exported()), series - set(exported())
    for name, selector in re.findall(r"(\w+)\{([^}]*)\}", query):
        asked = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector))
        assert asked <= exported()[name] | SCRAPED, (name, asked)
    grouped = {
        label.strip()
        for labels in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", bare)
        for label in labels.split(",")
    }
    known = SCRAPED.union(*(exported()[name] for name in series))
    assert grouped <= known, grouped - known
    # Nothing that looks like ours is left over.
    words = set(re.findall(r"\b(?:asd|gen_ai)_\w+", bare))
    assert words <= series | known, words - series - known


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text())["panels"]  # type: ignore[no-any-return]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def helm_template(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [str(find_helm()), "template", "demo", str(ROOT / "charts"), "--namespace", "models", "-f", "-"]
    return subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, timeout=60, check=False
    )


def render(**monitoring: Any) -> list[dict[str, Any]]:
    values: dict[str, Any] = json.loads(json.dumps(ON))
    policy = monitoring.pop("policy", None)
    for key, value in monitoring.items():
        values["monitoring"][key].update(value)
    run = helm_template({**values, **({"policy": policy} if policy else {})})
    assert run.returncode == 0, run.stderr
    return [each for each in yaml.safe_load_all(run.stdout) if each]


def rendered_rules(**monitoring: Any) -> dict[str, dict[str, Any]]:
    (found,) = [each for each in render(**monitoring) if each["kind"] == "PrometheusRule"]
    return {rule["alert"]: rule for group in found["spec"]["groups"] for rule in group["rules"]}


def run_promtool(promtool: Path, *arguments: str) -> None:
    run = subprocess.run(
        [str(promtool), *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_accepts_the_alerts(promtool: Path) -> None:
    run_promtool(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(ALERTS))


def test_alerts_fire_and_keep_silent_as_their_unit_tests_say(promtool: Path) -> None:
    run_promtool(promtool, "test", "rules", str(UNIT_TESTS))


def test_every_alert_fires_in_a_unit_test() -> None:
    text = UNIT_TESTS.read_text()
    fired = set(re.findall(r'ALERTS\{alertname="(\w+)"', text))
    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_reads_what_is_exported(rule: dict[str, Any]) -> None:
    check_names(rule["expr"])


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_leads_to_its_section(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert f"\n## {rule['alert']}\n" in RUNBOOK.read_text()


def test_the_runbook_has_no_section_for_an_alert_that_is_gone() -> None:
    sections = set(re.findall(r"^## (Asd\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    assert sections == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("query", queries())
def test_the_dashboard_reads_what_is_exported(query: str) -> None:
    check_names(query)


def test_a_name_that_nobody_exports_is_noticed() -> None:
    for query in (
        "sum(rate(asd_request_total[5m]))",
        'asd_requests_total{asd_plan_sauce="policy"}',
        "sum by (asd_stage) (asd_requests_total)",
        "sum by (error_type) (asd_requests_total{})",
    ):
        with pytest.raises(AssertionError):
            check_names(query)


def test_prometheus_understands_every_query_of_the_dashboard(promtool: Path, tmp_path: Path) -> None:
    known = {"$__rate_interval": "5m", "$namespace": ".+", "$release": ".+"}
    records = []
    for number, query in enumerate(queries()):
        for variable, value in known.items():
            query = query.replace(variable, value)  # noqa: PLW2901
        assert "$" not in query
        records.append({"record": f"query:{number}", "expr": query})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}))
    run_promtool(promtool, "check", "rules", str(file))


def test_every_query_of_the_dashboard_is_of_the_chosen_releases() -> None:
    for query in queries():
        selectors = re.findall(r"\{([^}]*)\}", query)
        assert selectors, query
        for selector in selectors:
            assert selector.startswith('namespace=~"$namespace",release=~"$release"'), query


def test_panels_lie_beside_each_other_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        assert panel["type"] == "row" or panel["description"]
    identifiers = [panel["id"] for panel in panels()]
    assert len(set(identifiers)) == len(identifiers)


def test_the_dashboard_asks_the_operators_questions() -> None:
    asked = " ".join(queries())
    for series in (
        "asd_early_stops_total",
        "asd_verify_accepted_tokens_total",
        "asd_stage_duration_seconds_bucket",
        "asd_stage_queue_depth",
        "asd_request_cost_sum",
        "asd_policy_reported_accuracy",
        "asd_policy_drift_alarm",
        "asd_stage_failures_total",
        "asd_static_plans_total",
        "asd_stage_completion_tokens_total",
    ):
        assert series in asked


def test_by_default_the_chart_asks_for_no_operator() -> None:
    run = helm_template({})
    assert run.returncode == 0, run.stderr
    kinds = {each["kind"] for each in yaml.safe_load_all(run.stdout) if each}
    assert not kinds & {"PodMonitor", "ServiceMonitor", "PrometheusRule"}


def test_the_chart_carries_the_dashboard_for_the_sidecar() -> None:
    rendered = render(
        dashboard={"labels": {"grafana_dashboard": "yes"}, "annotations": {"grafana_folder": "asd"}}
    )
    (found,) = [each for each in rendered if each["metadata"]["name"] == "demo-dashboard"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "yes"
    assert found["metadata"]["annotations"] == {"grafana_folder": "asd"}
    assert json.loads(found["data"]["asd.json"]) == json.loads(DASHBOARD.read_text())


@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor"])
def test_every_pod_is_monitored_once_at_a_port_that_it_has(kind: str) -> None:
    on = {
        "podMonitor": {"enabled": kind == "PodMonitor"},
        "serviceMonitor": {"enabled": kind != "PodMonitor"},
    }
    rendered = render(**on)
    deployments = {each["metadata"]["name"]: each for each in rendered if each["kind"] == "Deployment"}
    services = [each for each in rendered if each["kind"] == "Service"]
    watched = []
    for monitor in (each["spec"] for each in rendered if each["kind"] == kind):
        assert monitor["namespaceSelector"] == {"matchNames": ["models"]}
        (endpoint,) = monitor["podMetricsEndpoints" if kind == "PodMonitor" else "endpoints"]
        for name, deployment in deployments.items():
            template = deployment["spec"]["template"]
            labels = template["metadata"]["labels"]
            # A ServiceMonitor chooses Services, and these their pods.
            chosen = (
                [labels]
                if kind == "PodMonitor"
                else [
                    each["metadata"]["labels"]
                    for each in services
                    if each["spec"]["selector"].items() <= labels.items()
                ]
            )
            if any(_selects(monitor["selector"], each) for each in chosen):
                watched.append(name)
                (container,) = template["spec"]["containers"]
                ports = {port["name"]: port["containerPort"] for port in container["ports"]}
                assert ports[endpoint["port" if kind == "PodMonitor" else "targetPort"]] == 9464
        added = {each["targetLabel"]: each["sourceLabels"] for each in endpoint["relabelings"]}
        assert added == {
            "release": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
            "component": ["__meta_kubernetes_pod_label_app_kubernetes_io_component"],
        }
    assert sorted(watched) == sorted(deployments)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    (expression,) = selector["matchExpressions"]
    return (
        selector["matchLabels"].items() <= labels.items()
        and labels[expression["key"]] in expression["values"]
    )


@pytest.mark.parametrize("kind", ["podMonitor", "serviceMonitor"])
def test_monitors_of_pods_that_serve_no_metrics_are_refused(kind: str) -> None:
    run = helm_template({"monitoring": {kind: {"enabled": True}}})
    assert run.returncode != 0
    assert "telemetry.metricsPort" in run.stderr


def test_a_release_watches_itself_alone(promtool: Path, tmp_path: Path) -> None:
    found = rendered_rules()
    assert set(found) == {rule["alert"] for rule in rules()}
    for rule in found.values():
        assert "release=~" not in rule["expr"]
        assert rule["expr"].count(SCOPE) == rule["expr"].count("{")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asd", "rules": list(found.values())}]}))
    run_promtool(promtool, "check", "rules", str(file))


def test_the_charts_own_thresholds_are_those_of_the_file() -> None:
    scoped = {rule["alert"]: rule["expr"].replace('release=~".+"', SCOPE) for rule in rules()}
    values = yaml.safe_load((ROOT / "charts" / "values.yaml").read_text())["monitoring"]["rules"][
        "thresholds"
    ]
    marks = re.findall(r"([0-9.]+) # monitoring\.rules\.thresholds\.(\w+)", ALERTS.read_text())
    assert {key: float(value) for value, key in marks} == {k: float(v) for k, v in values.items()}
    for name, rule in rendered_rules().items():
        without_marks = re.sub(r" # monitoring\.\S+", "", scoped[name])
        assert rule["expr"].strip() == without_marks.strip()


@pytest.mark.parametrize(
    ("key", "alert"),
    [
        ("earlyStopShare", "AsdNoEarlyStops"),
        ("staticPlanShare", "AsdStaticPlans"),
        ("requestFailureShare", "AsdRequestFailures"),
        ("stageFailureShare", "AsdStageFailures"),
        ("queueDepth", "AsdQueueGrowing"),
        ("latencyP95Seconds", "AsdLatencyHigh"),
    ],
)
def test_a_threshold_changes_its_alert_and_no_other(key: str, alert: str) -> None:
    before, after = rendered_rules(), rendered_rules(rules={"thresholds": {key: 0.625}})
    assert {name for name in before if before[name] != after[name]} == {alert}
    assert re.search(r"[<>] 0\.625$", after[alert]["expr"], re.MULTILINE)


def test_alerts_can_be_left_out_and_lead_to_a_runbook_elsewhere() -> None:
    found = rendered_rules(rules={"disabled": ["AsdLatencyHigh"], "runbook": "https://wiki.example/asd"})
    assert set(found) == {rule["alert"] for rule in rules()} - {"AsdLatencyHigh"}
    assert found["AsdTargetDown"]["annotations"]["runbook_url"] == "https://wiki.example/asd#asdtargetdown"


def test_without_a_policy_service_nothing_alerts_about_it() -> None:
    found = rendered_rules(policy={"enabled": False})
    assert set(found) == {
        "AsdRequestFailures",
        "AsdStageFailures",
        "AsdQueueGrowing",
        "AsdLatencyHigh",
        "AsdTargetDown",
    }


def test_an_alert_that_does_not_exist_cannot_be_left_out() -> None:
    run = helm_template({"monitoring": {"rules": {"disabled": ["AsdLatencyHihg"]}}})
    assert run.returncode != 0
    assert "disabled" in run.stderr


def test_the_schema_knows_every_alert() -> None:
    schema = json.loads((ROOT / "charts" / "values.schema.json").read_text())
    known = schema["properties"]["monitoring"]["properties"]["rules"]["properties"]["disabled"]["items"][
        "enum"
    ]
    assert known == [rule["alert"] for rule in rules()]
