"""Runs the gateway: `python -m services.gateway --config FILE`."""

from __future__ import annotations

import asyncio
import logging
import time

from asd.client import AsyncClient
from asd.errors import AsdError, PreconditionFailed, Unauthenticated
from asd.transport.addresses import is_loopback
from asd.transport.files import UnusableFile
from services.common import telemetry
from services.common.extras import needs
from services.common.privacy import report_nothing
from services.common.server import run_service

with needs("gateway", "asd"):
    from services.gateway.app import Gateway
    from services.gateway.cascade import Cascade
    from services.gateway.instruments import AccessLog, Instruments, setup_prometheus
    from services.gateway.server import serve
    from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)


async def run(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    metrics = setup_prometheus()
    peer = settings.router
    if not is_loopback(peer.target) and peer.tls is None:
        logger.warning(
            "callers' tokens go to %s in the clear: set router.tls, or encrypt the network", peer.target
        )
    try:
        client = AsyncClient(
            peer.target,
            timeout_ms=peer.timeout_ms,
            tls=peer.tls,
            interceptors=telemetry.client_interceptors() or (),
        )
        async with client:
            cascade = Cascade(client, peer.target, peer.timeout_ms, time.monotonic)
            await _check_names(cascade)
            gateway = Gateway(settings, cascade, Instruments(), AccessLog(is_on=settings.access_log), metrics)
            await serve(gateway, settings)
    except UnusableFile as error:
        raise SystemExit(f"asd: {error.message}") from error
    finally:
        await asyncio.to_thread(telemetry.shutdown_telemetry)


async def _check_names(cascade: Cascade) -> None:
    """Raise SystemExit if a stage has the name of a virtual model, as far as the router can be asked now."""
    try:
        await cascade.describe("")
    except PreconditionFailed as error:
        raise SystemExit(f"asd: {error.message}") from error
    except Unauthenticated:
        logger.info("the router wants tokens: the stages' names are read with the first caller's")
    except AsdError as error:
        logger.warning("the stages' names are not known yet: %s", error.message)


def main() -> None:
    """Read the settings and serve."""
    report_nothing()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = GatewaySettings.from_arguments()
    telemetry.setup_telemetry("asd-gateway", settings.metrics_listen)
    run_service(run(settings))


if __name__ == "__main__":
    main()
