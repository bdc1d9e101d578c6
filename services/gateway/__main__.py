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

# How long after a router was away it is asked again for the stages' names. Chosen.
_AGAIN_S = 2.0


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
            is_checked = await _check_names(cascade)
            gateway = Gateway(settings, cascade, Instruments(), AccessLog(is_on=settings.access_log), metrics)
            serving = asyncio.create_task(serve(gateway, settings))
            checking = None if is_checked else asyncio.create_task(_check_later(cascade))
            await asyncio.wait({serving, checking} if checking else {serving}, return_when="FIRST_COMPLETED")
            if checking and checking.done():
                # Raises if a name is taken.
                checking.result()
            await serving
    except (UnusableFile, PreconditionFailed) as error:
        raise SystemExit(f"asd: {error.message}") from error
    finally:
        await asyncio.to_thread(telemetry.shutdown_telemetry)


async def _check_names(cascade: Cascade) -> bool:
    """Return whether the router could be asked now. Raises PreconditionFailed if a stage has a taken name."""
    try:
        await cascade.describe("")
    except PreconditionFailed:
        raise
    except Unauthenticated:
        logger.info("the router wants tokens: the stages' names are read with the first caller's")
    except AsdError as error:
        logger.warning("the stages' names are not known yet: %s", error.message)
        return False
    return True


async def _check_later(cascade: Cascade) -> None:
    """Ask a router that is away until it answers. Raises PreconditionFailed if a stage has a taken name."""
    while not await _check_names(cascade):  # noqa: ASYNC110
        await asyncio.sleep(_AGAIN_S)


def main() -> None:
    """Read the settings and serve."""
    report_nothing()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = GatewaySettings.from_arguments()
    telemetry.setup_telemetry("asd-gateway", settings.metrics_listen)
    run_service(run(settings))


if __name__ == "__main__":
    main()
