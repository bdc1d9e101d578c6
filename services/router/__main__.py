"""Runs the router: `python -m services.router --config FILE`."""

from __future__ import annotations

import logging
import time
from contextlib import AsyncExitStack

from services.common import telemetry
from services.common.channel import open_channel
from services.common.server import run_service, serve
from services.router.breaker import Breaker
from services.router.cascade import Cascade
from services.router.clients import Directory, GrpcPolicy, GrpcStage
from services.router.domain import Stage
from services.router.instruments import Instruments
from services.router.planner import Planner
from services.router.replicas import Replicas
from services.router.servicer import CascadeServicer
from services.router.settings import RouterSettings
from services.router.speculation import SpeculationOptions
from services.router.static_plan import StaticPlan


async def build(settings: RouterSettings, channels: AsyncExitStack) -> CascadeServicer:
    """Return the servicer that the settings describe; its channels close with the stack."""
    clock = time.monotonic
    names = [stage.name for stage in settings.stages]
    stages = []
    for index, entry in enumerate(settings.stages):
        stage = Stage(entry.name, index, entry.cost, entry.timeout_ms, entry.target, entry.model)
        replicas = Replicas(entry.target, clock)
        channels.push_async_callback(replicas.close)
        stages.append(GrpcStage(stage, replicas, clock))
    policy = None
    if settings.policy is not None:
        target = settings.policy.target
        # No retries: the static plan is the better answer to a policy that is away.
        channel = await channels.enter_async_context(open_channel(target, retry=False))
        policy = GrpcPolicy(target, channel, names, settings.policy.timeout_ms, Breaker(clock))
    static_plan = StaticPlan(tuple(names.index(name) for name in settings.static_plan), len(names))
    instruments = Instruments()
    options = SpeculationOptions(**settings.speculation.model_dump())
    planner = Planner([each.stage for each in stages], policy, static_plan, instruments, clock, options)
    return CascadeServicer(
        Cascade(stages, planner, instruments, clock),
        Directory(stages, policy, settings.static_plan),
        clock,
        max_concurrent=settings.max_concurrent,
        batch_concurrency=settings.batch_concurrency,
        default_deadline_ms=settings.default_deadline_ms,
    )


async def run(settings: RouterSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    async with AsyncExitStack() as channels:
        servicer = await build(settings, channels)
        await serve(
            "router",
            settings.listen,
            [servicer.registration()],
            drain_seconds=settings.drain_seconds,
            on_drain=servicer.drain,
        )


def main() -> None:
    """Read the settings and serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = RouterSettings.from_arguments()
    telemetry.setup_telemetry("asd-router")
    run_service(run(settings))


if __name__ == "__main__":
    main()
