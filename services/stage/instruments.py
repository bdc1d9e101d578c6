"""The stage's metrics, read from its models at each export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common import telemetry
from services.common.telemetry import Attributes, Metrics
from services.stage.engines.engine import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Observation

    from services.stage.engines.engine import EngineStatus
    from services.stage.model_pool import ModelPool

    Read = Callable[[EngineStatus], float]


def watch_models(pool: ModelPool) -> None:
    """Register the metrics of a process's models. Call it after telemetry is set up."""
    meter = telemetry.meter()

    def each_model(read: Read) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [
                telemetry.observation(read(engine.status()), {Attributes.REQUEST_MODEL: name})
                for name, engine in pool.engines.items()
            ]

        return observe

    def process(read: Callable[[], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [telemetry.observation(read())]

    def is_ready(status: EngineStatus) -> bool:
        return status.state is ModelState.READY

    for name, unit, description, read in (
        (Metrics.QUEUE_DEPTH, "{request}", "requests that wait", lambda s: s.queued),
        (Metrics.RUNNING_REQUESTS, "{request}", "requests that are computed", lambda s: s.running),
        (Metrics.KV_CACHE, "By", "memory of KV caches in use", lambda s: s.kv_cache_bytes),
        (
            Metrics.CACHED_SEQUENCES,
            "{sequence}",
            "sequences kept for prefix reuse",
            lambda s: s.cached_sequences,
        ),
        (Metrics.MODELS_LOADED, "{model}", "1 where a model is in memory, else 0", is_ready),
        (
            Metrics.MODEL_MEMORY,
            "By",
            "estimated memory of a model in memory; 0 where it is not",
            lambda s: s.memory_bytes if is_ready(s) else 0,
        ),
    ):
        meter.create_observable_gauge(name, [each_model(read)], unit, description)
    for name, description, read in (
        (Metrics.COMPLETED_REQUESTS, "requests that were answered", lambda s: s.completed),
        (Metrics.CANCELLED_REQUESTS, "requests that their callers left", lambda s: s.cancelled),
    ):
        meter.create_observable_counter(name, [each_model(read)], "{request}", description)
    meter.create_observable_gauge(
        Metrics.MODEL_MEMORY_BUDGET,
        [process(lambda: pool.budget_bytes)],
        "By",
        "budget for models in memory; 0: none",
    )
    meter.create_observable_gauge(
        Metrics.IDLE,
        [process(lambda: pool.idle_ms() / 1000.0)],
        "s",
        "time since a call last used a model",
    )
