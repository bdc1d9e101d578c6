"""Cascade files: what is refused and how, and whether each process can load what is rendered for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from policy_service.settings import PolicySettings
from services.common.settings import SettingsError
from services.gateway.settings import GatewaySettings
from services.local.cascade_file import EMBEDDED, CascadeFile, Ports, read_cascade, services_of
from services.router.domain import Overload
from services.router.settings import RouterSettings
from services.stage.settings import StageSettings

_GOOD = """
stages:
  - {name: small, path: models/small, cost: 1.5}
  - {name: large, path: models/large, cost: 8.0,
     threads: 2, max_batch: 4, max_model_len: 64, default_max_new_tokens: 9, timeout_ms: 500}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("small", "large"):
        model = tmp_path / "models" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    (tmp_path / "artifact").mkdir()
    return tmp_path


def _read(directory: Path, content: str) -> CascadeFile:
    file = directory / "cascade.yaml"
    file.write_text(content)
    return read_cascade(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("stages: []", ["stages", "at least 1 item"]),
        ("", ["stages: is required"]),
        ("- a\n- b", ["mapping"]),
        ("stages: [", ["not YAML"]),
        (_GOOD + "static_pan: [small]", ["static_pan: unknown key: did you mean static_plan?"]),
        (
            _GOOD + "zzz: 1",
            ["zzz: unknown key: known: policy, stages, static_plan, speculation, overload, gateway"],
        ),
        (_GOOD + "speculation: {adaptiv: false}", ["speculation.adaptiv", "did you mean adaptive?"]),
        (_GOOD + "policy: {artifact: artifact, timeout: 5}", ["did you mean timeout_ms?"]),
        (_GOOD + "gateway: {prot: 8001}", ["gateway.prot: unknown key: did you mean port?"]),
        (_GOOD + "gateway: {port: 65536}", ["gateway.port"]),
        (_GOOD.replace("name: large", "name: gateway"), ["gateway", "another process"]),
        (_GOOD + "overload: drop", ["overload: ", "'queue', 'degrade' or 'shed'"]),
        (_GOOD + "speculation: yes", ["speculation: must be a mapping, such as"]),
        (_GOOD + "static_plan: small", ["static_plan: must be a list, such as"]),
        (_GOOD + "static_plan: [small]\nstatic_plan: [large]", ["not YAML", "static_plan is there twice"]),
        (_GOOD + "static_plan: [medium]", ["static_plan", "medium", "small, large"]),
        (_GOOD + "static_plan: [large, small]", ["static_plan", "order"]),
        (_GOOD.replace("large,", "small,", 1), ["names must differ"]),
        (_GOOD.replace("name: large", "name: router"), ["router", "another process"]),
        (_GOOD.replace("name: large", "name: Large"), ["stages.1.name"]),
        (_GOOD.replace("8.0", "-1"), ["stages.1.cost", "greater than 0"]),
        (_GOOD.replace("8.0", ".nan"), ["stages.1.cost", "finite"]),
        (_GOOD.replace("threads: 2", "threads: 0"), ["stages.1.threads"]),
        (_GOOD.replace("max_batch: 4", "max_batch: 4097"), ["stages.1.max_batch", "equal to 4096"]),
        *(
            (_GOOD.replace("name: large", f"name: {name}"), ["stages.1.name", name, "a-z, 0-9 and '-'"])
            for name in ("f_wrap", "Large", "-a", "a" * 64)
        ),
        (_GOOD.replace("threads: 2", "engine: torch"), ["stages.1.engine", "onnx"]),
        (
            _GOOD.replace("threads: 2", "threads: 2, engine: vllm"),
            ["stages.1: threads is an option of engine onnx, and this model's is vllm: remove it"],
        ),
        (
            _GOOD.replace("threads: 2", "engine: vllm, vllm: {tensor_paralel: 2}"),
            ["stages.1.vllm.tensor_paralel: unknown key: did you mean tensor_parallel?"],
        ),
        (
            _GOOD.replace("models/large", "models/none"),
            ["stages.1.path", "config.json", "; models/none is relative to the cascade file"],
        ),
        (
            _GOOD + "policy: {artifact: nowhere}",
            ["policy.artifact", "; nowhere is relative to the cascade file"],
        ),
        (_GOOD + "policy: {timeout_ms: 5}", ["policy.artifact", "required"]),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_entry(directory, content, words):
    with pytest.raises(SettingsError) as refused:
        _read(directory, content)
    for word in (str(directory / "cascade.yaml"), *words):
        assert word in str(refused.value)


def test_each_wrong_entry_has_its_line_and_lists_are_not_blamed_for_their_entries(directory):
    with pytest.raises(SettingsError) as refused:
        _read(directory, "stages:\n  - {name: small, path: models/small, cots: 1}\nstatic_plan: 5")
    assert str(refused.value).splitlines() == [
        f"{directory / 'cascade.yaml'}:",
        "  stages.0.cost: is required",
        "  stages.0.cots: unknown key: did you mean cost?",
        "  static_plan: must be a list, such as [first, second]",
    ]


def test_a_key_of_a_merged_mapping_may_be_there_again(directory):
    content = """
stages:
  - &small {name: small, path: models/small, cost: 1.5}
  - {<<: *small, name: large, path: models/large, cost: 8.0}
"""
    assert [stage.name for stage in _read(directory, content).stages] == ["small", "large"]


def test_variables_that_count_too_are_named(directory, monkeypatch):
    monkeypatch.setenv("ASD_ROUTER_SERVICE_HOST", "10.0.0.7")
    monkeypatch.setenv("ASD_ROUTER_SPECULATION__PIPELIND", "false")
    with pytest.raises(SettingsError) as refused:
        _read(directory, _GOOD)
    assert "cascade.yaml with ASD_ROUTER_SPECULATION__PIPELIND: speculation.pipelind: " in str(refused.value)


def test_an_absolute_path_is_not_called_relative(directory):
    with pytest.raises(SettingsError) as refused:
        _read(directory, _GOOD.replace("models/large", "/nowhere"))
    assert str(refused.value).endswith("(it has no config.json)")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: No such file"):
        read_cascade(tmp_path / "none.yaml")


def test_paths_are_relative_to_the_file(directory, monkeypatch):
    monkeypatch.chdir("/")
    cascade = _read(directory, _GOOD + "policy: {artifact: artifact, reports_path: reports.jsonl}")
    assert cascade.stages[1].path == directory / "models" / "large"
    assert cascade.policy.artifact == directory / "artifact"
    assert cascade.policy.reports_path == directory / "reports.jsonl"


def test_ports_follow_from_the_base():
    ports = Ports.from_base(50050, 4)
    assert (ports.router, ports.policy, ports.stages) == (50050, 50051, (50061, 50062, 50063, 50064))
    assert ports.highest == 50064
    assert ports.gateway is None


def _load(settings, config, tmp_path):
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump(config))
    return settings.load(file)


def test_every_process_loads_its_configuration(directory):
    cascade = _read(directory, _GOOD + "policy: {artifact: artifact, timeout_ms: 70}")
    router, policy, small, large = services_of(
        cascade, Ports.from_base(7000, 2), Path("/run/asd"), drain_seconds=3.0
    )
    assert [each.name for each in (router, policy, small, large)] == ["router", "policy", "small", "large"]
    assert [each.address.rpartition(":")[2] for each in (router, policy, small, large)] == [
        "7000",
        "7001",
        "7011",
        "7012",
    ]

    loaded = _load(RouterSettings, router.config, directory)
    assert (loaded.listen, loaded.drain_seconds) == ("127.0.0.1:7000", 3.0)
    assert (loaded.policy.target, loaded.policy.timeout_ms) == ("127.0.0.1:7001", 70.0)
    assert [(stage.name, stage.target, stage.cost, stage.timeout_ms) for stage in loaded.stages] == [
        ("small", "127.0.0.1:7011", 1.5, 30_000.0),
        ("large", "127.0.0.1:7012", 8.0, 500.0),
    ]
    assert loaded.static_plan == ("large",)

    loaded = _load(StageSettings, large.config, directory)
    model = loaded.models[0]
    assert (loaded.listen, loaded.default_name, loaded.drain_seconds) == ("127.0.0.1:7012", "large", 3.0)
    assert (model.path, model.threads) == (directory / "models" / "large", 2)
    assert (model.max_batch, model.default_max_new_tokens, model.preload) == (4, 9, True)
    assert model.max_model_len == 64

    loaded = _load(PolicySettings, policy.config, directory)
    assert (loaded.listen, loaded.artifact) == ("127.0.0.1:7001", directory / "artifact")
    assert loaded.cascade == ("small", "large")
    assert loaded.reports_path == Path("/run/asd/reports.jsonl")


def _on_vllm(content: str = "", first: str = "") -> str:
    """Return a cascade whose stages run vLLM. content, first: the section of the last and the first stage."""
    return f"""
stages:
  - {{name: small, path: models/small, cost: 1.5, engine: vllm{first}}}
  - {{name: large, path: models/large, cost: 8.0, engine: vllm{content}}}
"""


@pytest.mark.parametrize(
    ("section", "inside"),
    [
        ("", (False, True)),
        (", vllm: {dtype: float16}", (False, True)),
        (", vllm: {verify_inside: auto}", (False, True)),
        (", vllm: {verify_inside: false}", (False, False)),
        (", vllm: {verify_inside: true}", (True, True)),
        # Too short for a proposal, which nobody makes.
        (", vllm: {verify_inside: false, max_model_len: 16}", (False, False)),
    ],
)
def test_stages_that_get_drafts_verify_them_inside_vllm(directory, section, inside):
    content = _on_vllm(section, section)
    _, *stages = services_of(_read(directory, content), Ports.from_base(7000, 2), Path("/run/asd"))
    models = [_load(StageSettings, stage.config, directory).models[0] for stage in stages]
    assert tuple(model.vllm.verify_inside for model in models) == inside


@pytest.mark.parametrize("value", ["'yes'", "'true'", "1", "null", "[]", "automatic"])
def test_verify_inside_is_true_false_or_auto(directory, value):
    with pytest.raises(SettingsError, match=r"stages\.1\.vllm\.verify_inside: must be true, false or auto$"):
        _read(directory, _on_vllm(f", vllm: {{verify_inside: {value}}}"))


def test_a_context_without_room_for_a_proposal_is_refused(directory):
    content = _on_vllm(", vllm: {max_model_len: 120, proposed_tokens: 120}")
    with pytest.raises(SettingsError, match=r"stages\.1\.vllm: .*max_model_len \(120\) must exceed"):
        _read(directory, content)
    assert _read(directory, content.replace("max_model_len: 120", "max_model_len: 121"))


def test_a_first_stage_that_verifies_inside_is_warned_of(directory):
    (warning,) = _read(directory, _on_vllm(first=", vllm: {verify_inside: true}")).warnings()
    assert warning.startswith("stages.0.vllm.verify_inside")
    assert _read(directory, _on_vllm(", vllm: {verify_inside: true}")).warnings() == ()


def test_without_a_policy_there_is_no_policy_process(directory):
    services = services_of(_read(directory, _GOOD), Ports.from_base(7000, 2), Path("/run/asd"))
    assert [each.name for each in services] == ["router", "small", "large"]
    assert _load(RouterSettings, services[0].config, directory).policy is None


def test_a_gateway_asks_the_router_with_the_settings_of_the_file(directory, monkeypatch):
    section = "gateway: {port: 9000, timeout_ms: 50, max_concurrent: 3, access_log: true}"
    cascade = _read(directory, _GOOD + section)
    ports = replace(Ports.from_base(7000, 2), gateway=8001)
    *_, gateway = services_of(cascade, ports, Path("/run/asd"), drain_seconds=3.0)
    assert (gateway.name, gateway.module, gateway.address) == (
        "gateway",
        "services.gateway",
        "127.0.0.1:8001",
    )
    loaded = _load(GatewaySettings, gateway.config, directory)
    assert (loaded.listen, loaded.drain_seconds) == ("127.0.0.1:8001", 3.0)
    assert (loaded.router.target, loaded.router.timeout_ms) == ("127.0.0.1:7000", 50.0)
    assert (loaded.max_concurrent, loaded.access_log) == (3, True)
    monkeypatch.setenv("ASD_GATEWAY_ACCESS_LOG", "false")
    assert not _load(GatewaySettings, gateway.config, directory).access_log


def test_a_gateway_without_a_section_has_its_own_defaults(directory):
    ports = replace(Ports.from_base(7000, 2), gateway=8000)
    *_, gateway = services_of(_read(directory, _GOOD), ports, Path("/run/asd"), drain_seconds=3.0)
    plain = GatewaySettings(listen="127.0.0.1:8000", router={"target": "127.0.0.1:7000"}, drain_seconds=3.0)
    assert _load(GatewaySettings, gateway.config, directory) == plain


def test_a_stage_named_like_a_model_of_the_gateway_is_refused_only_with_a_gateway(directory):
    cascade = _read(directory, _GOOD.replace("name: large", "name: asd-exact"))
    ports = Ports.from_base(7000, 2)
    assert [each.name for each in services_of(cascade, ports, directory)] == ["router", "small", "asd-exact"]
    with pytest.raises(SettingsError, match=r"a stage named asd-exact.*--no-gateway"):
        services_of(cascade, replace(ports, gateway=8000), directory)


def test_what_works_ahead_can_be_switched_off_for_the_cascade_and_by_a_variable(directory, monkeypatch):
    cascade = _read(directory, _GOOD + "speculation: {adaptive: false, pipelined: true}")
    router, *_ = services_of(cascade, Ports.from_base(7000, 2), Path("/run/asd"))
    loaded = _load(RouterSettings, router.config, directory).speculation
    assert (loaded.adaptive, loaded.pipelined, loaded.early_abandon) == (False, True, True)
    monkeypatch.setenv("ASD_ROUTER_SPECULATION__PIPELINED", "false")
    loaded = _load(RouterSettings, router.config, directory).speculation
    assert (loaded.adaptive, loaded.pipelined) == (False, False)


def test_what_becomes_of_too_many_requests_is_said_for_the_cascade_or_by_a_variable(directory, monkeypatch):
    services = services_of(_read(directory, _GOOD), Ports.from_base(7000, 2), Path("/run/asd"))
    assert _load(RouterSettings, services[0].config, directory).overload is Overload.QUEUE
    cascade = _read(directory, _GOOD + "overload: shed")
    router, *_ = services_of(cascade, Ports.from_base(7000, 2), Path("/run/asd"))
    assert _load(RouterSettings, router.config, directory).overload is Overload.SHED
    monkeypatch.setenv("ASD_ROUTER_OVERLOAD", "degrade")
    assert _load(RouterSettings, router.config, directory).overload is Overload.DEGRADE


def test_the_embedded_cascade_is_readable():
    cascade = CascadeFile.load(EMBEDDED)
    assert [(stage.name, stage.cost) for stage in cascade.stages] == [
        ("small", 1.6),
        ("medium", 4.2),
        ("large", 8.8),
    ]
    for stage in cascade.stages:
        assert (EMBEDDED.parent / stage.path / "config.json").is_file()
