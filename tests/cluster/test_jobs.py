"""A release with certificates and tokens, and everything of k8s/ that is run beside a release.

The tests build on each other: a model is loaded, outcomes are collected, a policy is made of them and served.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import yaml

from tests.cluster.release import (
    HERE,
    ROOT,
    STAGES,
    Cluster,
    ClusterError,
    Release,
    poll,
    run_job,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TOKEN = "a-token-of-the-tests"
SHOWN = {"asd-client": "/client"}
TRUSTING = ("--tls-ca=/client/ca.crt",)
CERTIFIED = (*TRUSTING, "--tls-cert=/client/tls.crt", "--tls-key=/client/tls.key")
HUB_PORT = 8000


def _secret(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def _certificate(authority: trustme.CA, *names: str) -> dict[str, str]:
    issued = authority.issue_cert(*names)
    return {
        "tls.crt": issued.cert_chain_pems[0].bytes().decode(),
        "tls.key": issued.private_key_pem.bytes().decode(),
        "ca.crt": authority.cert_pem.bytes().decode(),
    }


def _values(folder: Path, **further: Any) -> str:
    """Return the option for a file of values."""
    secured = {
        "tls": {"enabled": True, "mutual": True, "clientCertificates": True, "secretName": "asd-tls"},
        "auth": {"enabled": True, "secretName": "asd-tokens"},
        "networkPolicy": {"enabled": True},
        "telemetry": {"metricsPort": 9464},
        "router": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 3}},
    }
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(secured | further), encoding="utf-8")
    return f"--values={file}"


@pytest.fixture(scope="module")
def secured(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """Give a release whose every connection is encrypted, and that asks who calls."""
    # Not `asd`: Jobs find a release by its name.
    release = Release(
        cluster, name="guarded", namespace="asd-jobs", arguments=(f"--values={HERE / 'values.yaml'}",)
    )
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": release.namespace}}
    cluster.apply(namespace, namespace=release.namespace)
    authority = trustme.CA()
    services = [
        f"{release.name}-{name}"
        for name in ("router", "gateway", "policy", *(f"stage-{stage}" for stage in STAGES))
    ]
    cluster.apply(
        _secret("asd-tls", **_certificate(authority, *services)),
        _secret("asd-client", **_certificate(authority, "client"), token=TOKEN),
        _secret("asd-tokens", tokens=f"# who may call\ntests:{TOKEN}\n"),
        namespace=release.namespace,
    )
    release.kubectl("apply", "--kustomize", str(ROOT / "k8s" / "storage"))
    release.install(_values(tmp_path_factory.mktemp("values")))
    yield release
    if cluster.is_kept:
        release.uninstall()
    cluster.remove_namespace(release.namespace)


def test_helm_test_passes_with_certificates_and_a_token(secured: Release) -> None:
    log = secured.test()
    assert '"plan_source": "policy"' in log
    # By gRPC, and by the gateway.
    assert log.count("Answer: 19") >= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "closes the connection: it may want TLS (--tls-ca)"),
        (TRUSTING, "closes the connection: it may want a certificate (--tls-cert, --tls-key)"),
        (CERTIFIED, "this cascade wants a token"),
        ((*CERTIFIED, "--token=another"), "this cascade does not know the token"),
    ],
)
def test_callers_who_show_less_are_refused_and_told_why(
    secured: Release, options: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ClusterError, match=re.escape(says)):
        secured.ask(*options, secrets=SHOWN)


def test_an_autoscaler_without_a_load_gives_the_router_its_least_pods(secured: Release) -> None:
    poll(lambda: len(secured.pods("router")) == 2, 60.0, lambda: secured.kubectl("describe", "hpa"))
    secured.wait_rolled("router")


def test_a_model_comes_from_a_hub_to_the_claim(secured: Release) -> None:
    secured.run_pod(
        "hub", "python", "/script/hub.py", str(HUB_PORT), script=HERE / "hub.py", image="stage-onnx"
    )
    secured.kubectl("expose", "pod/hub", f"--port={HUB_PORT}")
    secured.kubectl("wait", "--for=condition=Ready", "pod/hub", "--timeout=60s", timeout_s=70)
    log = run_job(secured, "models", f"HF_ENDPOINT=http://hub:{HUB_PORT}", "MODEL=asd/small")
    assert "/models/small" in log


def test_a_policy_is_made_of_collected_outcomes_and_served(secured: Release, tmp_path: Path) -> None:
    """Tiny: whether it decides well is tested elsewhere."""
    counts = {"TRAIN": 60, "CALIBRATION": 40, "EVALUATION": 20}
    run_job(
        secured,
        "collect",
        *(f"{split}_PROMPTS={count}" for split, count in counts.items()),
        *(f"{split}_CONVERSATIONS=8" for split in ("TRAIN", "CALIBRATION")),
        "CONCURRENCY=2",
        "ASD_TLS_CA=/client/ca.crt",
        "ASD_TLS_CERT=/client/tls.crt",
        "ASD_TLS_KEY=/client/tls.key",
    )
    first = _published(run_job(secured, "train"))
    before = _ask(secured)
    assert before["policy_version"] != first
    # The loaded model, too, is served from its claim.
    defaults = yaml.safe_load((ROOT / "charts" / "values.yaml").read_text(encoding="utf-8"))["stages"]
    stages = [
        {**each, "model": {**each["model"], "claim": "asd-models"}} if each["name"] == "small" else each
        for each in defaults
    ]
    secured.upgrade(_values(tmp_path, policy={"artifactClaim": "asd-policies"}, stages=stages))
    _await_version(secured, first)
    assert _ask(secured, "--stage=small")["stage"] == "small"

    pods = set(secured.pods("policy"))
    second = _published(run_job(secured, "train", "SEED=1"))
    assert second != first
    _await_version(secured, second)
    assert set(secured.pods("policy")) == pods


def _await_version(secured: Release, version: str) -> None:
    """Wait until a policy decides: pods that end still answer, and claims are looked at now and then."""
    poll(
        lambda: _ask(secured)["policy_version"] == version,
        60.0,
        lambda: f"policy {version} to decide\n{secured.describe()}",
    )


def _published(log: str) -> str:
    """Return the version in force, of the table that ends the Job's log."""
    found = re.search(r"(\w+) \*", log)
    assert found is not None, log
    return found[1]


def _ask(secured: Release, *options: str) -> dict[str, Any]:
    return secured.ask(*CERTIFIED, "--token-file=/client/token", *options, secrets=SHOWN)
