"""The file that describes a cascade on one machine, and the settings of each of its processes.

It only reads the file, and starts nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from asd.errors import PreconditionFailed
from asd.visible import one_line
from services.common.settings import (
    Requests,
    Section,
    ServiceSettings,
    SettingsError,
    explain,
    service_config,
    suggestion,
)
from services.gateway.models import Models
from services.router.domain import Overload
from services.router.settings import Milliseconds, Name, RouterSettings, SpeculationSettings
from services.stage.engines.settings import (
    AtATime,
    ContextLength,
    Count,
    EngineName,
    TensorrtLlmSettings,
    Threads,
    VllmBase,
    check_options,
    most_at_a_time,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

EMBEDDED = Path(__file__).with_name("embedded.yaml")
HOST = "127.0.0.1"
HIGHEST_PORT = 65_535
_HTTP = "HTTP: OpenAI, Anthropic"
ROUTER, POLICY, GATEWAY = "router", "policy", "gateway"
Port = Annotated[int, Field(ge=1, le=HIGHEST_PORT)]
# Most entries in a message about a file, and characters of each. Chosen: what a person reads.
_MOST_ENTRIES, _MOST_OF_ENTRY = 20, 300


def _check_switch(value: object) -> object:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError("must be true, false or auto")


class VllmSection(VllmBase):
    """Options of the `vllm` engine. verify_inside auto: true for every stage but the first."""

    verify_inside: Annotated[bool | Literal["auto"], BeforeValidator(_check_switch)] = "auto"


class PolicyEntry(Section):
    """The policy service: its artifact, the timeout of its calls, and the folder of its reports."""

    artifact: Path
    timeout_ms: Milliseconds = 100.0
    reports_path: Path | None = None


class GatewayEntry(Section):
    """The HTTP gateway: its port, and those of its settings that make sense on one machine."""

    port: Port | None = None
    timeout_ms: Milliseconds | None = None
    keep_alive_ms: Milliseconds | None = None
    max_concurrent: Requests | None = None
    access_log: bool = False


class LocalStage(Section):
    """One stage and its model. cost: of a whole answer, in cost units."""

    name: Name
    path: Path
    cost: float = Field(gt=0, allow_inf_nan=False)
    engine: EngineName = "onnx"
    threads: Threads = 1
    max_batch: AtATime | None = None
    max_model_len: ContextLength | None = None
    default_max_new_tokens: Count = 160
    timeout_ms: Milliseconds = 30_000.0
    vllm: VllmSection | None = None
    tensorrt_llm: TensorrtLlmSettings | None = None

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        check_options(self.engine, self.model_fields_set)
        return self

    def verifies_inside(self, *, gets_drafts: bool) -> bool:
        """Return whether vLLM is to verify drafts inside. gets_drafts: whether earlier stages draft."""
        if self.engine != "vllm":
            return False
        given = "auto" if self.vllm is None else self.vllm.verify_inside
        return gets_drafts if given == "auto" else given


class CascadeFile(ServiceSettings):
    """A cascade on one machine. See embedded.yaml for what each entry means."""

    model_config = service_config("ASD_CASCADE_")

    policy: PolicyEntry | None = None
    stages: tuple[LocalStage, ...] = Field(min_length=1)
    # Empty: the last stage alone.
    static_plan: tuple[str, ...] = ()
    speculation: SpeculationSettings | None = None
    # None: the router's default.
    overload: Overload | None = None
    gateway: GatewayEntry = GatewayEntry()

    @model_validator(mode="after")
    def _check(self) -> Self:
        reserved = {ROUTER, POLICY, GATEWAY} & {stage.name for stage in self.stages}
        if reserved:
            raise ValueError(f"stages: no stage can be called {reserved.pop()}: that is another process")
        for index, stage in enumerate(self.stages):
            if stage.vllm is not None and stage.verifies_inside(gets_drafts=index > 0):
                try:
                    stage.vllm.check_proposals()
                except ValueError as error:
                    raise ValueError(f"stages.{index}.vllm: {error}") from error
        return self

    def warnings(self) -> tuple[str, ...]:
        """Return what the file may say, but costs more than it gives."""
        first = self.stages[0]
        if not first.verifies_inside(gets_drafts=False):
            return ()
        return (
            f"stages.0.vllm.verify_inside is true: {first.name} is the first stage and gets no drafts but "
            "requests' predictions, and each token that it writes takes 1.1 to 1.5 times as long; leave "
            "verify_inside out, or set it to auto",
        )


@dataclass(frozen=True)
class Ports:
    """The port of each process; `stages` in the order of the cascade. gateway: None for no gateway."""

    router: int
    policy: int
    stages: tuple[int, ...]
    gateway: int | None = None

    @classmethod
    def from_base(cls, base: int, stages: int) -> Ports:
        """Return the ports for --port-base: base, base + 1, and from base + 11 for the stages; no gateway."""
        return cls(base, base + 1, tuple(base + 11 + index for index in range(stages)))

    @property
    def highest(self) -> int:
        """The largest number that follows from the base."""
        return max(self.router, self.policy, *self.stages)


@dataclass(frozen=True)
class Service:
    """A process to run: `name` for people, `module` for `python -m`, its configuration and its address.

    speaks: the protocol of its port, for people.
    """

    name: str
    module: str
    config: dict[str, Any]
    port: int
    speaks: str = "gRPC"

    @property
    def address(self) -> str:
        """The address for clients."""
        return f"{HOST}:{self.port}"


def read_cascade(file: Path) -> CascadeFile:
    """Return the content of a cascade file, with absolute paths.

    Raises SettingsError, naming file and entry, if an entry is missing, unknown or wrong, or a path does not
    exist.
    """
    try:
        cascade = CascadeFile.load(file)
    except SettingsError as error:
        if isinstance(error.__cause__, ValidationError):
            raise SettingsError(_explain(file, error.__cause__.errors(include_url=False))) from error
        raise
    try:
        # The router's settings check the names of stages.
        RouterSettings(**router_config(cascade, Ports.from_base(1, len(cascade.stages)), drain_seconds=0))
    except ValidationError as error:
        variables = RouterSettings.variables_in(os.environ)
        beside = f" with {', '.join(sorted(variables))}" if variables else ""
        raise SettingsError(f"{file}{beside}: {explain(error)}") from error
    base = file.resolve().parent
    stages = []
    for index, stage in enumerate(cascade.stages):
        path = _resolved(base / stage.path, f"{file}: stages.{index}.path")
        if not (path / "config.json").is_file():
            raise SettingsError(
                f"{file}: stages.{index}.path: {path} is not a Hugging Face model directory (it has no "
                f"config.json){_relative(stage.path)}"
            )
        vllm = stage.vllm
        if vllm is not None and vllm.lora:
            where = f"{file}: stages.{index}.vllm.lora"
            adapters = {task: _resolved(base / adapter, where) for task, adapter in vllm.lora.items()}
            vllm = vllm.model_copy(update={"lora": adapters})
        stages.append(stage.model_copy(update={"path": path, "vllm": vllm}))
    policy = cascade.policy
    if policy is not None:
        artifact = _resolved(base / policy.artifact, f"{file}: policy.artifact")
        if not artifact.exists():
            raise SettingsError(
                f"{file}: policy.artifact: {artifact} is not there; make one with asd-policy, or leave "
                f"`policy` out to follow static_plan{_relative(policy.artifact)}"
            )
        reports = policy.reports_path and _resolved(
            base / policy.reports_path, f"{file}: policy.reports_path"
        )
        policy = policy.model_copy(update={"artifact": artifact, "reports_path": reports})
    return cascade.model_copy(update={"policy": policy, "stages": tuple(stages)})


def _resolved(path: Path, where: str) -> Path:
    """Return a path without links. Raises SettingsError for one that no file can have."""
    try:
        found = path.resolve()
        # It raises for faults that `resolve` ignores, such as a part that is too long.
        (found / "config.json").is_file()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise SettingsError(f"{where}: {one_line(str(path), _MOST_OF_ENTRY)}: {reason.lower()}") from error
    return found


def _relative(path: Path) -> str:
    return "" if path.is_absolute() else f"; {path} is relative to the cascade file"


def _explain(file: Path, problems: Sequence[ErrorDetails]) -> str:
    """Return the faults of a file, one line per entry if there are several."""
    places = [problem["loc"] for problem in problems]
    lines = [
        one_line(f"{'.'.join(map(str, problem['loc'])) or 'cascade'}: {_say(problem)}", _MOST_OF_ENTRY)
        for problem in problems
        # A list of wrong entries counts as an empty one.
        if not any(
            len(place) > len(problem["loc"]) and place[: len(problem["loc"])] == problem["loc"]
            for place in places
        )
    ]
    if len(lines) > _MOST_ENTRIES:
        lines[_MOST_ENTRIES:] = [f"and {len(lines) - _MOST_ENTRIES} more"]
    return f"{file}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{file}:", *lines])


def _say(problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return "is required"
    if problem["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        return "must be a mapping, such as {key: value}"
    if problem["type"] == "tuple_type":
        return "must be a list, such as [first, second]"
    if problem["type"] != "extra_forbidden":
        return problem["msg"].removeprefix("Value error, ")
    *place, key = problem["loc"]
    section: dict[object, type[Section] | type[ServiceSettings]] = {
        "": CascadeFile,
        "stages": LocalStage,
        "policy": PolicyEntry,
        "speculation": SpeculationSettings,
        "gateway": GatewayEntry,
        "vllm": VllmSection,
        "tensorrt_llm": TensorrtLlmSettings,
    }
    names = [part for part in place if isinstance(part, str)]
    known = list(section[names[-1] if names else ""].model_fields)
    return f"unknown key: {suggestion(str(key), known)}"


def services_of(
    cascade: CascadeFile, ports: Ports, directory: Path, *, drain_seconds: float = 10.0
) -> tuple[Service, ...]:
    """Return every process of a cascade: router, policy service and gateway if there are, and each stage.

    directory: folder for reports if the file names none. Raises SettingsError if a stage is named like one of
    the gateway's models.
    """
    services = [
        Service(
            ROUTER,
            "services.router",
            router_config(cascade, ports, drain_seconds=drain_seconds),
            ports.router,
        )
    ]
    if cascade.policy is not None:
        config = policy_config(cascade, ports.policy, directory, drain_seconds=drain_seconds)
        services.append(Service(POLICY, "policy_service", config, ports.policy))
    for index, (stage, port) in enumerate(zip(cascade.stages, ports.stages, strict=True)):
        config = stage_config(stage, port, gets_drafts=index > 0, drain_seconds=drain_seconds)
        services.append(Service(stage.name, "services.stage", config, port))
    if ports.gateway is not None:
        config = gateway_config(cascade, ports, ports.gateway, drain_seconds=drain_seconds)
        services.append(Service(GATEWAY, "services.gateway", config, ports.gateway, _HTTP))
    return tuple(services)


def router_config(cascade: CascadeFile, ports: Ports, *, drain_seconds: float) -> dict[str, Any]:
    """Return the settings of the router (services.router.settings)."""
    config: dict[str, Any] = {
        "listen": f"{HOST}:{ports.router}",
        "stages": [
            {
                "name": stage.name,
                "target": f"{HOST}:{port}",
                "cost": stage.cost,
                "timeout_ms": stage.timeout_ms,
            }
            for stage, port in zip(cascade.stages, ports.stages, strict=True)
        ],
        "static_plan": list(cascade.static_plan or (cascade.stages[-1].name,)),
        "drain_seconds": drain_seconds,
    }
    if cascade.policy is not None:
        config["policy"] = {
            "target": f"{HOST}:{ports.policy}",
            "timeout_ms": cascade.policy.timeout_ms,
        }
    if cascade.speculation is not None:
        config["speculation"] = cascade.speculation.model_dump(mode="json", exclude_unset=True)
    if cascade.overload is not None:
        config["overload"] = cascade.overload.value
    return config


def policy_config(
    cascade: CascadeFile, port: int, directory: Path, *, drain_seconds: float
) -> dict[str, Any]:
    """Return the settings of the policy service (policy_service.settings). The cascade must have a policy."""
    policy = cascade.policy
    assert policy is not None
    return {
        "listen": f"{HOST}:{port}",
        "cascade": [stage.name for stage in cascade.stages],
        "artifact": str(policy.artifact),
        "reports_path": str(policy.reports_path or directory / "reports.jsonl"),
        "drain_seconds": drain_seconds,
    }


def stage_config(
    stage: LocalStage, port: int, *, gets_drafts: bool = False, drain_seconds: float
) -> dict[str, Any]:
    """Return the settings of a stage process (services.stage.settings).

    gets_drafts: whether earlier stages draft for it.
    """
    model: dict[str, Any] = {
        "name": stage.name,
        "path": str(stage.path),
        "engine": stage.engine,
        "max_batch": most_at_a_time(stage.engine, stage.max_batch),
        "default_max_new_tokens": stage.default_max_new_tokens,
    }
    section = stage.vllm or stage.tensorrt_llm
    if stage.engine == "onnx":
        model["threads"] = stage.threads
        if stage.max_model_len is not None:
            model["max_model_len"] = stage.max_model_len
    elif section is not None:
        model[stage.engine] = section.model_dump(mode="json", exclude_unset=True)
    if stage.engine == "vllm":
        inside = stage.verifies_inside(gets_drafts=gets_drafts)
        model["vllm"] = model.get("vllm", {}) | {"verify_inside": inside}
    return {
        "listen": f"{HOST}:{port}",
        "default_model": stage.name,
        "models": [model],
        "drain_seconds": drain_seconds,
    }


def gateway_config(cascade: CascadeFile, ports: Ports, port: int, *, drain_seconds: float) -> dict[str, Any]:
    """Return the settings of the gateway (services.gateway.settings)."""
    try:
        Models([stage.name for stage in cascade.stages])
    except PreconditionFailed as error:
        raise SettingsError(f"stages: {error.message}, or leave the gateway out with --no-gateway") from error
    config = cascade.gateway.model_dump(mode="json", exclude={"port", "timeout_ms"}, exclude_none=True)
    router: dict[str, Any] = {"target": f"{HOST}:{ports.router}"}
    if cascade.gateway.timeout_ms is not None:
        router["timeout_ms"] = cascade.gateway.timeout_ms
    return {
        "listen": f"{HOST}:{port}",
        "router": router,
        "drain_seconds": drain_seconds,
        **config,
    }
