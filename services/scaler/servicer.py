"""ManagerService over gRPC: converts between messages and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.errors import InvalidRequest
from asd.v1 import manager_pb2, manager_pb2_grpc
from services.common.server import ServiceRegistration
from services.common.version import VERSION
from services.scaler.idle_scaler import SleepState

if TYPE_CHECKING:
    import grpc

    from services.scaler.idle_scaler import IdleScaler, StageView

_STATES = {
    SleepState.UNKNOWN: manager_pb2.SLEEP_STATE_UNSPECIFIED,
    SleepState.AWAKE: manager_pb2.SLEEP_STATE_AWAKE,
    SleepState.WAKING: manager_pb2.SLEEP_STATE_WAKING,
    SleepState.ASLEEP: manager_pb2.SLEEP_STATE_ASLEEP,
}


class ManagerServicer(manager_pb2_grpc.ManagerServiceServicer):
    """Serves asd.v1.ManagerService."""

    def __init__(self, scaler: IdleScaler) -> None:
        self._scaler = scaler

    def registration(self) -> ServiceRegistration:
        """Return the registration of this servicer."""
        return ServiceRegistration(
            "asd.v1.ManagerService",
            lambda server: manager_pb2_grpc.add_ManagerServiceServicer_to_server(self, server),
        )

    async def Wake(  # noqa: N802
        self,
        request: manager_pb2.WakeRequest,
        context: grpc.aio.ServicerContext[manager_pb2.WakeRequest, manager_pb2.WakeResponse],
    ) -> manager_pb2.WakeResponse:
        """Activate a stage."""
        if not request.stage:
            raise InvalidRequest("stage is required", field="stage")
        return manager_pb2.WakeResponse(stage=_stage(await self._scaler.wake(request.stage)))

    async def Status(  # noqa: N802
        self,
        request: manager_pb2.ManagerServiceStatusRequest,
        context: grpc.aio.ServicerContext[
            manager_pb2.ManagerServiceStatusRequest, manager_pb2.ManagerServiceStatusResponse
        ],
    ) -> manager_pb2.ManagerServiceStatusResponse:
        """Return the state of each managed stage."""
        return manager_pb2.ManagerServiceStatusResponse(
            stages=[_stage(view) for view in self._scaler.views()], version=VERSION
        )


def _stage(view: StageView) -> manager_pb2.ManagedStage:
    return manager_pb2.ManagedStage(
        stage=view.stage,
        state=_STATES[view.state],
        wanted_replicas=view.wanted,
        ready_replicas=view.ready,
        idle_ms=view.idle_ms,
        unmanaged=bool(view.autoscaler),
        error=view.error,
    )
