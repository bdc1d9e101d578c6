"""`python -m services.stage --config FILE`: build a stage's models and serve them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from asd.errors import AsdError
from asd.v1 import stage_pb2_grpc
from services.common import telemetry
from services.common.privacy import report_nothing
from services.common.server import ServiceRegistration, run_service, serve
from services.stage.engines.factory import make_all
from services.stage.engines.onnx.partial_folders import remove_own
from services.stage.instruments import StageInstruments, watch_models
from services.stage.model_pool import ModelPool
from services.stage.servicer import StageServicer
from services.stage.settings import StageSettings

logger = logging.getLogger(__name__)


def build(settings: StageSettings) -> tuple[ModelPool, StageServicer]:
    """Return the models that the settings describe, none of them loaded yet, and the servicer over them."""
    engines, damaged = make_all(settings.models, settings.default_name, settings.max_queue)
    budget = settings.memory_budget_mb << 20
    pool = ModelPool(engines, settings.default_name, budget, damaged=damaged)
    return pool, StageServicer(pool, StageInstruments())


async def preload(pool: ModelPool, settings: StageSettings) -> None:
    """Load the models that the settings preload.

    Raises as ModelPool.load does if the default model cannot be loaded. For any other model, the failure is
    logged, and the first request for it tries again.
    """
    for model in settings.models:
        if model.preload and model.name in pool.engines:
            try:
                await pool.load(model.name)
            except AsdError as error:
                if model.name == settings.default_name:
                    raise
                logger.error("model %s is not loaded: %s", model.name, error)


async def run(settings: StageSettings) -> None:
    """Preload models, and serve until SIGTERM or SIGINT."""
    pool, servicer = build(settings)
    watch_models(pool)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until `serve` takes these signals over.
        loop.add_signal_handler(number, _end, number)
    await preload(pool, settings)
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
        options=settings.server_options(),
    )


def _end(number: int) -> None:
    """Remove half-derived models and end at a signal: the thread that derives one cannot be stopped."""
    remove_own()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main() -> None:
    """Read the settings and serve."""
    report_nothing()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Texts are encoded one by one, so the tokenizers' threads are useless, and the library warns when a GPU
    # engine forks after they were started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = StageSettings.from_arguments()
    telemetry.setup_telemetry("asd-stage", settings.metrics_listen)
    try:
        run_service(run(settings))
    except AsdError as error:
        raise SystemExit(f"asd-stage: {error.message}") from error


if __name__ == "__main__":
    main()
