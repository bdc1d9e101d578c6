"""`python -m services.stage --config FILE`: build a stage's models and serve them."""

from __future__ import annotations

import logging
import sys

from asd.v1 import stage_pb2_grpc
from services.common import telemetry
from services.common.errors import AsdError
from services.common.server import ServiceRegistration, run_service, serve
from services.stage.onnx_engine import OnnxEngine, OnnxOptions
from services.stage.residency import Residency
from services.stage.servicer import StageServicer
from services.stage.settings import ModelSettings, StageSettings


def build(settings: StageSettings) -> tuple[Residency, StageServicer]:
    """Return the models that the settings describe, none of them loaded yet, and the servicer over them."""
    residency = Residency(
        {model.name: _engine(model, settings.max_queue) for model in settings.models},
        settings.default_name,
        settings.memory_budget_mb << 20,
    )
    return residency, StageServicer(residency)


async def run(settings: StageSettings) -> None:
    """Load what is to be there from the start, and serve until SIGTERM or SIGINT."""
    residency, servicer = build(settings)
    for model in settings.models:
        if model.preload:
            await residency.load(model.name)
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
    )
    await serve(
        f"stage:{settings.default_name}",
        settings.listen,
        [registration],
        drain_seconds=settings.drain_seconds,
        on_drain=servicer.drain,
    )


def main() -> None:
    """Read the settings and serve."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    settings = StageSettings.from_arguments()
    telemetry.setup_telemetry("asd-stage")
    try:
        run_service(run(settings))
    except AsdError as error:
        raise SystemExit(f"asd-stage: {error.message}") from error


def _engine(model: ModelSettings, max_queue: int) -> OnnxEngine:
    options = OnnxOptions(
        threads=model.threads,
        max_batch=model.max_batch,
        max_lanes=model.max_lanes,
        cached_sequences=model.cached_sequences,
        max_queue=max_queue,
        default_max_new_tokens=model.default_max_new_tokens,
        resync=model.resync,
    )
    return OnnxEngine(model.name, model.path, options)


if __name__ == "__main__":
    main()
