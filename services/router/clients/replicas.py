"""The replicas of a stage: a channel to each, kept up to date as replicas come and go."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asd.errors import Away
from asd.transport.addresses import host_of
from asd.transport.files import UnusableFile
from asd.transport.tls import watched_channel_credentials
from asd.v1 import stage_pb2_grpc
from services.common.addresses import resolve_addresses
from services.common.channel import open_channel
from services.router.clients.affinity import choose_replica

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    import grpc

    from services.common.tls import ClientTls

logger = logging.getLogger(__name__)

_DNS = "dns:///"
# How long resolved addresses are kept. Chosen: the lifetime of a cluster's DNS records.
_FRESH_SECONDS = 5.0
# Least time between two look-ups after calls to every known address have failed. Chosen: as in
# services.common.channel.
_LOOK_SECONDS = 1.0
# How long a call waits for the first addresses. Chosen.
_RESOLVE_SECONDS = 2.0


@dataclass(eq=False, slots=True)
class Replica:
    """One replica. calls: in flight."""

    address: str
    channel: grpc.aio.Channel
    stub: stage_pb2_grpc.StageServiceAsyncStub
    calls: int = 0


class Replicas:
    """Channels to the replicas behind a target.

    target: "dns:///host:port", where every address of the name is a replica; or one or several "host:port",
    separated by commas. tls: replicas are called by address, but their certificates must show its
    server_name, or else the target's host. clock: monotonic seconds. Close it when done.
    """

    def __init__(
        self,
        target: str,
        clock: Callable[[], float],
        resolve: Callable[[str], Awaitable[list[str]]] = resolve_addresses,
        tls: ClientTls | None = None,
    ) -> None:
        self._name = target.removeprefix(_DNS) if target.startswith(_DNS) else ""
        if tls is not None and not tls.server_name:
            tls = tls.model_copy(update={"server_name": host_of(target)})
        if tls is not None:
            # Channels are opened later, once there are addresses. Report a missing file now.
            watched_channel_credentials(tls)
        self._tls = tls
        self._clock = clock
        self._resolve = resolve
        self._resolved = -_FRESH_SECONDS
        self._refresh: asyncio.Task[None] | None = None
        self._replicas: dict[str, Replica] = {}
        self._leaving: set[Replica] = set()
        self._closing: set[asyncio.Task[None]] = set()
        if not self._name:
            self._follow([address.strip() for address in target.split(",")])

    @property
    def addresses(self) -> tuple[str, ...]:
        """The known addresses."""
        return tuple(self._replicas)

    async def choose(self, key: str, tried: Collection[str] = ()) -> Replica:
        """Return the replica to call for a key, other than those tried. Raises Away if there is none."""
        if self._name and self._clock() - self._resolved >= _FRESH_SECONDS:
            if self._refresh is None or self._refresh.done():
                self._refresh = asyncio.create_task(self._update())
            if not self._replicas:
                await asyncio.wait([self._refresh], timeout=_RESOLVE_SECONDS)
        loads = {address: each.calls for address, each in self._replicas.items() if address not in tried}
        if not loads:
            raise Away(f"{self._name or 'the target'} has no replica that can be called")
        return self._replicas[choose_replica(key, loads)]

    def has_other(self, tried: Collection[str]) -> bool:
        """Return whether there is a replica that was not tried."""
        return any(address not in tried for address in self._replicas)

    async def find_other(self, tried: Collection[str]) -> bool:
        """Return whether there is a replica that was not tried. If not, look up addresses first.

        A look-up that was made a moment ago is not repeated.
        """
        if not self.has_other(tried) and self._clock() - self._resolved >= _LOOK_SECONDS:
            await self.find()
        return self.has_other(tried)

    async def find(self) -> bool:
        """Look for replicas now; return whether there is one."""
        if self._name:
            if self._refresh is None or self._refresh.done():
                self._refresh = asyncio.create_task(self._update())
            await asyncio.wait([self._refresh], timeout=_RESOLVE_SECONDS)
        return bool(self._replicas)

    def forget(self) -> None:
        """Drop the resolved addresses: their replicas are gone."""
        if self._name:
            self._follow([])
            self._resolved = -_FRESH_SECONDS

    @contextmanager
    def calling(self, replica: Replica) -> Iterator[None]:
        """Count the block as a call in flight at a replica."""
        replica.calls += 1
        try:
            yield
        finally:
            replica.calls -= 1
            self._close_if_idle(replica)

    async def close(self) -> None:
        """Close every channel."""
        if self._refresh is not None:
            self._refresh.cancel()
        replicas = [*self._replicas.values(), *self._leaving]
        await asyncio.gather(*(each.channel.close() for each in replicas), *self._closing)

    async def _update(self) -> None:
        try:
            addresses = await self._resolve(self._name)
        except (OSError, ValueError) as error:
            # Keep the known addresses: they may still be valid. ValueError: no port, or no valid name.
            logger.warning("%s cannot be resolved: %s", self._name, error)
            return
        try:
            self._follow(addresses)
        except UnusableFile as error:
            logger.error("no channel to the replicas of %s: %s", self._name, error)
            return
        self._resolved = self._clock()

    def _follow(self, addresses: Collection[str]) -> None:
        for address in addresses:
            if address not in self._replicas:
                # No retries with pauses: another replica, or another stage, is called at once.
                channel = open_channel(address, retry=False, tls=self._tls)
                self._replicas[address] = Replica(address, channel, stage_pb2_grpc.StageServiceStub(channel))
        for address in self._replicas.keys() - set(addresses):
            replica = self._replicas.pop(address)
            self._leaving.add(replica)
            self._close_if_idle(replica)

    def _close_if_idle(self, replica: Replica) -> None:
        """Close the channel to a removed replica once it has no call in flight."""
        if replica in self._leaving and not replica.calls:
            self._leaving.discard(replica)
            closing = asyncio.create_task(replica.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
