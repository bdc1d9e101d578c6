"""The variants of the chart's values, each rendered once by helm."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.kubernetes_programs import find_helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts"
RELEASE, NAMESPACE = "demo", "models"
FAMILY = ("small", "medium", "large")
LLAMA_2 = ("13b", "34b", "70b")

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """Values over a file's, over the chart's own. stages: their names."""

    values: dict[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = FAMILY
    file: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """What is set beside the chart's own values."""
        file = yaml.safe_load((ROOT / self.file).read_text()) if self.file else {}
        return _merged(file, self.values)

    @property
    def effective(self) -> dict[str, Any]:
        """All values that hold."""
        return _merged(chart_values(), self.given)

    def stage(self, name: str) -> dict[str, Any]:
        """All values that hold for a stage."""
        values = self.effective
        (own,) = [each for each in values["stages"] if each["name"] == name]
        return _merged(values["stageDefaults"], own)

    @property
    def prefix(self) -> str:
        """What every object's name begins with."""
        return str(self.given.get("fullnameOverride") or RELEASE)

    @property
    def components(self) -> set[str]:
        """Names of the deployments."""
        parts = {f"stage-{name}" for name in self.stages} | {"router"}
        parts |= {part for part in ("gateway", "policy", "manager") if self.effective[part]["enabled"]}
        return {f"{self.prefix}-{part}" for part in parts}


def _stages(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"cost": cost, **entry} for cost, entry in enumerate(entries, start=1)]


def _sleeping(**rule: Any) -> dict[str, Any]:
    """Return the family's stages, of which the largest may sleep."""
    own = [
        {**each, "scaleToZero": rule} if each["name"] == "large" else each
        for each in chart_values()["stages"]
    ]
    return {"manager": {"enabled": True}, "stages": own}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


@cache
def chart_values() -> dict[str, Any]:
    """Return the chart's own values."""
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


FOUR_STAGES = Variant(
    {
        "stages": [
            {
                "name": name,
                "cost": cost,
                "model": {"engine": "onnx", "path": f"/models/{name}", "claim": "weights"},
            }
            for name, cost in (("s0", 1), ("s1", 2), ("s2", 4.5), ("s3", 9))
        ],
        "router": {"staticPlan": ["s1", "s3"]},
        "policy": {"artifactClaim": "four-stage-policy"},
    },
    ("s0", "s1", "s2", "s3"),
)
ONE_STAGE = Variant(
    {
        "stages": [
            {
                "name": "only",
                "cost": 1,
                "model": {
                    "engine": "onnx",
                    "path": "/models/large",
                    "cachedSequences": 0,
                    "maxModelLen": 4096,
                    "preload": False,
                    "resync": False,
                    "maxBatch": 3,
                },
            }
        ],
        "router": {"staticPlan": ["only"]},
        "policy": {"enabled": False},
    },
    ("only",),
)
_PLACED = {
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "spot", "operator": "Exists"}],
    "affinity": {
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname"}}
            ]
        }
    },
    "topologySpreadConstraints": [
        {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "serving",
    "runtimeClassName": "gvisor",
    "podAnnotations": {"sidecar.istio.io/inject": "false"},
    "podLabels": {"team": "inference"},
    "terminationGracePeriodSeconds": 300,
}
_GPU = {"gpus": 2, "sharedMemory": "8Gi", "tmpSize": "4Gi", "runtimeClassName": "nvidia"}
_TRUSTED = {"tls": {"enabled": True, "secretName": "asd-tls"}}
_ISSUED = {"tls": {"enabled": True, "mode": "certManager"}}
_TOKENS = {"auth": {"enabled": True, "secretName": "tokens"}}
_KEDA = {"enabled": True, "prometheusAddress": "http://prometheus.monitoring:9090"}
_GATE = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}

VARIANTS: dict[str, Variant] = {
    "defaults": Variant(),
    "one stage": ONE_STAGE,
    "four stages": FOUR_STAGES,
    "policy off": Variant({"policy": {"enabled": False}}),
    "gateway off": Variant({"gateway": {"enabled": False}}),
    "everything on": Variant(
        {
            "fullnameOverride": "cascade",
            "global": {"anything": {"of": "a parent chart"}},
            "image": {"registry": "registry.example/asd", "tag": "1.2.3", "pullSecrets": ["pull"]},
            "telemetry": {"endpoint": "http://jaeger:4317", "env": {"OTEL_TRACES_SAMPLER": "always_on"}},
            "rollout": {"minReadySeconds": 30, "preStopSeconds": 7},
            "router": {
                "service": {"type": "LoadBalancer", "annotations": {"a.cloud/internal": "true"}},
                "speculation": {"pipelined": False, "adaptive": False},
                "overload": "shed",
                "maxConnectionAgeSeconds": 0,
                **_PLACED,
            },
            "gateway": {
                "service": {"type": "NodePort", "annotations": {"a.cloud/internal": "true"}},
                "timeoutMs": 120_000,
                "maxBodyBytes": 1_048_576,
                "readTimeoutMs": 10_000,
                "writeTimeoutMs": 20_000,
                "idleTimeoutMs": 620_000,
                "keepAliveMs": 2_500.5,
                "maxConcurrent": 64,
                "accessLog": True,
                "drainSeconds": 125,
                **_PLACED,
            },
            "policy": {
                "artifactClaim": "policy",
                "artifactPollSeconds": 2.5,
                "reportsClaim": "reports",
                "drift": {"runLength": 500, "tolerance": 0.05},
                "noveltyThreshold": 0.3,
                "shadow": {"artifactClaim": "candidate", "maxMb": 7},
                **_PLACED,
            },
            "stageDefaults": {
                "memoryBudgetMb": 512,
                "startupSeconds": 900,
                "maxConnectionAgeSeconds": 60,
                **_PLACED,
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            },
        }
    ),
    "H100s": Variant(stages=LLAMA_2, file="charts/values-h100.yaml"),
    "H100s, TensorRT-LLM": Variant(stages=LLAMA_2, file="charts/values-h100-tensorrt-llm.yaml"),
    "kind": Variant(file="charts/values-kind.yaml"),
    "test cluster": Variant(file="tests/cluster/values.yaml"),
    "vLLM": Variant(
        {
            "router": {"staticPlan": ["draft"]},
            "policy": {"enabled": False},
            "stageDefaults": {**_GPU, "model": {"engine": "vllm", "claim": "weights", "maxModelLen": 2048}},
            "stages": _stages(
                {
                    "name": "draft",
                    "gpus": 1,
                    "model": {
                        "path": "/models/draft",
                        "cache": {"claim": "shared-cache"},
                        "vllm": {
                            "dtype": "float16",
                            "quantization": "fp8",
                            "maxModelLen": 1_000_000,
                            "maxBatchedTokens": 4096,
                            "kvCacheGib": 2.5,
                            "cudaGraphTokens": 256,
                            "verifyInside": True,
                            "proposedTokens": 16,
                            "prefixCaching": False,
                            "constraints": False,
                            "enforceEager": True,
                            "sleepLevel": 1,
                            "lora": {"law": "/models/law"},
                        },
                    },
                },
                {
                    "name": "target",
                    "gpuResource": "nvidia.com/gpu.shared",
                    "model": {"path": "/models/target", "vllm": {"tensorParallel": 2, "cudaGraphTokens": 0}},
                },
            ),
        },
        ("draft", "target"),
    ),
    "TensorRT-LLM": Variant(
        {
            "router": {"staticPlan": ["only"]},
            "policy": {"enabled": False},
            "stages": _stages(
                {
                    "name": "only",
                    **_GPU,
                    "updateStrategy": {"maxUnavailable": 1, "maxSurge": 0},
                    "model": {
                        "engine": "tensorrt_llm",
                        "path": "/models/only",
                        "maxModelLen": 8192,
                        "tensorrtLlm": {"tensorParallel": 2, "kvCacheDtype": "fp8"},
                        "cache": {"size": "20Gi", "storageClass": "fast", "accessMode": "ReadWriteOnce"},
                    },
                }
            ),
        },
        ("only",),
    ),
    "autoscaled": Variant(
        {
            "telemetry": {"metricsPort": 9464},
            "router": {"autoscaling": {"enabled": True}},
            "gateway": {"autoscaling": {"enabled": True, "minReplicas": 3}},
            "policy": {"autoscaling": {"enabled": True, "maxReplicas": 6, "targetCpuPercent": 50}},
            "stageDefaults": {"autoscaling": {**_KEDA, "minReplicas": 2, "maxReplicas": 5}},
        }
    ),
    "autoscaled by a query": Variant(
        {
            "stageDefaults": {
                "autoscaling": {**_KEDA, "query": 'sum(waiting{stage="all"})', "requestsPerPod": 3}
            }
        }
    ),
    "scale to zero": Variant(
        _sleeping(idleSeconds=600, wakeReplicas=2, minAwakeSeconds=30, giveUpSeconds=45)
    ),
    "all may sleep": Variant(
        {"manager": {"enabled": True}, "stageDefaults": {"scaleToZero": {"idleSeconds": 60}}}
    ),
    "metrics": Variant({"telemetry": {"metricsPort": 9464}}),
    "digests": Variant(
        {
            "image": {
                "registry": "registry.example",
                "digests": {
                    name: f"sha256:{number:064x}"
                    for number, name in enumerate(
                        ("router", "policy", "stageOnnx", "tools", "gateway"), start=1
                    )
                },
            }
        }
    ),
    # As restricted-v2 wants it: a namespace's users are its own.
    "openshift": Variant(
        {
            "podSecurity": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
            "policy": {"reportsClaim": "reports"},
            "stageDefaults": {"model": {"cache": {"claim": "shared-cache"}}},
            **_sleeping(idleSeconds=600),
        }
    ),
    "users given": Variant(
        {
            "podSecurity": {"runAsUser": 1_000_650_000, "runAsGroup": 0, "fsGroup": 0},
            "policy": {"reportsClaim": "reports"},
        }
    ),
    "TLS": Variant(_TRUSTED),
    "TLS, Secrets apart": Variant(
        {
            "tls": {
                "enabled": True,
                "mutual": True,
                "secretNames": {
                    name: f"{name}-tls"
                    for name in ("router", "gateway", "policy", "stages", "manager", "client")
                },
            }
        }
    ),
    "TLS by cert-manager": Variant(
        _merged(
            _ISSUED,
            {
                "tls": {
                    "mutual": True,
                    "certManager": {
                        "routerDnsNames": ["asd.example"],
                        "gatewayDnsNames": ["api.asd.example"],
                    },
                }
            },
        )
    ),
    "TLS by an issuer": Variant(
        _merged(_ISSUED, {"tls": {"certManager": {"issuerName": "company", "issuerKind": "ClusterIssuer"}}})
    ),
    "tokens": Variant(_TOKENS),
    "ingress": Variant(
        {
            "router": {
                "service": {"type": "ClusterIP"},
                "ingress": {
                    "enabled": True,
                    "className": "nginx",
                    "host": "asd.example",
                    "tlsSecretName": "asd-example",
                    "annotations": {"nginx.ingress.kubernetes.io/backend-protocol": "GRPC"},
                },
            }
        }
    ),
    "gateway ingress": Variant(
        {
            **_TRUSTED,
            "gateway": {
                "timeoutMs": 600_500,
                "maxBodyBytes": 33_554_432,
                "maxBufferedBytes": 134_217_728,
                "ingress": {
                    "enabled": True,
                    "className": "nginx",
                    "host": "api.asd.example",
                    "tlsSecretName": "api-asd-example",
                    "annotations": {
                        "nginx.ingress.kubernetes.io/proxy-send-timeout": "9",
                        "team": "inference",
                    },
                },
            },
        }
    ),
    "route": Variant(
        {
            "router": {
                "route": {
                    "enabled": True,
                    "gateway": "public",
                    "gatewayNamespace": "gateways",
                    "sectionName": "grpc",
                    "hostnames": ["asd.example"],
                }
            },
            "gateway": {
                "timeoutMs": 300_000,
                "route": {
                    "enabled": True,
                    "gateway": "public",
                    "gatewayNamespace": "gateways",
                    "sectionName": "https",
                    "hostnames": ["api.asd.example"],
                },
            },
            "networkPolicy": {"enabled": True, "clients": [_GATE], "gatewayClients": [_GATE]},
        }
    ),
    "network policies": Variant(
        {
            "networkPolicy": {
                "enabled": True,
                "metricsClients": [_GATE],
                "directClients": [
                    {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "collect"}}}
                ],
                "stageEgress": [
                    {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"protocol": "TCP", "port": 443}]}
                ],
            },
            "telemetry": {"endpoint": "https://collector.example", "metricsPort": 9464},
        }
    ),
    "locked down": Variant(
        _merged(
            _sleeping(idleSeconds=900),
            {
                **_TOKENS,
                "tls": {"enabled": True, "mode": "certManager", "mutual": True, "clientCertificates": True},
                "networkPolicy": {"enabled": True},
                "telemetry": {"endpoint": "http://jaeger.tracing:4317", "metricsPort": 9464},
                "router": {"autoscaling": {"enabled": True}},
            },
        )
    ),
}


def count_variants() -> int:
    """Return how many variants of the values are rendered and checked."""
    return len(VARIANTS)


def helm(command: str, variant: Variant, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what helm says of the chart with a variant's values."""
    files = [f"--values={ROOT / variant.file}"] if variant.file else []
    return subprocess.run(
        [str(find_helm()), *command.split(), *arguments, *files, "--namespace", NAMESPACE, "--values=-"],
        input=json.dumps(variant.values),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def template(variant: Variant) -> subprocess.CompletedProcess[str]:
    """Return what `helm template` says."""
    return helm("template", variant, RELEASE, str(CHART))


@cache
def render(name: str) -> tuple[Manifest, ...]:
    """Return the objects of a variant."""
    run = template(VARIANTS[name])
    assert run.returncode == 0, run.stderr
    return tuple(document for document in yaml.safe_load_all(run.stdout) if document)


def of_kind(name: str, kind: str) -> dict[str, Manifest]:
    """Return a variant's objects of a kind by their names."""
    return {each["metadata"]["name"]: each for each in render(name) if each["kind"] == kind}


def pod_spec(name: str, deployment: str) -> dict[str, Any]:
    """Return the pod of a variant's deployment."""
    spec: dict[str, Any] = of_kind(name, "Deployment")[deployment]["spec"]["template"]["spec"]
    return spec


def container(name: str, deployment: str) -> dict[str, Any]:
    """Return the only container of a variant's deployment."""
    (found,) = pod_spec(name, deployment)["containers"]
    return dict(found)


def config(name: str, component: str) -> dict[str, Any]:
    """Return the settings that a variant gives to a component."""
    text = of_kind(name, "ConfigMap")[component]["data"]["config.yaml"]
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded
