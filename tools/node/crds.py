"""Kinds of objects that the chart makes for others: their definitions, as their makers publish them.

They are files of Go modules, which is how they come to a machine without another source. Versions are the
newest that the Go of the tests can read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.machine import MissingProgramError


@dataclass(frozen=True)
class Definitions:
    """Definitions in a Go module. files: under its folder."""

    module: str
    version: str
    files: tuple[str, ...]


_KEDA = "config/crd/bases/keda.sh"
_GATEWAY = "config/crd/standard/gateway.networking.k8s.io"
_PROMETHEUS = "example/prometheus-operator-crd/monitoring.coreos.com"
_CERTIFICATES = "deploy/crds/cert-manager.io"
DEFINITIONS = (
    Definitions("github.com/kedacore/keda/v2", "v2.21.0", (f"{_KEDA}_scaledobjects.yaml",)),
    Definitions(
        "sigs.k8s.io/gateway-api",
        "v1.6.1",
        tuple(f"{_GATEWAY}_{name}.yaml" for name in ("grpcroutes", "httproutes")),
    ),
    Definitions(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        tuple(f"{_PROMETHEUS}_{name}.yaml" for name in ("podmonitors", "servicemonitors", "prometheusrules")),
    ),
    Definitions(
        "github.com/cert-manager/cert-manager",
        "v1.21.2",
        tuple(f"{_CERTIFICATES}_{name}.yaml" for name in ("certificates", "issuers")),
    ),
)


def find_definitions() -> list[Path]:
    """Return the files, fetched by Go if need be. Raises MissingProgramError where that is not possible."""
    found = []
    for each in DEFINITIONS:
        answer = _download(each)
        if "Dir" not in answer:
            raise MissingProgramError(f"Go cannot fetch {each.module}: {answer['Error']}")
        found += [Path(answer["Dir"]) / file for file in each.files]
    return found


def absent_definitions() -> list[str]:
    """Return the modules, with their versions, that would have to be fetched."""
    return [
        f"{each.module} {each.version}" for each in DEFINITIONS if "Dir" not in _download(each, GOPROXY="off")
    ]


def _download(definitions: Definitions, **environment: str) -> dict[str, Any]:
    """Return what Go says of a module that it was to fetch: `Dir`, where it is, or else `Error`."""
    go = shutil.which("go")
    if go is None:
        return {"Error": "there is no Go; install Go 1.26 or later"}
    # Outside of a module, so that none is changed.
    with tempfile.TemporaryDirectory() as scratch:
        run = subprocess.run(
            [go, "mod", "download", "-json", f"{definitions.module}@{definitions.version}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=scratch,
            env={**os.environ, "GOWORK": "off", **environment},
        )
    return {"Error": run.stderr, **json.loads(run.stdout or "{}")}
