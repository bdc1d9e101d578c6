"""Asks stages how long they have been idle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asd.errors import AsdError
from asd.transport.addresses import host_of
from asd.transport.channel import call_unary
from asd.transport.tls import watched_channel_credentials
from asd.v1 import stage_pb2, stage_pb2_grpc
from services.common.addresses import resolve_addresses
from services.common.channel import open_channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import grpc

    from services.common.tls import ClientTls

_DNS = "dns:///"


class StageUsage:
    """Asks every replica of a stage. targets: address and TLS by stage, as the router's. Close it when done.

    timeout_ms: of each call. Raises UnusableFile for certificates that cannot be used.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[str, ClientTls | None]],
        timeout_ms: float,
        resolve: Callable[[str], Awaitable[list[str]]] = resolve_addresses,
    ) -> None:
        self._targets: dict[str, tuple[str, ClientTls | None]] = {}
        for stage, (target, tls) in targets.items():
            named = tls
            if tls is not None:
                watched_channel_credentials(tls)
                # Replicas are called by address, but their certificates have the stage's name.
                named = tls.model_copy(update={"server_name": tls.server_name or host_of(target)})
            self._targets[stage] = target, named
        self._timeout_ms = timeout_ms
        self._resolve = resolve
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}

    async def idle_ms(self, stage: str, replicas: int) -> float | None:
        """Return the time since a stage was last used, in milliseconds.

        None if fewer than `replicas` replicas answer.
        """
        target, tls = self._targets[stage]
        try:
            addresses = await self._addresses(target)
        except (OSError, ValueError):
            return None
        for key in [key for key in self._channels if key[0] == stage and key[1] not in addresses]:
            await self._channels.pop(key).close()
        if len(addresses) < replicas:
            return None
        found = await asyncio.gather(*(self._ask(stage, address, tls) for address in addresses))
        known = [idle_ms for idle_ms in found if idle_ms is not None]
        return min(known) if len(known) == len(found) else None

    async def close(self) -> None:
        """Close every channel."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _addresses(self, target: str) -> list[str]:
        if target.startswith(_DNS):
            return await self._resolve(target.removeprefix(_DNS))
        return [address.strip() for address in target.split(",")]

    async def _ask(self, stage: str, address: str, tls: ClientTls | None) -> float | None:
        try:
            channel = self._channels.get((stage, address))
            if channel is None:
                channel = self._channels[stage, address] = open_channel(address, tls=tls)
            status = await call_unary(
                stage_pb2_grpc.StageServiceStub(channel).Status,
                stage_pb2.StatusRequest(),
                timeout_ms=self._timeout_ms,
                peer=f"stage {stage} at {address}",
            )
        except AsdError:
            return None
        is_busy = any(model.queued_requests or model.running_requests for model in status.models)
        return 0.0 if is_busy else status.idle_ms
