"""What holds for every variant of the chart's values, and what a few values make of the objects."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from kubernetes_validate import utils

from policy_service.settings import PolicySettings
from services.common.privacy import SWITCHES
from services.common.settings import ServiceSettings
from services.gateway.settings import GatewaySettings, RouterPeer
from services.router.domain import Overload
from services.router.settings import RouterSettings
from services.scaler.settings import ScalerSettings
from services.stage.settings import StageSettings
from tests.chart.rendering import (
    CHART,
    NAMESPACE,
    RELEASE,
    ROOT,
    VARIANTS,
    Manifest,
    Variant,
    config,
    container,
    helm,
    of_kind,
    pod_spec,
    render,
    template,
)

T = TypeVar("T", bound=ServiceSettings)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def with_component(part: str) -> pytest.MarkDecorator:
    """Parametrize over the variants in which a component is enabled."""
    return pytest.mark.parametrize(
        "variant", [name for name, each in VARIANTS.items() if each.effective[part]["enabled"]]
    )


# From the chart's kubeVersion on, all that kubernetes-validate knows.
VERSIONS = [each for each in (v.rpartition(".")[0] for v in utils.all_versions()) if float(each[2:]) >= 30]
SELECTING = ("Service", "PodDisruptionBudget", "Deployment")


def load(settings: type[T], variant: str, component: str, folder: Path) -> T:
    """Return a component's settings as its process would read them."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config(variant, component)))
    return settings.load(file)


def named(variant: str, part: str) -> str:
    return f"{VARIANTS[variant].prefix}-{part}"


@each_variant
def test_helm_finds_nothing_to_say_of_it(variant: str) -> None:
    run = helm("lint --strict", VARIANTS[variant], str(CHART))
    assert run.returncode == 0, run.stdout


@each_variant
def test_every_component_has_its_objects(variant: str) -> None:
    components = VARIANTS[variant].components
    for kind in ("Deployment", "Service", "ServiceAccount", "ConfigMap", "PodDisruptionBudget"):
        assert set(of_kind(variant, kind)) == components, kind


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> None:
    """Each validation would read a megabyte of JSON again."""
    utils.schema_contents = cache(utils.schema_contents)
    utils.all_versions = cache(utils.all_versions)


@cache
def crds() -> dict[str, Any]:
    """Return schemas of what is not Kubernetes' own, by apiVersion/kind: fields that the chart may use."""
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "crds.json").read_text())
    return loaded


@cache
def check(text: str) -> None:
    """Validate an object for every version; the same one of another variant needs no second time."""
    manifest = json.loads(text)
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    if kind in crds():
        jsonschema.Draft202012Validator({**crds()[kind], "$defs": crds()["$defs"]}).validate(manifest)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@each_variant
def test_manifests_are_valid_kubernetes(variant: str) -> None:
    assert len(VERSIONS) >= 6
    for manifest in render(variant):
        check(json.dumps(manifest, sort_keys=True))


@pytest.mark.parametrize(
    "kind", ["v1/Service", "keda.sh/v1alpha1/ScaledObject", "cert-manager.io/v1/Certificate"]
)
def test_a_misspelt_field_would_be_found(kind: str) -> None:
    everything = (each for name in VARIANTS for each in render(name))
    found = next(each for each in everything if f"{each['apiVersion']}/{each['kind']}" == kind)
    wrong = {**found, "spec": {**found["spec"], "misspelt": 1}}
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        check(json.dumps(wrong))


@each_variant
def test_objects_are_told_apart_by_name_and_carry_the_release(variant: str) -> None:
    manifests = render(variant)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)
    for each in manifests:
        assert each["metadata"]["name"].startswith(VARIANTS[variant].prefix)
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        assert len(each["metadata"]["name"]) <= 63


@each_variant
def test_router_config_loads_and_names_the_services(variant: str, tmp_path: Path) -> None:
    settings = load(RouterSettings, variant, named(variant, "router"), tmp_path)
    assert tuple(stage.name for stage in settings.stages) == VARIANTS[variant].stages
    targets = {stage.target for stage in settings.stages}
    targets |= {each.target for each in (settings.policy, settings.manager) if each}
    services = of_kind(variant, "Service")
    others = VARIANTS[variant].components - {named(variant, "router"), named(variant, "gateway")}
    assert targets == {f"dns:///{name}:{services[name]['spec']['ports'][0]['port']}" for name in others}
    assert all(services[name]["spec"]["clusterIP"] == "None" for name in others)


@each_variant
def test_stage_config_loads_and_its_model_is_mounted_or_in_the_image(variant: str, tmp_path: Path) -> None:
    for name in VARIANTS[variant].stages:
        full = named(variant, f"stage-{name}")
        settings = load(StageSettings, variant, full, tmp_path)
        assert settings.default_name == name
        [model] = settings.models
        values = VARIANTS[variant].stage(name)
        mounts = {m["mountPath"]: m for m in container(variant, full)["volumeMounts"]}
        if values["model"]["claim"]:
            assert mounts["/models"]["readOnly"] is True
        elif model.engine == "onnx":
            assert (ROOT / str(model.path).lstrip("/") / "config.json").exists()
        assert model.engine == values["model"]["engine"]
        image = container(variant, full)["image"]
        assert f"asd-stage-{model.engine.replace('_', '-')}" in image


@with_component("gateway")
def test_gateway_config_loads_and_names_the_router(variant: str, tmp_path: Path) -> None:
    settings = load(GatewaySettings, variant, named(variant, "gateway"), tmp_path)
    router = named(variant, "router")
    (port,) = of_kind(variant, "Service")[router]["spec"]["ports"]
    assert settings.router.target == f"dns:///{router}:{port['port']}"


@with_component("policy")
def test_policy_config_loads(variant: str, tmp_path: Path) -> None:
    policy = VARIANTS[variant].effective["policy"]
    settings = load(PolicySettings, variant, named(variant, "policy"), tmp_path)
    assert settings.artifact == Path("/artifact" if policy["artifactClaim"] else "/policy")
    assert settings.reports_path == Path("/reports/reports.jsonl")
    assert settings.cascade == VARIANTS[variant].stages


@with_component("manager")
def test_manager_config_loads(variant: str, tmp_path: Path) -> None:
    settings = load(ScalerSettings, variant, named(variant, "manager"), tmp_path)
    assert settings.namespace == NAMESPACE
    assert {each.deployment for each in settings.stages} <= set(of_kind(variant, "Deployment"))


@each_variant
def test_selectors_match_one_component_only(variant: str) -> None:
    pods = {
        name: o["spec"]["template"]["metadata"]["labels"]
        for name, o in of_kind(variant, "Deployment").items()
    }
    for kind in SELECTING:
        for name, manifest in of_kind(variant, kind).items():
            selector = manifest["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            assert [pod for pod, labels in pods.items() if wanted.items() <= labels.items()] == [name], kind


@each_variant
def test_probes_ask_a_port_where_the_process_serves_health_plainly(variant: str) -> None:
    for name in of_kind(variant, "Deployment"):
        serving = container(variant, name)
        ports = {port["name"]: port["containerPort"] for port in serving["ports"]}
        settings = config(variant, name)
        spoken = "http" if name == named(variant, "gateway") else "grpc"
        assert settings["listen"] == f"0.0.0.0:{ports[spoken]}"
        assert len(set(ports.values())) == len(ports)
        probes = [serving[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
        if spoken == "http":
            assert "health" not in ports
            for probe in probes:
                _assert_probes_http(probe, settings.get("tls"))
        elif "tls" in settings:
            assert settings["health_listen"] == f"0.0.0.0:{ports['health']}"
            assert {probe["grpc"]["port"] for probe in probes} == {ports["health"]}
        else:
            assert "health" not in ports
            assert {probe["grpc"]["port"] for probe in probes} == {ports["grpc"]}
        [service_port] = of_kind(variant, "Service")[name]["spec"]["ports"]
        assert (service_port["name"], service_port["targetPort"]) == (spoken, spoken)
        is_plain_grpc = spoken == "grpc" and "tls" not in settings
        assert ("appProtocol" in service_port) == is_plain_grpc


def _assert_probes_http(probe: dict[str, Any], tls: dict[str, str] | None) -> None:
    """Kubernetes' probes trust every certificate, and have none to show."""
    if tls and "client_ca_file" in tls:
        assert probe["tcpSocket"] == {"port": "http"}
        assert "httpGet" not in probe
    else:
        scheme = "HTTPS" if tls else "HTTP"
        assert probe["httpGet"] == {"path": "/healthz", "port": "http", "scheme": scheme}


@each_variant
def test_what_the_settings_name_is_mounted(variant: str) -> None:
    """Files of certificates and tokens, and the folders that a process writes to."""
    for name in of_kind(variant, "Deployment"):
        mounts = tuple(mount["mountPath"] for mount in container(variant, name)["volumeMounts"])
        files = [text for text in _texts(config(variant, name)) if text.startswith(("/tls/", "/auth/"))]
        assert all(text.startswith(tuple(f"{mount}/" for mount in mounts)) for text in files), files
        volumes = {volume["name"] for volume in pod_spec(variant, name)["volumes"]}
        assert {mount["name"] for mount in container(variant, name)["volumeMounts"]} == volumes


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


@each_variant
def test_pods_run_unprivileged(variant: str) -> None:
    specs = [o["spec"]["template"]["spec"] for o in of_kind(variant, "Deployment").values()]
    for pod in [*specs, *(o["spec"] for o in of_kind(variant, "Pod").values())]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        users = {"runAsUser": 10001, "runAsGroup": 10001, **VARIANTS[variant].given.get("podSecurity", {})}
        for name in ("runAsUser", "runAsGroup"):
            assert pod["securityContext"].get(name) == users[name]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        [running] = pod["containers"]
        security = running["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= running["resources"]["requests"].keys()
        assert "memory" in running["resources"]["limits"]


def test_the_cluster_may_choose_whom_pods_run_as() -> None:
    """OpenShift's restricted-v2 refuses every user and group that is named but the namespace's own."""
    pods = [each["spec"]["template"]["spec"] for each in of_kind("openshift", "Deployment").values()]
    pods += [each["spec"] for each in of_kind("openshift", "Pod").values()]
    assert len(pods) == 9
    for pod in pods:
        named = {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups"}
        assert named.isdisjoint(pod["securityContext"])
        for each in pod["containers"]:
            assert named.isdisjoint(each["securityContext"])
    writing = pod_spec("users given", "demo-policy")["securityContext"]
    assert (writing["runAsUser"], writing["runAsGroup"], writing["fsGroup"]) == (1_000_650_000, 0, 0)


@each_variant
def test_no_library_reports_its_use(variant: str) -> None:
    for name in of_kind(variant, "Deployment"):
        environment = {each["name"]: each.get("value") for each in container(variant, name)["env"]}
        assert SWITCHES.items() <= environment.items(), name


@each_variant
def test_only_the_manager_may_call_the_kubernetes_api(variant: str) -> None:
    allowed = {
        name
        for name in of_kind(variant, "Deployment")
        if pod_spec(variant, name)["automountServiceAccountToken"]
    }
    assert allowed <= {named(variant, "manager")}
    assert set(of_kind(variant, "Role")) == allowed
    assert not of_kind(variant, "ClusterRole")
    assert not of_kind(variant, "ClusterRoleBinding")


@each_variant
def test_a_pod_outlives_its_drain_and_goes_after_the_next_one_is_there(variant: str) -> None:
    rollout = VARIANTS[variant].effective["rollout"]
    for name, deployment in of_kind(variant, "Deployment").items():
        pod = pod_spec(variant, name)
        sleep = container(variant, name)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert sleep == rollout["preStopSeconds"]
        drain = config(variant, name)["drain_seconds"]
        assert pod["terminationGracePeriodSeconds"] > drain + sleep
        spec = deployment["spec"]
        assert spec["minReadySeconds"] == rollout["minReadySeconds"]
        starts = container(variant, name)["startupProbe"]
        assert spec["progressDeadlineSeconds"] > starts["periodSeconds"] * starts["failureThreshold"]
        moving = spec["strategy"]["rollingUpdate"]
        # One pod, and none more while it is replaced: not without being asked for.
        stage = name.partition("-stage-")[2]
        asked = (
            VARIANTS[variant].stage(stage)["updateStrategy"]
            if stage
            else {"maxUnavailable": 0, "maxSurge": 1}
        )
        if name.endswith("-policy") and VARIANTS[variant].effective["policy"]["reportsClaim"]:
            # Two pods must not write one file.
            asked = {"maxUnavailable": 1, "maxSurge": 0}
        assert moving == asked
        assert of_kind(variant, "PodDisruptionBudget")[name]["spec"]["maxUnavailable"] == 1


@each_variant
def test_the_number_of_pods_is_said_unless_something_else_sets_it(variant: str) -> None:
    scaled = {
        o["spec"]["scaleTargetRef"]["name"] for o in of_kind(variant, "HorizontalPodAutoscaler").values()
    }
    scaled |= {o["spec"]["scaleTargetRef"]["name"] for o in of_kind(variant, "ScaledObject").values()}
    managers = [config(variant, each) for each in of_kind(variant, "Deployment") if each.endswith("-manager")]
    scaled |= {stage["deployment"] for each in managers for stage in each["stages"]}
    for name, deployment in of_kind(variant, "Deployment").items():
        assert ("replicas" in deployment["spec"]) == (name not in scaled)


def test_router_config_of_the_defaults_holds_the_documented_costs_and_times(tmp_path: Path) -> None:
    settings = load(RouterSettings, "defaults", "demo-router", tmp_path)
    assert [(s.cost, s.timeout_ms) for s in settings.stages] == [(1.6, 10000), (4.2, 20000), (8.8, 30000)]
    assert settings.static_plan == ("medium",)
    assert settings.policy is not None
    assert settings.policy.timeout_ms == 100
    assert settings.overload is Overload.QUEUE


def test_what_is_switched_off_or_zero_reaches_the_settings(tmp_path: Path) -> None:
    router = load(RouterSettings, "everything on", "cascade-router", tmp_path)
    assert not router.speculation.pipelined
    assert not router.speculation.adaptive
    assert router.speculation.prefill_ahead
    assert router.overload is Overload.SHED
    assert router.grpc.max_connection_age_ms == 0
    stage = load(StageSettings, "everything on", "cascade-stage-small", tmp_path)
    assert stage.memory_budget_mb == 512
    assert stage.grpc.max_connection_age_ms == 60_000
    (model,) = load(StageSettings, "one stage", "demo-stage-only", tmp_path).models
    assert (model.cached_sequences, model.preload, model.resync, model.max_batch) == (0, False, False, 3)
    assert model.max_model_len == 4096


def test_clients_of_router_and_policy_find_new_pods(tmp_path: Path) -> None:
    """gRPC looks a name up again only when a connection ends."""
    for part, settings in (("router", RouterSettings), ("policy", PolicySettings)):
        loaded = load(settings, "defaults", f"demo-{part}", tmp_path)
        assert loaded.grpc.max_connection_age_ms == 30_000
        assert loaded.grpc.max_connection_age_grace_ms == 0


def test_what_the_policy_learns_from_reaches_its_settings_and_its_volumes(tmp_path: Path) -> None:
    settings = load(PolicySettings, "everything on", "cascade-policy", tmp_path)
    assert settings.artifact_poll_seconds == 2.5
    assert (settings.drift_run_length, settings.drift_tolerance) == (500, 0.05)
    assert settings.novelty_threshold == 0.3
    assert (settings.shadow_artifact, settings.shadow_max_mb) == (Path("/shadow"), 7)
    assert settings.shadow_path == Path("/reports/shadow.jsonl")
    pod = pod_spec("everything on", "cascade-policy")
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


def test_what_is_set_of_the_gateway_reaches_it(tmp_path: Path) -> None:
    settings = load(GatewaySettings, "everything on", "cascade-gateway", tmp_path)
    assert settings.router.timeout_ms == 120_000
    assert (settings.max_body_bytes, settings.max_concurrent, settings.access_log) == (1_048_576, 64, True)
    assert (settings.read_timeout_ms, settings.write_timeout_ms) == (10_000, 20_000)
    assert (settings.idle_timeout_ms, settings.keep_alive_ms) == (620_000, 2_500.5)
    assert settings.drain_seconds == 125
    service = of_kind("everything on", "Service")["cascade-gateway"]
    assert service["spec"]["type"] == "NodePort"
    assert service["metadata"]["annotations"] == {"a.cloud/internal": "true"}


def test_by_default_the_gateway_has_its_settings_own_values(tmp_path: Path) -> None:
    settings = load(GatewaySettings, "defaults", "demo-gateway", tmp_path)
    own = GatewaySettings(
        listen=settings.listen,
        router=RouterPeer(target=settings.router.target),
        # As the router's, whose answers it waits for.
        drain_seconds=config("defaults", "demo-router")["drain_seconds"],
    )
    assert settings == own
    assert of_kind("defaults", "Service")["demo-gateway"]["spec"]["type"] == "ClusterIP"


def test_by_default_the_policy_has_no_shadow_and_its_settings_own_values(tmp_path: Path) -> None:
    settings = load(PolicySettings, "defaults", "demo-policy", tmp_path)
    own = PolicySettings(artifact=Path("/policy"))
    kept = ("artifact_poll_seconds", "drift_run_length", "drift_tolerance", "novelty_threshold")
    for name in (*kept, "shadow_artifact"):
        assert getattr(settings, name) == getattr(own, name), name
    pod = pod_spec("defaults", "demo-policy")
    assert {"name": "reports", "emptyDir": {}} in pod["volumes"]
    assert "fsGroup" not in pod["securityContext"]


def test_a_changed_setting_restarts_the_router_and_nothing_else() -> None:
    changed = template(Variant({"router": {"maxConcurrent": 7}}))
    assert changed.returncode == 0, changed.stderr

    def pods(objects: list[Manifest]) -> dict[str, Any]:
        return {o["metadata"]["name"]: o["spec"]["template"] for o in objects if o["kind"] == "Deployment"}

    before = pods(list(render("defaults")))
    after = pods([o for o in yaml.safe_load_all(changed.stdout) if o])
    assert {name for name in before if before[name] != after[name]} == {"demo-router"}
