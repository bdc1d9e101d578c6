"""Settings of the router."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from services.common import validation
from services.common.auth import AuthSettings
from services.common.serving import ServerSettings
from services.common.settings import Requests, Section, Target, service_config
from services.common.tls import ClientTls
from services.router.domain import Overload

# As names of services in Kubernetes.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _check_task(task: str) -> str:
    if not validation.TASK.fullmatch(task):
        raise ValueError(
            "must be 1 to 64 characters of a-z, 0-9, '_', '.' and '-', the first a letter or a digit"
        )
    return task


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name: it may have 1 to 63 characters of a-z, 0-9 and '-', the first and the "
            "last a letter or a digit"
        )
    return name


Name = Annotated[str, AfterValidator(_check_name)]
TaskName = Annotated[str, AfterValidator(_check_task)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PolicyPeer(Section):
    """Address of the policy service, and the timeout of one call."""

    target: Target
    timeout_ms: Milliseconds = 100.0
    tls: ClientTls | None = None


class ManagerPeer(Section):
    """Address of the manager, which activates stages. timeout_ms: of one call. poll_ms: between two polls."""

    target: Target
    timeout_ms: Milliseconds = 2_000.0
    poll_ms: Milliseconds = 1_000.0
    tls: ClientTls | None = None


class StagePeer(Section):
    """One stage. cost: cost units of a whole answer. model: empty for the stage's default model.

    adapters: types of task that the model has adapters for. The stage serves them as MODEL/TASK. Absent: the
    router asks the stage.
    """

    name: Name
    target: Target
    model: str = ""
    cost: float = Field(gt=0, allow_inf_nan=False)
    timeout_ms: Milliseconds = 30_000.0
    tls: ClientTls | None = None
    adapters: tuple[TaskName, ...] | None = None

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.adapters and not self.model:
            raise ValueError("adapters: are asked for as MODEL/TASK: set model, too")
        return self


class SpeculationSettings(Section):
    """Speculative work, as in services.router.planning.draft_selection.SpeculationOptions."""

    pipelined: bool = True
    prefill_ahead: bool = True
    early_abandon: bool = True
    adaptive: bool = True


class RouterSettings(ServerSettings):
    """Settings of the asd router."""

    model_config = service_config("ASD_ROUTER_")

    listen: str = "127.0.0.1:50050"
    # Absent: calls need no token.
    auth: AuthSettings | None = None
    # Absent: there is no policy service, and the static plan always applies.
    policy: PolicyPeer | None = None
    # Absent: stages are never scaled to zero.
    manager: ManagerPeer | None = None
    stages: tuple[StagePeer, ...] = Field(min_length=1)
    # Stages called in order while the policy service is unavailable; the last one answers. If a policy
    # service is configured, only FASTEST follows it: see services.router.planning.planner.
    static_plan: tuple[str, ...] = Field(min_length=1)
    speculation: SpeculationSettings = SpeculationSettings()
    # What happens to requests under overload. queue: they wait, and quality stays; a request is refused if
    # the queue leaves no time before its deadline. degrade: they wait, and the policy counts a stage's queue
    # as cost. shed: like queue, and a request is refused if its stage's queue is longer than one answer.
    overload: Overload = Overload.QUEUE
    # Requests in flight at once; a batch counts as one.
    max_concurrent: Requests = 256
    # Requests of one batch in flight at once.
    batch_concurrency: Requests = 16
    # For callers that set no deadline.
    default_deadline_ms: Milliseconds = 60_000.0
    drain_seconds: float = Field(default=10.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, not {', '.join(names)}")
        unknown = [name for name in self.static_plan if name not in names]
        if unknown:
            raise ValueError(f"static_plan: {', '.join(unknown)} is not among stages ({', '.join(names)})")
        indices = [names.index(name) for name in self.static_plan]
        if indices != sorted(set(indices)):
            raise ValueError("static_plan: name stages once each, in the order of stages")
        return self
