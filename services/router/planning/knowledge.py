"""This router's knowledge of its stages: load, health, drafts, contexts. All requests use and extend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.errors import (
    AsdError,
    BudgetSpent,
    InputFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    PreconditionFailed,
    PromptTooLong,
    Unavailable,
)
from services.router.domain import StageKnowledge
from services.router.planning.admission import MIN_QUEUE_MS
from services.router.planning.draft_selection import DraftSelection
from services.router.planning.health import StageHealth
from services.router.planning.load import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from services.router.domain import CallFailure, RoutedRequest, Stage, StageAnswer
    from services.router.interfaces import Activator

# A timed-out call marks the stage unhealthy only if it had this many times the usual time. Chosen: answers
# differ in length. For a silent call, the usual time once is enough; the times of several silent calls that
# are too short are added up.
USUAL_TIMES = 4.0
# The usual time, in milliseconds, before any call was answered. Chosen.
_UNKNOWN_MS = 1000.0
# Requests in flight per replica from which a stage is busy: no prefill ahead is made there, and chains are
# not pipelined. Chosen: with fewer, the time of a pass hardly depends on how many tokens it scores.
_BUSY = 8
# Tokens that a chat template may add to a user's message, such as a default system text. Chosen: several
# times as many as known templates add.
_TEMPLATE_TOKENS = 1024


class Knowledge:
    """What the router knows of the stages of a cascade.

    clock: monotonic seconds. activator: knows which stages have no replica. has_adaptive_drafts: whether
    drafts that save nothing are left out.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        clock: Callable[[], float],
        activator: Activator,
        *,
        has_adaptive_drafts: bool,
    ) -> None:
        self.stages = tuple(stages)
        self.clock = clock
        self.load = Load(len(self.stages), clock)
        self.health = tuple(StageHealth(stage, clock) for stage in stages)
        self.drafts = DraftSelection(clock, enabled=has_adaptive_drafts)
        self._activator = activator
        self._by_name = {stage.name: stage for stage in stages}
        # Each stage's tokenizer fingerprint and context in tokens, as last reported.
        self._contexts: dict[int, tuple[str, int]] = {}

    # Stages.

    def named(self, name: str, field: str) -> Stage:
        """Return a stage by name. field: the request's field with the name. Raises NotFound."""
        if name not in self._by_name:
            raise NotFound(f"no stage {name!r}; the cascade has {', '.join(self._by_name)}", field=field)
        return self._by_name[name]

    def unhealthy(self) -> frozenset[int]:
        """Return the indices of the stages that plans avoid now."""
        return frozenset(index for index, health in enumerate(self.health) if health.is_avoided)

    def scaled_to_zero(self) -> frozenset[int]:
        """Return the indices of the stages that have no replica."""
        return self._activator.scaled_to_zero

    def activate(self, wanted: Collection[int | None]) -> frozenset[int]:
        """Activate the wanted stages that have no replica.

        Returns every stage without a replica, or nothing if all wanted stages have one.
        """
        inactive = self.scaled_to_zero()
        missing = inactive.intersection(wanted)
        for index in missing:
            self._activator.activate(self.stages[index])
        return inactive if missing else frozenset()

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        """Activate a stage and wait for it. Raises BudgetSpent if it is not active in time."""
        await self._activator.until_active(stage, timeout_ms)

    # Times.

    def expected_ms(self, stage: Stage) -> float:
        """Return the expected time of a call at a stage, including its wait; 0 before any was answered."""
        return self.load.expected_queue_ms(stage.index) + self.load.service_ms(stage.index)

    def usual_ms(self, stage: Stage) -> float:
        """Return `expected_ms`; 0 while the stage has answered no request."""
        return self.expected_ms(stage) if self.load.service_ms(stage.index) else 0.0

    def timeout_ms(self, stage: Stage) -> float:
        """Return a stage's own timeout plus the wait in its queue: a waiting call is not late."""
        return stage.timeout_ms + self.load.expected_queue_ms(stage.index)

    def has_line(self, stage: Stage) -> bool:
        """Return whether a call is expected to wait at a stage."""
        return self.load.expected_queue_ms(stage.index) >= MIN_QUEUE_MS

    def is_busy(self, stage: Stage) -> bool:
        """Return whether a stage would be busy with one more call, counting all routers' calls."""
        index = stage.index
        return self.load.calls(index) + 1 >= _BUSY * self.load.replicas(index)

    def queues_ms(self) -> list[float]:
        """Return the expected wait at each stage."""
        return [self.load.expected_queue_ms(stage.index) for stage in self.stages]

    def has_grown(self, stage: int | None, told_ms: Sequence[float]) -> bool:
        """Return whether the queue at a stage is at least one answer longer than the policy was told.

        Simultaneous requests went there meanwhile, so the policy is asked once more.
        """
        if stage is None:
            return False
        longer_ms = self.load.expected_queue_ms(stage) - told_ms[stage]
        return longer_ms >= self.load.service_ms(stage) > 0.0

    def conditions(self, unavailable: Collection[int], queues_ms: Sequence[float]) -> list[StageKnowledge]:
        """Return the conditions of stages that are unavailable or busy; the policy assumes the rest idle.

        queues_ms: the result of `queues_ms`.
        """
        conditions = []
        for stage, queue_ms in zip(self.stages, queues_ms, strict=True):
            depth = self.load.own_calls(stage.index)
            if stage.index in unavailable or depth or queue_ms >= MIN_QUEUE_MS:
                conditions.append(StageKnowledge(stage.name, stage.index not in unavailable, depth, queue_ms))
        return conditions

    # Learning.

    def learn_answer(self, answer: StageAnswer, depth: int) -> None:
        """Learn from an answer. depth: calls in flight at its stage when it began, itself included."""
        if not answer.is_whole:
            return
        index, result = answer.stage.index, answer.result
        self.health[index].answered()
        if result.context_length:
            self._contexts[index] = result.tokenizer_fingerprint, result.context_length
        # A pipelined call mostly waits for its drafter, and holds no slot meanwhile.
        service_ms = 0.0 if answer.is_pipelined else result.timing.total_ms - result.timing.queue_ms
        self.load.answered(index, depth, result.timing.queue_ms, service_ms)
        if result.others is not None:
            self.load.heard(index, result.others)

    def learn_failure(self, failure: CallFailure) -> None:
        """Learn from a failed call: plans avoid its stage for a while if other requests would fail too."""
        index, error = failure.stage.index, failure.error
        health = self.health[index]
        if isinstance(error, Unavailable) or (
            isinstance(error, PreconditionFailed) and not isinstance(error, InputFailed)
        ):
            # It may come back with another model.
            self._contexts.pop(index, None)
            health.went_away(error)
        elif isinstance(error, BudgetSpent):
            if not self._works_for_others(failure) and self._hangs(failure):
                health.hung(error)
            elif failure.call is not None and failure.has_heard:
                self.load.ran_out(failure.call)
        elif isinstance(error, InvalidRequest):
            health.spoke()
        elif not isinstance(error, Overloaded):
            health.failed_a_request(error)

    def _works_for_others(self, failure: CallFailure) -> bool:
        """Return whether the stage has answered other requests since the call began, or is answering them."""
        call, index = failure.call, failure.stage.index
        if call is None:
            return False
        writes = not failure.has_heard and self.load.has_sent_since(index, call.began)
        return writes or self.load.has_answered_since(index, call.began)

    def _hangs(self, failure: CallFailure) -> bool:
        """Return whether a timed-out call shows that its stage hangs.

        It does if it had enough time for a working stage, or if earlier calls were silent as well: a single
        call may be too short to show it.
        """
        stage = failure.stage
        health, timeout_ms, usual_ms = self.health[stage.index], self.timeout_ms(stage), self.usual_ms(stage)
        long_ms = min(timeout_ms, USUAL_TIMES * usual_ms or _UNKNOWN_MS)
        if failure.has_heard:
            health.spoke()
            return failure.call_ms >= long_ms
        if failure.call_ms <= 0:
            return False
        silent_ms = health.was_silent(failure.call_ms)
        return failure.call_ms >= min(timeout_ms, usual_ms or _UNKNOWN_MS) or silent_ms >= long_ms

    def too_short_contexts(self, request: RoutedRequest, answer: StageAnswer) -> dict[int, AsdError]:
        """Return later stages whose context certainly cannot hold the prompt: their errors by index.

        The stage that has just answered counted the prompt after its own chat template. Another stage with
        the same tokenizer may have a template that adds less, so that much is subtracted. For several turns
        there is no bound, since some templates leave out system turns or parts of earlier answers. In doubt
        the stage is called: it refuses within milliseconds, while leaving it out would lose a better answer.
        """
        if not isinstance(request.input, str) and len(request.input) > 1:
            return {}
        result = answer.result
        found: dict[int, AsdError] = {}
        least = result.usage.prompt_tokens - _TEMPLATE_TOKENS
        for stage in self.stages[answer.stage.index + 1 :]:
            fingerprint, context = self._contexts.get(stage.index, ("", 0))
            is_counted = bool(fingerprint) and fingerprint == result.tokenizer_fingerprint
            if is_counted and least >= context:
                text = f"a prompt of at least {least} tokens leaves no room in a context of {context}"
                found[stage.index] = PromptTooLong(text)
        return found
