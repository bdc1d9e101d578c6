"""gRPC behind the cascade's policy: its calls, their line, and a breaker."""

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

# Calls of this router to the policy service that are under way at once; further ones wait in its line, where
# `timeout_ms` does not run yet. Four take some 4 ms of processor time there, and so end within the default
# 100 ms where stages leave it a tenth of a processor. At 32 requests at a time beside others, 1 of 720 had
# a late call with four, 5 with eight. At a millisecond each they are 4,000 a second, more than a router asks.
POLICY_CALLS = 4
# Share of a call's time that it may spend in that line, and of what is left of the request's latency budget.
# Chosen: a request of half a second, which then follows the static plan, still has most of it for its stages.
_SHARE_IN_LINE = 0.25
# Timeouts of a call that it may spend there. Chosen: bursts of some hundreds are planned within, on two busy
# cores in 2 s or so. A policy service that is late with them is no longer waited for: see Breaker.
_TIMEOUTS_IN_LINE = 50.0


class GrpcPolicy:
    """Calls the policy service. stages: names in order. timeout_ms: the most that one call may take, the wait
    in this router's own line not counted. health: is told how calls end. clock: the breaker's.

    Raises Unavailable or BudgetSpent where the service is away or late; at once while the breaker is open.
    Raises AsdError where its answer makes no sense.
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
                # A plan is not told what was spent. Who has waited longer than that has left the line.
                made.objective.max_latency_ms -= min(waited_ms, made.objective.max_latency_ms)
            set_input(made, request.input)
            return made

        wait_ms = self._wait_ms(request, 0.0, timeout_ms)
        response = await self._ask(self._plan, message, timeout_ms, wait_ms)
        first = self._index(response.first_stage)
        likely = self._later(first, response.likely_next_stage)
        return convert.plan_from(response, first, likely, self._later(first, response.abandon_stage))

    def _later(self, first: int, name: str) -> int | None:
        """Return the index of a stage that may follow the first one; None for no name."""
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
        """Return what to do with an answer. spent_ms: up to now; the wait in line is added."""

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
                # The caller did not write that: the stage did.
                raise AsdError(f"{answer.stage} showed what no model should: {error.message}") from error
            raise
        return self._decision(response, answer.stage.index)

    async def describe(self) -> policy_pb2.PolicyServiceDescribeResponse | None:
        """Return which policy is in force; None where the service does not answer."""
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
        """Return how long a request may stand in line, by its deadline and by its latency budget."""
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
        """Return the answer of a call; of a second one where a replica is away: another may be there.

        At once, and once: where none is, the static plan is the better answer. Who waits in line behind calls
        that fail does not wait for each of them: the breaker is asked again when the turn comes. message: is
        made then, and told the wait in line. wait_ms: of that, the most.
        """
        arrived = self._clock()
        if self._breaker.is_open and self._limit.is_full:
            # What is under way are probes, or calls that are about to fail.
            raise self._refusal()
        waits = self._limit.is_full
        async with self._limit.place(wait_ms, self._peer):
            began = self._clock()
            # What the caller asked for is passed on as it is where nothing was waited for.
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
            # A caller in a hurry says nothing of the service.
            if isinstance(error, Unavailable) or timeout_ms >= self._timeout_ms:
                self._breaker.failed(began)
                self._health.failed(error, "and the static plan stands in for it")
            raise
        except AsdError:
            # Whoever refuses a request is there.
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
            # A policy service of before did not send a 0, which no policy predicts.
            is_out_of_family=not has_p_correct,
        )

    def _index(self, stage: str) -> int:
        index = self._indices.get(stage)
        if index is None:
            raise AsdError(f"{self._peer} chose stage {stage!r}, which the cascade does not have")
        return index
