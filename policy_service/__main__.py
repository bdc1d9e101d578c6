"""`python -m policy_service --config FILE`: load a policy and serve it."""

from __future__ import annotations

import logging
import sys

from asd.v1 import policy_pb2_grpc
from policy_service.artifact import UnfitArtifact, load_policy
from policy_service.reports import ReportLog
from policy_service.servicer import PolicyServicer
from policy_service.settings import PolicySettings
from services.common import telemetry
from services.common.server import ServiceRegistration, run_service, serve


def main() -> None:
    """Serve until SIGTERM. Exit with a message where the artifact or the reports cannot be used."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    settings = PolicySettings.from_arguments()
    try:
        policy, document = load_policy(settings.artifact)
    except UnfitArtifact as error:
        raise SystemExit(f"asd-policy: {error}") from error
    try:
        reports = ReportLog(settings.reports_path) if settings.reports_path else None
    except OSError as error:
        raise SystemExit(
            f"asd-policy: reports_path {settings.reports_path}: {error.strerror}: choose a file that can be "
            "written"
        ) from error
    telemetry.setup_telemetry("asd-policy")
    servicer = PolicyServicer(policy, document, reports)
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server),
    )
    run_service(serve("policy", settings.listen, [registration], drain_seconds=settings.drain_seconds))


if __name__ == "__main__":
    main()
