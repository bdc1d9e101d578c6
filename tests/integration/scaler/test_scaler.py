"""The manager over gRPC, with stages that answer, and a Kubernetes API that the official client speaks to."""

# ruff: noqa: N802 - methods have the protos' and http.server's names

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import yaml
from kubernetes import client

from asd.errors import PreconditionFailed, Unavailable
from asd.v1 import manager_pb2, manager_pb2_grpc, stage_pb2
from services.common.server import ServerOptions, ServiceRegistration, start_server
from services.common.tls import ClientTls, ServerTls
from services.scaler.cluster import Scale
from services.scaler.kubernetes_cluster import KubernetesCluster, open_cluster
from services.scaler.usage import StageUsage
from tests.integration.common.certificates import Authority
from tests.integration.common.conftest import CALL_S, PROCESS_S, running
from tests.integration.common.test_metrics import check_names, documented, found, scrape, values
from tests.integration.common.test_tls import failing
from tests.integration.router.conftest import FakeStage, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

DEPLOYMENT = re.compile(r"/apis/apps/v1/namespaces/models/deployments/([\w-]+)(/scale)?")
AUTOSCALERS = "/apis/autoscaling/v2/namespaces/models/horizontalpodautoscalers"


class KubernetesApi:
    """So much of the API as the manager uses: deployments by name with (wanted, ready), and autoscalers."""

    def __init__(self) -> None:
        self.deployments: dict[str, tuple[int, int]] = {"asd-large": (1, 1)}
        self.autoscalers: list[dict[str, Any]] = []
        self.status = 200
        self.patches: list[tuple[str, str, Any]] = []
        self.patched = threading.Event()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"kind": "Status", "reason": "Refused"}
        if path == AUTOSCALERS:
            return 200, {"items": self.autoscalers}
        match = DEPLOYMENT.fullmatch(path)
        if match is None or match[1] not in self.deployments:
            return 404, {"kind": "Status", "reason": "NotFound"}
        name, (wanted, ready) = match[1], self.deployments[match[1]]
        if method == "PATCH":
            self.patches.append((name, match[2] or "", body))
            self.deployments[name] = body["spec"]["replicas"], ready
            self.patched.set()
            return 200, {"metadata": {"name": name}, "spec": body["spec"]}
        # Kubernetes leaves out what is 0.
        status = {"readyReplicas": ready} if ready else {}
        return 200, {
            "metadata": {"name": name},
            "spec": {"replicas": wanted, "selector": {}, "template": {}},
            "status": status,
        }


@pytest.fixture
def api() -> Iterator[tuple[KubernetesApi, str]]:
    """The API and its address."""
    kubernetes = KubernetesApi()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            code, answer = kubernetes.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PATCH = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kubernetes, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cluster(api: tuple[KubernetesApi, str]) -> Iterator[KubernetesCluster]:
    configuration = client.Configuration(host=api[1])
    kubernetes = KubernetesCluster(configuration, "models", timeout_s=CALL_S)
    yield kubernetes
    kubernetes.close()


def autoscaler(name: str, kind: str, target: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {"maxReplicas": 3, "scaleTargetRef": {"kind": kind, "name": target}},
    }


async def test_replicas_are_read_and_set_by_the_official_client(
    api: tuple[KubernetesApi, str], cluster: KubernetesCluster
) -> None:
    kubernetes, _ = api
    kubernetes.deployments["asd-small"] = 0, 0
    assert await cluster.read(["asd-large", "asd-small", "none"]) == {
        "asd-large": Scale(1, 1),
        "asd-small": Scale(0, 0),
    }
    await cluster.scale("asd-small", 2)
    assert kubernetes.patches == [("asd-small", "/scale", {"spec": {"replicas": 2}})]
    assert await cluster.read(["asd-small"]) == {"asd-small": Scale(2, 0)}


async def test_an_autoscaler_of_the_deployment_is_seen(
    api: tuple[KubernetesApi, str], cluster: KubernetesCluster
) -> None:
    api[0].autoscalers = [
        autoscaler("other", "Deployment", "asd-small"),
        autoscaler("set", "StatefulSet", "asd-large"),
    ]
    assert (await cluster.read(["asd-large"]))["asd-large"].autoscaler == ""
    api[0].autoscalers.append(autoscaler("hpa", "Deployment", "asd-large"))
    assert (await cluster.read(["asd-large"]))["asd-large"].autoscaler == "horizontalpodautoscaler hpa"


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (
            403,
            PreconditionFailed,
            "may not get deployments asd-large in namespace models: grant it in a Role",
        ),
        (503, Unavailable, "the Kubernetes API answers 503"),
        (429, Unavailable, "the Kubernetes API answers 429"),
    ],
)
async def test_what_the_api_refuses_is_said(
    api: tuple[KubernetesApi, str], cluster: KubernetesCluster, status: int, kind: type[Exception], says: str
) -> None:
    api[0].status = status
    with pytest.raises(kind, match=says):
        await cluster.read(["asd-large"])


async def test_the_clusters_own_api_is_asked_past_a_proxy(
    api: tuple[KubernetesApi, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    def in_a_pod(client_configuration: client.Configuration) -> None:
        client_configuration.host = api[1]

    monkeypatch.setattr("kubernetes.config.load_incluster_config", in_a_pod)
    cluster = open_cluster("models", CALL_S)
    assert await cluster.read(["asd-large"]) == {"asd-large": Scale(1, 1)}
    cluster.close()


async def test_an_api_that_is_away_is_unavailable() -> None:
    cluster = KubernetesCluster(client.Configuration(host=f"http://127.0.0.1:{free_port()}"), "models", 5.0)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await cluster.scale("asd-large", 1)
    cluster.close()


class IdleStage(FakeStage):
    """A stage that says how long it was idle, and how many requests it has."""

    def __init__(self, idle_ms: float, queued: int = 0, running: int = 0) -> None:
        super().__init__("large")
        self.says = stage_pb2.StatusResponse(
            idle_ms=idle_ms,
            models=[stage_pb2.ModelStatus(name="large", queued_requests=queued, running_requests=running)],
        )

    async def Status(self, request: Any, context: Any) -> stage_pb2.StatusResponse:
        return self.says


@pytest.fixture
async def serve() -> AsyncIterator[Any]:
    """Return a function that serves a stage and returns its address."""
    async with AsyncExitStack() as stack:

        async def start(stage: FakeStage, options: ServerOptions | None = None) -> str:
            server, port = await start_server(
                "127.0.0.1:0",
                [ServiceRegistration(stage.full_name, stage.add)],
                options=options or ServerOptions(),
            )
            stack.push_async_callback(server.stop, 0)
            return f"127.0.0.1:{port}"

        yield start


async def idle(addresses: list[str], replicas: int, **options: Any) -> float | None:
    async def resolve(name: str) -> list[str]:
        assert name == "asd-large:50061"
        return addresses

    usage = StageUsage({"large": ("dns:///asd-large:50061", options.get("tls"))}, CALL_S * 1e3, resolve)
    try:
        return await usage.idle_ms("large", replicas)
    finally:
        await usage.close()


async def test_a_stage_is_as_idle_as_its_busiest_replica(serve: Any) -> None:
    addresses = [await serve(IdleStage(5000.0)), await serve(IdleStage(3000.0))]
    assert await idle(addresses, 2) == 3000.0
    addresses.append(await serve(IdleStage(9000.0, queued=1)))
    assert await idle(addresses, 3) == 0.0
    assert await idle([addresses[0], await serve(IdleStage(9000.0, running=1))], 2) == 0.0


async def test_a_replica_that_does_not_say_leaves_it_unknown(serve: Any) -> None:
    address = await serve(IdleStage(5000.0))
    assert await idle([address, f"127.0.0.1:{free_port()}"], 2) is None
    # One that is ready, but that the name does not lead to yet.
    assert await idle([address], 2) is None
    assert await idle([address], 1) == 5000.0


async def test_replicas_show_their_services_name(serve: Any, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("stage", "asd-large")
    options = ServerOptions(ServerTls(cert_file=cert, key_file=key))
    address = await serve(IdleStage(5000.0), options)
    assert await idle([address], 1, tls=ClientTls(ca_file=authority.file)) == 5000.0
    named = ClientTls(ca_file=authority.file, server_name="asd-small")
    assert await idle([address], 1, tls=named) is None


def kubeconfig(server: str) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "models"}}],
            "current-context": "x",
        }
    )


async def test_the_process_puts_a_stage_to_sleep_and_wakes_it(
    api: tuple[KubernetesApi, str], serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubernetes, server = api
    file = tmp_path / "kubeconfig"
    file.write_text(kubeconfig(server))
    monkeypatch.setenv("KUBECONFIG", str(file))
    stage = IdleStage(0.0)
    metrics = f"127.0.0.1:{free_port()}"
    config = {
        "poll_seconds": 0.01,
        "metrics_listen": metrics,
        "stages": [
            {
                "name": "large",
                "deployment": "asd-large",
                "target": await serve(stage),
                "idle_seconds": 100,
                "min_awake_seconds": 0,
            }
        ],
    }
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        manager = await stack.enter_async_context(running("services.scaler", config, tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(manager.target))
        stub = manager_pb2_grpc.ManagerServiceStub(channel)

        async def state(wanted: manager_pb2.SleepState.ValueType) -> manager_pb2.ManagedStage:
            """Return the stage once it is in a state."""
            while True:
                (seen,) = (
                    await stub.Status(manager_pb2.ManagerServiceStatusRequest(), timeout=CALL_S)
                ).stages
                if seen.state == wanted:
                    return seen

        seen = await state(manager_pb2.SLEEP_STATE_AWAKE)
        assert (seen.stage, seen.wanted_replicas, seen.ready_replicas) == ("large", 1, 1)
        assert kubernetes.patches == []
        stage.says.idle_ms = 100_000.0
        await asyncio.to_thread(kubernetes.patched.wait, CALL_S)
        await state(manager_pb2.SLEEP_STATE_ASLEEP)
        assert kubernetes.patches == [("asd-large", "/scale", {"spec": {"replicas": 0}})]
        kubernetes.deployments["asd-large"] = 0, 0
        stage.says.idle_ms = 0.0
        woken = await stub.Wake(manager_pb2.WakeRequest(stage="large"), timeout=CALL_S)
        assert woken.stage.state == manager_pb2.SLEEP_STATE_WAKING
        assert kubernetes.patches[-1] == ("asd-large", "/scale", {"spec": {"replicas": 1}})
        kubernetes.deployments["asd-large"] = 1, 1
        await state(manager_pb2.SLEEP_STATE_AWAKE)
        for stage_name, code in (("small", "NOT_FOUND"), ("", "INVALID_ARGUMENT")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Wake(manager_pb2.WakeRequest(stage=stage_name), timeout=CALL_S)
            assert caught.value.code().name == code
        text = await scrape(metrics)
        check_names(text)
        assert found(text) == documented("manager")
        assert values(text, "asd_manager_scalings_total") == {("sleep", "large"): 1.0, ("wake", "large"): 1.0}
        assert values(text, "asd_manager_wanted_replicas") == {("large",): 1.0}
        code, log = await manager.stop(signal.SIGTERM)
    assert code == 0
    assert "Traceback" not in log


async def test_a_manager_without_a_cluster_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    config = {"stages": [{"name": "large", "deployment": "asd-large", "target": "127.0.0.1:1"}]}
    # Under the name that it had until 0.2.
    code, line = await failing("services.manager", config, tmp_path)
    assert code == 1
    assert line.startswith(
        "asd-manager: no Kubernetes cluster: neither a pod's service account nor a kubeconfig"
    )
