"""Where a request starts and stops: the caller's stage, the policy's choice, or the static plan. Pure."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.cost import is_above
from services.common.errors import (
    AsdError,
    Away,
    BudgetSpent,
    InputFailed,
    InvalidRequest,
    ModelRefusal,
    NotFound,
    Overloaded,
    PreconditionFailed,
    PromptTooLong,
    QueueFull,
    ResourceExhausted,
    Unavailable,
)
from services.common.telemetry import Spans, Traced
from services.router import spans
from services.router.domain import (
    AcceptanceMode,
    Condition,
    Decision,
    DecisionAction,
    DecisionReason,
    Overload,
    PlanSource,
    Preference,
    Refusal,
    Stage,
)
from services.router.planning.admission import MIN_QUEUE_MS, Admission
from services.router.planning.draft_selection import DraftSelection
from services.router.planning.health import StageHealth
from services.router.planning.load import Load, Question
from services.router.planning.static_plan import StaticPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from services.common.patience import Patience
    from services.router.domain import Answer, Failure, Plan, StageResult
    from services.router.interfaces import Activator, Observer, PolicyClient
    from services.router.planning.draft_selection import SpeculationOptions
    from services.router.planning.load import Call
    from services.router.request import RequestState

# Kept from every deadline, for the router's own work and the way back. Chosen: above its own p95.
MARGIN_MS = 10.0
# Kept in its place beside other requests, as a share of the whole time and at most, in milliseconds. Chosen:
# a refusal that its caller does not hear in time is none, and a busy machine takes long to say anything. With
# a tenth, 177 of 200 requests at once with half a second each heard nothing in time on two busy cores.
_SHARE_KEPT, _MOST_KEPT_MS = 0.25, 250.0
# A call that runs out of time says that the stage hangs where it had so many times what calls take there.
# Chosen: answers differ in length. One that nothing was heard of needs once that time. Several of them, each
# too short to tell, say it where nothing was heard for so many times that time in all.
_USUAL_TIMES = 4.0
# The same, in milliseconds, where no call has been answered yet. Chosen.
_UNKNOWN_MS = 1000.0
# Kept of a deadline, in milliseconds, for an earlier answer to reach its caller. gRPC rounds a deadline of
# 10 to 100 s up to a tenth of a second, so that the router may think that it has so much more.
_RETURN_MS = 100.0
# Share of the time left that a stage may take whose answer others could still replace. Chosen.
_SHARE_OF_TIME = 0.5
# Share of the time left that an escalation may lose to a prompt that is read ahead. Chosen.
_SHARE_FOR_WARMING = 0.25
# Probability of an escalation from which on its target is warmed. Chosen: more often right than wrong.
_LIKELY = 0.5
# Tokens that a chat template may add to a user's message, such as a default system text. Chosen: several
# times what known ones add.
_TEMPLATE_TOKENS = 1024
# Requests under way per replica from which on a stage is busy: nothing is warmed there, and chains are not
# pipelined. Chosen: with fewer, what a pass takes hardly depends on how many tokens it scores.
_BUSY = 8


class Planner:
    """Chooses stages. Only where the policy service is away or late does the static plan stand in for it.

    policy: None where there is no policy service. clock: monotonic seconds. overload: what becomes of
    requests where stages have lines. A stage that sleeps is woken
    where a plan would use it, and the plan is made again without it; only where nothing else can answer is it
    waited for.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        policy: PolicyClient | None,
        static_plan: StaticPlan,
        observer: Observer,
        clock: Callable[[], float],
        options: SpeculationOptions,
        sleepers: Activator,
        overload: Overload = Overload.QUEUE,
    ) -> None:
        self._sleepers = sleepers
        self._options = options
        self._speculation = DraftSelection(clock, enabled=options.adaptive)
        self._stages = tuple(stages)
        self._policy = policy
        self._static_plan = static_plan
        self._observer = observer
        self._clock = clock
        self._by_name = {stage.name: stage.index for stage in stages}
        self._health = tuple(StageHealth(stage, clock) for stage in stages)
        # What stages said last of their models: the tokenizer's fingerprint, and the context in tokens.
        self._contexts: dict[int, tuple[str, int]] = {}
        self._load = Load(len(self._stages), clock)
        self._admission = Admission(self._load, overload, clock)

    def stage_failed(self, progress: RequestState, failure: Failure) -> None:
        """A stage has failed a request: avoid it for a while if others may find it so, too."""
        place, error = failure.place, failure.error
        if isinstance(error, Overloaded):
            # The request left its line.
            self._drop(progress, place)
            progress.choices.pop(place, None)
            return
        choice = progress.choices.pop(place, None)
        if choice is not None:
            self._speculation.ended(choice)
        health = self._health[place]
        if isinstance(error, Unavailable) or (
            isinstance(error, PreconditionFailed) and not isinstance(error, InputFailed)
        ):
            # It may come back as another model.
            self._contexts.pop(place, None)
            health.went_away(error)
        elif isinstance(error, BudgetSpent):
            # One that others are answered by meanwhile is busy.
            call = progress.call
            answers = call is not None and self._load.has_answered_since(place, call.began)
            if not failure.has_heard and call is not None:
                answers = answers or self._load.has_sent_since(place, call.began)
            if not answers and self._hangs(failure):
                health.hung(error)
            elif call is not None and call.stage == place and failure.has_heard:
                self._load.ran_out(call)
        elif isinstance(error, InvalidRequest):
            health.spoke()
        else:
            health.failed_a_request(error)

    def may_be_refused(self, progress: RequestState) -> bool:
        """Return whether a request that has an answer is refused where there is no room for a better one.

        Waits lower no quality unasked. Who did not ask for quality has more of the answer.
        """
        return self._admission.asks_for_quality(progress.request.objective) and not progress.has_committed

    def is_refused_for(self, progress: RequestState, error: AsdError) -> bool:
        """Return whether a request that asks for quality ends with an error, though it has an answer.

        Where the improvement ran out of room or time because of other requests.
        """
        is_crowded = isinstance(error, Overloaded | QueueFull) or (
            isinstance(error, BudgetSpent) and self._is_out_of_time_for_others(progress)
        )
        return is_crowded and self.may_be_refused(progress)

    def heard(self, stage: Stage) -> None:
        """A stage has sent something of a call that is under way."""
        self._load.heard_from(stage.index)

    def may_be_replaced(self, progress: RequestState, error: AsdError) -> bool:
        """Return whether another stage may still answer, after one did not."""
        if isinstance(error, BudgetSpent):
            return progress.left_ms(self._margin_ms(progress)) > 0
        if isinstance(error, Overloaded):
            # Another one would answer less well, or be in the way of those that need it.
            return False
        # The router has checked the request: what a stage finds beyond that holds for all of them.
        return not isinstance(error, InvalidRequest) or isinstance(error, ModelRefusal)

    def _hangs(self, failure: Failure) -> bool:
        """Return whether a call that has run out of time shows that its stage hangs.

        It had enough for a stage that works, or calls before it were silent as well: no caller may have the
        time to see it alone.
        """
        health, timeout_ms = self._health[failure.place], self._timeout_of(self._stages[failure.place])
        usual_ms = self._usual_ms(failure.place)
        long_ms = min(timeout_ms, _USUAL_TIMES * usual_ms or _UNKNOWN_MS)
        if failure.has_heard:
            health.spoke()
            return failure.call_ms >= long_ms
        if failure.call_ms <= 0:
            return False
        silent_ms = health.was_silent(failure.call_ms)
        return failure.call_ms >= min(timeout_ms, usual_ms or _UNKNOWN_MS) or silent_ms >= long_ms

    def _usual_ms(self, stage: int) -> float:
        """Return what a call takes at a stage, its wait included; 0 where none has been answered."""
        service_ms = self._load.service_ms(stage)
        return service_ms + self._load.expected_queue_ms(stage) if service_ms else 0.0

    def _away(self) -> frozenset[int]:
        """Return the stages that are avoided now."""
        return frozenset(index for index, health in enumerate(self._health) if health.is_avoided)

    def warming_ms(self, progress: RequestState, place: int) -> float:
        """Return how long a stage may take to read a prompt ahead."""
        return min(progress.left_ms(MARGIN_MS) * _SHARE_FOR_WARMING, self._stages[place].timeout_ms)

    def timeout_ms(self, progress: RequestState, stage: Stage) -> float:
        """Return how long a stage's call may take."""
        left_ms = progress.left_ms(self._margin_ms(progress))
        if not self.is_final(progress, stage):
            left_ms = self._part_of(left_ms, stage)
        return min(left_ms, self._timeout_of(stage))

    def _margin_ms(self, progress: RequestState) -> float:
        """Return what is kept of a request's deadline: more beside others, who make the way back longer."""
        if not (self._admission.refuses and self._is_beside_others(progress)):
            return MARGIN_MS
        return max(MARGIN_MS, min(progress.whole_ms() * _SHARE_KEPT, _MOST_KEPT_MS))

    def _is_beside_others(self, progress: RequestState) -> bool:
        """Return whether a request has had others beside it: what is kept for that is not given back.

        A call that ends where it was to end would otherwise seem to have time left for another one.
        """
        own_calls = 1 + len(progress.upstream)
        progress.was_beside_others |= self._load.under_way() > own_calls
        return progress.was_beside_others

    def _timeout_of(self, stage: Stage) -> float:
        """Return a stage's own limit, from when its line has been served: who waits in it is not late."""
        return stage.timeout_ms + self._load.expected_queue_ms(stage.index)

    def _part_of(self, left_ms: float, stage: Stage) -> float:
        """Return what a stage may take of the time left where others could still answer.

        All of it where its line is waited in: others are answered meanwhile, or it is found to hang.
        """
        is_waited = self._admission.refuses and self._load.expected_queue_ms(stage.index) >= MIN_QUEUE_MS
        return left_ms if is_waited else left_ms * _SHARE_OF_TIME

    def leave_after_ms(self, progress: RequestState, stage: Stage) -> float:
        """Return after how long a request goes on without a stage, where it then still can.

        Unlike the call's own time, this is not known as the call begins: see RequestState.can_leave.
        """
        left_ms = progress.left_ms(self._margin_ms(progress))
        is_fixed = progress.plan_source is PlanSource.FIXED
        if is_fixed or not (progress.has_earlier_answer() or self._has_others(progress, stage)):
            return left_ms
        # A stage that takes long for every answer may have more than half, but for the way back.
        usual_ms = min(_USUAL_TIMES * self._usual_ms(stage.index), left_ms - _RETURN_MS)
        return max(self._part_of(left_ms, stage), usual_ms)

    def watch(self, progress: RequestState, stage: Stage, call: Call) -> Callable[[], float]:
        """Return what looks at a call that nothing has come of.

        It returns after how many milliseconds to look again. It raises Overloaded where the line at the stage
        leaves no time for an answer, and BudgetSpent where the stage was found to hang and the request can go
        on without it. A stage that only failed others may answer this one.
        """
        progress.call = call
        is_bound = progress.plan_source is PlanSource.FIXED or not self._has_others(progress, stage)

        def look() -> float:
            can_leave = progress.has_earlier_answer() or not is_bound
            if can_leave and call.depth > 1 and self._health[stage.index].is_hanging:
                # It says no more of the stage than the time that it waited.
                waited_ms = (self._clock() - call.began) * 1000.0
                progress.call_ms = min(progress.call_ms, waited_ms)
                raise BudgetSpent(f"{stage} has not answered for {waited_ms:.0f} ms")
            with _noting(progress, Refusal.DEADLINE):
                return self._admission.look(stage, call, progress.left_ms(self._margin_ms(progress)))

        return look

    def refused(self, progress: RequestState, error: ResourceExhausted | BudgetSpent) -> AsdError:
        """Return the error for a request that ran out of room or time: where others are why, when to ask
        again."""
        if isinstance(error, QueueFull):
            places = [place for place, each in progress.failed.items() if each is error]
            stages = [self._stages[place] for place in places] or self._stages
            progress.refusal = Refusal.STAGE_FULL
            after_s = min(map(self._admission.retry_after_s, stages))
            error = Overloaded(error.message, retry_after_s=after_s)
        elif (
            isinstance(error, BudgetSpent)
            and progress.call is not None
            and self._is_out_of_time_for_others(progress)
        ):
            progress.refusal = Refusal.DEADLINE
            after_s = self._admission.retry_after_s(self._stages[progress.call.stage])
            error = Overloaded(
                f"{error.message} while it was busy with other requests: allow more time, or call again in "
                f"{after_s:.2f} s",
                retry_after_s=after_s,
            )
        if isinstance(error, Overloaded):
            self._observer.request_refused(progress.refusal or Refusal.STAGE_FULL)
        return error

    def _is_out_of_time_for_others(self, progress: RequestState) -> bool:
        """Return whether a request ran out of time in a call, having had others beside it.

        Not where they wait for a stage that hangs, nor where the caller was given final tokens.
        """
        call = progress.call
        if call is None or progress.has_committed or self._health[call.stage].is_hanging:
            return False
        return self._admission.refuses and self._is_beside_others(progress)

    def _has_others(self, progress: RequestState, stage: Stage) -> bool:
        """Return whether a stage is awake, other than this one and those that failed the request."""
        left_out = self._sleepers.asleep.union(progress.failed, {stage.index})
        return len(left_out) < len(self._stages)

    async def until_awake(self, progress: RequestState, stages: Sequence[Stage]) -> None:
        """Wait for those of the stages that sleep. Raises BudgetSpent where one is not awake in time."""
        for stage in stages:
            if stage.index not in self._sleepers.asleep:
                continue
            left_ms = progress.left_ms(MARGIN_MS)
            has_others = self._has_others(progress, stage) or progress.has_earlier_answer()
            if has_others and progress.plan_source is not PlanSource.FIXED:
                left_ms *= _SHARE_OF_TIME
            await self._sleepers.until_awake(stage, left_ms)
            # How long that took says nothing about drafts.
            progress.choices = {
                place: replace(choice, counts=False) for place, choice in progress.choices.items()
            }

    def calling(self, stage: Stage) -> AbstractContextManager[Call]:
        """Return what counts its block as a call under way at a stage."""
        return self._load.calling(stage.index)

    def stage_answered(self, progress: RequestState, answer: Answer, depth: int) -> None:
        """Learn from an answer how long calls wait at its stage, and what its draft was worth.

        depth: calls under way at the stage as it began, itself included.
        """
        self._speculation.answered(answer, progress.choices.pop(answer.stage.index, None))
        if answer.is_whole:
            self._health[answer.stage.index].answered()
            if answer.result.context_length:
                known = answer.result.tokenizer_fingerprint, answer.result.context_length
                self._contexts[answer.stage.index] = known
            timing = answer.result.timing
            # A pipelined call mostly waits for its drafter, and takes nobody's place meanwhile.
            service_ms = 0.0 if answer.is_pipelined else timing.total_ms - timing.queue_ms
            self._load.answered(answer.stage.index, depth, timing.queue_ms, service_ms)
            if answer.result.others is not None:
                self._load.heard(answer.stage.index, answer.result.others)

    def ended(self, progress: RequestState) -> None:
        """A request has ended, however it did: what was chosen for it and found no answer is known too."""
        for choice in progress.choices.values():
            self._speculation.ended(choice)
        progress.choices.clear()

    def draft_for(self, progress: RequestState, stage: Stage) -> StageResult | None:
        """Return the draft that a stage is to verify; None where it had better write anew."""
        draft = progress.draft()
        if draft is None or progress.plan_source is PlanSource.FIXED:
            # Whether a chain's drafts are worth it was asked once, when it started.
            return draft
        return None if self._skips(progress, progress.answer.stage, stage, has_draft=True) else draft

    def _skips(
        self, progress: RequestState, drafter: Stage, target: Stage, *, has_draft: bool = False
    ) -> bool:
        """Return whether a target works without a drafter's draft, having noted why."""
        calls, replicas = self._load.calls(target.index) + 1, self._load.replicas(target.index)
        choice = self._speculation.choose(drafter.name, target.name, calls, replicas, has_draft=has_draft)
        self._drop(progress, target.index)
        progress.choices[target.index] = choice
        if choice.reason is None:
            return False
        self._observer.draft_skipped(target, choice.reason)
        return True

    def _drop(self, progress: RequestState, place: int) -> None:
        """Give back what was chosen for a stage, without a word on how long that took."""
        choice = progress.choices.get(place)
        if choice is not None:
            self._speculation.ended(replace(choice, counts=False))

    def stage_to_warm(self, progress: RequestState) -> int | None:
        """Return the stage to warm while the first one drafts; None: none is likely, or it is busy."""
        stage = progress.likely_next
        if stage is None or not self._options.prefill_ahead or progress.p_escalate < _LIKELY:
            return None
        if progress.request.objective.max_cost is not None:
            # What it costs is not part of the policy's sum.
            return None
        if stage in self._sleepers.asleep:
            self._sleepers.wake(self._stages[stage])
            return None
        # Any call of this router, since requests that come together would all warm it.
        is_busy = self._load.own_calls(stage) or self._is_crowded(stage)
        return None if is_busy or self._load.expected_queue_ms(stage) >= MIN_QUEUE_MS else stage

    def _is_crowded(self, stage: int) -> bool:
        """Return whether a stage would have _BUSY calls per replica with the next one, whoever makes them."""
        return self._load.calls(stage) + 1 >= _BUSY * self._load.replicas(stage)

    async def plan(self, progress: RequestState) -> int:
        """Return the stage to ask first. Raises NotFound for an unknown fixed one, Unavailable if all
        failed, Overloaded where there is no room for the request."""
        with Traced(Spans.PLAN) as span:
            first = await self._first_stage(progress)
            self._admit(progress, [self._stages[place] for place in (first, *progress.chain)])
            spans.describe_plan(span, progress, self._stages[first])
            return first

    def _admit(self, progress: RequestState, stages: Sequence[Stage]) -> None:
        """Raise Overloaded where there is no room for a request at the stages that it needs."""
        with _noting(progress, Refusal.LINE):
            for stage in stages:
                self._admission.shed(stage)
        with _noting(progress, Refusal.DEADLINE):
            self._admission.check(stages, progress.left_ms(self._margin_ms(progress)))

    async def decide(self, progress: RequestState) -> Decision:
        """Judge the latest answer. An escalation that does not fit the deadline is not started.

        Raises Overloaded where there is no room for it, and the caller asked for quality.
        """
        with Traced(Spans.DECIDE) as span:
            self._leave_out_short_contexts(progress)
            decision = await self._judge(progress)
            is_last = progress.answer.stage.index == len(self._stages) - 1
            if decision.reason is DecisionReason.LAST_STAGE and not is_last:
                # To the policy, one that is away is not there.
                decision = decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
            # A draft that was given up is no answer to stop with.
            following = decision.next_stage
            if following is not None and decision.reason is not DecisionReason.ABANDONED:
                left_ms = progress.left_ms(self._margin_ms(progress))
                if following in progress.failed:
                    decision = decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
                elif left_ms <= 0 or (decision.expected_ms or 0.0) > left_ms:
                    if self.may_be_refused(progress) and self._is_beside_others(progress):
                        raise self._admission.late(self._stages[following], left_ms)
                    decision = decision.stopped(DecisionReason.DEADLINE)
                elif progress.plan_source is not PlanSource.FIXED:
                    try:
                        self._admit(progress, [self._stages[following]])
                    except Overloaded:
                        if not self.may_be_refused(progress):
                            decision = decision.stopped(DecisionReason.DEADLINE)
                        else:
                            raise
            progress.judged(decision)
            spans.describe_decision(span, progress, decision)
            return decision

    def _leave_out_short_contexts(self, progress: RequestState) -> None:
        """Leave later stages out whose context is certain not to hold the prompt.

        The stage that has just answered counted it after its own chat template. Another stage's template may
        add less though their tokenizers are the same: so much is taken off. What a template makes of several
        turns is not bounded, since some leave out system turns or parts of earlier answers. A stage that is
        asked in doubt refuses within milliseconds, and one that is left out in error loses its better answer.
        """
        request, result = progress.request, progress.answer.result
        if not isinstance(request.input, str) and len(request.input) > 1:
            return
        least = result.usage.prompt_tokens - _TEMPLATE_TOKENS
        for stage in self._stages[progress.answer.stage.index + 1 :]:
            fingerprint, context = self._contexts.get(stage.index, ("", 0))
            is_counted = bool(fingerprint) and fingerprint == result.tokenizer_fingerprint
            if is_counted and least >= context:
                text = f"a prompt of at least {least} tokens leaves no room in a context of {context}"
                progress.failed.setdefault(stage.index, PromptTooLong(text))

    async def plan_again(self, progress: RequestState, error: AsdError, patience: Patience) -> int:
        """Return the stage to ask after one has failed before there was an answer.

        Where none is left, those that were away are waited for and asked again; patience: for how long.
        Raises the error where nothing else may be asked; where everything was, one that says so of each.
        """
        try:
            return await self._stage_instead(progress, error)
        except Unavailable:
            # A request that names its stages has waited in the call itself. One whose caller has been given
            # final tokens cannot begin anew.
            is_bound = progress.plan_source is PlanSource.FIXED or progress.has_committed
            away = [place for place, each in progress.failed.items() if isinstance(each, Away)]
            until = self._clock() + progress.left_ms() / 1000.0
            if is_bound or not away or not await patience.wait(until):
                raise
            for place in away:
                del progress.failed[place]
            return await self.plan(progress)

    async def _stage_instead(self, progress: RequestState, error: AsdError) -> int:
        """Return a stage that has not failed the request; of a chain, the next one.

        Raises the error where nothing else may be asked; where everything was, one that says so of each.
        """
        if progress.plan_source is PlanSource.FIXED:
            if not (progress.chain and isinstance(error, ModelRefusal)):
                raise error
            # Its draft would have been a help; the last stage's answer is what was asked for.
            following, *rest = progress.chain
            progress.chain = tuple(rest)
            return following
        if progress.has_committed or not self.may_be_replaced(progress, error):
            raise error
        if isinstance(error, QueueFull) and self._admission.refuses:
            # What stands in for a stage without room is not worse than it.
            full = max(place for place, each in progress.failed.items() if each is error)
            for place in range(full):
                progress.failed.setdefault(place, error)
        try:
            return await self.plan(progress)
        except InvalidRequest as refusal:
            # What is left of the cascade does not fit the request's budget.
            raise _failure_of_all(self._stages, progress.failed) from refusal

    async def decide_again(self, progress: RequestState) -> int | None:
        """Return the stage to escalate to after one has failed; None: the earlier answer stands."""
        if progress.has_committed or progress.left_ms(MARGIN_MS) <= 0:
            return None
        try:
            return (await self.decide(progress)).next_stage
        except Overloaded:
            raise
        except AsdError:
            # There is an answer.
            return None

    def is_final(self, progress: RequestState, stage: Stage) -> bool:
        """Return whether a stage's answer will stand, whatever it shows."""
        if progress.plan_source is PlanSource.FIXED:
            return not progress.chain
        if all(later in progress.failed for later in range(stage.index + 1, len(self._stages))):
            return True
        return (
            not progress.follows_policy
            and self._plan_without_policy(progress).next_after(stage.index, progress.failed) is None
        )

    def _plan_without_policy(self, progress: RequestState) -> StaticPlan:
        """Return what is asked while the policy is away or late.

        Where the caller wants quality certified or the BEST, the last stage alone: no other answer could
        stand. FASTEST is the static plan, as it is written. What is between them must not lose quality
        because the policy is late: the plan's stages draft, and the last stage of the cascade verifies. It
        verifies at once what the policy had drafted and was too late to judge, and writes where max_cost does
        not leave room for drafts. Without any policy service the static plan is all that its operator wants.
        """
        objective, last = progress.request.objective, len(self._stages) - 1
        alone = StaticPlan((last,), len(self._stages))
        if objective.min_quality is not None or objective.preference is Preference.BEST:
            return alone
        is_fastest = objective.preference is Preference.FASTEST and objective.lambda_ is None
        if self._policy is None or is_fastest:
            return self._static_plan
        cost = sum(self._stages[place].cost for place in {*self._static_plan.stages, last})
        is_too_dear = objective.max_cost is not None and is_above(cost, objective.max_cost)
        if is_too_dear or progress.plan_source is PlanSource.POLICY:
            return alone
        return self._static_plan.ending_with_the_last()

    async def _first_stage(self, progress: RequestState) -> int:
        request = progress.request
        # An earlier plan of this request says nothing of the stage that is chosen now.
        progress.p_escalate, progress.likely_next, progress.abandon = 0.0, None, ()
        if request.stage:
            progress.plan_source = PlanSource.FIXED
            place = self._place(request.stage, "stage")
            self._woken({place})
            return place
        if request.chain:
            progress.plan_source = PlanSource.FIXED
            return self._start_chain(progress)
        away = self._away()
        if self._policy is not None and progress.follows_policy:
            try:
                plan = await self._ask_for_plan(self._policy, progress, away.union(progress.failed))
            except (Unavailable, BudgetSpent) as error:
                if progress.left_ms() <= 0:
                    raise BudgetSpent("the deadline passed before a stage was asked") from error
            else:
                if plan.first_stage not in progress.failed:
                    progress.plan_source = PlanSource.POLICY
                    progress.policy_version = plan.policy_version
                    progress.p_escalate, progress.likely_next = plan.p_escalate, plan.likely_next
                    # Within a budget the policy alone says what comes next.
                    has_budget = request.objective.max_cost or request.objective.max_latency_ms
                    is_used = self._options.early_abandon and not has_budget
                    left_out = self._sleepers.asleep.union(progress.failed)
                    is_there = plan.abandon_to is not None and plan.abandon_to not in left_out
                    progress.abandon = plan.abandon if is_used and is_there else ()
                    progress.abandon_to = plan.abandon_to
                    return plan.first_stage
        progress.follows_policy = False
        progress.plan_source = PlanSource.STATIC
        self._observer.static_plan_used("plan")
        max_cost = request.objective.max_cost
        too_dear = {s.index for s in self._stages if max_cost is not None and s.cost > max_cost}
        excluded = too_dear.union(progress.failed)
        excluded |= self._too_slow(progress, excluded)
        first = self._plan_without_policy(progress).first(away, excluded)
        if first is not None and self._woken({first}):
            first = self._plan_without_policy(progress).first(away | self._sleepers.asleep, excluded)
        if first is not None:
            return first
        if progress.failed:
            raise _failure_of_all(self._stages, progress.failed)
        least = min(self._stages, key=lambda stage: stage.cost)
        raise InvalidRequest(
            f"max_cost {max_cost:g} is below the cheapest stage ({least.name}: {least.cost:g}): raise it",
            field="objective.max_cost",
        )

    async def _ask_for_plan(
        self, policy: PolicyClient, progress: RequestState, away: Collection[int]
    ) -> Plan:
        """Return the policy's plan; where it begins with a stage that sleeps, the plan without those."""
        avoided, share = away, self._admission.accuracy_share(progress.request.objective)
        may_repeat = self._counts_waits(progress, share)
        with progress.waiting_for_policy():
            while True:
                conditions, told_ms = self._conditions(avoided), self._queues_ms()
                with self._load.asking(Question.PLAN):
                    plan = await policy.plan(
                        progress.request,
                        conditions,
                        progress.left_ms(MARGIN_MS),
                        min_accuracy_share=share,
                    )
                asleep = self._woken({plan.first_stage})
                if asleep and avoided is away:
                    avoided = asleep.union(away)
                elif may_repeat and self._has_grown(plan.first_stage, told_ms):
                    may_repeat = False
                else:
                    self._load.chosen(Question.PLAN, plan.first_stage)
                    return plan

    async def _ask_for_decision(self, policy: PolicyClient, progress: RequestState) -> Decision:
        """Return the policy's decision; where it goes to a stage that sleeps, the decision without those."""
        answer, spent_cost, spent_ms = progress.answer, progress.spent_cost, progress.spent_ms()
        known = away = self._away().union(progress.failed)
        share = self._admission.accuracy_share(progress.request.objective)
        may_repeat = self._counts_waits(progress, share)
        with progress.waiting_for_policy():
            while True:
                conditions, told_ms = self._conditions(away), self._queues_ms()
                # There is an answer, which is not lost to a question about it.
                left_ms = progress.left_ms(MARGIN_MS) * _SHARE_OF_TIME
                with self._load.asking(Question.DECIDE):
                    decision = await policy.decide(
                        progress.request,
                        answer,
                        spent_cost,
                        spent_ms,
                        conditions,
                        left_ms,
                        min_accuracy_share=share,
                    )
                asleep = self._woken({decision.next_stage})
                if asleep and away is not known:
                    # An answer that is there does not wait for a stage that is not.
                    return decision.stopped(DecisionReason.STAGE_UNAVAILABLE)
                if asleep:
                    away = asleep.union(known)
                elif may_repeat and self._has_grown(decision.next_stage, told_ms):
                    may_repeat = False
                else:
                    self._load.chosen(Question.DECIDE, decision.next_stage)
                    return decision

    @staticmethod
    def _counts_waits(progress: RequestState, share: float | None) -> bool:
        """Return whether waits may change what the policy answers. share: as it is told."""
        return share is None or share < 1.0 or progress.request.objective.max_latency_ms is not None

    def _queues_ms(self) -> list[float]:
        """Return the wait to be expected at each stage."""
        return [self._load.expected_queue_ms(stage.index) for stage in self._stages]

    def _has_grown(self, stage: int | None, told_ms: Sequence[float]) -> bool:
        """Return whether the line at a stage is longer by an answer or more than the policy was told.

        Requests that came together went there meanwhile: it is worth asking once more.
        """
        if stage is None:
            return False
        longer_ms = self._load.expected_queue_ms(stage) - told_ms[stage]
        return longer_ms >= self._load.service_ms(stage) > 0.0

    def _woken(self, wanted: Collection[int | None]) -> frozenset[int]:
        """Have those wanted that sleep woken; return every stage that sleeps, or none where no wanted one
        does."""
        asleep = self._sleepers.asleep
        missing = asleep.intersection(wanted)
        for place in missing:
            self._sleepers.wake(self._stages[place])
        return asleep if missing else frozenset()

    def _place(self, name: str, field: str) -> int:
        if name not in self._by_name:
            raise NotFound(f"no stage {name!r}; the cascade has {', '.join(self._by_name)}", field=field)
        return self._by_name[name]

    def _start_chain(self, progress: RequestState) -> int:
        """Return the stage that a chain starts with, or that verifies while the others draft."""
        names = progress.request.chain
        chain = [self._place(name, f"chain[{index}]") for index, name in enumerate(names)]
        if chain != sorted(set(chain)) or len(chain) < 2:
            known = ", ".join(self._by_name)
            raise InvalidRequest(
                f"chain must name two or more stages in the order of the cascade ({known})", field="chain"
            )
        self._woken(chain)
        # Where drafts are not worth it, the last stage writes alone: an exact answer is the same.
        kept = [chain.pop()]
        acceptance = progress.request.acceptance
        is_exact = acceptance is None or acceptance.mode is AcceptanceMode.EXACT
        while chain and not is_exact:
            kept.insert(0, chain.pop())
        while chain and not self._skips(progress, self._stages[chain[-1]], self._stages[kept[0]]):
            kept.insert(0, chain.pop())
        # Drafts that come piece by piece take a pass for each piece, and a wait for them holds a place.
        is_free = all(
            not self._is_crowded(place) and self._load.expected_queue_ms(place) < MIN_QUEUE_MS
            for place in kept[1:]
        )
        if self._options.pipelined and is_free:
            progress.upstream = tuple(kept[:-1])
            return kept[-1]
        progress.chain = tuple(kept[1:])
        return kept[0]

    def _judge_fixed(self, progress: RequestState) -> Decision:
        if not progress.chain:
            return Decision(DecisionAction.STOP, DecisionReason.FIXED_STAGE)
        following, *rest = progress.chain
        progress.chain = tuple(rest)
        return Decision(DecisionAction.ESCALATE, DecisionReason.FIXED_STAGE, following)

    async def _judge(self, progress: RequestState) -> Decision:
        if progress.plan_source is PlanSource.FIXED:
            return self._judge_fixed(progress)
        if progress.is_abandoned:
            progress.is_abandoned = False
            return Decision(DecisionAction.ESCALATE, DecisionReason.ABANDONED, progress.abandon_to)
        if self._policy is not None and progress.follows_policy:
            try:
                return await self._ask_for_decision(self._policy, progress)
            except (Unavailable, BudgetSpent):
                self._observer.static_plan_used("decide")
                progress.follows_policy = False
        return self._judge_by_static_plan(progress)

    def _judge_by_static_plan(self, progress: RequestState) -> Decision:
        plan, judged = self._plan_without_policy(progress), progress.answer.stage.index
        away = self._away().union(progress.failed)
        following = plan.next_after(judged, away)
        asleep = self._woken({following})
        if asleep:
            following = plan.next_after(judged, asleep.union(away))
        if following is None:
            is_last = plan.next_after(judged) is None
            reason = DecisionReason.STATIC_PLAN if is_last else DecisionReason.STAGE_UNAVAILABLE
            return Decision(DecisionAction.STOP, reason)
        decision = Decision(DecisionAction.ESCALATE, DecisionReason.STATIC_PLAN, following)
        max_cost = progress.request.objective.max_cost
        # A verified answer never costs more than one written anew.
        cost = progress.spent_cost + self._stages[following].cost
        if max_cost is not None and is_above(cost, max_cost):
            return decision.stopped(DecisionReason.MAX_COST)
        if self._expected_ms(following) > self._left_of_budget_ms(progress):
            return decision.stopped(DecisionReason.MAX_LATENCY)
        return decision

    def _too_slow(self, progress: RequestState, excluded: Collection[int]) -> frozenset[int]:
        """Return the stages that max_latency_ms leaves no time for, by what calls took; never all that are
        left: where none fits, the quickest one does."""
        left_ms = self._left_of_budget_ms(progress)
        expected = {s.index: self._expected_ms(s.index) for s in self._stages if s.index not in excluded}
        quickest = min(expected, key=lambda place: expected[place], default=None)
        return frozenset(place for place, ms in expected.items() if ms > left_ms and place != quickest)

    def _expected_ms(self, place: int) -> float:
        """Return how long a call is expected to take at a stage, its wait included."""
        return self._load.expected_queue_ms(place) + self._load.service_ms(place)

    @staticmethod
    def _left_of_budget_ms(progress: RequestState) -> float:
        budget_ms = progress.request.objective.max_latency_ms
        return math.inf if budget_ms is None else budget_ms - progress.spent_ms()

    def _conditions(self, away: Collection[int]) -> list[Condition]:
        """Return the conditions of the stages that are away or busy: the policy takes others as idle."""
        conditions = []
        for index, stage in enumerate(self._stages):
            depth, queue_ms = self._load.own_calls(index), self._load.expected_queue_ms(index)
            if index in away or depth or queue_ms >= MIN_QUEUE_MS:
                conditions.append(Condition(stage.name, index not in away, depth, queue_ms))
        return conditions


@contextmanager
def _noting(progress: RequestState, refusal: Refusal) -> Iterator[None]:
    """Note why a request was refused in the block, where it was."""
    try:
        yield
    except Overloaded:
        progress.refusal = refusal
        raise


def _failure_of_all(stages: Sequence[Stage], failed: Mapping[int, AsdError]) -> AsdError:
    """Return the one error for a request that every stage has failed or refused.

    The request is at fault only where every stage says so. failed: by place; at least one.
    """
    errors = list(failed.values())
    if len(errors) == 1:
        return errors[0]
    refusals = [error for error in errors if isinstance(error, ModelRefusal)]
    counted = [error for error in errors if error not in refusals] or errors
    kinds = {type(error) for error in counted}
    kind: type[AsdError] = AsdError
    if len(kinds) == 1:
        kind = kinds.pop()
    elif all(isinstance(error, ModelRefusal) for error in counted):
        kind = ModelRefusal
    elif any(isinstance(error, Unavailable | BudgetSpent | ResourceExhausted) for error in counted):
        kind = Unavailable
    # Refusals do not name the stage: alone, they are about what the caller wrote.
    texts = [
        f"stage {stages[place].name}: {error.message}" if error in refusals else error.message
        for place, error in failed.items()
    ]
    texts = list(dict.fromkeys(texts))
    fields = {error.field for error in counted}
    return kind("; ".join(texts), field=fields.pop() if len(fields) == 1 else "")
