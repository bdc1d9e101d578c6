"""The policy's plan: the calls to the policy service, and the conditions of the stages in them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from asd.values import DecisionReason
from services.router.planning.load import Question
from services.router.planning.time_budget import MARGIN_MS, SHARE_OF_TIME

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from services.router.domain import Decision, PolicyChoice
    from services.router.interfaces import PolicyClient
    from services.router.planning.admission import Admission
    from services.router.planning.knowledge import Knowledge
    from services.router.request import RequestState


class PolicyPlan:
    """The policy's plan for one request. Its methods raise Unavailable where the policy service is
    unreachable, and BudgetSpent where it is late."""

    def __init__(
        self, policy: PolicyClient, state: RequestState, knowledge: Knowledge, admission: Admission
    ) -> None:
        self._policy = policy
        self._state = state
        self._knowledge = knowledge
        # Least share of the largest stage's accuracy that waits must leave the request.
        self._share = admission.accuracy_share(state.request.objective)
        # Time of the calls to the policy, in milliseconds.
        self.asked_ms = 0.0

    async def plan(self, unavailable: Collection[int]) -> PolicyChoice:
        """Return the policy's plan. If it begins with a stage without a replica, plan again without those."""
        avoided, may_repeat = unavailable, self._counts_waits()
        with self._timed():
            while True:
                told_ms = self._knowledge.queues_ms()
                conditions = self._knowledge.conditions(avoided, told_ms)
                with self._knowledge.load.asking(Question.PLAN):
                    plan = await self._policy.plan(
                        self._state.request,
                        conditions,
                        self._state.left_ms(MARGIN_MS),
                        min_accuracy_share=self._share,
                    )
                inactive = self._knowledge.activate({plan.first_stage})
                if inactive and avoided is unavailable:
                    avoided = inactive.union(unavailable)
                elif may_repeat and self._knowledge.has_grown(plan.first_stage, told_ms):
                    may_repeat = False
                else:
                    self._knowledge.load.chosen(Question.PLAN, plan.first_stage)
                    return plan

    async def decide(self, unavailable: Collection[int]) -> Decision:
        """Return the decision on the latest answer. If it names a stage without a replica, decide again
        without those."""
        state, avoided, may_repeat = self._state, unavailable, self._counts_waits()
        spent_ms = state.spent_ms()
        with self._timed():
            while True:
                told_ms = self._knowledge.queues_ms()
                conditions = self._knowledge.conditions(avoided, told_ms)
                with self._knowledge.load.asking(Question.DECIDE):
                    decision = await self._policy.decide(
                        state.request,
                        state.answer,
                        state.spent_cost,
                        spent_ms,
                        conditions,
                        # Leave time to return the answer if the policy is slow.
                        state.left_ms(MARGIN_MS) * SHARE_OF_TIME,
                        min_accuracy_share=self._share,
                    )
                inactive = self._knowledge.activate({decision.next_stage})
                if inactive and avoided is not unavailable:
                    # An answer is not held back until a stage has a replica.
                    return decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
                if inactive:
                    avoided = inactive.union(unavailable)
                elif may_repeat and self._knowledge.has_grown(decision.next_stage, told_ms):
                    may_repeat = False
                else:
                    self._knowledge.load.chosen(Question.DECIDE, decision.next_stage)
                    return decision

    def _counts_waits(self) -> bool:
        """Return whether waits may change the policy's answer."""
        has_budget = self._state.request.objective.max_latency_ms is not None
        return self._share is None or self._share < 1.0 or has_budget

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = self._knowledge.clock()
        try:
            yield
        finally:
            self.asked_ms += (self._knowledge.clock() - started) * 1000.0
