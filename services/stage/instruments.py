"""The stage's metrics: of its calls as they end, and of its models, read at each export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common import telemetry
from services.common.telemetry import Attributes, Metrics
from services.stage.engines.engine import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Observation

    from services.stage.domain import Result, VerificationResult
    from services.stage.engines.engine import EngineStatus
    from services.stage.model_pool import ModelPool

    Read = Callable[[EngineStatus], float]


class StageInstruments:
    """The instruments of a stage's calls. Build it after telemetry is set up.

    They leave out REQUEST_DURATION: that is the router's, and each stage call would count as one more request
    in it. The router measures stage calls as INFERENCE_DURATION.
    """

    def __init__(self) -> None:
        self._enabled = telemetry.metrics_enabled()
        self._to_first_token = telemetry.duration_histogram(
            Metrics.TTFT, "time from a call's arrival to its first token"
        )
        self._per_output_token = telemetry.duration_histogram(
            Metrics.TPOT, "mean time of a call's tokens after the first"
        )

        self._verifications = telemetry.meter().create_counter(
            Metrics.VERIFICATIONS, "{draft}", "drafts that were verified, and where"
        )

    def verified(self, model: str, result: VerificationResult) -> None:
        """A model verified a draft: inside of the request that writes the answer, or outside."""
        place = "inside" if result.while_writing else "outside"
        self._verifications.add(1, {Attributes.REQUEST_MODEL: model, Attributes.VERIFY_PLACE: place})

    def answered(self, model: str, result: Result) -> None:
        """A model answered a call."""
        count = len(result.ids)
        if not self._enabled or not count:
            return
        inference = telemetry.inference_attributes(model, model)
        # The pass over the prompt (and draft) gives the first token.
        self._to_first_token.record_ms(result.queue_ms + result.prefill_ms, inference)
        if count > 1:
            self._per_output_token.record_ms(result.decode_ms / (count - 1), inference)


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
