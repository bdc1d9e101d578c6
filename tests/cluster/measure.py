"""Measures a release on a real cluster: `python -m tests.cluster.measure`.

Writes benchmarks/results/kubernetes.json.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.record import percentile, write_result
from tests.chart.rendering import VARIANTS
from tests.cluster import images, release
from tests.cluster.build import MissingProgramError, cache_dir, say
from tests.cluster.images import ImageError
from tests.cluster.node import NodeError

COMMAND = "python -m tests.cluster.measure"


def measure(cluster: release.Cluster) -> dict[str, object]:
    """Return the figures."""
    say("installing with the chart's own values")
    default = release.Release(cluster, namespace="asd-default")
    seconds, _ = release.install_to_answer(default)
    default.uninstall()
    cluster.remove_namespace(default.namespace)
    say(f"the first answer came after {seconds:.1f} s")
    disturbed = release.Release(cluster, arguments=(f"--values={release.HERE / 'values.yaml'}",))
    disturbed.install()
    say("asking while pods are deleted and replaced")
    found = release.disrupt(disturbed)
    if cluster.is_kept:
        disturbed.uninstall()
    cluster.remove_namespace(disturbed.namespace)
    # A cluster of somebody's own has images that were made elsewhere.
    made = [] if cluster.is_kept else images.release_images(cache_dir() / "images")
    version = json.loads(cluster.kubectl("get", "--raw=/version"))
    return {
        "install_to_answer_s": round(seconds, 1),
        "requests": found.requests,
        "failed_requests": len(found.failures),
        "failures": sorted(set(found.failures)),
        "requests_per_second": release.RATE,
        "normal": _percentiles(found.normal_ms),
        "during": _percentiles(found.during_ms),
        **{name: round(value, 1) for name, value in found.seconds.items()},
        "image_mb": images.sizes_mb(made),
        "render_variants": len(VARIANTS),
        "kubernetes": version["gitVersion"],
        "nodes": len(cluster.get("nodes")["items"]),
    }


def _percentiles(values: tuple[float, ...]) -> dict[str, float]:
    shares = {f"p{share}_ms": round(percentile(values, share / 100), 1) for share in (50, 95, 99)}
    return {"requests": len(values), **shares}


def main() -> None:
    """Measure and record."""
    try:
        with release.cluster() as cluster:
            figures = measure(cluster)
    except (
        MissingProgramError,
        ImageError,
        NodeError,
        release.ClusterError,
        subprocess.SubprocessError,
    ) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{write_result('kubernetes', COMMAND, figures)}\n")


if __name__ == "__main__":
    main()
