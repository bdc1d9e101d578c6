"""Implements the scaler's Cluster with the official Kubernetes client. Needs the extra `kubernetes`.

It needs these rights in its namespace: get deployments, patch deployments/scale, list
horizontalpodautoscalers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from asd.errors import AsdError, PreconditionFailed, Unavailable
from services.scaler.cluster import Scale

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_NOT_FOUND, _CONFLICT, _TOO_MANY = 404, 409, 429
_REFUSED = {401, 403}


class KubernetesCluster:
    """Deployments of one namespace. timeout_s: of each call of the API."""

    def __init__(self, configuration: client.Configuration, namespace: str, timeout_s: float) -> None:
        # The client would retry on its own, beyond the timeout.
        configuration.retries = False
        api = client.ApiClient(configuration)
        self._api = api
        self._apps = client.AppsV1Api(api)
        self._autoscaling = client.AutoscalingV2Api(api)
        self._namespace = namespace
        self._timeout_s = timeout_s

    async def read(self, deployments: Sequence[str]) -> dict[str, Scale]:
        """Return the replicas of deployments by name; one that does not exist is left out."""
        found = await asyncio.gather(*(self._read(name) for name in deployments))
        autoscalers = await self._autoscalers()
        return {
            name: Scale(each.spec.replicas or 0, each.status.ready_replicas or 0, autoscalers.get(name, ""))
            for name, each in zip(deployments, found, strict=True)
            if each is not None
        }

    async def scale(self, deployment: str, replicas: int) -> None:
        """Set the number of wanted replicas."""
        body = {"spec": {"replicas": replicas}}
        patch = self._apps.patch_namespaced_deployment_scale
        await self._call(patch, f"patch deployments/scale {deployment}", deployment, body=body)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()  # type: ignore[no-untyped-call]

    async def _read(self, name: str) -> Any:
        read = self._apps.read_namespaced_deployment
        try:
            return await self._call(read, f"get deployments {name}", name)
        except _Absent:
            return None

    async def _autoscalers(self) -> dict[str, str]:
        """Return the namespace's autoscalers, by the deployment that they scale."""
        found = await self._call(
            self._autoscaling.list_namespaced_horizontal_pod_autoscaler, "list horizontalpodautoscalers"
        )
        return {
            each.spec.scale_target_ref.name: f"horizontalpodautoscaler {each.metadata.name}"
            for each in found.items
            if each.spec and each.metadata and each.spec.scale_target_ref.kind == "Deployment"
        }

    async def _call(self, method: Callable[..., T], what: str, *arguments: Any, **options: Any) -> T:
        """Return the result of an API call. what: verb and resource, as in a Role, for messages."""
        try:
            return await asyncio.to_thread(
                method, *arguments, namespace=self._namespace, _request_timeout=self._timeout_s, **options
            )
        except client.ApiException as error:
            if error.status == _NOT_FOUND:
                raise _Absent(f"{what} in namespace {self._namespace}: there is none") from error
            if error.status in _REFUSED:
                raise PreconditionFailed(
                    f"the manager's service account may not {what} in namespace {self._namespace}: grant it "
                    "in a Role"
                ) from error
            kind = Unavailable if error.status in {_CONFLICT, _TOO_MANY} or error.status >= 500 else AsdError
            raise kind(f"{what}: the Kubernetes API answers {error.status} {error.reason}") from error
        except (HTTPError, OSError) as error:
            raise Unavailable(f"the Kubernetes API cannot be reached: {error}") from error


class _Absent(PreconditionFailed):
    """The resource does not exist."""


def open_cluster(namespace: str, timeout_s: float) -> KubernetesCluster:
    """Return the cluster that this process runs in, or else the kubeconfig's. namespace: "": its own.

    Raises PreconditionFailed if there is neither.
    """
    configuration = client.Configuration()
    own = ""
    try:
        config.load_incluster_config(  # type: ignore[no-untyped-call]
            client_configuration=configuration
        )
        # The cluster's own API needs no proxy: proxies are for traffic that leaves the cluster.
        configuration.proxy = None
        own = namespace or _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError):
        try:
            config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            _, current = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]
            own = current["context"].get("namespace", "")
        except (config.ConfigException, OSError) as error:
            raise PreconditionFailed(
                f"no Kubernetes cluster: neither a pod's service account nor a kubeconfig is there ({error})"
            ) from error
    return KubernetesCluster(configuration, namespace or own or "default", timeout_s)
