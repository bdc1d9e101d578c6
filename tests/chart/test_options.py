"""What each optional block of the values makes."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import yaml

from policy_service.settings import PolicySettings
from services.common.telemetry import Metrics
from services.gateway.app import APIS, MODEL, MODELS
from services.gateway.settings import GatewaySettings
from services.router.settings import RouterSettings
from services.scaler.settings import ScalerSettings
from services.stage.settings import StageSettings
from tests.chart.rendering import (
    FAMILY,
    NAMESPACE,
    VARIANTS,
    Variant,
    config,
    container,
    of_kind,
    pod_spec,
    template,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.common.settings import ServiceSettings


def read(settings: type[ServiceSettings], variant: str, component: str, folder: Path) -> Any:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config(variant, component)))
    return settings.load(file)


def labels_of(variant: str, component: str) -> dict[str, str]:
    metadata = of_kind(variant, "Deployment")[component]["spec"]["template"]["metadata"]
    return dict(metadata["labels"])


class TestScaling:
    def test_router_gateway_and_policy_scale_by_cpu(self) -> None:
        scalers = of_kind("autoscaled", "HorizontalPodAutoscaler")
        assert set(scalers) == {"demo-router", "demo-gateway", "demo-policy"}
        assert scalers["demo-gateway"]["spec"]["scaleTargetRef"]["name"] == "demo-gateway"
        assert scalers["demo-gateway"]["spec"]["minReplicas"] == 3
        spec = scalers["demo-policy"]["spec"]
        assert spec["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": "demo-policy",
        }
        assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 6)
        (metric,) = spec["metrics"]
        assert metric["resource"] == {
            "name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": 50},
        }

    def test_a_stage_scales_by_what_waits_and_runs_in_its_own_pods(self) -> None:
        scaled = of_kind("autoscaled", "ScaledObject")
        assert set(scaled) == {f"demo-stage-{name}" for name in FAMILY}
        spec = scaled["demo-stage-small"]["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 5)
        assert spec["scaleTargetRef"] == {"name": "demo-stage-small"}
        (trigger,) = spec["triggers"]
        pods = f'{{namespace="{NAMESPACE}",pod=~"demo-stage-small-.+"}}'
        wanted = [Metrics.QUEUE_DEPTH.replace(".", "_"), Metrics.RUNNING_REQUESTS.replace(".", "_")]
        assert trigger["metadata"]["query"] == " + ".join(f"sum({name}{pods})" for name in wanted)
        assert trigger["metadata"]["threshold"] == "8"

    def test_the_metrics_of_the_query_are_documented_under_these_names(self) -> None:
        """docs/telemetry.md is checked against what Prometheus gets by tests/integration/common."""
        query = of_kind("autoscaled", "ScaledObject")["demo-stage-small"]["spec"]["triggers"][0]["metadata"][
            "query"
        ]
        documented = (Path(__file__).parents[2] / "docs/telemetry.md").read_text()
        for name in (part.split("{")[0].removeprefix("sum(") for part in query.split(" + ")):
            assert f"| `{name}` |" in documented

    def test_a_query_of_the_users_own_takes_its_place(self) -> None:
        (trigger,) = of_kind("autoscaled by a query", "ScaledObject")["demo-stage-large"]["spec"]["triggers"]
        assert trigger["metadata"]["query"] == 'sum(waiting{stage="all"})'
        assert trigger["metadata"]["threshold"] == "3"

    def test_the_manager_gets_the_stages_that_may_sleep(self, tmp_path: Path) -> None:
        settings = read(ScalerSettings, "scale to zero", "demo-manager", tmp_path)
        (stage,) = settings.stages
        assert (stage.name, stage.deployment) == ("large", "demo-stage-large")
        assert stage.target == "dns:///demo-stage-large:50061"
        assert (stage.idle_seconds, stage.min_awake_seconds) == (600, 30)
        # Beyond the time that a pod may take to load its model.
        assert stage.give_up_seconds == 120 + 45
        assert (stage.wake_replicas, stage.min_replicas) == (2, 0)
        router = read(RouterSettings, "scale to zero", "demo-router", tmp_path)
        assert router.manager is not None
        assert router.manager.target == "dns:///demo-manager:50053"
        assert len(read(ScalerSettings, "all may sleep", "demo-manager", tmp_path).stages) == 3

    def test_the_manager_may_scale_these_stages_and_nothing_else(self) -> None:
        """What services/scaler/kubernetes_cluster.py says that it wants."""
        rules = of_kind("scale to zero", "Role")["demo-manager"]["rules"]
        assert rules == [
            {
                "apiGroups": ["apps"],
                "resources": ["deployments"],
                "resourceNames": ["demo-stage-large"],
                "verbs": ["get"],
            },
            {
                "apiGroups": ["apps"],
                "resources": ["deployments/scale"],
                "resourceNames": ["demo-stage-large"],
                "verbs": ["patch"],
            },
            {"apiGroups": ["autoscaling"], "resources": ["horizontalpodautoscalers"], "verbs": ["list"]},
        ]
        binding = of_kind("scale to zero", "RoleBinding")["demo-manager"]
        assert binding["roleRef"]["name"] == "demo-manager"
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": "demo-manager", "namespace": NAMESPACE}
        ]
        assert pod_spec("scale to zero", "demo-manager")["serviceAccountName"] == "demo-manager"


class TestEngines:
    def test_every_option_of_an_engine_reaches_it(self, tmp_path: Path) -> None:
        (model,) = read(StageSettings, "vLLM", "demo-stage-draft", tmp_path).models
        given = model.vllm
        assert (given.dtype, given.quantization, given.kv_cache_gib) == ("float16", "fp8", 2.5)
        assert (given.max_model_len, given.max_batched_tokens) == (1_000_000, 4096)
        assert (given.prefix_caching, given.enforce_eager, given.sleep_level) == (False, True, 1)
        assert not given.constraints
        assert (given.verify_inside, given.proposed_tokens, given.cuda_graph_tokens) == (True, 16, 256)
        assert given.lora == {"law": Path("/models/law")}
        # Of stages that say nothing, those that get drafts verify them inside.
        (follower,) = read(StageSettings, "vLLM", "demo-stage-target", tmp_path).models
        assert follower.vllm.verify_inside
        assert follower.vllm.cuda_graph_tokens is None
        draft, target = read(RouterSettings, "vLLM", "demo-router", tmp_path).stages
        assert (draft.adapters, draft.model) == (("law",), model.name)
        # Without an entry, the router asks the stage.
        assert (target.adapters, target.model) == (None, "")
        (model,) = read(StageSettings, "TensorRT-LLM", "demo-stage-only", tmp_path).models
        assert (model.tensorrt_llm.tensor_parallel, model.tensorrt_llm.kv_cache_dtype) == (2, "fp8")
        assert model.tensorrt_llm.max_model_len == 8192

    @pytest.mark.parametrize(
        ("engine", "section"), [("onnx", ""), ("vllm", "vllm"), ("tensorrt_llm", "tensorrtLlm")]
    )
    def test_the_charts_own_values_are_the_settings_own(
        self, engine: str, section: str, tmp_path: Path
    ) -> None:
        stage = {
            "name": "only",
            "cost": 1,
            "gpus": int(bool(section)),
            "model": {"engine": engine, "path": "/m"},
        }
        values = {"stages": [stage], "policy": {"enabled": False}, "router": {"staticPlan": ["only"]}}
        run = template(Variant(values, ("only",)))
        assert run.returncode == 0, run.stderr
        maps = [each for each in yaml.safe_load_all(run.stdout) if each and each["kind"] == "ConfigMap"]
        (text,) = [
            each["data"]["config.yaml"] for each in maps if each["metadata"]["name"] == "demo-stage-only"
        ]
        rendered = yaml.safe_load(text)["models"][0]
        (model,) = StageSettings.model_validate({"models": [rendered]}).models
        bare = {"name": "only", "path": "/m", "engine": engine, **({engine: {}} if section else {})}
        (own,) = StageSettings.model_validate({"models": [bare]}).models
        assert model == own

    def test_gpus_come_with_what_tensor_parallelism_needs(self) -> None:
        serving = container("H100s", "demo-stage-70b")
        assert serving["resources"]["limits"]["nvidia.com/gpu"] == 2
        assert "nvidia.com/gpu" not in serving["resources"]["requests"]
        volumes = {each["name"]: each for each in pod_spec("H100s", "demo-stage-70b")["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
        assert {"name": "shm", "mountPath": "/dev/shm"} in serving["volumeMounts"]
        assert pod_spec("vLLM", "demo-stage-draft")["runtimeClassName"] == "nvidia"
        shared = container("vLLM", "demo-stage-target")["resources"]["limits"]
        assert shared["nvidia.com/gpu.shared"] == 2
        assert "nvidia.com/gpu" not in shared

    def test_the_production_cascade_has_a_gpu_for_each_part_of_a_model(self) -> None:
        for variant, engine, name, gpus in (
            ("H100s", "vllm", "13b", 1),
            ("H100s", "vllm", "34b", 1),
            ("H100s", "vllm", "70b", 2),
            ("H100s, TensorRT-LLM", "tensorrt_llm", "13b", 1),
            ("H100s, TensorRT-LLM", "tensorrt_llm", "34b", 2),
            ("H100s, TensorRT-LLM", "tensorrt_llm", "70b", 4),
        ):
            full = f"demo-stage-{name}"
            (model,) = config(variant, full)["models"]
            assert model["engine"] == engine
            assert model[engine]["tensor_parallel"] == gpus
            serving = container(variant, full)
            assert serving["resources"]["limits"]["nvidia.com/gpu"] == gpus
            # Weights come at some 200 MB/s at worst.
            assert serving["startupProbe"]["failureThreshold"] >= 600
            pod = pod_spec(variant, full)
            assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
            assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"

    def test_an_engine_caches_on_the_claim_that_it_is_given(self) -> None:
        claims = of_kind("TensorRT-LLM", "PersistentVolumeClaim")
        assert claims["demo-stage-only-cache"]["spec"] == {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "fast",
            "resources": {"requests": {"storage": "20Gi"}},
        }
        for variant, full, claim in (
            ("TensorRT-LLM", "demo-stage-only", "demo-stage-only-cache"),
            ("vLLM", "demo-stage-draft", "shared-cache"),
        ):
            pod = pod_spec(variant, full)
            volumes = {each["name"]: each for each in pod["volumes"]}
            assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": claim}
            assert pod["securityContext"]["fsGroup"] == 10001
            environment = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
            assert environment["ASD_CACHE_DIR"] == "/cache"
            assert environment["HF_HOME"].startswith("/cache/")
        assert not of_kind("defaults", "PersistentVolumeClaim")


class TestEncryption:
    TLS = ("TLS", "TLS, Secrets apart", "TLS by cert-manager", "TLS by an issuer", "locked down")

    @pytest.mark.parametrize("variant", TLS)
    def test_every_call_within_the_release_is_encrypted(self, variant: str, tmp_path: Path) -> None:
        tls = VARIANTS[variant].effective["tls"]
        router = read(RouterSettings, variant, "demo-router", tmp_path)
        called = [*router.stages, *(each for each in (router.policy, router.manager) if each)]
        if router.manager:
            called += read(ScalerSettings, variant, "demo-manager", tmp_path).stages
        for each in called:
            assert each.tls is not None
            assert each.tls.ca_file == Path("/tls/ca.crt")
            assert (each.tls.cert_file is not None) == tls["mutual"]
        for name in of_kind(variant, "Deployment"):
            served = config(variant, name)["tls"]
            is_way_in = name in {"demo-router", "demo-gateway"}
            asks = tls["clientCertificates"] if is_way_in else tls["mutual"]
            assert ("client_ca_file" in served) == asks, name
        gateway = read(GatewaySettings, variant, "demo-gateway", tmp_path)
        assert gateway.router.tls.ca_file == Path("/tls/ca.crt")
        # The router asks it for a certificate, as any other client.
        assert (gateway.router.tls.cert_file is not None) == tls["clientCertificates"]

    @pytest.mark.parametrize("variant", ["TLS by cert-manager", "TLS by an issuer", "locked down"])
    def test_a_certificate_holds_the_name_that_its_callers_use(self, variant: str) -> None:
        certificates = {
            each["spec"]["secretName"]: each["spec"] for each in of_kind(variant, "Certificate").values()
        }
        for name in of_kind(variant, "Deployment"):
            secret = _secret(variant, name)
            assert name in certificates[secret]["dnsNames"]
            assert f"{name}.{NAMESPACE}.svc" in certificates[secret]["dnsNames"]
            assert {"server auth", "client auth"} <= set(certificates[secret]["usages"])

    def test_the_release_makes_its_own_authority_or_asks_the_users(self) -> None:
        issuers = of_kind("TLS by cert-manager", "Issuer")
        authority = of_kind("TLS by cert-manager", "Certificate")["demo-ca"]["spec"]
        assert authority["isCA"] is True
        assert authority["issuerRef"]["name"] == "demo-self-signed"
        assert issuers["demo-self-signed"]["spec"] == {"selfSigned": {}}
        assert issuers["demo-ca"]["spec"] == {"ca": {"secretName": authority["secretName"]}}
        signed = [spec["spec"]["issuerRef"]["name"] for name, spec in _signed("TLS by cert-manager")]
        assert set(signed) == {"demo-ca"}
        assert not of_kind("TLS by an issuer", "Issuer")
        wanted = {"name": "company", "kind": "ClusterIssuer", "group": "cert-manager.io"}
        assert all(each["spec"]["issuerRef"] == wanted for _, each in _signed("TLS by an issuer"))
        router = of_kind("TLS by cert-manager", "Certificate")["demo-router"]["spec"]
        assert router["dnsNames"][-1] == "asd.example"
        gateway = of_kind("TLS by cert-manager", "Certificate")["demo-gateway"]["spec"]
        assert gateway["dnsNames"][-1] == "api.asd.example"

    def test_services_have_secrets_of_their_own_where_they_are_named(self) -> None:
        assert _secret("TLS, Secrets apart", "demo-router") == "router-tls"
        assert _secret("TLS, Secrets apart", "demo-gateway") == "gateway-tls"
        assert _secret("TLS, Secrets apart", "demo-policy") == "policy-tls"
        assert _secret("TLS, Secrets apart", "demo-stage-large") == "stages-tls"
        assert {_secret("TLS", name) for name in of_kind("TLS", "Deployment")} == {"asd-tls"}

    def test_the_router_reads_tokens_from_the_secret(self, tmp_path: Path) -> None:
        assert read(RouterSettings, "tokens", "demo-router", tmp_path).auth.tokens_file == Path(
            "/auth/tokens"
        )
        volumes = {each["name"]: each for each in pod_spec("tokens", "demo-router")["volumes"]}
        wanted = {"secretName": "tokens", "items": [{"key": "tokens", "path": "tokens"}]}
        assert volumes["auth"]["secret"] == wanted
        for name in ("demo-policy", "demo-gateway"):
            assert "auth" not in {each["name"] for each in pod_spec("tokens", name)["volumes"]}


def _signed(variant: str) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in of_kind(variant, "Certificate").items() if name != "demo-ca"]


def _secret(variant: str, deployment: str) -> str:
    (found,) = [each for each in pod_spec(variant, deployment)["volumes"] if each["name"] == "tls"]
    return str(found["secret"]["secretName"])


class TestHelmTest:
    def test_it_asks_the_router(self) -> None:
        pod = of_kind("everything on", "Pod")["cascade-test-ask"]
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        [asking] = pod["spec"]["containers"]
        assert asking["image"] == "registry.example/asd/asd-tools:1.2.3"
        assert "cascade-router:50050" in asking["args"]

    def test_it_trusts_the_authority_and_shows_a_certificate_where_it_must(self) -> None:
        plain, shown = of_kind("TLS", "Pod")["demo-test-ask"], of_kind("locked down", "Pod")["demo-test-ask"]
        variables = [{each["name"] for each in p["spec"]["containers"][0]["env"]} for p in (plain, shown)]
        assert variables == [{"ASD_TLS_CA"}, {"ASD_TLS_CA", "ASD_TLS_CERT", "ASD_TLS_KEY"}]
        secrets = [
            next(v["secret"] for v in p["spec"]["volumes"] if v["name"] == "tls") for p in (plain, shown)
        ]
        # Who shows no certificate gets no key.
        assert secrets[0] == {"secretName": "asd-tls", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        assert secrets[1] == {"secretName": "demo-client-tls"}
        assert "demo-client" in of_kind("locked down", "Certificate")

    def test_it_asks_the_gateway_if_there_is_one(self) -> None:
        assert "demo-test-chat" not in of_kind("gateway off", "Pod")
        pod = of_kind("everything on", "Pod")["cascade-test-chat"]
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        [asking] = pod["spec"]["containers"]
        assert asking["image"] == "registry.example/asd/asd-tools:1.2.3"

    @pytest.mark.parametrize("variant", ["defaults", "tokens"])
    def test_it_prints_what_the_gateway_answers(self, variant: str, tmp_path: Path) -> None:
        (file := tmp_path / "tokens").write_text("team-a:secret-1\nsecret-2\n")
        with _gateway() as (address, asked):
            run = self._run(file, "", variant=variant, test="chat", gateway=address)
        assert (run.returncode, run.stdout) == (0, "Answer: 19\n"), run.stderr
        (path, token, body) = asked
        assert path == "/v1/chat/completions"
        assert token == ("Bearer secret-1" if variant == "tokens" else None)
        assert body["model"] == "asd"
        assert body["messages"][0]["role"] == "user"

    def test_it_trusts_the_gateway_by_the_authority_and_shows_a_certificate(self, tmp_path: Path) -> None:
        authority = trustme.CA()
        shown = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
        shown.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
        shown.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
        (file := tmp_path / "tokens").write_text("secret-1\n")
        trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        trust.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(trust)
        shown.configure_cert(trust)
        [asking] = of_kind("locked down", "Pod")["demo-test-chat"]["spec"]["containers"]
        variables = {each["name"]: each["value"].replace("/tls/", f"{tmp_path}/") for each in asking["env"]}
        with _gateway(tls=trust) as (address, asked):
            run = self._run(
                file, "", variant="locked down", test="chat", gateway=address, variables=variables
            )
        assert (run.returncode, run.stdout) == (0, "Answer: 19\n"), run.stderr
        assert asked[1] == "Bearer secret-1"

    def test_a_gateway_that_refuses_is_quoted(self, tmp_path: Path) -> None:
        with _gateway(status=503) as (address, _):
            run = self._run(tmp_path, "", variant="defaults", test="chat", gateway=address)
        assert run.returncode == 1
        assert "503" in run.stderr
        assert "Answer: 19" in run.stderr

    @pytest.mark.parametrize(
        "tokens",
        ["secret-1\n", "# who\n\n  team-a: secret-1 \nteam-b:secret-2\n", "secret-1\r\nother\r\n"],
    )
    def test_it_shows_the_first_token_of_the_secret(self, tokens: str, tmp_path: Path) -> None:
        (file := tmp_path / "tokens").write_text(tokens)
        asd = tmp_path / "asd"
        asd.write_text('#!/bin/sh\necho "$ASD_TOKEN|$*"\n')
        asd.chmod(0o755)
        run = self._run(file, f"{tmp_path}:{os.environ['PATH']}")
        assert run.returncode == 0, run.stderr
        token, _, arguments = run.stdout.partition("|")
        assert token == "secret-1"
        assert arguments.startswith("ask --target demo-router:50050 --json ")

    @pytest.mark.parametrize("tokens", ["", "\n", "# nobody yet\n", "team-a:\n"])
    def test_a_secret_without_a_token_is_named(self, tokens: str, tmp_path: Path) -> None:
        (file := tmp_path / "tokens").write_text(tokens)
        run = self._run(file, os.environ["PATH"])
        said = "the Secret tokens holds no token under its key tokens: put one on a line\n"
        assert (run.returncode, run.stderr) == (1, said)

    def _run(
        self,
        tokens: Path,
        path: str,
        *,
        variant: str = "tokens",
        test: str = "ask",
        gateway: str = "demo-gateway:8000",
        variables: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        [asking] = of_kind(variant, "Pod")[f"demo-test-{test}"]["spec"]["containers"]
        [script] = asking["args"]
        script = script.replace("/auth/tokens", str(tokens)).replace("demo-gateway:8000", gateway)
        assert asking["command"] == ["python", "-c"]
        environment = {"PATH": path, **(variables or {})}
        return subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )


@contextlib.contextmanager
def _gateway(status: int = 200, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[Any]]]:
    """Serve one answer to everything; yield the address, and path, token and body of the last request."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked[:] = [self.path, self.headers["authorization"], body]
            answer = json.dumps({"choices": [{"message": {"content": "Answer: 19"}}]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


class TestNetwork:
    def test_an_ingress_leads_to_the_router(self) -> None:
        found = of_kind("ingress", "Ingress")["demo-router"]
        assert found["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/backend-protocol": "GRPC"}
        assert found["spec"]["ingressClassName"] == "nginx"
        assert found["spec"]["tls"] == [{"hosts": ["asd.example"], "secretName": "asd-example"}]
        (rule,) = found["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        assert path["backend"]["service"] == {"name": "demo-router", "port": {"name": "grpc"}}
        assert of_kind("ingress", "Service")["demo-router"]["spec"]["type"] == "ClusterIP"

    def test_a_route_leads_to_the_router(self) -> None:
        spec = of_kind("route", "GRPCRoute")["demo-router"]["spec"]
        assert spec["parentRefs"] == [{"name": "public", "namespace": "gateways", "sectionName": "grpc"}]
        assert spec["hostnames"] == ["asd.example"]
        assert spec["rules"] == [{"backendRefs": [{"name": "demo-router", "port": 50050}]}]

    def test_an_ingress_leads_to_the_gateway_and_waits_for_its_streams(self) -> None:
        found = of_kind("gateway ingress", "Ingress")["demo-gateway"]
        prefix = "nginx.ingress.kubernetes.io"
        assert found["metadata"]["annotations"] == {
            # 600.5 s for the answer, 30 s for the body and 5 s more.
            f"{prefix}/proxy-read-timeout": "636",
            f"{prefix}/proxy-send-timeout": "9",
            f"{prefix}/proxy-body-size": "33554432",
            f"{prefix}/backend-protocol": "HTTPS",
            "team": "inference",
        }
        assert found["spec"]["ingressClassName"] == "nginx"
        assert found["spec"]["tls"] == [{"hosts": ["api.asd.example"], "secretName": "api-asd-example"}]
        (rule,) = found["spec"]["rules"]
        paths = {
            each["path"]: (each["pathType"], each["backend"]["service"]) for each in rule["http"]["paths"]
        }
        service = {"name": "demo-gateway", "port": {"name": "http"}}
        assert paths == {
            "/v1": ("Prefix", service),
            "/openapi.json": ("Exact", service),
            "/healthz": ("Exact", service),
        }

    def test_a_route_leads_to_the_gateway_and_waits_for_its_streams(self) -> None:
        spec = of_kind("route", "HTTPRoute")["demo-gateway"]["spec"]
        assert spec["parentRefs"] == [{"name": "public", "namespace": "gateways", "sectionName": "https"}]
        assert spec["hostnames"] == ["api.asd.example"]
        (rule,) = spec["rules"]
        assert rule["backendRefs"] == [{"name": "demo-gateway", "port": 8000}]
        assert rule["timeouts"] == {"request": "335s", "backendRequest": "335s"}
        paths = {each["path"]["value"]: each["path"]["type"] for each in rule["matches"]}
        assert paths == {"/v1": "PathPrefix", "/openapi.json": "Exact", "/healthz": "Exact"}

    def test_what_leads_in_from_outside_leads_to_paths_of_the_gateway(self) -> None:
        """All but /metrics, which are for the cluster."""
        (rule,) = of_kind("gateway ingress", "Ingress")["demo-gateway"]["spec"]["rules"]
        outside = {each["path"] for each in rule["http"]["paths"]}
        served = {*APIS, MODELS, MODEL, "/healthz", "/openapi.json"}
        assert all(any(f"{path}/".startswith(f"{each}/") for each in outside) for path in served)

    @pytest.mark.parametrize("variant", ["network policies", "locked down", "route"])
    def test_every_pod_of_the_release_is_denied_what_no_rule_allows(self, variant: str) -> None:
        policies = of_kind(variant, "NetworkPolicy")
        assert set(policies) == VARIANTS[variant].components
        for name, policy in policies.items():
            assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
            assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels_of(variant, name).items()

    @pytest.mark.parametrize("variant", ["network policies", "locked down", "route"])
    def test_every_call_that_a_service_makes_is_let_out_and_in(self, variant: str, tmp_path: Path) -> None:
        router = read(RouterSettings, variant, "demo-router", tmp_path)
        calls = [("demo-router", each.target) for each in router.stages]
        calls += [("demo-router", each.target) for each in (router.policy, router.manager) if each]
        if router.manager:
            kept = read(ScalerSettings, variant, "demo-manager", tmp_path).stages
            calls += [("demo-manager", each.target) for each in kept]
        gateway = read(GatewaySettings, variant, "demo-gateway", tmp_path)
        calls.append(("demo-gateway", gateway.router.target))
        for caller, target in calls:
            called, _, port = target.removeprefix("dns:///").rpartition(":")
            assert _allows(variant, caller, "egress", "to", called, int(port)), (caller, target)
            assert _allows(variant, called, "ingress", "from", caller, int(port)), (caller, target)

    def test_no_other_service_may_call(self) -> None:
        assert not _allows("locked down", "demo-policy", "ingress", "from", "demo-stage-small", 50051)
        assert not _allows("locked down", "demo-stage-small", "ingress", "from", "demo-policy", 50061)
        for called, port in (("demo-policy", 50051), ("demo-stage-small", 50061), ("demo-manager", 50053)):
            assert not _allows("locked down", "demo-gateway", "egress", "to", called, port)
            assert not _allows("locked down", called, "ingress", "from", "demo-gateway", port)
        # Stages that never sleep have nothing to do with the manager.
        assert not _allows("locked down", "demo-manager", "egress", "to", "demo-stage-small", 50061)
        assert not _allows("locked down", "demo-stage-small", "egress", "to", "demo-stage-large", 50061)

    def test_all_may_ask_dns_and_send_telemetry(self) -> None:
        for variant, port in (("network policies", 443), ("locked down", 4317)):
            for name, policy in of_kind(variant, "NetworkPolicy").items():
                anywhere = [rule["ports"] for rule in policy["spec"]["egress"] if "to" not in rule]
                numbers = {entry["port"] for ports in anywhere for entry in ports}
                api = {443, 6443} if name == "demo-manager" else set()
                assert numbers == {53, port} | api

    def test_clients_and_prometheus_come_from_where_they_may(self) -> None:
        router = of_kind("route", "NetworkPolicy")["demo-router"]["spec"]["ingress"]
        tester = of_kind("route", "Pod")["demo-test-ask"]["metadata"]["labels"]
        gate, test, gateway = router[0]["from"]
        assert gateway["podSelector"]["matchLabels"].items() <= labels_of("route", "demo-gateway").items()
        behind = of_kind("route", "NetworkPolicy")["demo-gateway"]["spec"]["ingress"]
        assert behind[0] == {"from": [gate, test], "ports": [{"protocol": "TCP", "port": 8000}]}
        assert gate == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}
        assert test["podSelector"]["matchLabels"].items() <= tester.items()
        for policy in of_kind("network policies", "NetworkPolicy").values():
            metrics = policy["spec"]["ingress"][1]
            assert metrics["ports"] == [{"protocol": "TCP", "port": 9464}]
            assert metrics["from"] == [gate]
        for part in ("policy", "stage-small", "stage-large"):
            called = of_kind("network policies", "NetworkPolicy")[f"demo-{part}"]["spec"]["ingress"][0]
            job = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "collect"}}}
            assert called["from"][-1] == job
        small = of_kind("network policies", "NetworkPolicy")["demo-stage-small"]["spec"]["egress"]
        assert small[-1]["to"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]


def _allows(variant: str, name: str, direction: str, end: str, other: str, port: int) -> bool:
    """Return whether a component's policy has a rule for another component's pods and a port."""
    pods = labels_of(variant, other)
    for rule in of_kind(variant, "NetworkPolicy")[name]["spec"][direction]:
        peers = [
            each["podSelector"].get("matchLabels", {}) for each in rule.get(end, ()) if "podSelector" in each
        ]
        if any(peer and peer.items() <= pods.items() for peer in peers):
            return port in {entry["port"] for entry in rule["ports"]}
    return False


class TestPods:
    @pytest.mark.parametrize("component", ["router", "gateway", "policy", "stage-small"])
    def test_they_go_where_they_are_told(self, component: str) -> None:
        name = f"cascade-{component}"
        pod = pod_spec("everything on", name)
        assert pod["nodeSelector"] == {"pool": "cpu"}
        assert pod["priorityClassName"] == "serving"
        assert pod["runtimeClassName"] == "gvisor"
        assert "podAntiAffinity" in pod["affinity"]
        (spread,) = pod["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"].items() <= labels_of("everything on", name).items()
        assert labels_of("everything on", name)["team"] == "inference"
        metadata = of_kind("everything on", "Deployment")[name]["spec"]["template"]["metadata"]
        assert metadata["annotations"]["sidecar.istio.io/inject"] == "false"
        assert pod["terminationGracePeriodSeconds"] == 300

    def test_images_by_digest_have_no_tag(self) -> None:
        images = {name: container("digests", name)["image"] for name in of_kind("digests", "Deployment")}
        assert images["demo-router"] == f"registry.example/asd-router@sha256:{1:064x}"
        assert images["demo-gateway"] == f"registry.example/asd-gateway@sha256:{5:064x}"
        assert images["demo-stage-large"] == f"registry.example/asd-stage-onnx@sha256:{3:064x}"
        [asking] = of_kind("digests", "Pod")["demo-test-ask"]["spec"]["containers"]
        assert asking["image"] == f"registry.example/asd-tools@sha256:{4:064x}"
        assert container("kind", "demo-router")["image"] == "asd-router:0.1.0"
        assert container("kind", "demo-router")["imagePullPolicy"] == "Never"

    def test_metrics_are_served_where_prometheus_looks(self, tmp_path: Path) -> None:
        for name in of_kind("metrics", "Deployment"):
            ports = {each["name"]: each["containerPort"] for each in container("metrics", name)["ports"]}
            assert ports["metrics"] == 9464
            assert config("metrics", name)["metrics_listen"] == "0.0.0.0:9464"
        assert all(
            "metrics_listen" not in config("defaults", name) for name in of_kind("defaults", "Deployment")
        )


def test_every_setting_of_a_service_is_given_by_some_variant() -> None:
    """A setting that no value reaches cannot be used on Kubernetes."""
    # Calls always go to their end; every certificate holds the name of its Service; the manager is one pod.
    left_out = {"max_connection_age_grace_ms", "server_name"}
    of_one = {"manager": {"grpc", "max_connection_age_ms"}}
    components: dict[str, type[ServiceSettings]] = {
        "router": RouterSettings,
        "gateway": GatewaySettings,
        "policy": PolicySettings,
        "stage": StageSettings,
        "manager": ScalerSettings,
    }
    given: dict[str, set[str]] = {name: set() for name in components}
    for variant in VARIANTS:
        for each in of_kind(variant, "ConfigMap").values():
            component = each["metadata"]["labels"]["app.kubernetes.io/component"].partition("-")[0]
            if component in given:
                given[component] |= set(_keys(yaml.safe_load(each["data"]["config.yaml"])))
    for component, settings in components.items():
        missing = _fields(settings.model_json_schema()) - left_out - of_one.get(component, set())
        assert missing - given[component] == set(), component


def _keys(value: Any) -> list[str]:
    if isinstance(value, list):
        return [key for each in value for key in _keys(each)]
    if isinstance(value, dict):
        return [*value, *(key for each in value.values() for key in _keys(each))]
    return []


def _fields(schema: dict[str, Any]) -> set[str]:
    sections = [schema, *schema.get("$defs", {}).values()]
    return {name for section in sections for name in section.get("properties", ())}


def test_large_numbers_stay_whole() -> None:
    """Helm holds numbers as floats and writes large ones as 1e+06, which YAML takes for text."""
    values = {"stageDefaults": {"memoryBudgetMb": 123_456_789, "timeoutMs": 7_200_000}}
    run = template(Variant(values))
    assert "memory_budget_mb: 123456789" in run.stdout
    assert "timeout_ms: 10000" in run.stdout
    assert "e+" not in run.stdout
