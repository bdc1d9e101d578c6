"""Renders the chart with helm and loads what it renders through the services' own settings."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import kubernetes_validate
import pytest
import yaml

from policy_service.settings import PolicySettings
from services.common.settings import ServiceSettings
from services.router.settings import RouterSettings
from services.stage.settings import StageSettings
from tools.get_helm import find_helm

ROOT = Path(__file__).parents[2]
FOUR_STAGES = {
    "stages": [
        {"name": name, "cost": cost, "model": {"path": f"/models/{name}", "claim": "weights"}}
        for name, cost in (("s0", 1), ("s1", 2), ("s2", 4.5), ("s3", 9))
    ],
    "router": {"staticPlan": ["s1", "s3"]},
    "policy": {"artifactClaim": "four-stage-policy"},
}
EVERYTHING = {
    "fullnameOverride": "cascade",
    "global": {"anything": {"of": "a parent chart"}},
    "image": {"registry": "registry.example/asd", "tag": "1.2.3", "pullSecrets": ["pull"]},
    "telemetry": {"endpoint": "http://jaeger:4317", "env": {"OTEL_TRACES_SAMPLER": "always_on"}},
    "router": {
        "service": {"type": "LoadBalancer"},
        "nodeSelector": {"pool": "cpu"},
        "speculation": {"pipelined": False, "adaptive": False},
    },
    "policy": {
        "artifactClaim": "policy",
        "artifactPollSeconds": 2.5,
        "reportsClaim": "reports",
        "drift": {"runLength": 500, "tolerance": 0.05},
        "shadow": {"artifactClaim": "candidate", "maxMb": 7},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
    },
    "stageDefaults": {
        "memoryBudgetMb": 512,
        "nodeSelector": {"pool": "models"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
}
ONE_STAGE = {
    "stages": [
        {
            "name": "only",
            "cost": 1,
            "model": {"path": "/models/large", "cachedSequences": 0, "preload": False, "resync": False},
        }
    ],
    "router": {"staticPlan": ["only"]},
    "policy": {"enabled": False},
}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "defaults": ({}, ("small", "medium", "large")),
    "one stage": (ONE_STAGE, ("only",)),
    "four stages": (FOUR_STAGES, ("s0", "s1", "s2", "s3")),
    "policy off": ({"policy": {"enabled": False}}, ("small", "medium", "large")),
    "everything on": (EVERYTHING, ("small", "medium", "large")),
}
T = TypeVar("T", bound=ServiceSettings)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def helm_template(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [str(find_helm()), "template", "demo", str(ROOT / "charts"), "--namespace", "models", "-f", "-"]
    return subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, timeout=60, check=False
    )


@cache
def render(variant: str) -> list[dict[str, Any]]:
    run = helm_template(VARIANTS[variant][0])
    assert run.returncode == 0, run.stderr
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def of_kind(variant: str, kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in render(variant) if o["kind"] == kind}


def prefix(variant: str) -> str:
    return str(VARIANTS[variant][0].get("fullnameOverride", "demo"))


def components(variant: str) -> set[str]:
    stages = {f"{prefix(variant)}-stage-{name}" for name in VARIANTS[variant][1]}
    enabled = VARIANTS[variant][0].get("policy", {}).get("enabled", True)
    return stages | {f"{prefix(variant)}-router"} | ({f"{prefix(variant)}-policy"} if enabled else set())


def load(settings: type[T], config: str, folder: Path) -> T:
    file = folder / "config.yaml"
    file.write_text(config)
    return settings.load(file)


@each_variant
def test_every_component_has_its_objects(variant: str) -> None:
    for kind in (
        "Deployment",
        "Service",
        "ServiceAccount",
        "ConfigMap",
        "PodDisruptionBudget",
    ):
        assert set(of_kind(variant, kind)) == components(variant), kind


@each_variant
def test_manifests_are_valid_kubernetes(variant: str) -> None:
    for manifest in render(variant):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


@each_variant
def test_router_config_loads_and_names_the_services(variant: str, tmp_path: Path) -> None:
    config = of_kind(variant, "ConfigMap")[f"{prefix(variant)}-router"]["data"]["config.yaml"]
    settings = load(RouterSettings, config, tmp_path)
    assert tuple(stage.name for stage in settings.stages) == VARIANTS[variant][1]
    targets = {stage.target for stage in settings.stages}
    if settings.policy:
        targets.add(settings.policy.target)
    services = of_kind(variant, "Service")
    others = components(variant) - {f"{prefix(variant)}-router"}
    assert targets == {f"dns:///{name}:{services[name]['spec']['ports'][0]['port']}" for name in others}


def test_router_config_of_the_defaults_holds_the_documented_costs_and_times(tmp_path: Path) -> None:
    settings = load(
        RouterSettings, of_kind("defaults", "ConfigMap")["demo-router"]["data"]["config.yaml"], tmp_path
    )
    assert [(s.cost, s.timeout_ms) for s in settings.stages] == [(1.6, 10000), (4.2, 20000), (8.8, 30000)]
    assert settings.static_plan == ("medium",)
    assert settings.policy is not None
    assert settings.policy.timeout_ms == 100


def test_what_is_switched_off_or_zero_reaches_the_settings(tmp_path: Path) -> None:
    maps = of_kind("everything on", "ConfigMap")
    router = load(RouterSettings, maps["cascade-router"]["data"]["config.yaml"], tmp_path)
    assert not router.speculation.pipelined
    assert not router.speculation.adaptive
    assert router.speculation.prefill_ahead
    stage = load(StageSettings, maps["cascade-stage-small"]["data"]["config.yaml"], tmp_path)
    assert stage.memory_budget_mb == 512
    only = of_kind("one stage", "ConfigMap")["demo-stage-only"]["data"]["config.yaml"]
    (model,) = load(StageSettings, only, tmp_path).models
    assert (model.cached_sequences, model.preload, model.resync) == (0, False, False)


@each_variant
def test_stage_config_loads_and_its_model_is_mounted_or_in_the_image(variant: str, tmp_path: Path) -> None:
    for name in VARIANTS[variant][1]:
        full = f"{prefix(variant)}-stage-{name}"
        settings = load(StageSettings, of_kind(variant, "ConfigMap")[full]["data"]["config.yaml"], tmp_path)
        assert settings.default_name == name
        [model] = settings.models
        pod = of_kind(variant, "Deployment")[full]["spec"]["template"]["spec"]
        mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        if variant == "four stages":
            assert "/models" in mounts
        else:
            assert (ROOT / str(model.path).lstrip("/") / "config.json").exists()


@each_variant
def test_policy_config_loads(variant: str, tmp_path: Path) -> None:
    config = of_kind(variant, "ConfigMap").get(f"{prefix(variant)}-policy")
    if config is None:
        pytest.skip("no policy service in this variant")
    settings = load(PolicySettings, config["data"]["config.yaml"], tmp_path)
    has_claim = bool(VARIANTS[variant][0].get("policy", {}).get("artifactClaim"))
    assert settings.artifact == Path("/artifact" if has_claim else "/policy")
    assert settings.reports_path == Path("/reports/reports.jsonl")
    assert settings.cascade == VARIANTS[variant][1]


def test_what_the_policy_learns_from_reaches_its_settings_and_its_volumes(tmp_path: Path) -> None:
    maps = of_kind("everything on", "ConfigMap")
    settings = load(PolicySettings, maps["cascade-policy"]["data"]["config.yaml"], tmp_path)
    assert settings.artifact_poll_seconds == 2.5
    assert (settings.drift_run_length, settings.drift_tolerance) == (500, 0.05)
    assert (settings.shadow_artifact, settings.shadow_max_mb) == (Path("/shadow"), 7)
    assert settings.shadow_path == Path("/reports/shadow.jsonl")
    pod = of_kind("everything on", "Deployment")["cascade-policy"]["spec"]["template"]["spec"]
    claims = {each["name"]: each.get("persistentVolumeClaim") for each in pod["volumes"]}
    assert claims["reports"] == {"claimName": "reports"}
    assert claims["shadow"] == {"claimName": "candidate", "readOnly": True}
    assert claims["artifact"] == {"claimName": "policy", "readOnly": True}
    mounts = {each["mountPath"]: each.get("readOnly", False) for each in pod["containers"][0]["volumeMounts"]}
    assert {path: mounts[path] for path in ("/reports", "/shadow", "/artifact")} == {
        "/reports": False,
        "/shadow": True,
        "/artifact": True,
    }
    assert pod["securityContext"]["fsGroup"] == 10001


def test_by_default_the_policy_has_no_shadow_and_its_settings_own_values(tmp_path: Path) -> None:
    maps = of_kind("defaults", "ConfigMap")
    settings = load(PolicySettings, maps["demo-policy"]["data"]["config.yaml"], tmp_path)
    own = PolicySettings(artifact=Path("/policy"))
    for name in ("artifact_poll_seconds", "drift_run_length", "drift_tolerance", "shadow_artifact"):
        assert getattr(settings, name) == getattr(own, name), name
    pod = of_kind("defaults", "Deployment")["demo-policy"]["spec"]["template"]["spec"]
    assert {"name": "reports", "emptyDir": {}} in pod["volumes"]
    assert "fsGroup" not in pod["securityContext"]


@each_variant
def test_selectors_match_one_component_only(variant: str) -> None:
    pods = {
        name: o["spec"]["template"]["metadata"]["labels"]
        for name, o in of_kind(variant, "Deployment").items()
    }
    for kind in ("Service", "PodDisruptionBudget", "Deployment"):
        for name, manifest in of_kind(variant, kind).items():
            selector = manifest["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            assert [pod for pod, labels in pods.items() if wanted.items() <= labels.items()] == [name], kind


@each_variant
def test_probes_ask_the_port_that_the_process_listens_on(variant: str) -> None:
    for name, deployment in of_kind(variant, "Deployment").items():
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        [port] = [p["containerPort"] for p in container["ports"] if p["name"] == "grpc"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == port
        listen = yaml.safe_load(of_kind(variant, "ConfigMap")[name]["data"]["config.yaml"])["listen"]
        assert listen == f"0.0.0.0:{port}"
        [service_port] = of_kind(variant, "Service")[name]["spec"]["ports"]
        assert service_port["targetPort"] == "grpc"


@each_variant
def test_containers_run_unprivileged_and_outlive_their_drain(variant: str) -> None:
    for name, deployment in of_kind(variant, "Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        [container] = pod["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        drain = yaml.safe_load(of_kind(variant, "ConfigMap")[name]["data"]["config.yaml"])["drain_seconds"]
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > drain + sleep


def test_a_changed_setting_restarts_the_router_and_nothing_else() -> None:
    changed = helm_template({"router": {"maxConcurrent": 7}})
    assert changed.returncode == 0, changed.stderr

    def checksums(objects: list[dict[str, Any]]) -> dict[str, str]:
        return {
            o["metadata"]["name"]: o["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for o in objects
            if o["kind"] == "Deployment"
        }

    before = checksums(render("defaults"))
    after = checksums([o for o in yaml.safe_load_all(changed.stdout) if o])
    assert {name for name in before if before[name] != after[name]} == {"demo-router"}


def test_helm_test_asks_the_router() -> None:
    pod = of_kind("everything on", "Pod")["cascade-test-ask"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    [container] = pod["spec"]["containers"]
    assert container["image"] == "registry.example/asd/asd-tools:1.2.3"
    assert "cascade-router:50050" in container["args"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ruoter": {}}, "ruoter"),
        ({"router": {"staticplan": ["small"]}}, "staticplan"),
        ({"policy": {"enable": False}}, "enable"),
        ({"stageDefaults": {"replica": 2}}, "replica"),
        (
            {"stages": [{"name": "a", "cost": 1, "model": {"path": "/m"}, "timeout": 5}]},
            "timeout",
        ),
        ({"stages": []}, "stages"),
        ({"stages": [{"name": "Upper", "cost": 1, "model": {"path": "/m"}}]}, "name"),
        ({"stages": [{"name": "a", "cost": 0, "model": {"path": "/m"}}]}, "cost"),
        (
            {
                "stages": [{"name": "twin", "cost": c, "model": {"path": "/m"}} for c in (1, 2)],
                "router": {"staticPlan": ["twin"]},
                "policy": {"enabled": False},
            },
            'stages: two are named "twin"; give each stage its own name',
        ),
        ({"router": {"staticPlan": ["huge"]}}, '"huge" is not among stages (small, medium, large)'),
        ({"router": {"staticPlan": ["large", "small"]}}, "in the order of stages"),
        ({**ONE_STAGE, "policy": {"enabled": True}}, "policy.artifactClaim"),
        ({"policy": {"enabled": True, "reportsClaim": "r", "replicas": 2}}, "policy.reportsClaim"),
        ({"policy": {"enabled": True, "drift": {"tolerance": 0}}}, "tolerance"),
        ({"policy": {"enabled": True, "shadow": {"claim": "c"}}}, "claim"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str) -> None:
    run = helm_template(values)
    assert run.returncode != 0
    assert said in run.stderr
