"""Values that are wrong or contradict each other are refused, with a sentence that says what to change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart.rendering import CHART, ONE_STAGE, Variant, helm, template

TLS = {"enabled": True, "secretName": "asd-tls"}
KEDA = {"enabled": True, "prometheusAddress": "http://prometheus:9090"}
SLEEPS = {"idleSeconds": 60}


def stage(**settings: Any) -> dict[str, Any]:
    """Return values with one stage, of an engine on a GPU unless another one is said."""
    model = {"engine": "vllm", "path": "/m", **settings.pop("model", {})}
    entry = {"name": "a", "cost": 1, "gpus": 1, **settings, "model": model}
    return {"stages": [entry], "router": {"staticPlan": ["a"]}, "policy": {"enabled": False}}


SCHEMA = [
    ({"ruoter": {}}, "ruoter"),
    ({"router": {"staticplan": ["small"]}}, "staticplan"),
    ({"policy": {"enable": False}}, "enable"),
    ({"stageDefaults": {"replica": 2}}, "replica"),
    ({"stages": [{"name": "a", "cost": 1, "model": {"path": "/m"}, "timeout": 5}]}, "timeout"),
    ({"router": {"overload": "drop"}}, "overload"),
    ({"stages": []}, "stages"),
    ({"stages": [{"name": "Upper", "cost": 1, "model": {"path": "/m"}}]}, "name"),
    ({"stages": [{"name": "a", "cost": 0, "model": {"path": "/m"}}]}, "cost"),
    ({"policy": {"enabled": True, "drift": {"tolerance": 0}}}, "tolerance"),
    ({"policy": {"enabled": True, "noveltyThreshold": 2}}, "noveltyThreshold"),
    ({"policy": {"enabled": True, "shadow": {"claim": "c"}}}, "claim"),
    ({"image": {"digests": {"router": "latest"}}}, "router"),
    ({"telemetry": {"metricsPort": 65536}}, "metricsPort"),
    ({"tls": {"mode": "vault"}}, "mode"),
    ({"auth": {"secret": "tokens"}}, "secret"),
    ({"manager": {"replicas": 2}}, "replicas"),
    ({"networkPolicy": {"clients": [{"podSelctor": {}}]}}, "podSelctor"),
    ({"stageDefaults": {"model": {"vllm": {"lora": {"Law!": "/models/law"}}}}}, "Law!"),
    ({"stageDefaults": {"model": {"vllm": {"lora": {"a" * 65: "/models/law"}}}}}, "a" * 65),
    (stage(model={"vllm": {"lora": {"b" * 65: "/models/law"}}}), "b" * 65),
    ({"router": {"affinity": {"nodeAfinity": {}}}}, "nodeAfinity"),
    ({"router": {"topologySpreadConstraints": [{"topologyKey": "zone"}]}}, "topologySpreadConstraints"),
    ({"stageDefaults": {"model": {"engine": "llama.cpp"}}}, "engine"),
    ({"stageDefaults": {"model": {"vllm": {"tensorparallel": 2}}}}, "tensorparallel"),
    ({"stageDefaults": {"model": {"cache": {"accessMode": "ReadOnlyMany"}}}}, "accessMode"),
    ({"stageDefaults": {"autoscaling": {"minReplicas": 0}}}, "minReplicas"),
    ({"stageDefaults": {"gpuResource": "gpus"}}, "gpuResource"),
    ({"stageDefaults": {"model": {"maxBatch": 4097}}}, "maxBatch"),
    (stage(model={"maxBatch": 4097}), "maxBatch"),
    ({"stageDefaults": {"model": {"maxLanes": 4097}}}, "maxLanes"),
    ({"stageDefaults": {"model": {"cachedSequences": 4097}}}, "cachedSequences"),
    ({"stageDefaults": {"maxQueue": 65537}}, "maxQueue"),
    ({"router": {"maxConcurrent": 65537}}, "maxConcurrent"),
    ({"router": {"batchConcurrency": 65537}}, "batchConcurrency"),
    ({"gateway": {"enabled": True, "timeout": 5}}, "timeout"),
    ({"gateway": {"enabled": True, "service": {"type": "Headless"}}}, "type"),
    ({"gateway": {"enabled": True, "maxBodyBytes": 2**26 + 1}}, "maxBodyBytes"),
    ({"gateway": {"enabled": True, "maxConcurrent": 65537}}, "maxConcurrent"),
    ({"gateway": {"enabled": True, "keepAliveMs": 0}}, "keepAliveMs"),
    ({"gateway": {"enabled": True, "route": {"hostnames": ["Upper"]}}}, "hostnames"),
    ({"networkPolicy": {"gatewayClients": [{}]}}, "gatewayClients"),
    ({"podSecurity": {"runAsUser": 0}}, "runAsUser"),
    ({"podSecurity": {"fsGroup": "10001"}}, "fsGroup"),
]
CONTRADICTIONS = {
    "two stages of one name": (
        {
            **ONE_STAGE.values,
            "stages": [
                {"name": "twin", "cost": c, "model": {"engine": "onnx", "path": "/m"}} for c in (1, 2)
            ],
        },
        'stages: two are named "twin"; give each stage its own name',
    ),
    "unknown stage in the plan": (
        {"router": {"staticPlan": ["huge"]}},
        '"huge" is not among stages (small, medium, large); name stages of this cascade, for instance '
        "[large]",
    ),
    "plan out of order": (
        {"router": {"staticPlan": ["large", "small"]}},
        "name stages in the order of stages (small, medium, large)",
    ),
    "another cascade than the image's policy": (
        {**ONE_STAGE.values, "policy": {"enabled": True}},
        "policy.artifactClaim: the image's policy was made for the stages small, medium, large, not for "
        "only; name a "
        "claim with a policy for these, or set policy.enabled=false",
    ),
    "a cascade of another policy with no engine": (
        {"stages": [{"name": "a", "cost": 1, "model": {"path": "/m"}}], "router": {"staticPlan": ["a"]}},
        'stages: "a" has no engine',
    ),
    "no resources of the router": (
        {"router": {"resources": None}},
        "router.resources: null is no setting; to ask for nothing, set router.resources.requests=null and "
        "router.resources.limits=null",
    ),
    "no resources of the policy service": ({"policy": {"resources": None}}, "policy.resources: null is no"),
    "no resources of the gateway": ({"gateway": {"resources": None}}, "gateway.resources: null is no"),
    "no resources of stages": ({"stageDefaults": {"resources": None}}, "stageDefaults.resources: null is no"),
    "more CPU asked for than allowed": (
        {"router": {"resources": {"requests": {"cpu": "1500m"}, "limits": {"cpu": 1}}}},
        "router: resources.requests.cpu 1500m is above resources.limits.cpu 1; raise the limit or lower the "
        "request",
    ),
    "more memory asked for than allowed": (
        {"stageDefaults": {"resources": {"requests": {"memory": "1.5Gi"}}}},
        "stageDefaults: resources.requests.memory 1.5Gi is above resources.limits.memory 1Gi",
    ),
    "more memory of one stage asked for than allowed": (
        stage(resources={"requests": {"memory": "1100M"}}),
        'stages: "a": resources.requests.memory 1100M is above resources.limits.memory 1Gi',
    ),
    "metrics at the gateway's port": (
        {"telemetry": {"metricsPort": 8000}},
        "telemetry.metricsPort: 8000 is the port of the gateway",
    ),
    "metrics at a port that is taken": (
        {"telemetry": {"metricsPort": 50050}},
        "telemetry.metricsPort: 50050 is the port of the router; set another one, for instance 9464",
    ),
    "one file of reports for two": (
        {"policy": {"reportsClaim": "r", "replicas": 2}},
        "policy.reportsClaim: several pods cannot keep one file of reports; set policy.replicas=1",
    ),
    "one file of reports for many": (
        {"policy": {"reportsClaim": "r", "autoscaling": {"enabled": True}}},
        "policy.autoscaling.enabled=false, or leave the claim out",
    ),
    "no engine": (
        stage(model={"engine": ""}),
        'stages: "a" has no engine; set model.engine to onnx, vllm or tensorrt_llm',
    ),
    "onnx on a GPU": (
        stage(model={"engine": "onnx"}),
        'stages: "a" asks for GPUs, and the engine onnx computes on CPUs; set model.engine to vllm or '
        "tensorrt_llm, "
        "or gpus to 0",
    ),
    "vllm without a GPU": (
        stage(gpus=0),
        'stages: "a" has the engine vllm and no GPU; set gpus to 1, its model.vllm.tensorParallel',
    ),
    "tensor parallelism that does not divide": (
        stage(gpus=4, sharedMemory="8Gi", model={"vllm": {"tensorParallel": 3}}),
        'stages: "a" has gpus 4, which model.vllm.tensorParallel 3 does not divide; set gpus to 3',
    ),
    "idle GPUs": (
        stage(
            gpus=4, sharedMemory="8Gi", model={"engine": "tensorrt_llm", "tensorrtLlm": {"tensorParallel": 2}}
        ),
        'stages: "a" has gpus 4 and model.tensorrtLlm.tensorParallel 2, so that 2 would be idle; make '
        "them equal",
    ),
    "too little shared memory": (
        stage(gpus=2, model={"vllm": {"tensorParallel": 2}}),
        'stages: "a" is tensor-parallel, and its processes need more than 64 MiB of shared memory; set '
        "sharedMemory",
    ),
    "a context without room for a proposal": (
        stage(gpus=1, model={"vllm": {"verifyInside": True, "maxModelLen": 64}}),
        'stages: "a" would propose nothing: model.vllm.maxModelLen 64 must exceed '
        "model.vllm.proposedTokens 64",
    ),
    "GPUs said twice": (
        stage(resources={"limits": {"nvidia.com/gpu": 1}}),
        'stages: "a" names nvidia.com/gpu in resources.limits; say how many with gpus instead',
    ),
    "two caches": (
        stage(model={"cache": {"claim": "c", "size": "1Gi"}}),
        'stages: "a" names a claim for its cache, and a size for a new one; leave model.cache.claim or '
        "model.cache.size empty",
    ),
    "no way to update": (
        stage(updateStrategy={"maxSurge": 0, "maxUnavailable": 0}),
        'stages: "a" could never be updated; set updateStrategy.maxSurge or '
        "updateStrategy.maxUnavailable to 1",
    ),
    "killed while it drains": (
        {"router": {"drainSeconds": 60, "terminationGracePeriodSeconds": 30}},
        "router: terminationGracePeriodSeconds 30 would kill calls that may still go on; set it to 63 or "
        "more",
    ),
    "a label of the release's": (
        {"router": {"podLabels": {"app.kubernetes.io/name": "other"}}},
        "router: podLabels may not set app.kubernetes.io/name, by which the release knows its pods; "
        "choose another",
    ),
    "fewer at most than at least": (
        {"router": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}},
        "router.autoscaling: minReplicas 5 is above maxReplicas 2; raise maxReplicas or lower minReplicas",
    ),
    "fewer pods of a stage at most than at least": (
        {"stageDefaults": {"autoscaling": {**KEDA, "minReplicas": 9, "query": "q"}}},
        'stages: "small": autoscaling.minReplicas 9 is above autoscaling.maxReplicas 4',
    ),
    "a share of no CPU": (
        {"policy": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}},
        "policy.autoscaling: the share of used CPU is of the requested one; set "
        "policy.resources.requests.cpu",
    ),
    "two that scale": (
        {
            "manager": {"enabled": True},
            "telemetry": {"metricsPort": 9464},
            "stageDefaults": {"autoscaling": KEDA, "scaleToZero": SLEEPS},
        },
        'stages: "small" is scaled by KEDA and by the manager; set autoscaling.enabled=false, or '
        "scaleToZero.idleSeconds=0",
    ),
    "asleep for good": (
        {"stageDefaults": {"scaleToZero": SLEEPS}},
        'stages: "small" may sleep, and nobody would wake it; set manager.enabled=true, or '
        "scaleToZero.idleSeconds=0",
    ),
    "nothing to manage": (
        {"manager": {"enabled": True}},
        "manager.enabled: no stage may sleep, so that there is nothing to manage; set "
        "scaleToZero.idleSeconds",
    ),
    "more asleep than awake": (
        {"manager": {"enabled": True}, "stageDefaults": {"scaleToZero": {**SLEEPS, "minReplicas": 3}}},
        'stages: "small" sleeps with 3 pods and wakes to 1; raise scaleToZero.wakeReplicas',
    ),
    "KEDA without Prometheus": (
        {"stageDefaults": {"autoscaling": {"enabled": True}}},
        "which KEDA reads from Prometheus; set autoscaling.prometheusAddress, for instance to http://",
    ),
    "KEDA without metrics": (
        {"stageDefaults": {"autoscaling": KEDA}},
        "is scaled by a metric that its pods do not serve; set telemetry.metricsPort, for instance to 9464",
    ),
    "Prometheus without metrics": (
        {"monitoring": {"podMonitor": {"enabled": True}}},
        "monitoring.podMonitor: pods serve no metrics; set telemetry.metricsPort, for instance to 9464",
    ),
    "pods monitored twice": (
        {
            "telemetry": {"metricsPort": 9464},
            "monitoring": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}},
        },
        "monitoring.podMonitor and monitoring.serviceMonitor: pods would be asked twice; enable one of them",
    ),
    "TLS without a Secret": (
        {"tls": {"enabled": True}},
        "tls: there is no Secret for router; set tls.secretName or tls.secretNames.router, or let "
        "cert-manager make "
        "them with tls.mode=certManager",
    ),
    "TLS without a Secret for the gateway": (
        {"tls": {"enabled": True, "secretNames": {"router": "r", "policy": "p", "stages": "s"}}},
        "tls: there is no Secret for gateway; set tls.secretName or tls.secretNames.gateway",
    ),
    "TLS without a Secret for stages": (
        {
            "tls": {
                "enabled": True,
                "secretNames": {"router": "r", "gateway": "g", "policy": "p", "client": "c"},
            }
        },
        "tls: there is no Secret for stages; set tls.secretName or tls.secretNames.stages",
    ),
    "Secrets beside cert-manager": (
        {"tls": {**TLS, "mode": "certManager"}},
        "tls.secretName: with tls.mode=certManager the release names its Secrets itself; leave it empty, "
        "or set "
        "tls.mode=secret",
    ),
    "certificates without TLS": (
        {"tls": {"mutual": True}},
        "tls.mutual: there are no certificates without TLS; set tls.enabled=true, or tls.mutual=false",
    ),
    "client certificates behind an Ingress": (
        {
            "tls": {**TLS, "clientCertificates": True},
            "router": {"ingress": {"enabled": True, "host": "a.example"}},
        },
        "tls.clientCertificates: an Ingress or a Gateway ends the clients' TLS and shows no certificate "
        "of theirs; "
        "set tls.clientCertificates=false",
    ),
    "tokens without a Secret": (
        {"auth": {"enabled": True}},
        "auth.secretName: the router needs a Secret with the tokens; set auth.secretName, or "
        "auth.enabled=false",
    ),
    "a Secret with tokens that nobody asks for": (
        {"auth": {"secretName": "x"}},
        "auth: a Secret is named (x), and the router would answer everybody all the same; set "
        "auth.enabled=true, or leave auth.secretName empty",
    ),
    "a Secret with certificates that nobody shows": (
        {"tls": {"secretName": "x"}},
        "tls: a Secret is named (x), and connections would be plain all the same; set tls.enabled=true, or "
        "leave tls.secretName and tls.secretNames empty",
    ),
    "a Secret of one service that nobody shows": (
        {"tls": {"secretNames": {"policy": "p"}}},
        "tls: a Secret is named (p), and connections would be plain all the same",
    ),
    "Ingress without a host": (
        {"router": {"ingress": {"enabled": True}}},
        "router.ingress.host: an Ingress needs a host name; set router.ingress.host",
    ),
    "route without a Gateway": (
        {"router": {"route": {"enabled": True}}},
        "router.route.gateway: a GRPCRoute belongs to a Gateway; set router.route.gateway to its name",
    ),
    "two ways in": (
        {
            "router": {
                "ingress": {"enabled": True, "host": "a.example"},
                "route": {"enabled": True, "gateway": "g"},
            }
        },
        "router.ingress and router.route: both lead to the router; enable one of them",
    ),
    "an Ingress of the gateway without a host": (
        {"gateway": {"ingress": {"enabled": True}}},
        "gateway.ingress.host: an Ingress needs a host name; set gateway.ingress.host",
    ),
    "a route of the gateway without a Gateway": (
        {"gateway": {"route": {"enabled": True}}},
        "gateway.route.gateway: an HTTPRoute belongs to a Gateway; set gateway.route.gateway to its name",
    ),
    "two ways in to the gateway": (
        {
            "gateway": {
                "ingress": {"enabled": True, "host": "a.example"},
                "route": {"enabled": True, "gateway": "g"},
            }
        },
        "gateway.ingress and gateway.route: both lead to the gateway; enable one of them",
    ),
    "an Ingress of the gateway that shows no certificate": (
        {
            "tls": {**TLS, "clientCertificates": True},
            "gateway": {"ingress": {"enabled": True, "host": "a.example"}},
        },
        "set tls.clientCertificates=false, or let clients reach the gateway's Service",
    ),
    "fewer pods of the gateway at most than at least": (
        {"gateway": {"autoscaling": {"enabled": True, "maxReplicas": 1}}},
        "gateway.autoscaling: minReplicas 2 is above maxReplicas 1",
    ),
    "an Ingress that may not call the gateway": (
        {
            "networkPolicy": {"enabled": True, "clients": [{"podSelector": {}}]},
            "gateway": {"ingress": {"enabled": True, "host": "a.example"}},
        },
        "networkPolicy.gatewayClients: the gateway is reached from outside its namespace",
    ),
    "a load balancer that may not call": (
        {"networkPolicy": {"enabled": True}, "router": {"service": {"type": "LoadBalancer"}}},
        "networkPolicy.clients: the router is reached from outside its namespace (service type, ingress "
        "or route), "
        "which the policy would deny; name who may call it",
    ),
}


@pytest.mark.parametrize(("values", "said"), SCHEMA, ids=[said for _, said in SCHEMA])
def test_unknown_and_malformed_values_are_refused(values: dict[str, Any], said: str) -> None:
    run = template(Variant(values))
    assert run.returncode != 0
    assert said in run.stderr


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused_with_a_sentence(case: str) -> None:
    values, said = CONTRADICTIONS[case]
    run = template(Variant(values))
    assert run.returncode != 0
    assert said in run.stderr


def test_a_release_name_that_leaves_no_room_for_those_of_stages_is_refused() -> None:
    name = "a-release-of-25-chars-now"
    run = helm(f"template {name}", Variant(), str(CHART))
    assert run.returncode != 0
    assert f'fullnameOverride: "{name}" has 25 characters' in run.stderr
    assert helm(f"template {name[1:].strip('-')}", Variant(), str(CHART)).returncode == 0
    assert helm(f"template {name}", Variant({"fullnameOverride": "short"}), str(CHART)).returncode == 0


@pytest.mark.parametrize("name", ["a.b", "1a"])
def test_a_release_name_that_services_cannot_have_is_refused(name: str) -> None:
    run = helm(f"template {name}", Variant(), str(CHART))
    assert run.returncode != 0
    assert f'fullnameOverride: "{name}" cannot begin names of Services' in run.stderr
    assert helm(f"template {name}", Variant({"fullnameOverride": "fine"}), str(CHART)).returncode == 0


def test_requests_up_to_the_limit_and_of_unusual_units_are_taken() -> None:
    for requests, limits in (
        ({"memory": "512Mi"}, {"memory": "0.5Gi"}),
        ({"memory": "1e12"}, {"memory": "1Gi"}),
        ({"cpu": 1}, {"cpu": "1000m"}),
    ):
        run = template(Variant({"router": {"resources": {"requests": requests, "limits": limits}}}))
        assert run.returncode == 0, run.stderr


def test_a_misspelt_value_is_refused_by_lint_and_install_alike() -> None:
    for command in ("lint --strict", "install --dry-run=client demo"):
        run = helm(command, Variant({"router": {"staticplan": []}}), str(CHART))
        assert run.returncode != 0
        assert "staticplan" in run.stdout + run.stderr
