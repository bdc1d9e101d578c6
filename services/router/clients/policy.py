"""Calls to the policy service over gRPC, with a queue of their own and a circuit breaker."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from asd.convert import DECISION_ACTIONS, DECISION_REASONS, objective_to, set_input
from asd.errors import AsdError, BudgetSpent, InvalidRequest, Unavailable
from asd.transport.channel import call_unary
from asd.v1 import policy_pb2, policy_pb2_grpc
from asd.values import DecisionAction
from services.router import convert
from services.router.clients.call_limit import CallLimit
from services.router.clients.stage import DESCRIBE_TIMEOUT_MS
from services.router.domain import Decision, PolicyChoice, RoutedRequest, StageAnswer, StageKnowledge

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Iterator,
        Sequence,
    )

    import grpc

    from services.router.clients.breaker import Breaker
    from services.router.planning.health import Health

Sent = TypeVar("Sent")
Received = TypeVar("Received")

# Concurrent calls of this router to the policy service. Further calls wait in a queue; `timeout_ms` starts
# after it. Four calls take some 4 ms of processor time there. They end within the default 100 ms even if the
# stages leave the service a tenth of a processor. Measured at 32 concurrent requests on a busy machine: 1 of
# 720 had a late call with four, 5 with eight. At 1 ms each, four allow 4,000 calls a second, more than a
# router makes.
POLICY_CALLS = 4
# Share that the queue may take of a call's time, and of the rest of the request's latency budget. Chosen: a
# request of half a second that then follows the static plan still has most of its time for the stages.
_SHARE_IN_LINE = 0.25
# Longest wait in the queue, in timeouts of a call. Chosen: it covers a burst of some hundred requests, which
# two busy cores plan in about 2 s. If the service is late throughout, the breaker ends the wait.
_TIMEOUTS_IN_LINE = 50.0


class GrpcPolicy:
    """Calls the policy service. stages: names in order. timeout_ms: of one call, after its wait in this
    router's queue. health: records how calls end. clock: the breaker's.

    Raises Unavailable if the service is unreachable, at once while the breaker is open; BudgetSpent if it is
    late; AsdError if its answer is malformed.
    """

    def __init__(
        self,
        target: str,
        channel: grpc.aio.Channel,
        stages: Sequence[str],
        timeout_ms: float,
        breaker: Breaker,
        health: Health,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._peer = f"the policy service at {target}"
        self._health = health
        self._stages = tuple(stages)
        self._indices = {name: index for index, name in enumerate(stages)}
        self._timeout_ms = timeout_ms
        self._breaker = breaker
        self._limit = CallLimit(POLICY_CALLS)
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        self._plan = stub.Plan
        self._decide = stub.Decide
        self._describe = stub.Describe

    async def plan(
        self,
        request: RoutedRequest,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> PolicyChoice:
        """Return the first stage."""

        def message(waited_ms: float) -> policy_pb2.PlanRequest:
            made = policy_pb2.PlanRequest(
                request_id=request.id,
                objective=objective_to(request.objective),
                cascade=self._stages,
                conditions=convert.conditions_to(conditions),
                min_accuracy_share=min_accuracy_share,
            )
            if made.objective.HasField("max_latency_ms"):
                # PlanRequest has no field for time spent, so the wait comes off the budget. It cannot exceed
                # the budget: the wait is bounded by a share of it.
                made.objective.max_latency_ms -= min(waited_ms, made.objective.max_latency_ms)
            set_input(made, request.input)
            return made

        wait_ms = self._wait_ms(request, 0.0, timeout_ms)
        response = await self._ask(self._plan, message, timeout_ms, wait_ms)
        first = self._index(response.first_stage)
        likely = self._later(first, response.likely_next_stage)
        return convert.plan_from(response, first, likely, self._later(first, response.abandon_stage))

    def _later(self, first: int, name: str) -> int | None:
        """Return the index of a stage later than the first one; None for an empty name."""
        index = self._index(name) if name else None
        if index is not None and index <= first:
            raise AsdError(f"{self._peer} expects to escalate from {self._stages[first]} to an earlier stage")
        return index

    async def decide(
        self,
        request: RoutedRequest,
        answer: StageAnswer,
        spent_cost: float,
        spent_ms: float,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> Decision:
        """Return what to do with an answer. spent_ms: up to now; the wait in the queue is added."""

        def message(waited_ms: float) -> policy_pb2.DecideRequest:
            made = policy_pb2.DecideRequest(
                request_id=request.id,
                objective=objective_to(request.objective),
                cascade=self._stages,
                stage=answer.stage.name,
                draft=convert.evidence_to(answer),
                verification=convert.verification_to(answer),
                spent_cost=spent_cost,
                spent_ms=spent_ms + waited_ms,
                conditions=convert.conditions_to(conditions),
                min_accuracy_share=min_accuracy_share,
            )
            set_input(made, request.input)
            return made

        wait_ms = self._wait_ms(request, spent_ms, timeout_ms)
        try:
            response = await self._ask(self._decide, message, timeout_ms, wait_ms)
        except InvalidRequest as error:
            if error.field.startswith(("draft", "verification")):
                # The stage wrote these fields, not the caller.
                raise AsdError(f"{answer.stage} showed what no model should: {error.message}") from error
            raise
        return self._decision(response, answer.stage.index)

    async def describe(self) -> policy_pb2.PolicyServiceDescribeResponse | None:
        """Return which policy is in force; None if the service does not answer."""
        try:
            return await call_unary(
                self._describe,
                policy_pb2.PolicyServiceDescribeRequest(),
                timeout_ms=DESCRIBE_TIMEOUT_MS,
                peer=self._peer,
            )
        except AsdError:
            return None

    def _wait_ms(self, request: RoutedRequest, spent_ms: float, timeout_ms: float) -> float:
        """Return how long a request may wait in the queue, by its deadline and its latency budget."""
        budget_ms = request.objective.max_latency_ms
        left_ms = timeout_ms if budget_ms is None else min(timeout_ms, max(budget_ms - spent_ms, 0.0))
        return min(left_ms * _SHARE_IN_LINE, self._timeout_ms * _TIMEOUTS_IN_LINE)

    async def _ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Sent, Received],
        message: Callable[[float], Sent],
        timeout_ms: float,
        wait_ms: float,
    ) -> Received:
        """Return the answer of a call. If a replica is unavailable, call once more: another may answer.

        The second call is made at once. If it fails too, the static plan is better than waiting. The breaker
        is asked again after the queue, so a request does not wait for every failing call before it.
        message: makes the message, given the wait in the queue in milliseconds. wait_ms: longest such wait.
        """
        arrived = self._clock()
        if self._breaker.is_open and self._limit.is_full:
            # The calls in flight are probes, or are about to fail.
            raise self._refusal()
        waits = self._limit.is_full
        async with self._limit.place(wait_ms, self._peer):
            began = self._clock()
            # Without a wait, the caller's latency budget is passed on unchanged.
            waited_ms = (began - arrived) * 1000.0 if waits else 0.0
            left_ms = timeout_ms - waited_ms
            first_ms = min(left_ms, self._timeout_ms)
            sent = message(waited_ms)
            with self._guarded(left_ms, began):
                try:
                    return await call_unary(method, sent, timeout_ms=first_ms, peer=self._peer)
                except Unavailable:
                    second_ms = first_ms - (self._clock() - began) * 1000.0
                    if second_ms <= 0:
                        raise
                    return await call_unary(method, sent, timeout_ms=second_ms, peer=self._peer)

    def _refusal(self) -> Unavailable:
        return Unavailable(f"{self._peer} failed repeatedly; it is tried again soon")

    @contextmanager
    def _guarded(self, timeout_ms: float, began: float) -> Iterator[None]:
        if not self._breaker.allows():
            raise self._refusal()
        try:
            yield
        except (BudgetSpent, Unavailable) as error:
            # If the caller's own deadline was short, the service is not to blame.
            if isinstance(error, Unavailable) or timeout_ms >= self._timeout_ms:
                self._breaker.failed(began)
                self._health.failed(error, "and the static plan stands in for it")
            raise
        except AsdError:
            # A refusal proves that the service is up.
            self._succeeded()
            raise
        self._succeeded()

    def _succeeded(self) -> None:
        self._breaker.succeeded()
        self._health.answered()

    def _decision(self, response: policy_pb2.DecideResponse, judged: int) -> Decision:
        action = convert.member(DECISION_ACTIONS, response.action, self._peer)
        next_stage: int | None = None
        expected_ms: float | None = None
        if action is DecisionAction.ESCALATE:
            next_stage = self._index(response.next_stage)
            if next_stage <= judged:
                raise AsdError(
                    f"{self._peer} escalates from {self._stages[judged]} to {response.next_stage}, "
                    "which is not a later stage"
                )
            expected_ms = next(
                (each.latency_ms for each in response.estimates if each.stage == response.next_stage), None
            )
        has_p_correct = response.HasField("p_correct")
        if not (0.0 <= response.p_correct <= 1.0):
            raise AsdError(f"{self._peer} sent p_correct {response.p_correct:g}, which is no probability")
        return Decision(
            action,
            convert.member(DECISION_REASONS, response.reason, self._peer),
            next_stage,
            response.p_correct if has_p_correct else None,
            response.p_correct_stderr if has_p_correct and math.isfinite(response.p_correct_stderr) else None,
            response.policy_version,
            expected_ms,
            response.predict_us,
            # Before the field was optional, services left it out only for 0, which no policy predicts.
            is_out_of_family=not has_p_correct,
        )

    def _index(self, stage: str) -> int:
        index = self._indices.get(stage)
        if index is None:
            raise AsdError(f"{self._peer} chose stage {stage!r}, which the cascade does not have")
        return index
