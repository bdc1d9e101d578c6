"""Runs the router: `python -m services.router --config FILE`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from asd.transport.files import UnusableFile
from asd.transport.patience import NEW_SECONDS, Patience
from services.common import telemetry
from services.common.auth import TokenInterceptor
from services.common.channel import open_channel
from services.common.privacy import report_nothing
from services.common.server import run_service, serve
from services.router.cascade import Cascade
from services.router.clients.activation import Activation, AlwaysActive, GrpcManager
from services.router.clients.breaker import Breaker
from services.router.clients.directory import Directory
from services.router.clients.policy import GrpcPolicy
from services.router.clients.replicas import Replicas
from services.router.clients.stage import GrpcStage
from services.router.domain import Stage
from services.router.instruments import RouterInstruments
from services.router.planning.draft_selection import SpeculationOptions
from services.router.planning.health import Health
from services.router.planning.knowledge import Knowledge
from services.router.planning.planner import Planner
from services.router.planning.static_plan import StaticPlan
from services.router.servicer import CascadeServicer
from services.router.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.router.clients.activation import Replicated
    from services.router.interfaces import Activator
    from services.router.planning.load import Load


@dataclass(frozen=True)
class Router:
    """A router: its servicer, and the load of its stages."""

    servicer: CascadeServicer
    load: Load


async def build(settings: RouterSettings, channels: AsyncExitStack) -> CascadeServicer:
    """Return the servicer that the settings describe; its channels close with the stack."""
    return (await assemble(settings, channels)).servicer


async def assemble(settings: RouterSettings, channels: AsyncExitStack) -> Router:
    """Return the router that the settings describe; its channels close with the stack."""
    clock = time.monotonic
    names = [stage.name for stage in settings.stages]
    # 0 would mean that no caller is named.
    caller = secrets.randbits(63) + 1
    stages: list[GrpcStage] = []
    replicated: list[tuple[Stage, Replicated]] = []
    for index, entry in enumerate(settings.stages):
        stage = Stage(entry.name, index, entry.cost, entry.timeout_ms, entry.target, entry.model)
        with _within(f"stages.{index}"):
            replicas = Replicas(entry.target, clock, tls=entry.tls)
        channels.push_async_callback(replicas.close)
        patience = Patience(clock, new_seconds=NEW_SECONDS)
        client = GrpcStage(stage, replicas, clock, caller, entry.adapters, patience)
        channels.push_async_callback(client.close)
        stages.append(client)
        replicated.append((stage, replicas))
    policy = None
    if settings.policy is not None:
        target = settings.policy.target
        # No retries with pauses: if the policy is unavailable, the static plan answers sooner.
        with _within("policy"):
            channel = open_channel(target, retry=False, tls=settings.policy.tls)
        await channels.enter_async_context(channel)
        health = Health(f"the policy service at {target}", clock)
        timeout_ms = settings.policy.timeout_ms
        policy = GrpcPolicy(target, channel, names, timeout_ms, Breaker(clock), health, clock)
    static_plan = StaticPlan(tuple(names.index(name) for name in settings.static_plan), len(names))
    instruments = RouterInstruments()
    options = SpeculationOptions(**settings.speculation.model_dump())
    activator = await _activator(settings, replicated, channels)
    if settings.manager is not None:
        instruments.watch_sleep([each.stage for each in stages], lambda: activator.scaled_to_zero)
    knowledge = Knowledge(
        [each.stage for each in stages], clock, activator, has_adaptive_drafts=options.adaptive
    )
    patience = Patience(clock, new_seconds=NEW_SECONDS)
    planner = Planner(knowledge, policy, static_plan, instruments, options, patience, settings.overload)
    servicer = CascadeServicer(
        Cascade(stages, planner, instruments, clock),
        Directory(stages, policy, settings.static_plan, activator),
        clock,
        instruments,
        max_concurrent=settings.max_concurrent,
        batch_concurrency=settings.batch_concurrency,
        default_deadline_ms=settings.default_deadline_ms,
    )
    return Router(servicer, knowledge.load)


async def run(settings: RouterSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    guard = TokenInterceptor(settings.auth) if settings.auth else None
    async with AsyncExitStack() as channels:
        servicer = await build(settings, channels)
        await serve(
            "router",
            settings.listen,
            [servicer.registration()],
            drain_seconds=settings.drain_seconds,
            on_drain=servicer.drain,
            options=replace(settings.server_options(), guard=guard),
        )


async def _activator(
    settings: RouterSettings, stages: Sequence[tuple[Stage, Replicated]], channels: AsyncExitStack
) -> Activator:
    """Return the activator of stages that are scaled to zero; it polls the manager until the stack closes."""
    if settings.manager is None:
        return AlwaysActive()
    target = settings.manager.target
    with _within("manager"):
        channel = open_channel(target, tls=settings.manager.tls)
    await channels.enter_async_context(channel)
    manager = GrpcManager(target, channel, settings.manager.timeout_ms)
    activation = Activation(stages, manager, time.monotonic, settings.manager.poll_ms)
    following = asyncio.create_task(activation.follow())

    async def stop() -> None:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    channels.push_async_callback(stop)
    return activation


@contextmanager
def _within(section: str) -> Iterator[None]:
    """Name the section of the settings in errors about its files."""
    try:
        yield
    except UnusableFile as error:
        raise UnusableFile(f"{section}.{error.message}") from error


def main() -> None:
    """Read the settings and serve."""
    report_nothing()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = RouterSettings.from_arguments()
    telemetry.setup_telemetry("asd-router", settings.metrics_listen)
    run_service(run(settings))


if __name__ == "__main__":
    main()
