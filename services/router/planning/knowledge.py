"""What this router knows of its stages: load, health, drafts, contexts. All requests use it and add to it."""

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

# A timed-out call marks the stage unhealthy only if it had so many times the usual time. Chosen: answers
# differ in length. A call from which nothing came needs the usual time once; several calls, each too short to
# tell, count together.
USUAL_TIMES = 4.0
# The usual time, in milliseconds, where no call has been answered yet. Chosen.
_UNKNOWN_MS = 1000.0
# Requests under way per replica from which on a stage is busy: no cache is filled ahead there, and chains are
# not pipelined. Chosen: with fewer, what a pass takes hardly depends on how many tokens it scores.
_BUSY = 8
# Tokens that a chat template may add to a user's message, such as a default system text. Chosen: several
# times what known ones add.
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
        # What stages said last of their models: the tokenizer's fingerprint, and the context in tokens.
        self._contexts: dict[int, tuple[str, int]] = {}

    # Stages.

    def named(self, name: str, field: str) -> Stage:
        """Return a stage. field: of the request, which names it. Raises NotFound."""
        if name not in self._by_name:
            raise NotFound(f"no stage {name!r}; the cascade has {', '.join(self._by_name)}", field=field)
        return self._by_name[name]

    def unhealthy(self) -> frozenset[int]:
        """Return the stages that plans avoid now, by their indices."""
        return frozenset(index for index, health in enumerate(self.health) if health.is_avoided)

    def scaled_to_zero(self) -> frozenset[int]:
        """Return the stages that have no replica, by their indices."""
        return self._activator.scaled_to_zero

    def activate(self, wanted: Collection[int | None]) -> frozenset[int]:
        """Have the wanted stages activated that have no replica.

        Returns every stage that has none; or nothing where all that are wanted have one.
        """
        inactive = self.scaled_to_zero()
        missing = inactive.intersection(wanted)
        for index in missing:
            self._activator.activate(self.stages[index])
        return inactive if missing else frozenset()

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        """Activate a stage and wait for it. Raises BudgetSpent where it is not active in time."""
        await self._activator.until_active(stage, timeout_ms)

    # Times.

    def expected_ms(self, stage: Stage) -> float:
        """Return how long a call is expected to take at a stage, its wait included; 0 where none was
        answered."""
        return self.load.expected_queue_ms(stage.index) + self.load.service_ms(stage.index)

    def usual_ms(self, stage: Stage) -> float:
        """Return `expected_ms`; 0 while the stage has answered no request."""
        return self.expected_ms(stage) if self.load.service_ms(stage.index) else 0.0

    def timeout_ms(self, stage: Stage) -> float:
        """Return a stage's own limit, from when its line has been served: who waits in it is not late."""
        return stage.timeout_ms + self.load.expected_queue_ms(stage.index)

    def has_line(self, stage: Stage) -> bool:
        """Return whether a call is expected to wait at a stage."""
        return self.load.expected_queue_ms(stage.index) >= MIN_QUEUE_MS

    def is_busy(self, stage: Stage) -> bool:
        """Return whether a stage would be busy with one more call, whoever makes the others."""
        index = stage.index
        return self.load.calls(index) + 1 >= _BUSY * self.load.replicas(index)

    def queues_ms(self) -> list[float]:
        """Return the wait that is expected at each stage."""
        return [self.load.expected_queue_ms(stage.index) for stage in self.stages]

    def has_grown(self, stage: int | None, told_ms: Sequence[float]) -> bool:
        """Return whether the line at a stage is longer by an answer or more than the policy was told.

        Requests that came together went there meanwhile: it is worth asking once more.
        """
        if stage is None:
            return False
        longer_ms = self.load.expected_queue_ms(stage) - told_ms[stage]
        return longer_ms >= self.load.service_ms(stage) > 0.0

    def conditions(self, unavailable: Collection[int], queues_ms: Sequence[float]) -> list[StageKnowledge]:
        """Return the conditions of stages that are unavailable or busy; the policy takes others as idle.

        queues_ms: what `queues_ms` gave.
        """
        conditions = []
        for stage, queue_ms in zip(self.stages, queues_ms, strict=True):
            depth = self.load.own_calls(stage.index)
            if stage.index in unavailable or depth or queue_ms >= MIN_QUEUE_MS:
                conditions.append(StageKnowledge(stage.name, stage.index not in unavailable, depth, queue_ms))
        return conditions

    # Learning.

    def learn_answer(self, answer: StageAnswer, depth: int) -> None:
        """Learn from an answer. depth: calls under way at its stage as it began, itself included."""
        if not answer.is_whole:
            return
        index, result = answer.stage.index, answer.result
        self.health[index].answered()
        if result.context_length:
            self._contexts[index] = result.tokenizer_fingerprint, result.context_length
        # A pipelined call mostly waits for its drafter, and takes nobody's place meanwhile.
        service_ms = 0.0 if answer.is_pipelined else result.timing.total_ms - result.timing.queue_ms
        self.load.answered(index, depth, result.timing.queue_ms, service_ms)
        if result.others is not None:
            self.load.heard(index, result.others)

    def learn_failure(self, failure: CallFailure) -> None:
        """Learn from a failed call: plans avoid its stage for a while if other requests may find it so."""
        index, error = failure.stage.index, failure.error
        health = self.health[index]
        if isinstance(error, Unavailable) or (
            isinstance(error, PreconditionFailed) and not isinstance(error, InputFailed)
        ):
            # It may come back as another model.
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
        """Return whether the stage has answered other requests since the call began, or writes for them."""
        call, index = failure.call, failure.stage.index
        if call is None:
            return False
        writes = not failure.has_heard and self.load.has_sent_since(index, call.began)
        return writes or self.load.has_answered_since(index, call.began)

    def _hangs(self, failure: CallFailure) -> bool:
        """Return whether a call that has run out of time shows that its stage hangs.

        It had enough for a stage that works, or calls before it were silent as well: no caller may have the
        time to see it alone.
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
        """Return later stages whose context is certain not to hold the prompt, by their indices, with why.

        The stage that has just answered counted it after its own chat template. Another stage's template may
        add less though their tokenizers are the same: so much is taken off. What a template makes of several
        turns is not bounded, since some leave out system turns or parts of earlier answers. A stage that is
        asked in doubt refuses within milliseconds, and one that is left out in error loses its better answer.
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
