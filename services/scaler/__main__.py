"""Runs the idle scaler: `python -m services.scaler --config FILE`."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from asd.errors import AsdError
from services.common import telemetry
from services.common.extras import needs
from services.common.privacy import report_nothing
from services.common.server import run_service, serve
from services.scaler.idle_scaler import IdleScaler, Rule
from services.scaler.instruments import ScalerInstruments
from services.scaler.servicer import ManagerServicer
from services.scaler.settings import ScalerSettings
from services.scaler.usage import StageUsage

if TYPE_CHECKING:
    from services.scaler.cluster import Cluster


logger = logging.getLogger(__name__)


async def run(settings: ScalerSettings, cluster: Cluster) -> None:
    """Scale the stages, and serve until SIGTERM or SIGINT."""
    instruments = ScalerInstruments()
    usage = StageUsage({each.name: (each.target, each.tls) for each in settings.stages}, settings.timeout_ms)
    rules = [
        Rule(
            each.name,
            each.deployment,
            each.idle_seconds,
            each.wake_replicas,
            each.min_awake_seconds,
            each.give_up_seconds,
            each.min_replicas,
        )
        for each in settings.stages
    ]
    scaler = IdleScaler(rules, cluster, usage, time.monotonic, instruments.scaled)
    instruments.watch(scaler.views)
    keeping = asyncio.create_task(_keep(scaler, settings.poll_seconds))
    try:
        await serve(
            "manager",
            settings.listen,
            [ManagerServicer(scaler).registration()],
            drain_seconds=settings.drain_seconds,
            options=settings.server_options(),
        )
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        await usage.close()


async def _keep(scaler: IdleScaler, poll_seconds: float) -> None:
    while True:
        try:
            await scaler.update()
        except Exception:
            # One failed update must not end the updates.
            logger.exception("the stages could not be looked at")
        await asyncio.sleep(poll_seconds)


def main() -> None:
    """Read the settings and serve."""
    report_nothing()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = ScalerSettings.from_arguments()
    telemetry.setup_telemetry("asd-manager", settings.metrics_listen)
    with needs("kubernetes", "asd-manager"):
        from services.scaler.kubernetes_cluster import open_cluster
    try:
        cluster = open_cluster(settings.namespace, settings.timeout_ms / 1000.0)
    except AsdError as error:
        raise SystemExit(f"asd-manager: {error.message}") from error
    try:
        run_service(run(settings, cluster))
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
