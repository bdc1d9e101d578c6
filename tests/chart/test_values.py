"""The chart's values: each explained, each in the schema, and nothing in the schema that is not explained."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import yaml

from policy_service.settings import PolicySettings
from services.gateway.settings import GatewaySettings
from services.router.settings import RouterSettings
from services.stage.engines.settings import TensorrtLlmSettings, VllmSettings
from services.stage.settings import ModelSettings, StageSettings
from tests.chart.rendering import CHART, ROOT, VARIANTS, chart_values, helm

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref", "")
    return SCHEMA["definitions"][reference.rpartition("/")[2]] if reference else schema


def schemas(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return every schema below one, by its path in the values; what is Kubernetes' own counts as a leaf."""
    schema = resolved(schema)
    found = [(path, schema)]
    if "$comment" in schema:
        return found
    for name, each in schema.get("properties", {}).items():
        found += schemas(each, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        found += schemas(schema["items"], f"{path}[]")
    return found


def value_paths(value: Any, path: str = "") -> set[str]:
    found = {path} if path else set()
    if isinstance(value, dict):
        for name, each in value.items():
            found |= value_paths(each, f"{path}.{name}".lstrip("."))
    if isinstance(value, list):
        for each in value:
            found |= value_paths(each, f"{path}[]")
    return found


def test_the_schema_is_closed_at_every_level() -> None:
    for path, schema in schemas(SCHEMA):
        if schema.get("type") != "object" or path == "global":
            continue
        assert "additionalProperties" in schema, path
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path


def test_everything_that_the_schema_knows_stands_in_the_values() -> None:
    known = value_paths(chart_values())
    # A stage may repeat what stands in stageDefaults.
    known |= {path.replace("stageDefaults", "stages[]", 1) for path in known}
    wanted = {path for path, _ in schemas(SCHEMA) if path and not path.endswith("[]")}
    assert wanted - known == set()


def _entries() -> list[tuple[int, str, bool]]:
    """Return line number, key and whether a comment stands before it, of every key in values.yaml."""
    entries = []
    commented = False
    for number, line in enumerate((CHART / "values.yaml").read_text().splitlines(), start=1):
        text = line.strip().removeprefix("- ")
        if text.startswith("#"):
            commented = True
            continue
        key, colon, value = text.partition(":")
        # What is a mapping of further lines is explained by what it holds.
        if colon and (value.strip() or commented):
            entries.append((number, key, commented))
        commented = False
    return entries


def test_every_value_is_explained() -> None:
    explained = {key for _, key, commented in _entries() if commented}
    missing = [
        (number, key)
        for number, key, commented in _entries()
        # A second stage need not explain again what the first one, or stageDefaults, did; requests and
        # limits are Kubernetes' own.
        if not commented and key not in {"requests", "limits"} and not _repeats(number, key, explained)
    ]
    assert missing == []


def _repeats(number: int, key: str, explained: set[str]) -> bool:
    lines = (CHART / "values.yaml").read_text().splitlines()
    return number > lines.index("stages:") and key in explained


@pytest.mark.parametrize("name", sorted(path.name for path in CHART.glob("values*.yaml")))
def test_lines_fit(name: str) -> None:
    lines = (CHART / name).read_text().splitlines()
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize(
    ("section", "settings"), [("vllm", VllmSettings), ("tensorrtLlm", TensorrtLlmSettings)]
)
def test_every_option_of_an_engine_is_a_value(section: str, settings: Any) -> None:
    values = chart_values()["stageDefaults"]["model"][section]
    # The chart knows which stages get drafts; a stage by itself does not.
    if section == "vllm":
        assert values["verifyInside"] == "auto"
        values |= {"verifyInside": False}
    assert {_snake(key) for key in values} == set(settings.model_fields)
    # A release is as the documentation says of the engine itself; 0 and "" leave out what is None there.
    defaults = settings().model_dump()
    assert {_snake(key): value or None for key, value in values.items()} == {
        key: value or None for key, value in defaults.items()
    }


def _snake(key: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in key)


# The GPUs of each model: with vLLM as many as were run with (docs/engines.md).
PRODUCTION = {
    "H100s": ("vllm", (1, 1, 2)),
    "H100s, TensorRT-LLM": ("tensorrt_llm", (1, 2, 4)),
}


@pytest.mark.parametrize("name", PRODUCTION)
def test_the_production_cascade_is_the_one_it_names(name: str) -> None:
    variant, (engine, gpus) = VARIANTS[name], PRODUCTION[name]
    stages = [variant.stage(stage) for stage in variant.stages]
    assert [stage["model"]["path"] for stage in stages] == [
        "/models/Llama-2-13b-chat-hf",
        "/models/CodeLlama-34b-Instruct-hf",
        "/models/Llama-2-70b-chat-hf",
    ]
    assert tuple(stage["gpus"] for stage in stages) == gpus
    assert {stage["model"]["engine"] for stage in stages} == {engine}
    text = (ROOT / variant.file).read_text()
    # Its header adds up what it asks for, and installs itself.
    assert f"= {sum(stage['gpus'] * stage['replicas'] for stage in stages)}," in text
    assert text.count(f"-f {variant.file} ") == 2


@pytest.mark.parametrize("name", PRODUCTION)
def test_the_claims_of_the_production_cascade_are_those_of_the_jobs(name: str) -> None:
    claims = {
        each["metadata"]["name"]
        for each in yaml.safe_load_all((ROOT / "k8s/storage/claims.yaml").read_text())
        if each
    }
    values = VARIANTS[name].effective
    assert {values["policy"]["artifactClaim"], values["stageDefaults"]["model"]["claim"]} <= claims


def test_the_engine_that_was_run_has_the_gpus_and_memory_that_it_was_run_with() -> None:
    rows = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())["rows"]
    variant = VARIANTS["H100s"]
    for name in variant.stages:
        stage = variant.stage(name)
        (row,) = [each for each in rows if each["model"] == name and "H100" in each["device"]]
        run = row["records"]["passes"]["settings"]
        section = stage["model"]["vllm"]
        assert (row["engine"], row["tensor_parallel"]) == ("vllm", stage["gpus"])
        assert section["gpuMemoryUtilization"] == run["gpu_memory_utilization"]
        assert (section["dtype"], section["tensorParallel"]) == (run["dtype"], run["tensor_parallel"])


def test_the_images_policy_is_the_one_that_the_defaults_ask_for() -> None:
    fields = PolicySettings.model_fields
    drift = chart_values()["policy"]["drift"]
    assert (drift["runLength"], drift["tolerance"]) == (
        fields["drift_run_length"].default,
        fields["drift_tolerance"].default,
    )


NOTES = {
    "defaults": (
        "helm test demo -n models",
        "image.registry is not set",
        "go nowhere yet",
        "Insufficient cpu or memory: lower resources.requests",
        "delete pod demo-test-ask demo-test-chat",
        "port 8000 of demo-gateway",
        "curl http://127.0.0.1:8000/v1/chat/completions",
    ),
    "gateway off": ("Port 50050 of demo-router speaks gRPC",),
    "H100s": ("The stages want 7 GPUs", "--timeout 1860s", "demo-stage-13b-cache, demo-stage-34b-cache"),
    "H100s, TensorRT-LLM": ("The stages want 12 GPUs", "--timeout 1860s", "demo-stage-13b-cache"),
    "everything on": ("From outside: the address of",),
    "vLLM": ("verifyInside is true for stage draft, the first",),
    "autoscaled": ("KEDA scales small, medium, large", "port 9464"),
    "scale to zero": ("Stages that sleep when idle: large.", "router.defaultDeadlineMs: 60000"),
    "TLS": ("get secret asd-tls", "--tls-ca ca.crt --tls-server-name demo-router", "FailedMount"),
    "locked down": (
        "get certificates",
        "get secret demo-client-tls",
        "--tls-cert tls.crt --tls-key tls.key",
        "export ASD_TOKEN=...",
        "Only pods of namespace models may call the router",
        "Only pods of namespace models may call the gateway",
        "--cert tls.crt --key tls.key https://demo-gateway:8000",
        '-H "Authorization: Bearer $ASD_TOKEN"',
        "networkPolicy.metricsClients",
    ),
    "tokens": ("Secret tokens", "Tokens travel in the clear"),
    "ingress": ("asd.example", "must be told to speak GRPC to the pods"),
    "route": ("Gateway public, asd.example", "Gateway public, api.asd.example"),
    "gateway ingress": ("https://api.asd.example/v1", "https://demo-gateway:8000/v1/chat/completions"),
}


@pytest.mark.parametrize("variant", NOTES)
def test_notes_say_what_to_do_next(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    run = helm("install --dry-run=client demo", VARIANTS[variant], str(CHART))
    assert run.returncode == 0, run.stderr
    notes = run.stdout.partition("NOTES:")[2]
    for sentence in NOTES[variant]:
        assert sentence in notes
    if variant == "defaults":
        for word in (
            "ASD_TOKEN",
            "--tls",
            "KEDA",
            "sleep",
            "GPUs",
            "From outside",
            "Claims",
            "networkPolicy",
            "verifyInside",
        ):
            assert word not in notes
    if variant == "H100s":
        assert "verifyInside" not in notes
    if variant == "gateway off":
        assert "8000" not in notes


BOUNDED = {
    "router.maxConcurrent": (RouterSettings, "max_concurrent"),
    "router.batchConcurrency": (RouterSettings, "batch_concurrency"),
    "gateway.maxConcurrent": (GatewaySettings, "max_concurrent"),
    "gateway.maxBodyBytes": (GatewaySettings, "max_body_bytes"),
    "gateway.maxBufferedBytes": (GatewaySettings, "max_buffered_bytes"),
    **{
        f"{place}.{value}": (model, name)
        for place in ("stageDefaults", "stages[]")
        for value, model, name in (
            ("maxQueue", StageSettings, "max_queue"),
            ("model.threads", ModelSettings, "threads"),
            ("model.maxBatch", ModelSettings, "max_batch"),
            ("model.maxLanes", ModelSettings, "max_lanes"),
            ("model.cachedSequences", ModelSettings, "cached_sequences"),
        )
    },
}


def test_the_gateways_memory_has_room_for_its_bodies() -> None:
    gateway = chart_values()["gateway"]
    limit = int(gateway["resources"]["limits"]["memory"].removesuffix("Mi"))
    # As the values say of maxBufferedBytes.
    assert limit >= 128 + 6 * (gateway["maxBufferedBytes"] >> 20)
    assert gateway["maxBufferedBytes"] >= gateway["maxBodyBytes"]


def _maximum(schema: dict[str, Any]) -> object:
    """Return the bound of a number in JSON schema, of one that may be null as well."""
    kinds = [schema, *schema.get("anyOf", ())]
    return next((kind["maximum"] for kind in kinds if "maximum" in kind), None)


@pytest.mark.parametrize("path", BOUNDED)
def test_the_schema_takes_as_much_as_the_service(path: str) -> None:
    model, name = BOUNDED[path]
    most = _maximum(model.model_json_schema()["properties"][name])
    assert most is not None
    assert _maximum(dict(schemas(SCHEMA))[path]) == most
