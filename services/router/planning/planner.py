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
from services.router.domain import Decision, Failure, Overload, Provenance, Refusal, StageFailed, Step, Stop
from services.router.planning.admission import Admission
from services.router.planning.failures import failure_of_all
from services.router.planning.fixed_plan import FixedPlan
from services.router.planning.policy_plan import PolicyPlan
from services.router.planning.static_plan import StaticPlan, plan_without_policy
from services.router.planning.time_budget import MARGIN_MS, SHARE_OF_TIME, TimeBudget

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from asd.transport.patience import Patience
    from services.router.domain import AbandonRule, Answer, Call, Report, Stage, StageResult
    from services.router.interfaces import Observer, PolicyClient
    from services.router.planning.draft_selection import DraftChoice, SpeculationOptions
    from services.router.planning.knowledge import Knowledge
    from services.router.planning.load import Load
    from services.router.request import RequestState

# Probability of an escalation from which on its target's prefix cache is filled. Chosen: it is then more
# often right than wrong.
_LIKELY = 0.5


class Planner:
    """Plans requests. Only where the policy service is unavailable does the static plan stand in for it.

    policy: None where there is no policy service. overload: what becomes of requests where stages have lines.
    patience: how long requests wait while no stage is there. A stage without a replica is activated where a
    plan would use it, and the plan is made again without it; only where nothing else can answer is it waited
    for.
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
        """Plan a request during the block. Raises Overloaded where it ran out of room or time for others."""
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
    """The plan of one request as it goes: the next step at each turn."""

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
        # False once the policy was unavailable: the static plan holds from there on.
        self._follows_policy = True
        # Stages that this request does without, by index, with why: they failed, or cannot take it.
        self._failed: dict[int, AsdError] = {}
        # What was chosen where a stage could verify a draft, by the stage's index.
        self._choices: dict[int, DraftChoice] = {}
        self._decision: Decision | None = None
        # Of the policy's plan: when the first draft is not worth finishing, and who goes on from it.
        self._abandon: tuple[AbandonRule, ...] = ()
        self._abandon_to: int | None = None
        self._prefill: Stage | None = None
        # The call that failed last, and why there was no room for the request.
        self._call: Call | None = None
        self._reason = Refusal.STAGE_FULL

    # The three questions.

    async def first_step(self) -> Step:
        """Return the stage to begin with. Raises NotFound for an unknown one, Unavailable where all have
        failed, Overloaded where there is no room for the request."""
        step = await self._step(await self._first())
        if not isinstance(step, Step):
            raise AsdError("a request without an answer cannot stop")
        return step

    async def after_answer(self, report: Report) -> Step | Stop:
        """Return what follows an answer. An escalation that does not fit the deadline is not started.

        Raises Overloaded where there is no room for it, and the caller asked for quality.
        """
        self._learn_failures(report.failures)
        for answer, depth in report.answers:
            self._learn_answer(answer, depth)
        self._failed.update(report.refusals)
        return await self._following(await self._decide(is_abandoned=report.is_abandoned))

    async def after_failure(self, failed: StageFailed) -> Step | Stop:
        """Return what follows a failure: another stage, or the earlier answer. Raises the failure's error
        where neither may be."""
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
        return self._stop(self._decision.stopped(reason), is_earlier=True)

    def look(self, stage: Stage, call: Call) -> float:
        """Return after how many milliseconds to look again at a call from which nothing has come.

        Raises Overloaded where the line at the stage leaves no time for an answer, and BudgetSpent where the
        stage was found to hang and the request can go on without it. A stage that only failed others may
        answer this one.
        """
        can_leave = self._state.has_earlier_answer() or self._has_replacement(stage)
        if can_leave and call.depth > 1 and self._knowledge.health[stage.index].is_hanging:
            waited_ms = (self._knowledge.clock() - call.began) * 1000.0
            raise BudgetSpent(f"{stage} has not answered for {waited_ms:.0f} ms")
        with self._refused_for(Refusal.DEADLINE):
            return self._admission.look(stage, call, self._time.left_ms())

    def refusal(self, error: BudgetSpent | ResourceExhausted) -> AsdError:
        """Return the error for a request that ran out of room or time: where other requests are why, when to
        ask again."""
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
        """The request has ended, however it did: what was chosen for it and found no answer is known too."""
        for choice in self._choices.values():
            self._knowledge.drafts.ended(choice)
        self._choices.clear()

    # Steps.

    async def _step(self, stage: Stage, decision: Decision | None = None) -> Step | Stop:
        """Return a stage's step once its stages have a replica; what follows where they get none in time."""
        drafters = self._fixed.drafters
        draft = self._draft_for(stage)
        self._time.works_with(len(drafters))
        try:
            await self._until_active([stage, *drafters])
        except AsdError as error:
            return await self.after_failure(StageFailed(Failure(stage, error, 0.0, has_heard=False)))
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

    def _stop(self, decision: Decision, *, is_earlier: bool = False) -> Stop:
        return Stop(decision, self._provenance(), is_earlier)

    def _provenance(self) -> Provenance:
        return Provenance(self._source, self._policy_version, self._policy.asked_ms if self._policy else 0.0)

    async def _until_active(self, stages: Sequence[Stage]) -> None:
        """Wait for the stages that have no replica. Raises BudgetSpent where one gets none in time."""
        for stage in stages:
            if stage.index not in self._knowledge.scaled_to_zero():
                continue
            left_ms = self._state.left_ms(MARGIN_MS)
            if self._has_replacement(stage) or self._state.has_earlier_answer():
                left_ms *= SHARE_OF_TIME
            await self._knowledge.until_active(stage, left_ms)
            # How long that took says nothing about drafts.
            self._choices = {index: replace(choice, counts=False) for index, choice in self._choices.items()}

    def _is_final(self, stage: Stage) -> bool:
        """Return whether a stage's answer will stand, whatever it shows."""
        if self._source is PlanSource.FIXED:
            return not self._fixed.following
        if all(later in self._failed for later in range(stage.index + 1, len(self._knowledge.stages))):
            return True
        following = self._without_policy().next_after(stage.index, self._failed)
        return not self._follows_policy and following is None

    def _has_replacement(self, stage: Stage) -> bool:
        """Return whether a stage has a replica, other than this one and those that failed the request."""
        if self._source is PlanSource.FIXED:
            return False
        left_out = self._knowledge.scaled_to_zero().union(self._failed, {stage.index})
        return len(left_out) < len(self._knowledge.stages)

    # Where to begin.

    async def _first(self) -> Stage:
        """Return the stage to ask first, of those that have not failed. Errors: first_step."""
        with Traced(Spans.PLAN) as span:
            # An earlier plan of this request says nothing of the stage that is chosen now.
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
                    # Within a budget the policy alone says what comes next.
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
        """Return the stage to ask after one has failed before there was an answer.

        Where none is left, those that were away are waited for and asked again. Raises the error where
        nothing else may be asked; where everything was, one that says so of each.
        """
        try:
            return await self._instead(error)
        except Unavailable:
            # A request that names its stages has waited in the call itself. One whose caller has been given
            # final tokens cannot begin anew.
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
            # What stands in for a stage without room is not worse than it.
            full = max(index for index, each in self._failed.items() if each is error)
            for index in range(full):
                self._failed.setdefault(index, error)
        try:
            return await self._first()
        except InvalidRequest as refusal:
            # What is left of the cascade does not fit the request's budget.
            raise failure_of_all(self._knowledge.stages, self._failed) from refusal

    def _may_be_replaced(self, error: AsdError) -> bool:
        """Return whether another stage may still answer, after one did not."""
        if isinstance(error, BudgetSpent):
            return self._time.left_ms() > 0
        if isinstance(error, Overloaded):
            # Another one would answer less well, or be in the way of those that need it.
            return False
        # The router has checked the request: what a stage finds beyond that holds for all of them.
        return not isinstance(error, InvalidRequest) or isinstance(error, ModelRefusal)

    def _to_prefill(self, index: int | None) -> Stage | None:
        """Return the stage whose cache is filled while the first one drafts; None: it is busy, or costs."""
        if index is None or not self._options.prefill_ahead or self._objective.max_cost is not None:
            # What it costs is not part of the policy's sum.
            return None
        stage = self._knowledge.stages[index]
        if self._knowledge.activate({index}):
            return None
        # Any call of this router, since requests that come together would all fill it.
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
        # A verified answer never costs more than one written anew.
        cost, max_cost = self._state.spent_cost + stage.cost, self._objective.max_cost
        if max_cost is not None and is_above(cost, max_cost):
            return decision.stopped(DecisionReason.MAX_COST)
        if self._knowledge.expected_ms(stage) > self._time.left_of_latency_ms():
            return decision.stopped(DecisionReason.MAX_LATENCY)
        return decision

    def _within_reach(self, decision: Decision) -> Decision:
        """Return a decision, stopped where its stage cannot answer in time. Raises Overloaded where others
        are why, and the caller asked for quality."""
        if decision.reason is DecisionReason.LAST_STAGE:
            is_last = self._state.answer.stage.index == len(self._knowledge.stages) - 1
            # To the policy, a stage that is unavailable is not there.
            return decision if is_last else decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
        if decision.next_stage is None or decision.reason is DecisionReason.ABANDONED:
            # A draft that was abandoned is no answer to stop with.
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
        """Return the decision on the earlier answer after a later stage has failed; None: it stands."""
        if self._state.has_committed or self._state.left_ms(MARGIN_MS) <= 0:
            return None
        try:
            return await self._decide()
        except Overloaded:
            raise
        except AsdError:
            # There is an answer.
            return None

    def _without_policy(self) -> StaticPlan:
        if self._policy is None:
            # Then it is all that its operator wants.
            return self._static_plan
        has_drafts = self._source is PlanSource.POLICY
        return plan_without_policy(
            self._objective, self._static_plan, self._knowledge.stages, has_drafts=has_drafts
        )

    def _too_slow(self, excluded: Collection[int]) -> frozenset[int]:
        """Return the stages that max_latency_ms leaves no time for, by what calls took; never all that are
        left: where none fits, the quickest one does."""
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
        """Raise Overloaded where there is no room for a request at the stages that it needs."""
        with self._refused_for(Refusal.LINE):
            for stage in stages:
                self._admission.shed(stage)
        with self._refused_for(Refusal.DEADLINE):
            self._admission.check(stages, self._time.left_ms())

    def _may_be_refused(self) -> bool:
        """Return whether a request that has an answer is refused where there is no room for a better one.

        Waits lower no quality unasked. A caller who did not ask for quality has more of the answer.
        """
        return self._admission.asks_for_quality(self._objective) and not self._state.has_committed

    def _is_refused_for(self, error: AsdError) -> bool:
        """Return whether a request that asks for quality ends with an error, though it has an answer.

        Where the improvement ran out of room or time because of other requests.
        """
        is_crowded = isinstance(error, Overloaded | QueueFull) or (
            isinstance(error, BudgetSpent) and self._call is not None and self._ran_out_for_others()
        )
        return is_crowded and self._may_be_refused()

    def _ran_out_for_others(self) -> bool:
        """Return whether the request ran out of time in its last call because it had others beside it.

        Not where they wait for a stage that hangs, nor where the caller was given final tokens.
        """
        if self._call is None or self._state.has_committed:
            return False
        is_hanging = self._knowledge.health[self._call.stage].is_hanging
        return not is_hanging and self._admission.refuses and self._time.is_beside_others()

    @contextmanager
    def _refused_for(self, reason: Refusal) -> Iterator[None]:
        """Note why a request was refused in the block, where it was."""
        try:
            yield
        except Overloaded:
            self._reason = reason
            raise

    # Drafts, and learning.

    def _draft_for(self, stage: Stage) -> StageResult | None:
        """Return the draft that a stage is to verify; None where it had better write anew."""
        draft = self._state.draft()
        if draft is None or self._source is PlanSource.FIXED:
            # Whether a chain's drafts are worth it was asked once, when it started.
            return draft
        return None if self._skips(self._state.answer.stage, stage, has_draft=True) else draft

    def _skips(self, drafter: Stage, target: Stage, *, has_draft: bool = False) -> bool:
        """Return whether a target works without a drafter's draft, having noted why."""
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
        """Release what was chosen for a stage, without recording how long it took."""
        choice = self._choices.pop(index, None)
        if choice is not None:
            self._knowledge.drafts.ended(replace(choice, counts=False))

    def _learn_answer(self, answer: Answer, depth: int) -> None:
        self._patience.there()
        self._knowledge.drafts.answered(answer, self._choices.pop(answer.stage.index, None))
        self._knowledge.learn_answer(answer, depth)
        task = self._state.request.task
        self._observer.stage_answered(answer, task, is_adapted=answer.result.is_adapted)

    def _learn_failures(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            if isinstance(failure.error, Overloaded):
                # The request left its line: that says nothing of the stage.
                self._release(failure.stage.index)
                continue
            if not isinstance(failure.error, InvalidRequest):
                self._observer.stage_failed(failure.stage, failure.error)
            choice = self._choices.pop(failure.stage.index, None)
            if choice is not None:
                self._knowledge.drafts.ended(choice)
            self._knowledge.learn_failure(failure)
