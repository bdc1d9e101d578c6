"""Where a request starts and stops: the caller's stages, the policy's choice, or the static plan.

No gRPC, no protobuf.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from asd.errors import (
    AsdError,
    Away,
    BudgetSpent,
    InvalidRequest,
    ModelRefusal,
    Overloaded,
    QueueFull,
    ResourceExhausted,
    Unavailable,
)
from asd.values import DecisionAction, DecisionReason, PlanSource
from services.common.cost import is_above
from services.common.telemetry import Spans, Traced
from services.router import spans
from services.router.domain import (
    CallFailure,
    Decision,
    Overload,
    Provenance,
    Refusal,
    StageFailed,
    Step,
    Stop,
)
from services.router.planning.admission import Admission
from services.router.planning.failures import failure_of_all
from services.router.planning.fixed_plan import FixedPlan
from services.router.planning.policy_plan import PolicyPlan
from services.router.planning.static_plan import StaticPlan, plan_without_policy
from services.router.planning.time_budget import MARGIN_MS, SHARE_OF_TIME, TimeBudget

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from asd.transport.patience import Patience
    from services.router.domain import AbandonRule, OpenCall, Report, Stage, StageAnswer, StageResult
    from services.router.interfaces import Observer, PolicyClient
    from services.router.planning.draft_selection import DraftChoice, SpeculationOptions
    from services.router.planning.knowledge import Knowledge
    from services.router.planning.load import Load
    from services.router.request import RequestState

# Least probability of an escalation at which its target's prefix cache is filled. Chosen: filling it is then
# more often useful than not.
_LIKELY = 0.5


class Planner:
    """Plans requests. The static plan replaces the policy service only while that is unavailable.

    policy: None without a policy service. overload: how requests are treated when stages have queues.
    patience: how long requests wait while no stage is reachable. If a plan names a stage without a replica,
    the stage is activated and the request is planned again without it. The request waits for the stage only
    if no other one can answer.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        policy: PolicyClient | None,
        static_plan: StaticPlan,
        observer: Observer,
        options: SpeculationOptions,
        patience: Patience,
        overload: Overload = Overload.QUEUE,
    ) -> None:
        self.knowledge = knowledge
        self.policy = policy
        self.static_plan = static_plan
        self.observer = observer
        self.options = options
        self.patience = patience
        self.admission = Admission(knowledge.load, overload, knowledge.clock)

    @property
    def load(self) -> Load:
        """How busy the stages are."""
        return self.knowledge.load

    @contextmanager
    def plan_for(self, state: RequestState) -> Iterator[RequestPlan]:
        """Plan a request during the block. Raises Overloaded if other requests took its room or time."""
        plan = RequestPlan(self, state)
        try:
            yield plan
        except (BudgetSpent, ResourceExhausted) as error:
            refusal = plan.refusal(error)
            if refusal is error:
                raise
            raise refusal from error
        finally:
            plan.close()


class RequestPlan:
    """The plan of one request: the next step after each event."""

    def __init__(self, planner: Planner, state: RequestState) -> None:
        self._state = state
        self._objective = state.request.objective
        self._knowledge = planner.knowledge
        self._admission = planner.admission
        self._options = planner.options
        self._observer = planner.observer
        self._patience = planner.patience
        self._static_plan = planner.static_plan
        self._time = TimeBudget(state, planner.knowledge, planner.admission)
        self._policy = (
            PolicyPlan(planner.policy, state, planner.knowledge, planner.admission)
            if planner.policy
            else None
        )
        self._fixed = FixedPlan(
            state.request, planner.knowledge, self._skips, is_pipelined=planner.options.pipelined
        )
        self._source = PlanSource.STATIC
        self._policy_version = ""
        # False once the policy was unavailable. From then on, the request follows the static plan.
        self._follows_policy = True
        # Errors by index of stages that failed this request or cannot take it.
        self._failed: dict[int, AsdError] = {}
        # The draft choice of each stage that could verify one, by index.
        self._choices: dict[int, DraftChoice] = {}
        self._decision: Decision | None = None
        # From the policy's plan: when to abandon the first draft, and which stage then continues.
        self._abandon: tuple[AbandonRule, ...] = ()
        self._abandon_to: int | None = None
        self._prefill: Stage | None = None
        # The last call that failed, and the reason of a refusal.
        self._call: OpenCall | None = None
        self._reason = Refusal.STAGE_FULL

    # The three questions.

    async def first_step(self) -> Step:
        """Return the first step. Raises NotFound for an unknown stage, Unavailable if all have failed,
        Overloaded if there is no room for the request."""
        step = await self._step(await self._first())
        if not isinstance(step, Step):
            raise AsdError("a request without an answer cannot stop")
        return step

    async def after_answer(self, report: Report) -> Step | Stop:
        """Return what follows an answer. An escalation that does not fit the deadline is not started.

        Raises Overloaded if there is no room for the escalation and the caller asked for quality.
        """
        self._learn_failures(report.failures)
        for answer, depth in report.answers:
            self._learn_answer(answer, depth)
        self._failed.update(report.refusals)
        return await self._following(await self._decide(is_abandoned=report.is_abandoned))

    async def after_failure(self, failed: StageFailed) -> Step | Stop:
        """Return what follows a failure: another stage, or the earlier answer. Raises the failure's error if
        neither is possible."""
        failure, error = failed.failure, failed.failure.error
        self._learn_failures([*failed.drafters, failure])
        self._call = failure.call
        self._failed[failure.stage.index] = error
        if not self._state.has_earlier_answer():
            return await self._step(await self._first_again(error))
        if isinstance(error, Overloaded) and self._may_be_refused():
            raise error
        decision = await self._decide_again()
        if decision is not None and decision.next_stage is not None:
            return await self._following(decision)
        if self._decision is None or self._is_refused_for(error):
            raise error
        is_late = isinstance(error, BudgetSpent | Overloaded)
        reason = DecisionReason.DEADLINE if is_late else DecisionReason.STAGE_UNAVAILABLE
        return self._stop(self._decision.stopped(reason))

    def look(self, stage: Stage, call: OpenCall) -> float:
        """Return after how many milliseconds to check a silent call again.

        Raises Overloaded if the queue at the stage leaves no time for an answer. Raises BudgetSpent if the
        stage was found to hang and the request can go on without it. A stage that failed other requests
        without hanging may still answer this one.
        """
        can_leave = self._state.has_earlier_answer() or self._has_replacement(stage)
        if can_leave and call.depth > 1 and self._knowledge.health[stage.index].is_hanging:
            waited_ms = (self._knowledge.clock() - call.began) * 1000.0
            raise BudgetSpent(f"{stage} has not answered for {waited_ms:.0f} ms")
        with self._refused_for(Refusal.DEADLINE):
            return self._admission.look(stage, call, self._time.left_ms())

    def refusal(self, error: BudgetSpent | ResourceExhausted) -> AsdError:
        """Return the error for a request that ran out of room or time. If other requests are the reason, it
        says when to call again."""
        if isinstance(error, QueueFull):
            failed = [self._knowledge.stages[index] for index, each in self._failed.items() if each is error]
            after_s = min(map(self._admission.retry_after_s, failed or self._knowledge.stages))
            self._reason = Refusal.STAGE_FULL
            error = Overloaded(error.message, retry_after_s=after_s)
        elif isinstance(error, BudgetSpent) and self._call is not None and self._ran_out_for_others():
            after_s = self._admission.retry_after_s(self._knowledge.stages[self._call.stage])
            self._reason = Refusal.DEADLINE
            error = Overloaded(
                f"{error.message} while it was busy with other requests: allow more time, or call again in "
                f"{after_s:.2f} s",
                retry_after_s=after_s,
            )
        if isinstance(error, Overloaded):
            self._observer.request_refused(self._reason)
        return error

    def close(self) -> None:
        """End the request, and report the draft choices that got no answer."""
        for choice in self._choices.values():
            self._knowledge.drafts.ended(choice)
        self._choices.clear()

    # Steps.

    async def _step(self, stage: Stage, decision: Decision | None = None) -> Step | Stop:
        """Return a stage's step once its stages have replicas, or what follows if they get none in time."""
        drafters = self._fixed.drafters
        draft = self._draft_for(stage)
        self._time.works_with(len(drafters))
        try:
            await self._until_active([stage, *drafters])
        except AsdError as error:
            return await self.after_failure(StageFailed(CallFailure(stage, error, 0.0, has_heard=False)))
        is_final = self._is_final(stage)
        timeout_ms = self._time.timeout_ms(stage, is_final=is_final)
        is_bound = not (self._state.has_earlier_answer() or self._has_replacement(stage))
        leave_after_ms = self._time.leave_after_ms(stage, is_bound=is_bound)
        choice, prefill = self._choices.get(stage.index), self._prefill
        self._prefill = None
        return Step(
            stage,
            self._provenance(),
            timeout_ms,
            min(timeout_ms, leave_after_ms),
            is_final,
            decision,
            draft,
            drafters,
            choice.reason.value if choice and choice.reason else "",
            self._abandon,
            prefill,
            self._time.prefill_ms(prefill) if prefill else 0.0,
        )

    async def _following(self, decision: Decision) -> Step | Stop:
        if decision.next_stage is None:
            return self._stop(decision)
        return await self._step(self._knowledge.stages[decision.next_stage], decision)

    def _stop(self, decision: Decision) -> Stop:
        return Stop(decision, self._provenance())

    def _provenance(self) -> Provenance:
        return Provenance(self._source, self._policy_version, self._policy.asked_ms if self._policy else 0.0)

    async def _until_active(self, stages: Sequence[Stage]) -> None:
        """Wait for the stages that have no replica. Raises BudgetSpent if one gets none in time."""
        for stage in stages:
            if stage.index not in self._knowledge.scaled_to_zero():
                continue
            left_ms = self._state.left_ms(MARGIN_MS)
            if self._has_replacement(stage) or self._state.has_earlier_answer():
                left_ms *= SHARE_OF_TIME
            await self._knowledge.until_active(stage, left_ms)
            # The wait says nothing about drafts.
            self._choices = {index: replace(choice, counts=False) for index, choice in self._choices.items()}

    def _is_final(self, stage: Stage) -> bool:
        """Return whether no decision will follow a stage's answer."""
        if self._source is PlanSource.FIXED:
            return not self._fixed.following
        if all(later in self._failed for later in range(stage.index + 1, len(self._knowledge.stages))):
            return True
        following = self._without_policy().next_after(stage.index, self._failed)
        return not self._follows_policy and following is None

    def _has_replacement(self, stage: Stage) -> bool:
        """Return whether another stage has a replica and has not failed the request."""
        if self._source is PlanSource.FIXED:
            return False
        left_out = self._knowledge.scaled_to_zero().union(self._failed, {stage.index})
        return len(left_out) < len(self._knowledge.stages)

    # Where to begin.

    async def _first(self) -> Stage:
        """Return the first stage, among those that have not failed. Errors: first_step."""
        with Traced(Spans.PLAN) as span:
            # These belong to an earlier plan of this request.
            self._abandon, self._abandon_to, self._prefill = (), None, None
            is_fixed = bool(self._state.request.stage or self._state.request.chain)
            first = self._fixed.first() if is_fixed else await self._chosen_first()
            if is_fixed:
                self._source = PlanSource.FIXED
            self._admit([first, *self._fixed.following])
            spans.describe_plan(span, self._provenance(), first)
            return first

    async def _chosen_first(self) -> Stage:
        unhealthy = self._knowledge.unhealthy()
        if self._policy is not None and self._follows_policy:
            try:
                plan = await self._policy.plan(unhealthy.union(self._failed))
            except (Unavailable, BudgetSpent) as error:
                if self._state.left_ms() <= 0:
                    raise BudgetSpent("the deadline passed before a stage was asked") from error
            else:
                if plan.first_stage not in self._failed:
                    self._source, self._policy_version = PlanSource.POLICY, plan.policy_version
                    # Within a budget, only the policy chooses the next stage.
                    has_budget = self._objective.max_cost or self._objective.max_latency_ms
                    left_out = self._knowledge.scaled_to_zero().union(self._failed)
                    is_there = plan.abandon_to is not None and plan.abandon_to not in left_out
                    if self._options.early_abandon and not has_budget and is_there:
                        self._abandon = plan.abandon
                    self._abandon_to = plan.abandon_to
                    if plan.p_escalate >= _LIKELY and not self._failed:
                        self._prefill = self._to_prefill(plan.likely_next)
                    return self._knowledge.stages[plan.first_stage]
        self._follows_policy = False
        self._source = PlanSource.STATIC
        self._observer.static_plan_used("plan")
        return self._statically_first(unhealthy)

    def _statically_first(self, unhealthy: frozenset[int]) -> Stage:
        stages, max_cost = self._knowledge.stages, self._objective.max_cost
        too_dear = {each.index for each in stages if max_cost is not None and each.cost > max_cost}
        excluded = too_dear.union(self._failed)
        excluded |= self._too_slow(excluded)
        first = self._without_policy().first(unhealthy, excluded)
        if first is not None and self._knowledge.activate({first}):
            first = self._without_policy().first(unhealthy | self._knowledge.scaled_to_zero(), excluded)
        if first is not None:
            return stages[first]
        if self._failed:
            raise failure_of_all(stages, self._failed)
        least = min(stages, key=lambda stage: stage.cost)
        raise InvalidRequest(
            f"max_cost {max_cost:g} is below the cheapest stage ({least.name}: {least.cost:g}): raise it",
            field="objective.max_cost",
        )

    async def _first_again(self, error: AsdError) -> Stage:
        """Return the first stage again after one has failed before there was an answer.

        If none is left, wait for the unreachable ones and plan anew. Raises the error if no other stage may
        answer. If all have failed, the error names each.
        """
        try:
            return await self._instead(error)
        except Unavailable:
            # A request that names its stages has already waited in the call. A request whose caller has final
            # tokens cannot begin anew.
            is_bound = self._source is PlanSource.FIXED or self._state.has_committed
            away = [index for index, each in self._failed.items() if isinstance(each, Away)]
            until = self._knowledge.clock() + self._state.left_ms() / 1000.0
            if is_bound or not away or not await self._patience.wait(until):
                raise
            for index in away:
                del self._failed[index]
            return await self._first()

    async def _instead(self, error: AsdError) -> Stage:
        if self._source is PlanSource.FIXED:
            return self._fixed.instead(error)
        if self._state.has_committed or not self._may_be_replaced(error):
            raise error
        if isinstance(error, QueueFull) and self._admission.refuses:
            # A full stage is not replaced by a worse one.
            full = max(index for index, each in self._failed.items() if each is error)
            for index in range(full):
                self._failed.setdefault(index, error)
        try:
            return await self._first()
        except InvalidRequest as refusal:
            # The remaining stages do not fit the request's budget.
            raise failure_of_all(self._knowledge.stages, self._failed) from refusal

    def _may_be_replaced(self, error: AsdError) -> bool:
        """Return whether another stage may still answer after one has failed."""
        if isinstance(error, BudgetSpent):
            return self._time.left_ms() > 0
        if isinstance(error, Overloaded):
            # Another stage would answer less well, or delay the requests that need it.
            return False
        # The router has checked the request. A further fault that a stage finds holds for all stages.
        return not isinstance(error, InvalidRequest) or isinstance(error, ModelRefusal)

    def _to_prefill(self, index: int | None) -> Stage | None:
        """Return the stage whose cache is filled while the first one drafts; None: busy, or too dear."""
        if index is None or not self._options.prefill_ahead or self._objective.max_cost is not None:
            # The policy's costs leave out prefills.
            return None
        stage = self._knowledge.stages[index]
        if self._knowledge.activate({index}):
            return None
        # One call of this router is enough: simultaneous requests would all fill the cache.
        is_busy = self._knowledge.load.own_calls(index) or self._knowledge.is_busy(stage)
        return None if is_busy or self._knowledge.has_line(stage) else stage

    # What follows an answer.

    async def _decide(self, *, is_abandoned: bool = False) -> Decision:
        with Traced(Spans.DECIDE) as span:
            for index, error in self._knowledge.too_short_contexts(
                self._state.request, self._state.answer
            ).items():
                self._failed.setdefault(index, error)
            decision = self._within_reach(await self._judge(is_abandoned=is_abandoned))
            self._decision = decision
            self._policy_version = decision.policy_version or self._policy_version
            spans.describe_decision(
                span,
                decision,
                self._state.answer.stage,
                self._provenance(),
                self._state.request.id,
                follows_policy=self._follows_policy,
            )
            return decision

    async def _judge(self, *, is_abandoned: bool) -> Decision:
        if self._source is PlanSource.FIXED:
            return self._fixed.decide()
        if is_abandoned:
            return Decision(DecisionAction.ESCALATE, DecisionReason.ABANDONED, self._abandon_to)
        if self._policy is not None and self._follows_policy:
            try:
                return await self._policy.decide(self._knowledge.unhealthy().union(self._failed))
            except (Unavailable, BudgetSpent):
                self._observer.static_plan_used("decide")
                self._follows_policy = False
        return self._judge_statically()

    def _judge_statically(self) -> Decision:
        plan, judged = self._without_policy(), self._state.answer.stage.index
        unavailable = self._knowledge.unhealthy().union(self._failed)
        following = plan.next_after(judged, unavailable)
        inactive = self._knowledge.activate({following})
        if inactive:
            following = plan.next_after(judged, inactive.union(unavailable))
        if following is None:
            is_last = plan.next_after(judged) is None
            reason = DecisionReason.STATIC_PLAN if is_last else DecisionReason.STAGE_UNAVAILABLE
            return Decision(DecisionAction.STOP, reason)
        decision = Decision(DecisionAction.ESCALATE, DecisionReason.STATIC_PLAN, following)
        stage = self._knowledge.stages[following]
        # A verified answer costs no more than a generated one.
        cost, max_cost = self._state.spent_cost + stage.cost, self._objective.max_cost
        if max_cost is not None and is_above(cost, max_cost):
            return decision.stopped(DecisionReason.MAX_COST)
        if self._knowledge.expected_ms(stage) > self._time.left_of_latency_ms():
            return decision.stopped(DecisionReason.MAX_LATENCY)
        return decision

    def _within_reach(self, decision: Decision) -> Decision:
        """Return a decision, stopped if its stage cannot answer in time. Raises Overloaded if other requests
        are the reason and the caller asked for quality."""
        if decision.reason is DecisionReason.LAST_STAGE:
            is_last = self._state.answer.stage.index == len(self._knowledge.stages) - 1
            # The policy leaves unavailable stages out.
            return decision if is_last else decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
        if decision.next_stage is None or decision.reason is DecisionReason.ABANDONED:
            # An abandoned draft is not an answer.
            return decision
        stage, left_ms = self._knowledge.stages[decision.next_stage], self._time.left_ms()
        if stage.index in self._failed:
            return decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
        try:
            if left_ms <= 0 or (decision.expected_ms or 0.0) > left_ms:
                if self._may_be_refused() and self._time.is_beside_others():
                    self._reason = Refusal.DEADLINE
                    raise self._admission.late(stage, left_ms)
                return decision.stopped(DecisionReason.DEADLINE)
            if self._source is not PlanSource.FIXED:
                self._admit([stage])
        except Overloaded:
            if self._may_be_refused():
                raise
            return decision.stopped(DecisionReason.DEADLINE)
        return decision

    async def _decide_again(self) -> Decision | None:
        """Return the decision on the earlier answer after a later stage has failed; None: keep the answer."""
        if self._state.has_committed or self._state.left_ms(MARGIN_MS) <= 0:
            return None
        try:
            return await self._decide()
        except Overloaded:
            raise
        except AsdError:
            # The earlier answer is better than an error.
            return None

    def _without_policy(self) -> StaticPlan:
        return plan_without_policy(
            self._objective,
            self._static_plan,
            self._knowledge.stages,
            is_whole=self._policy is None,
            has_drafts=self._source is PlanSource.POLICY,
        )

    def _too_slow(self, excluded: Collection[int]) -> frozenset[int]:
        """Return the stages too slow for max_latency_ms, by the times of earlier calls. If all are, the
        quickest one is left out of them."""
        left_ms = self._time.left_of_latency_ms()
        expected = {
            stage.index: self._knowledge.expected_ms(stage)
            for stage in self._knowledge.stages
            if stage.index not in excluded
        }
        quickest = min(expected, key=lambda index: expected[index], default=None)
        return frozenset(index for index, ms in expected.items() if ms > left_ms and index != quickest)

    # Room.

    def _admit(self, stages: Sequence[Stage]) -> None:
        """Raise Overloaded if the stages that a request needs have no room for it."""
        with self._refused_for(Refusal.LINE):
            for stage in stages:
                self._admission.shed(stage)
        with self._refused_for(Refusal.DEADLINE):
            self._admission.check(stages, self._time.left_ms())

    def _may_be_refused(self) -> bool:
        """Return whether a request that has an answer is refused if there is no room for a better one.

        Only a caller who asked for quality is refused. For any other, the answer is worth more.
        """
        return self._admission.asks_for_quality(self._objective) and not self._state.has_committed

    def _is_refused_for(self, error: AsdError) -> bool:
        """Return whether a request that asks for quality ends with an error although it has an answer.

        It does if the improvement ran out of room or time because of other requests.
        """
        is_crowded = isinstance(error, Overloaded | QueueFull) or (
            isinstance(error, BudgetSpent) and self._call is not None and self._ran_out_for_others()
        )
        return is_crowded and self._may_be_refused()

    def _ran_out_for_others(self) -> bool:
        """Return whether the request ran out of time in its last call because of other requests.

        Not if they all wait for a stage that hangs, nor if the caller has final tokens.
        """
        if self._call is None or self._state.has_committed:
            return False
        is_hanging = self._knowledge.health[self._call.stage].is_hanging
        return not is_hanging and self._admission.refuses and self._time.is_beside_others()

    @contextmanager
    def _refused_for(self, reason: Refusal) -> Iterator[None]:
        """Record the reason if the block refuses the request."""
        try:
            yield
        except Overloaded:
            self._reason = reason
            raise

    # Drafts, and learning.

    def _draft_for(self, stage: Stage) -> StageResult | None:
        """Return the draft that a stage should verify; None if generating is better."""
        draft = self._state.draft()
        if draft is None or draft.is_prediction or self._source is PlanSource.FIXED:
            # A caller's own draft is always verified. A chain's were chosen once, when it started.
            return draft
        return None if self._skips(self._state.answer.stage, stage, has_draft=True) else draft

    def _skips(self, drafter: Stage, target: Stage, *, has_draft: bool = False) -> bool:
        """Return whether a target works without a drafter's draft; record the reason."""
        load, drafts, index = self._knowledge.load, self._knowledge.drafts, target.index
        choice = drafts.choose(
            drafter.name, target.name, load.calls(index) + 1, load.replicas(index), has_draft=has_draft
        )
        self._release(index)
        self._choices[index] = choice
        if choice.reason is None:
            return False
        self._observer.draft_skipped(target, choice.reason)
        return True

    def _release(self, index: int) -> None:
        """Release the draft choice of a stage, without recording how long it took."""
        choice = self._choices.pop(index, None)
        if choice is not None:
            self._knowledge.drafts.ended(replace(choice, counts=False))

    def _learn_answer(self, answer: StageAnswer, depth: int) -> None:
        self._patience.there()
        self._knowledge.drafts.answered(answer, self._choices.pop(answer.stage.index, None))
        self._knowledge.learn_answer(answer, depth)
        task = self._state.request.task
        self._observer.stage_answered(answer, task, is_adapted=answer.result.is_adapted)

    def _learn_failures(self, failures: Sequence[CallFailure]) -> None:
        for failure in failures:
            if isinstance(failure.error, Overloaded):
                # The request left its queue, which does not count against the stage.
                self._release(failure.stage.index)
                continue
            if not isinstance(failure.error, InvalidRequest):
                call = failure.call
                took_ms = None if call is None else (self._knowledge.clock() - call.began) * 1000.0
                self._observer.stage_failed(failure.stage, failure.error, took_ms)
            choice = self._choices.pop(failure.stage.index, None)
            if choice is not None:
                self._knowledge.drafts.ended(choice)
            self._knowledge.learn_failure(failure)
