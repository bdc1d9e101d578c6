"""`python -m policy_service --config FILE`: load a policy and serve it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

from asd.transport.files import DamagedFile
from asd.v1 import policy_pb2_grpc
from policy_service.drift import DriftMonitor, DriftRule
from policy_service.instruments import PolicyInstruments
from policy_service.reports import ReportLog
from policy_service.settings import PolicySettings
from services.common import telemetry
from services.common.extras import needs
from services.common.privacy import report_nothing
from services.common.server import ServiceRegistration, run_service, serve

with needs("policy", "asd-policy"):
    from policy_service.document import UnfitArtifact
    from policy_service.servicer import PolicyServicer
    from policy_service.shadow import Shadow
    from policy_service.store import PolicyWatch, follow, open_policy

if TYPE_CHECKING:
    from policy_service.artifact import LoadedArtifact

logger = logging.getLogger(__name__)


async def run(settings: PolicySettings, servicer: PolicyServicer, watch: PolicyWatch | None) -> None:
    """Serve until SIGTERM or SIGINT. watch: follows the store of policies; None: there is no store."""
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server),
    )
    following = None
    if watch is not None:
        following = asyncio.create_task(follow(watch, servicer.use, settings.artifact_poll_seconds))
    try:
        await serve(
            "policy",
            settings.listen,
            [registration],
            drain_seconds=settings.drain_seconds,
            options=settings.server_options(),
        )
    finally:
        if following is not None:
            following.cancel()


def main() -> None:
    """Serve until SIGTERM. Exit with a message if the artifact or the reports cannot be used."""
    report_nothing()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = PolicySettings.from_arguments()
    try:
        loaded, store = open_policy(settings.artifact, settings.cascade)
    except UnfitArtifact as error:
        raise SystemExit(f"asd-policy: {error}") from error
    monitor = DriftMonitor(DriftRule(settings.drift_run_length, settings.drift_tolerance))
    try:
        reports = ReportLog(settings.reports_path, monitor.add) if settings.reports_path else None
    except DamagedFile as error:
        raise SystemExit(f"asd-policy: reports_path: {error}") from error
    except OSError as error:
        raise SystemExit(
            f"asd-policy: reports_path {settings.reports_path}: {error.strerror}: choose a file that can be "
            "written"
        ) from error
    telemetry.setup_telemetry("asd-policy", settings.metrics_listen)
    instruments = PolicyInstruments()
    with _shadow(settings, loaded, instruments) or nullcontext() as shadow:
        servicer = PolicyServicer(
            loaded.policy,
            loaded.document,
            reports,
            monitor=monitor,
            shadow=shadow,
            known_versions=store.names if store else tuple,
            novelty_threshold=settings.novelty_threshold,
        )
        instruments.watch_calibration(servicer.calibration)
        watch = PolicyWatch(store, loaded) if store else None
        run_service(run(settings, servicer, watch))


def _shadow(settings: PolicySettings, live: LoadedArtifact, instruments: PolicyInstruments) -> Shadow | None:
    """Return the shadow of the settings; None, with an error in the log, if it cannot be loaded."""
    if settings.shadow_artifact is None:
        return None
    try:
        candidate, _ = open_policy(settings.shadow_artifact, live.stages)
        if settings.novelty_threshold is not None:
            candidate.policy.mark_above(settings.novelty_threshold)
        max_bytes = settings.shadow_max_mb * 2**20
        return Shadow(candidate.policy, settings.shadow_path, instruments, max_bytes=max_bytes)
    except (UnfitArtifact, DamagedFile, OSError) as error:
        # The live policy must be served even if the candidate fails.
        logger.error("no shadow policy decides beside %s: %s", live.policy.version, error)
        return None


if __name__ == "__main__":
    main()
