"""Runs checkov over every variant of the chart: `python -m tests.chart.checks`.

checkov has a hundred dependencies, some of them older than ours, so that it lives in an environment of its
own: one on PATH, or one made in build/checkov. Rules that do not hold for the chart are named with a reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from tests.chart.rendering import NAMESPACE, ROOT, VARIANTS, render

REQUIREMENT = "checkov>=3.2,<4"
FOLDER = ROOT / "build" / "checkov"
LEFT_OUT = {
    "CKV_K8S_11": "CPU limits throttle: an answer that has begun would take longer on an idle node",
    "CKV_K8S_15": "image.pullPolicy is the user's; nodes that have their images have no registry to ask",
    "CKV_K8S_43": "image.digests are the user's: images are built from this repository",
}
# Of some objects only.
LEFT_OUT_OF = {
    ("CKV_K8S_8", "Pod.*"): "helm test's pod asks one question and ends",
    ("CKV_K8S_9", "Pod.*"): "helm test's pod asks one question and ends",
    ("CKV2_K8S_6", "Pod.*"): "networkPolicy is off by default; helm test's pod is called by nobody",
    ("CKV_K8S_38", "Deployment.*-manager"): "it scales stages through the Kubernetes API",
}
# In the manifests of some variants only.
LEFT_OUT_IN = {
    ("CKV_K8S_40", "/openshift.yaml"): "OpenShift gives the user: one of the namespace's, above a million",
}


def find_checkov() -> Path:
    """Return the program, installed first where there is none."""
    found = shutil.which("checkov")
    if found:
        return Path(found)
    program = FOLDER / "bin" / "checkov"
    if not program.exists():
        venv.create(FOLDER, with_pip=True, clear=True)
        pip = [
            str(FOLDER / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, REQUIREMENT], check=True)
    return program


def failures(folder: Path) -> list[str]:
    """Return what checkov has against the manifests of a folder."""
    command = [
        str(find_checkov()),
        "--directory",
        str(folder),
        "--framework",
        "kubernetes",
        "--skip-download",
    ]
    command += ["--quiet", "--compact", "--output", "json", "--skip-check", ",".join(LEFT_OUT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if not run.stdout.strip():
        raise SystemExit(f"checkov said nothing\n{run.stderr}")
    reports = json.loads(run.stdout)
    found = []
    for report in reports if isinstance(reports, list) else [reports]:
        if report["summary"]["parsing_errors"]:
            found.append(f"not read: {report['results']['parsing_errors']}")
        if not report["summary"]["passed"]:
            found.append("nothing was checked")
        found += [
            f"{each['file_path']}: {each['resource']}: {each['check_id']} {each['check_name']}"
            for each in report["results"]["failed_checks"]
            if not _is_left_out(each["check_id"], each["resource"], each["file_path"])
        ]
    return sorted(found)


def _is_left_out(check: str, resource: str, file: str) -> bool:
    if (check, file) in LEFT_OUT_IN:
        return True
    return any(check == left and fnmatch(resource, pattern) for left, pattern in LEFT_OUT_OF)


def write_manifests(folder: Path) -> None:
    """Write each variant's objects to a file, in the namespace that helm would put them in."""
    for name in VARIANTS:
        placed: list[dict[str, Any]] = [
            {**each, "metadata": {**each["metadata"], "namespace": NAMESPACE}} for each in render(name)
        ]
        file = folder / f"{name.replace(' ', '-').replace(',', '')}.yaml"
        file.write_text(yaml.safe_dump_all(placed))


def main() -> int:
    """Print what checkov finds; the exit status says whether there is something."""
    with tempfile.TemporaryDirectory() as scratch:
        write_manifests(Path(scratch))
        found = failures(Path(scratch))
    sys.stdout.write("".join(f"{line}\n" for line in found))
    sys.stdout.write(f"checkov: {len(VARIANTS)} variants, {len(found)} findings\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
