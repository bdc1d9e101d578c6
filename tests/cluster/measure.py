"""Measures a release on a real cluster: `python -m tests.cluster.measure`.

Writes benchmarks/results/kubernetes.json. `--disruptions 10` disturbs the release ten times; latencies are
those of the first time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.record import write_result
from services.common.stats import percentile
from tests.chart.rendering import VARIANTS
from tests.cluster import release
from tools.images import build as images
from tools.images.build import ImageError
from tools.machine import MissingProgramError, say
from tools.node.node import NodeError

COMMAND = "python -m tests.cluster.measure"


def measure(cluster: release.Cluster, disruptions: int) -> dict[str, object]:
    """Return the figures. disruptions: how often the release is disturbed, one after the other."""
    say("installing with the chart's own values")
    default = release.Release(cluster, namespace="asd-default")
    seconds, _ = release.install_to_answer(default)
    default.uninstall()
    cluster.remove_namespace(default.namespace)
    say(f"the first answer came after {seconds:.1f} s")
    disturbed = release.Release(cluster, arguments=(f"--values={release.HERE / 'values.yaml'}",))
    disturbed.install()
    rounds = []
    for number in range(1, disruptions + 1):
        say(f"asking while pods are deleted and replaced: {number} of {disruptions}")
        rounds.append(release.disrupt(disturbed))
        say(f"{len(rounds[-1].failures)} of {rounds[-1].requests} requests failed")
    found = rounds[0]
    if cluster.is_kept:
        disturbed.uninstall()
    cluster.remove_namespace(disturbed.namespace)
    # A cluster of somebody's own has images that were made elsewhere.
    sizes = {} if cluster.is_kept else images.sizes_mb()
    version = json.loads(cluster.kubectl("get", "--raw=/version"))
    return {
        "install_to_answer_s": round(seconds, 1),
        "disruptions": disruptions,
        "requests": sum(each.requests for each in rounds),
        "failed_requests": sum(len(each.failures) for each in rounds),
        "failures": sorted({failure for each in rounds for failure in each.failures}),
        "requests_per_second": release.RATE,
        "normal": _percentiles(found.normal_ms),
        "during": _percentiles(found.during_ms),
        **{name: round(value, 1) for name, value in found.seconds.items()},
        "image_mb": sizes,
        "render_variants": len(VARIANTS),
        "kubernetes": version["gitVersion"],
        "nodes": len(cluster.get("nodes")["items"]),
    }


def _percentiles(values: tuple[float, ...]) -> dict[str, float]:
    shares = {f"p{share}_ms": round(percentile(values, share / 100), 1) for share in (50, 95, 99)}
    return {"requests": len(values), **shares}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--disruptions", type=int, default=1, help="how often the release is disturbed")
    options = parser.parse_args()
    if options.disruptions < 1:
        parser.error("--disruptions must be 1 or more")
    command = COMMAND if options.disruptions == 1 else f"{COMMAND} --disruptions {options.disruptions}"
    try:
        with release.cluster() as cluster:
            figures = measure(cluster, options.disruptions)
    except (
        MissingProgramError,
        ImageError,
        NodeError,
        release.ClusterError,
        subprocess.SubprocessError,
    ) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{write_result('kubernetes', command, figures)}\n")


if __name__ == "__main__":
    main()
