"""Every object that the chart can make, shown to a real API server."""

from __future__ import annotations

import pytest
import yaml

from tests.chart.rendering import NAMESPACE, VARIANTS, Variant, template
from tests.cluster.release import Cluster, ClusterError
from tools.node.crds import find_definitions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def _monitored(kind: str) -> Variant:
    on = {kind: {"enabled": True}, "rules": {"enabled": True}, "dashboard": {"enabled": True}}
    return Variant({"telemetry": {"metricsPort": 9464}, "monitoring": on})


ALL = {
    **VARIANTS,
    "monitored": _monitored("podMonitor"),
    "monitored by Services": _monitored("serviceMonitor"),
}


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Cluster:
    """Give a cluster that knows every kind."""
    if cluster.is_kept:
        pytest.skip("definitions of kinds are not put into a cluster of somebody's own")
    for file in find_definitions():
        cluster.kubectl("apply", "--server-side", f"--filename={file}")
    cluster.kubectl("wait", "--for=condition=Established", "crds", "--all", "--timeout=30s")
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}, namespace=NAMESPACE
    )
    return cluster


def _show(server: Cluster, text: str) -> str:
    """Return what the API server says of objects that it checks as if they were to stay."""
    return server.kubectl(
        "apply",
        "--dry-run=server",
        "--validate=strict",
        f"--namespace={NAMESPACE}",
        "--filename=-",
        stdin=text,
    )


@pytest.mark.parametrize("name", ALL)
def test_every_object_is_accepted(server: Cluster, name: str) -> None:
    run = template(ALL[name])
    assert run.returncode == 0, run.stderr
    accepted = [line for line in _show(server, run.stdout).splitlines() if line.endswith("(server dry run)")]
    assert len(accepted) == len([each for each in yaml.safe_load_all(run.stdout) if each])


@pytest.mark.parametrize(
    ("variant", "kind", "field"),
    [
        ("autoscaled", "HorizontalPodAutoscaler", "maxReplicas"),
        ("autoscaled", "ScaledObject", "maxReplicaCount"),
        ("route", "GRPCRoute", "parentRefs"),
        ("route", "HTTPRoute", "rules"),
        ("monitored by Services", "ServiceMonitor", "endpoints"),
        ("TLS by cert-manager", "Certificate", "secretName"),
    ],
)
def test_a_field_that_does_not_exist_would_not_be(
    server: Cluster, variant: str, kind: str, field: str
) -> None:
    objects = [each for each in yaml.safe_load_all(template(ALL[variant]).stdout) if each]
    misspelt = next(each for each in objects if each["kind"] == kind)
    misspelt["spec"][f"{field}x"] = misspelt["spec"].pop(field)
    with pytest.raises(ClusterError, match=f'unknown field "spec.{field}x"'):
        _show(server, yaml.safe_dump(misspelt))
