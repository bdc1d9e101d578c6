"""The Jobs of k8s/ as kubectl renders them: valid, unprivileged, bounded, and calling commands that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from tools.kubernetes_programs import find_kubectl

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
KUSTOMIZATIONS = sorted(path.parent.name for path in FOLDER.glob("*/kustomization.yaml"))
JOBS = ("benchmark", "benchmark-kept", "collect", "models", "train")
README = (FOLDER / "README.md").read_text()

each_folder = pytest.mark.parametrize("folder", KUSTOMIZATIONS)
each_job = pytest.mark.parametrize("folder", JOBS)


@cache
def render(folder: Path) -> tuple[dict[str, Any], ...]:
    command = [str(find_kubectl()), "kustomize", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return tuple(each for each in yaml.safe_load_all(run.stdout) if each)


def of_kind(folder: str | Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in render(FOLDER / folder) if each["kind"] == kind]


def job(folder: str | Path) -> dict[str, Any]:
    (found,) = of_kind(folder, "Job")
    return found


def pods(folder: str) -> list[dict[str, Any]]:
    workloads = [*of_kind(folder, "Job"), *of_kind(folder, "Deployment")]
    return [each["spec"]["template"]["spec"] for each in workloads]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def resolved(folder: str | Path, container: dict[str, Any]) -> list[str]:
    """Return a container's command line with its parameters put in."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(folder, "ConfigMap")}
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= maps[source["configMapRef"]["name"]]
    labels = job(folder)["spec"]["template"]["metadata"]["labels"]
    for each in container.get("env", ()):
        path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        values[each["name"]] = labels[label[1]] if label else each.get("value", path)

    def put_in(text: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text)

    return [*container["command"], *map(put_in, container.get("args", ()))]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    for folder in ("collect", "models", "train"):
        for container in containers(pods(folder)[0]):
            yield folder, resolved(folder, container)


def test_every_folder_is_there() -> None:
    assert set(KUSTOMIZATIONS) == {*JOBS, "jaeger", "storage"}


@each_folder
def test_manifests_are_valid_kubernetes(folder: str) -> None:
    assert render(FOLDER / folder)
    for manifest in render(FOLDER / folder):
        for version in ("1.29", "1.33"):
            kubernetes_validate.validate(manifest, version, strict=True)


@each_folder
def test_the_readme_starts_it_with_one_command(folder: str) -> None:
    assert f"`kubectl apply -k k8s/{folder}`" in README


@each_folder
def test_containers_are_unprivileged_and_bounded(folder: str) -> None:
    for pod in pods(folder):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} == set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"]
            # The root is read-only, and Python and its libraries want a place for temporary files.
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        for volume in pod["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]


@each_job
def test_a_job_ends_and_says_how_often_it_tries(folder: str) -> None:
    spec = job(folder)["spec"]
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] >= 0
    assert spec["template"]["spec"]["restartPolicy"] in {"Never", "OnFailure"}


@each_job
def test_labels_say_what_a_pod_belongs_to(folder: str) -> None:
    component = folder.removesuffix("-kept")
    wanted = {"app.kubernetes.io/name": "asd", "app.kubernetes.io/component": component}
    for manifest in render(FOLDER / folder):
        assert wanted.items() <= manifest["metadata"]["labels"].items()
    assert wanted.items() <= job(folder)["spec"]["template"]["metadata"]["labels"].items()


@each_job
def test_every_parameter_is_used_and_told_in_the_readme(folder: str) -> None:
    template = str(job(folder)["spec"]["template"])
    for data in (each["data"] for each in of_kind(folder, "ConfigMap")):
        for name in (name for name in data if name.isupper()):
            assert f"$({name})" in template, name
            assert f"`{name}`" in README, name


@each_job
def test_every_parameter_that_is_used_exists(folder: str) -> None:
    for container in containers(pods(folder)[0]):
        assert "$(" not in " ".join(resolved(folder, container))


def test_claims_are_those_of_the_storage_example() -> None:
    there = {each["metadata"]["name"] for each in of_kind("storage", "PersistentVolumeClaim")}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for folder in JOBS
        for volume in pods(folder)[0]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    # The chart takes the reports.
    assert used | {"asd-reports"} == there


def test_commands_and_their_options_exist() -> None:
    for _, line in command_lines():
        group, words = group_of(line)
        _parse(group, line[len(words) :], words)


def group_of(line: list[str]) -> tuple[Any, tuple[str, ...]]:
    """Return the command of the first words of a line, None where it does not exist, and those words."""
    import typer

    from policy_service.train.cli import app as policy_app
    from services.cli.commands import app

    command: Any = typer.main.get_command({"asd": app, "asd-policy": policy_app}[line[0]])
    words = [line[0]]
    for word in line[1:]:
        if not hasattr(command, "commands"):
            break
        words.append(word)
        command = command.commands.get(word)
    return command, tuple(words)


def _parse(command: Any, arguments: list[str], words: tuple[str, ...]) -> None:
    assert command is not None, f"{' '.join(words)} does not exist"
    # Whether files are there is the Job's affair.
    context = command.make_context(" ".join(words), list(arguments), resilient_parsing=False)
    assert not context.args


def test_what_is_trained_is_published_last_and_read_only_until_then() -> None:
    pod = pods("train")[0]
    steps = [(each["name"], each["args"][0]) for each in containers(pod)]
    assert steps == [
        ("fit", "fit"),
        ("evaluate", "evaluate"),
        ("publish", "publish"),
        ("versions", "versions"),
    ]
    mounts = {
        each["name"]: {mount["name"]: mount for mount in each["volumeMounts"]} for each in containers(pod)
    }
    # A failure before publishing cannot touch the store.
    assert "policies" not in mounts["fit"]
    assert "policies" not in mounts["evaluate"]
    assert mounts["publish"]["fitted"]["readOnly"] is True
    assert mounts["fit"]["outcomes"]["readOnly"] is True
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "emptyDir" in volumes["fitted"]


def test_costs_of_the_training_are_those_of_the_embedded_family() -> None:
    embedded = ROOT / "policy_service" / "train" / "embedded.yaml"
    assert yaml.safe_load((FOLDER / "train" / "costs.yaml").read_text()) == yaml.safe_load(
        embedded.read_text()
    )


def test_outcomes_of_every_split_are_collected_from_the_releases_stages() -> None:
    values = yaml.safe_load((ROOT / "charts" / "values.yaml").read_text())
    wanted = [f"--stage={stage['name']}=dns:///asd-stage-{stage['name']}:50061" for stage in values["stages"]]
    splits = []
    for container in containers(pods("collect")[0]):
        line = resolved("collect", container)
        assert [word for word in line if word.startswith("--stage=")] == wanted
        (split,) = [word.removeprefix("--split=") for word in line if word.startswith("--split=")]
        assert line[:3] == ["asd-policy", "collect", f"/outcomes/{split}.parquet"]
        splits.append(split)
    assert splits == ["train", "calibration", "evaluation"]
    assert pods("collect")[0]["restartPolicy"] == "OnFailure"


def test_a_token_for_the_hub_is_optional_and_comes_from_a_secret() -> None:
    (container,) = pods("models")[0]["containers"]
    (token,) = [each for each in container["env"] if each["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {
        "secretKeyRef": {"name": "asd-huggingface", "key": "token", "optional": True}
    }


def test_the_benchmark_keeps_its_results_where_it_is_told_to() -> None:
    def results(folder: str) -> dict[str, Any]:
        (volume,) = [each for each in pods(folder)[0]["volumes"] if each["name"] == "results"]
        return {key: value for key, value in volume.items() if key != "name"}

    assert results("benchmark") == {"emptyDir": {"sizeLimit": "64Mi"}}
    assert results("benchmark-kept") == {"persistentVolumeClaim": {"claimName": "asd-results"}}


def test_the_readmes_overlay_gives_a_run_its_name_labels_image_and_parameters(tmp_path: Path) -> None:
    """The overlay of the README, word for word, beside a copy of k8s/."""
    shutil.copytree(FOLDER, tmp_path / "k8s")
    text, _ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "kustomization.yaml").write_text(text)
    overlaid = job(tmp_path / "my-run")
    assert overlaid["metadata"]["name"] == "asd-benchmark-20260101-1"
    (container,) = overlaid["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example/asd/asd-tools@sha256:")
    line = resolved(tmp_path / "my-run", container)
    for word in (
        "--target=dns:///cascade-router:50050",
        "--requests=2000",
        "--warmup=50",
        "--seed=7",
        "--label=policy-version=6c781246084d",
        "--label=image-digest=0123456789ab",
    ):
        assert word in line
    for manifest in render(tmp_path / "my-run"):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    # Another name and other parameters leave the first run's Job and ConfigMap alone.
    names = [each["metadata"]["name"] for each in render(tmp_path / "my-run")]
    assert not set(names) & {each["metadata"]["name"] for each in render(FOLDER / "benchmark")}


@each_folder
def test_on_openshift_the_readmes_overlay_names_no_user(folder: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k8s")
    _, text = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "kustomization.yaml").write_text(text.replace("k8s/train", f"k8s/{folder}"))
    before, after = render(FOLDER / folder), render(tmp_path / "own")
    assert [each["kind"] for each in after] == [each["kind"] for each in before]
    for was, manifest in zip(before, after, strict=True):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
        if manifest["kind"] not in {"Job", "Deployment"}:
            assert manifest == was
            continue
        left, said = (each["spec"]["template"]["spec"]["securityContext"] for each in (manifest, was))
        users = {"runAsUser", "runAsGroup", "fsGroup"}
        assert left == {key: value for key, value in said.items() if key not in users}
        assert users & said.keys()


def test_jaeger_takes_spans_at_the_endpoint_that_its_file_names() -> None:
    text = (FOLDER / "jaeger" / "kustomization.yaml").read_text()
    (name, port) = re.search(r"telemetry\.endpoint=http://([\w-]+):(\d+)", text).groups()  # type: ignore[union-attr]
    (service,) = of_kind("jaeger", "Service")
    (deployment,) = of_kind("jaeger", "Deployment")
    assert service["metadata"]["name"] == name
    (entry,) = [each for each in service["spec"]["ports"] if each["port"] == int(port)]
    template = deployment["spec"]["template"]
    ports = {each["name"]: each["containerPort"] for each in template["spec"]["containers"][0]["ports"]}
    assert ports[entry["targetPort"]] == 4317
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
