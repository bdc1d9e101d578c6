"""A release on a real cluster: what tests and measurements do with it, through kubectl and helm alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from tools.images import build as images
from tools.kubernetes_programs import find_helm
from tools.node.node import Node
from tools.node.programs import find_program
from tools.node.system_images import JAEGER_IMAGE as OWN_JAEGER_IMAGE
from tools.node.system_images import jaeger_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Of the same release as the one that the tests build; as in k8s/jaeger.
JAEGER_IMAGE = "docker.io/jaegertracing/all-in-one:1.76.0"
# Every request of the last disruption, with its time: to see which were held up, and by what.
REQUESTS = ROOT / "build" / "disruption.json"

QUESTION = "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"
STAGES = ("small", "medium", "large")
ROUTER_PORT = 50050
GATEWAY_PORT = 8000
POLL_SECONDS = 0.2


class ClusterError(AssertionError):
    """The cluster did not do what was asked; the message holds what it said."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that kubectl and helm reach with a kubeconfig.

    registry: of asd's images; empty where the nodes have them. jaeger_image: for the trace store. is_kept:
    True if it outlives the tests, so that these have to clear away what they made.
    """

    kubeconfig: Path
    registry: str = ""
    jaeger_image: str = OWN_JAEGER_IMAGE
    is_kept: bool = True

    @cached_property
    def _kubectl(self) -> str:
        # On a cluster of somebody's own, their kubectl.
        own = shutil.which("kubectl") if os.environ.get("KUBECONFIG") else None
        return own or str(find_program("kubectl"))

    @cached_property
    def _helm(self) -> str:
        return str(find_helm())

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 60.0) -> str:
        """Return what kubectl prints."""
        return self._run([self._kubectl, *arguments], stdin, timeout_s)

    def helm(self, *arguments: str, timeout_s: float = 300.0) -> str:
        """Return what helm prints."""
        return self._run([self._helm, *arguments], None, timeout_s)

    def get(self, *arguments: str) -> dict[str, Any]:
        """Return objects as kubectl reads them."""
        result: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "--output=json"))
        return result

    def apply(self, *objects: dict[str, Any], namespace: str) -> None:
        """Create or change objects."""
        text = yaml.safe_dump_all(objects)
        self.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=text)

    def remove_namespace(self, name: str) -> None:
        """Remove a namespace with all it holds, unless the cluster goes with it."""
        if self.is_kept:
            self.kubectl("delete", "namespace", name, "--ignore-not-found", timeout_s=120)

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Start kubectl and return its process; end it."""
        return subprocess.Popen(
            [self._kubectl, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    def _run(self, command: Sequence[str], stdin: str | None, timeout_s: float) -> str:
        try:
            run = subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
                env=self._environment,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"not done after {timeout_s:.0f} s: {' '.join(command)}") from error
        if run.returncode != 0:
            raise ClusterError(
                f"exit {run.returncode} of {' '.join(command)}\n{run.stdout}{run.stderr}".rstrip()
            )
        return run.stdout


@dataclass
class Release:
    """An installed release in a namespace of its own."""

    cluster: Cluster
    name: str = "asd"
    namespace: str = "asd-test"
    arguments: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The router, as a client in the release's namespace names it."""
        return f"dns:///{self.name}-router:{ROUTER_PORT}"

    @property
    def api(self) -> str:
        """The gateway's base URL, as a client in the release's namespace names it."""
        return f"http://{self.name}-gateway:{GATEWAY_PORT}/v1"

    @property
    def labels(self) -> str:
        """The selector of all objects of the release."""
        return f"app.kubernetes.io/instance={self.name}"

    @property
    def tools_image(self) -> str:
        """The image with the client."""
        return self.image("tools")

    def image(self, name: str) -> str:
        """Return the image of a target of the Dockerfile."""
        registry = f"{self.cluster.registry}/" if self.cluster.registry else ""
        return f"{registry}asd-{name}:{images.release_tag()}"

    def install(self, *arguments: str, timeout_s: float = 240.0) -> None:
        """Install and wait until all is ready."""
        self._helm("install", "--create-namespace", *arguments, timeout_s=timeout_s)

    def upgrade(self, *arguments: str, timeout_s: float = 240.0) -> None:
        """Upgrade and wait until the last pod is replaced."""
        self._helm("upgrade", *arguments, timeout_s=timeout_s)

    def rollback(self, revision: int, timeout_s: float = 240.0) -> None:
        """Go back to a revision and wait until the last pod is replaced."""
        with self._explained():
            self.cluster.helm(
                "rollback", self.name, str(revision), f"--namespace={self.namespace}", "--wait",
                f"--timeout={timeout_s:.0f}s", timeout_s=timeout_s + 30,
            )  # fmt: skip

    def revision(self) -> int:
        """Return the number of the revision in force."""
        history = json.loads(
            self.cluster.helm("history", self.name, f"--namespace={self.namespace}", "--output=json")
        )
        return int(next(each["revision"] for each in history if each["status"] == "deployed"))

    def uninstall(self) -> None:
        """Uninstall and wait until its pods are gone."""
        self.cluster.helm("uninstall", self.name, f"--namespace={self.namespace}", "--wait", "--timeout=120s")
        self.kubectl(
            "wait", "--for=delete", "pods", f"--selector={self.labels}", "--timeout=120s", timeout_s=130
        )

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 60.0) -> str:
        """Return what kubectl prints in the release's namespace."""
        place = f"--namespace={self.namespace}"
        return self.cluster.kubectl(place, *arguments, stdin=stdin, timeout_s=timeout_s)

    def test(self, *arguments: str) -> str:
        """Return the log of `helm test`."""
        place = f"--namespace={self.namespace}"
        return self.cluster.helm(
            "test", self.name, place, "--logs", "--timeout=120s", *arguments, timeout_s=150
        )

    def remains(self) -> list[str]:
        """Return every object of whatever kind that carries the release's label or name."""
        kinds = self.cluster.kubectl("api-resources", "--verbs=list", "--output=name").split()
        # They tell of what was, and are gone in an hour.
        kinds = [kind for kind in kinds if not kind.startswith("events") and "metrics.k8s.io" not in kind]
        found = self.cluster.get(",".join(kinds), "--all-namespaces", "--ignore-not-found")
        return [
            f"{each['kind']} {each['metadata'].get('namespace', '')}/{each['metadata']['name']}"
            for each in found.get("items", ())
            if each["kind"] != "Namespace" and self._is_ours(each["metadata"])
        ]

    def _is_ours(self, metadata: dict[str, Any]) -> bool:
        labels = metadata.get("labels") or {}
        name = metadata["name"]
        in_force = name == self.name or name.startswith((f"{self.name}-", f"sh.helm.release.v1.{self.name}."))
        named = in_force and metadata.get("namespace") == self.namespace
        return labels.get("app.kubernetes.io/instance") == self.name or named

    def pods(self, component: str) -> dict[str, dict[str, Any]]:
        """Return the pods of a component that are not going, by name."""
        selector = f"{self.labels},app.kubernetes.io/component={component}"
        found = self.cluster.get("pods", f"--namespace={self.namespace}", f"--selector={selector}")["items"]
        return {
            each["metadata"]["name"]: each for each in found if "deletionTimestamp" not in each["metadata"]
        }

    def scale(self, component: str, replicas: int) -> set[str]:
        """Return the names of a component's pods once there are so many and all are ready."""
        self.kubectl("scale", f"deployment/{self.name}-{component}", f"--replicas={replicas}")
        self.wait_rolled(component)
        return set(self.pods(component))

    def wait_rolled(self, component: str, timeout_s: float = 120.0) -> None:
        """Wait until every pod of a component is as it should be."""
        with self._explained():
            self.kubectl(
                "rollout", "status", f"deployment/{self.name}-{component}", f"--timeout={timeout_s:.0f}s",
                timeout_s=timeout_s + 10,
            )  # fmt: skip

    def config(self, component: str) -> dict[str, Any]:
        """Return the settings that a component's ConfigMap holds."""
        found = self.cluster.get("configmap", f"{self.name}-{component}", f"--namespace={self.namespace}")
        loaded: dict[str, Any] = yaml.safe_load(found["data"]["config.yaml"])
        return loaded

    def run_pod(
        self,
        name: str,
        *command: str,
        script: Path | None = None,
        image: str = "tools",
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """Start a pod. script: a file that it finds at /script. secrets: where it finds Secrets, by name."""
        volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
        mounts = [{"name": "tmp", "mountPath": "/tmp"}]
        objects: list[dict[str, Any]] = []
        if script is not None:
            content = {script.name: script.read_text(encoding="utf-8")}
            objects.append(
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": content}
            )
            volumes.append({"name": "script", "configMap": {"name": name}})
            mounts.append({"name": "script", "mountPath": "/script"})
        for secret, place in (secrets or {}).items():
            volumes.append({"name": secret, "secret": {"secretName": secret}})
            mounts.append({"name": secret, "mountPath": place})
        container = {
            "name": "client",
            "image": self.image(image),
            "imagePullPolicy": "IfNotPresent",
            "command": list(command),
            "volumeMounts": mounts,
            "resources": {"requests": {"cpu": "20m", "memory": "96Mi"}, "limits": {"memory": "512Mi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
        spec = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 5,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": volumes,
        }
        # Not of the release: it must not be counted among what the release left.
        metadata = {"name": name, "labels": {"app.kubernetes.io/name": "asd-cluster-client"}}
        objects.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self.cluster.apply(*objects, namespace=self.namespace)

    def ask(
        self, *arguments: str, name: str = "client-ask", secrets: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the answer that `asd ask` gets in a pod."""
        command = ("asd", "ask", "--target", self.target, "--json", *arguments, QUESTION)
        self.run_pod(name, *command, secrets=secrets)
        try:
            return json.loads(self.finished_log(name))  # type: ignore[no-any-return]
        finally:
            self.kubectl("delete", "pod", name, "--wait=true")

    def chat(self, body: Mapping[str, Any], name: str = "client-chat") -> dict[str, Any]:
        """Return what a pod gets for a chat completion: status, headers and body, a stream's as text."""
        command = ("python", "/script/chat.py", f"{self.api}/chat/completions", json.dumps(body))
        self.run_pod(name, *command, script=HERE / "chat.py")
        try:
            return json.loads(self.finished_log(name))  # type: ignore[no-any-return]
        finally:
            self.kubectl("delete", f"pod/{name}", f"configmap/{name}", "--wait=true")

    def finished_log(self, name: str, timeout_s: float = 120.0) -> str:
        """Return the log of a pod once it has ended well."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.cluster.get("pod", name, f"--namespace={self.namespace}")["status"]
            if status["phase"] == "Succeeded":
                return self.kubectl("logs", name)
            if status["phase"] == "Failed" or time.monotonic() > deadline:
                log = self.kubectl("logs", name) if "containerStatuses" in status else ""
                raise ClusterError(f"pod {name} is {status['phase']}\n{log}\n{self.describe()}")
            time.sleep(POLL_SECONDS)

    def describe(self) -> str:
        """Return what is to be known of a release that does not do what it should."""
        parts = [self.kubectl("get", "pods", "--output=wide")]
        events = self.kubectl("get", "events", "--field-selector=type!=Normal", "--sort-by=.lastTimestamp")
        parts.append("\n".join(events.splitlines()[-20:]))
        for pod in self.cluster.get("pods", f"--namespace={self.namespace}")["items"]:
            name = pod["metadata"]["name"]
            with contextlib.suppress(ClusterError):
                parts.append(f"--- log of {name}\n{self.kubectl('logs', name, '--tail=15')}")
            if any(each.get("restartCount") for each in pod["status"].get("containerStatuses", ())):
                with contextlib.suppress(ClusterError):
                    before = self.kubectl("logs", name, "--previous", "--tail=15")
                    parts.append(f"--- before its restart\n{before}")
        return "\n".join(parts)

    def _helm(self, verb: str, *arguments: str, timeout_s: float) -> None:
        registry = (f"--set=image.registry={self.cluster.registry}",) if self.cluster.registry else ()
        with self._explained():
            self.cluster.helm(
                verb, self.name, str(ROOT / "charts"), f"--namespace={self.namespace}", "--wait",
                f"--timeout={timeout_s:.0f}s", *registry, *self.arguments, *arguments,
                timeout_s=timeout_s + 30,
            )  # fmt: skip

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.describe()}") from error


@dataclass
class Load:
    """Requests that a pod sends at an even pace, read as they are answered."""

    release: Release
    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    started: bool = False
    other: list[str] = field(default_factory=list)

    def answered(self) -> list[dict[str, Any]]:
        """Return what is known of each request that has ended."""
        return list(self.lines)

    def wait_answered(self, count: int, timeout_s: float) -> None:
        """Wait until so many requests have ended."""
        poll(lambda: len(self.lines) >= count, timeout_s, lambda: f"{count} requests; {self._progress()}")

    def stop(self) -> None:
        """Say that what was to happen meanwhile has happened."""
        program = "import pathlib; pathlib.Path('/tmp/stop').touch()"
        self.release.kubectl("exec", self.name, "--", "python", "-c", program)

    def _progress(self) -> str:
        return f"{len(self.lines)} have ended\n" + "\n".join(self.other[-20:])


@contextlib.contextmanager
def load(release: Release, *, requests: int, rate: float, name: str = "client-load") -> Iterator[Load]:
    """Run a pod that asks until told to stop, and at least so many times; yield once it gets answers."""
    command = ("python", "/script/load.py", "--target", release.target, "--until", "/tmp/stop")
    release.run_pod(name, *command, "--requests", str(requests), "--rate", str(rate), script=HERE / "load.py")
    running = Load(release, name)
    try:
        release.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s", timeout_s=70)
        with release.cluster.popen("logs", "--follow", name, f"--namespace={release.namespace}") as log:

            def read() -> None:
                assert log.stdout is not None
                for line in log.stdout:
                    try:
                        found = json.loads(line)
                    except ValueError:
                        running.other.append(line.rstrip())
                        continue
                    if "ms" in found:
                        running.lines.append(found)
                    running.started = running.started or "started" in found

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            try:
                poll(lambda: running.started, 60.0, lambda: "the first answer\n" + "\n".join(running.other))
                yield running
                running.stop()
                release.finished_log(name)
                # The log ends with the pod.
                reader.join(timeout=30)
            finally:
                log.terminate()
    finally:
        release.kubectl("delete", f"pod/{name}", f"configmap/{name}", "--ignore-not-found")


@dataclass(frozen=True)
class Disruption:
    """What requests met while pods were deleted and replaced.

    normal, during: milliseconds of answered requests that were sent before, and from the first deletion to
    the last replacement. failures: of all requests. config_before, config_after: the router's settings.
    """

    requests: int
    failures: tuple[str, ...]
    normal_ms: tuple[float, ...]
    during_ms: tuple[float, ...]
    config_before: dict[str, Any]
    config_upgraded: dict[str, Any]
    config_after: dict[str, Any]
    seconds: dict[str, float]


# Chosen: what two cores answer beside a node's own work while pods start.
RATE = 15.0
# Every component's settings change, and so every pod is replaced.
UPGRADE = (
    "--set=router.batchConcurrency=15",
    "--set=gateway.maxConcurrent=1023",
    "--set=policy.artifactPollSeconds=11",
    "--set=stageDefaults.maxQueue=255",
)


def disrupt(release: Release, *, requests: int = 1000, rate: float = RATE) -> Disruption:
    """Ask all the while: delete a stage's pod, upgrade so that every pod is replaced, and roll back."""
    before = release.config("router")
    revision = release.revision()
    seconds: dict[str, float] = {}
    # Python, ONNX and the router's own measures are warm after these.
    warm_up = 50
    with load(release, requests=requests + warm_up, rate=rate) as running:
        running.wait_answered(warm_up + requests // 3, timeout_s=warm_up + requests / rate)
        began = time.time()

        def timed(name: str, action: Callable[[], None]) -> None:
            started = time.monotonic()
            action()
            seconds[name] = time.monotonic() - started

        def delete_pod() -> None:
            (victim,) = release.pods("stage-medium")
            release.kubectl("delete", "pod", victim, "--wait=true")
            release.wait_rolled("stage-medium")

        timed("delete_pod_s", delete_pod)
        timed("upgrade_s", lambda: release.upgrade(*UPGRADE))
        upgraded = release.config("router")
        timed("rollback_s", lambda: release.rollback(revision))
        ended = time.time()
    asked = running.answered()[warm_up:]
    kept = {"began": began, "ended": ended, "seconds": seconds, "requests": asked}
    REQUESTS.parent.mkdir(exist_ok=True)
    REQUESTS.write_text(json.dumps(kept), encoding="utf-8")
    return Disruption(
        requests=len(asked),
        failures=tuple(each["error"] for each in asked if each["error"]),
        normal_ms=tuple(each["ms"] for each in asked if not each["error"] and each["at"] < began),
        during_ms=tuple(each["ms"] for each in asked if not each["error"] and began <= each["at"] <= ended),
        config_before=before,
        config_upgraded=upgraded,
        config_after=release.config("router"),
        seconds=seconds,
    )


def install_to_answer(release: Release) -> tuple[float, dict[str, Any]]:
    """Install with the chart's own values; return the seconds to the first answer, and that answer."""
    started = time.monotonic()
    release.install()
    log = release.test(f"--filter=name={release.name}-test-ask")
    seconds = time.monotonic() - started
    return seconds, json.loads(log[log.index("{") : log.rindex("}") + 1])


def run_benchmark_job(
    release: Release, requests: int = 100, through: str = "router", timeout_s: float = 600.0
) -> dict[str, Any]:
    """Run the benchmark Job of k8s/benchmark, and return the JSON that ends its log."""
    parameters = (f"REQUESTS={requests}", "WARMUP=10", f"THROUGH={through}")
    log = run_job(release, "benchmark", *parameters, timeout_s=timeout_s)
    return json.loads(log.splitlines()[-1])  # type: ignore[no-any-return]


def run_job(release: Release, folder: str, *parameters: str, timeout_s: float = 300.0) -> str:
    """Run a Job of k8s/ to its end and remove it; return the log of its last container.

    parameters: NAME=VALUE in the place of those of parameters.env; RELEASE is the release's.
    """
    name = f"asd-{folder}"
    known = (ROOT / "k8s" / folder / "parameters.env").read_text(encoding="utf-8")
    own = [f"RELEASE={release.name}"] if "RELEASE=" in known else []
    overlay = {
        "images": [_image_entry(f"asd-{each}", release.image(each)) for each in ("tools", "train")],
        "configMapGenerator": [{"name": name, "behavior": "merge", "literals": [*own, *parameters]}],
    }
    with _overlaid(folder, overlay) as path:
        release.kubectl("apply", "--kustomize", path)
        try:
            return _job_log(release, name, timeout_s)
        finally:
            release.kubectl("delete", "--kustomize", path, "--wait=true", "--ignore-not-found")


@contextlib.contextmanager
def _overlaid(folder: str, overlay: dict[str, Any]) -> Iterator[str]:
    """Yield a kustomization over a folder of k8s/."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "k8s" / folder, Path(scratch) / "base")
        text = yaml.safe_dump({"resources": ["base"], **overlay})
        (Path(scratch) / "kustomization.yaml").write_text(text, encoding="utf-8")
        yield scratch


def _image_entry(name: str, image: str) -> dict[str, str]:
    place, _, tag = image.rpartition(":")
    return {"name": name, "newName": place, "newTag": tag}


def _job_log(release: Release, name: str, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        found = release.cluster.get("job", name, f"--namespace={release.namespace}")["status"]
        states = {each["type"] for each in found.get("conditions", ()) if each["status"] == "True"}
        if "Complete" in states:
            return release.kubectl("logs", f"job/{name}")
        if "Failed" in states or time.monotonic() > deadline:
            log = release.kubectl("logs", f"job/{name}", "--all-containers", "--tail=20", "--ignore-errors")
            raise ClusterError(
                f"Job {name}: {sorted(states) or 'not done in time'}\n{log}\n{release.describe()}"
            )
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Span:
    """A span as a trace store shows it. attributes: its own; resource: of the process."""

    id: str
    parent: str
    name: str
    service: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass(frozen=True)
class Jaeger:
    """The trace store of k8s/jaeger, asked through the API server."""

    cluster: Cluster
    namespace: str = "asd-tracing"

    @property
    def endpoint(self) -> str:
        """Value of telemetry.endpoint."""
        return f"http://asd-jaeger.{self.namespace}:4317"

    def up(self) -> None:
        """Start it and wait until it takes spans."""
        place = f"--namespace={self.namespace}"
        overlay = {
            "namespace": self.namespace,
            "images": [_image_entry("jaegertracing/all-in-one", self.cluster.jaeger_image)],
        }
        self.cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}},
            namespace=self.namespace,
        )
        with _overlaid("jaeger", overlay) as path:
            self.cluster.kubectl("apply", "--kustomize", path)
        try:
            self.cluster.kubectl(
                "rollout", "status", "deployment/asd-jaeger", place, "--timeout=90s", timeout_s=100
            )
        except ClusterError as error:
            pods = self.cluster.kubectl("describe", "pods", place)
            raise ClusterError(
                f"{error}\n{pods[-3000:]}\n{self.cluster.kubectl('logs', 'deployment/asd-jaeger', place)}"
            ) from error

    def down(self) -> None:
        """Remove it."""
        self.cluster.remove_namespace(self.namespace)

    def spans(self, trace_id: str) -> list[Span]:
        """Return the spans of a trace that have arrived."""
        try:
            found = self._ask(f"traces/{trace_id}")["data"]
        except ClusterError as error:
            if "NotFound" in str(error) or "trace not found" in str(error):
                return []
            raise
        return [span for trace in found for span in _read(trace)]

    def served(self, service: str, pods: Iterable[str]) -> set[str]:
        """Return those of a service's pods that answered a call."""
        # The store's limit keeps the oldest traces, so each pod is asked for by its name.
        return {pod for pod in pods if self._served(service, pod)}

    def _served(self, service: str, pod: str) -> bool:
        tags = quote(json.dumps({"k8s.pod.name": pod, "span.kind": "server"}))
        return bool(self._ask(f"traces?service={service}&tags={tags}&lookback=1h&limit=1")["data"])

    def _ask(self, path: str) -> dict[str, Any]:
        base = f"/api/v1/namespaces/{self.namespace}/services/asd-jaeger:query/proxy/api"
        result: dict[str, Any] = json.loads(self.cluster.kubectl("get", f"--raw={base}/{path}"))
        return result


def _read(trace: dict[str, Any]) -> Iterator[Span]:
    for span in trace["spans"]:
        process = trace["processes"][span["processID"]]
        yield Span(
            id=span["spanID"],
            parent=next((each["spanID"] for each in span["references"] if each["refType"] == "CHILD_OF"), ""),
            name=span["operationName"],
            service=process["serviceName"],
            attributes={tag["key"]: tag["value"] for tag in span["tags"]},
            resource={tag["key"]: tag["value"] for tag in process["tags"]},
        )


def poll(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    """Return once a condition holds. Raises ClusterError with what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"after {timeout_s:.0f} s still waiting for {what()}")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Yield the cluster of KUBECONFIG, or a node of our own that is ended afterwards.

    With KUBECONFIG, ASD_IMAGE_REGISTRY is where asd's images are (empty: on the nodes), and
    ASD_JAEGER_IMAGE names a Jaeger that a node can pull.
    """
    given = os.environ.get("KUBECONFIG", "")
    if given:
        jaeger = os.environ.get("ASD_JAEGER_IMAGE", JAEGER_IMAGE)
        yield Cluster(Path(given), os.environ.get("ASD_IMAGE_REGISTRY", ""), jaeger)
        return
    node = Node()
    node.up([images.release_archive(), jaeger_archive()])
    try:
        yield Cluster(node.kubeconfig, is_kept=False)
    finally:
        node.down()
