"""Exports what there would be if everything that asd counts had happened.

`python -m tests.monitoring.exported`: the services' own instruments run with the Prometheus exporter, and
what it reads is printed. With the argument `otlp` they run, with a span of each name, as OTEL_* variables
say. OpenTelemetry takes one meter for a process, so this is a process of its own. Stand-ins have the fields
that instruments read, and nothing else.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import SimpleNamespace as Fields

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, generate_latest

import policy_service.instruments
import services.router.instruments
import services.scaler.instruments
from asd.errors import Unavailable
from asd.values import DecisionAction, DecisionReason, PlanSource, StageAction
from services.common import telemetry
from services.common.telemetry import Spans, Traced
from services.router.domain import Refusal
from services.router.planning.draft_selection import SkipReason
from services.stage.engines.engine import EngineStatus, ModelState
from services.stage.instruments import StageInstruments, watch_models


def main() -> None:
    """Count everything once and print or send it."""
    if sys.argv[1:] == ["otlp"]:
        telemetry.setup_telemetry("asd-all")
        _count()
        for name, span in vars(Spans).items():
            if name.isupper():
                with Traced(span):
                    pass
        telemetry.shutdown_telemetry()
        return
    registry = CollectorRegistry()
    # As services.common.telemetry serves it.
    reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
    telemetry.use_meter_provider(MeterProvider([reader]))
    _count()
    sys.stdout.write(generate_latest(registry).decode())


def _count() -> None:
    _router()
    _policy()
    _manager()
    _stage()


def _router() -> None:
    router = services.router.instruments.RouterInstruments()
    small, large = Fields(name="small", index=0, model=""), Fields(name="large", index=1, model="")
    for source in (PlanSource.POLICY, PlanSource.STATIC, PlanSource.FIXED):
        first, last = _answer(small, StageAction.GENERATE), _answer(large, StageAction.VERIFY)
        escalated = Fields(action=DecisionAction.ESCALATE, reason=DecisionReason.VALUE)
        stopped = Fields(action=DecisionAction.STOP, reason=DecisionReason.VALUE)
        outcome = Fields(plan_source=source, cost=1.0, latency_ms=1.0, policy_ms=1.0, is_out_of_family=True)
        ahead = Fields(stage=large)
        early = Fields(answer=first, records=(Fields(answer=first, decision=stopped),), prefilled=ahead)
        late = Fields(
            answer=last,
            records=(Fields(answer=first, decision=escalated), Fields(answer=last, decision=stopped)),
            prefilled=None,
        )
        for each in (early, late):
            router.request_answered(Fields(**vars(outcome), **vars(each)), 2)
        router.stage_answered(first, "math", is_adapted=True)
        router.stage_answered(last, "", is_adapted=False)
    for step in ("plan", "decide"):
        router.static_plan_used(step)
    router.draft_skipped(large, SkipReason.LOAD)
    for refusal in Refusal:
        router.request_refused(refusal)
    router.stage_failed(small, Unavailable("away"), 1.0)
    with suppress(Unavailable), router.request_under_way():
        raise Unavailable("away")
    router.watch_sleep([small, large], lambda: frozenset({1}))


def _answer(stage: Fields, action: StageAction) -> Fields:
    usage = Fields(prompt_tokens=1, cached_prompt_tokens=1, completion_tokens=1)
    timing = Fields(queue_ms=1.0, prefill_ms=1.0, decode_ms=1.0)
    return Fields(
        stage=stage,
        action=action,
        latency_ms=1.0,
        first_message_ms=1.0,
        model="small/math",
        result=Fields(usage=usage, timing=timing),
        is_whole=True,
        verification=Fields(proposed_tokens=1, accepted_tokens=1),
    )


def _policy() -> None:
    policy = policy_service.instruments.PolicyInstruments()
    calibration = Fields(
        stage="small",
        reports=1,
        expected=0.5,
        observed=0.5,
        reported_calibration_error=0.1,
        evidence=1.0,
        alarm_at=None,
    )
    policy.watch_calibration(lambda: [calibration])
    policy.shadow_compared("plan", "small", agrees=True)
    policy.shadow_dropped()
    policy.shadow_failed()


def _manager() -> None:
    manager = services.scaler.instruments.ScalerInstruments()
    manager.scaled("small", "wake")
    manager.watch(lambda: [Fields(stage="small", wanted=1, ready=1, is_known=True)])


def _stage() -> None:
    status = EngineStatus(
        state=ModelState.READY,
        parameters=1,
        context_length=1,
        fingerprint="f",
        memory_bytes=1,
        kv_cache_bytes=1,
        queued=1,
        running=1,
        cached_sequences=1,
        completed=1,
        cancelled=1,
        error="",
    )
    engine = Fields(status=lambda: status)
    StageInstruments().answered("small", Fields(ids=(1, 2), queue_ms=1.0, prefill_ms=1.0, decode_ms=1.0))
    StageInstruments().verified("small", Fields(while_writing=True))
    watch_models(Fields(engines={"small": engine}, budget_bytes=1, idle_ms=lambda: 1.0))


if __name__ == "__main__":
    main()
