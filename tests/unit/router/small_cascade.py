"""A cascade of three stages in memory: stages that write letters, a policy with a script, a clock by hand."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asd.errors import BudgetSpent, Unavailable
from asd.transport.patience import Patience
from asd.values import DecisionAction, DecisionReason, FinishReason
from services.router.cascade import Cascade
from services.router.clients.activation import AlwaysActive
from services.router.domain import (
    Decision,
    DraftPart,
    FinalPart,
    Overload,
    PeerLoad,
    PolicyChoice,
    Refusal,
    Revision,
    RoutedAnswer,
    RoutedRequest,
    ScoredTokens,
    Stage,
    StageResult,
    Timing,
    TokenUsage,
    Verification,
    Visibility,
)
from services.router.planning.draft_selection import SpeculationOptions
from services.router.planning.knowledge import Knowledge
from services.router.planning.planner import Planner
from services.router.planning.static_plan import StaticPlan
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Sequence

    from asd.errors import AsdError
    from services.router.domain import Event, StageAnswer, StageKnowledge
    from services.router.interfaces import Activator, PolicyClient, Take

NAMES = ("small", "medium", "large")
COSTS = (1.0, 2.0, 4.0)
OWN, OTHER = "a" * 64, "b" * 64


class Clock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeStage:
    """Writes the letters of a text. failure: raised after so many of them; None for a stage that then hangs.

    is_silent: its tokens have no text. queue_ms: of total_ms. peers: calls of other routers, as its results
    tell them. adapters: types of task that it has one for. on_call: called as each call begins. on_token:
    called with the count of letters before each is sent. timeouts_ms: of each call.
    """

    stage: Stage
    text: str = "abc"
    fail_after: int | None = None
    failure: AsdError | None = None
    prefill_failure: AsdError | None = None
    prompt_tokens: int = 4
    fingerprint: str = OWN
    context_length: int = 0
    total_ms: float = 0.0
    queue_ms: float = 0.0
    peers: int = 0
    is_silent: bool = False
    adapters: tuple[str, ...] = ()
    on_call: Callable[[], None] = lambda: None
    on_token: Callable[[int], None] = lambda count: None
    calls: list[str] = field(default_factory=list)
    timeouts_ms: list[float] = field(default_factory=list)

    async def generate(self, request: RoutedRequest, timeout_ms: float, emit: Take) -> StageResult:
        self._begin("generate", timeout_ms)
        return await self._write(request, emit)

    async def verify(
        self, request: RoutedRequest, draft: StageResult, timeout_ms: float, emit: Take
    ) -> StageResult:
        self._begin("verify", timeout_ms)
        await self._may_fail(0)
        own = [ord(letter) for letter in self.text]
        pairs = zip(own, draft.token_ids, strict=False)
        accepted = next((n for n, (a, b) in enumerate(pairs) if a != b), len(draft.token_ids))
        await emit(Verification(len(draft.token_ids), min(accepted, len(own))))
        # One pass for the draft, and one for each token after the correction and the end.
        return await self._write(request, emit, passes=1 + max(len(own) - accepted, 0))

    async def verify_stream(
        self,
        request: RoutedRequest,
        drafts: AsyncIterable[ScoredTokens | FinishReason],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        self._begin("verify_stream", timeout_ms)
        proposed = 0
        async for piece in drafts:
            proposed += len(piece.ids) if isinstance(piece, ScoredTokens) else 0
        await emit(Verification(proposed, 0))
        return await self._write(request, emit, passes=1 + len(self.text))

    async def prefill(self, request: RoutedRequest, timeout_ms: float) -> int:
        self.calls.append("prefill")
        self.timeouts_ms.append(timeout_ms)
        if self.prefill_failure is not None:
            raise self.prefill_failure
        return self.prompt_tokens

    def _begin(self, call: str, timeout_ms: float) -> None:
        _check_time(timeout_ms)
        self.calls.append(call)
        self.timeouts_ms.append(timeout_ms)
        self.on_call()

    async def _write(self, request: RoutedRequest, emit: Take, passes: int | None = None) -> StageResult:
        for count, letter in enumerate(self.text):
            await self._may_fail(count)
            self.on_token(count)
            # What is warmed meanwhile, and who waits, has its turn.
            await asyncio.sleep(0)
            await emit(
                ScoredTokens((ord(letter),), "" if self.is_silent else letter, (-0.1,), (0.1,), (0.9,))
            )
        await self._may_fail(len(self.text))
        is_adapted = request.task in self.adapters
        return StageResult(
            "" if self.is_silent else self.text,
            tuple(ord(letter) for letter in self.text),
            self.fingerprint,
            FinishReason.EOS,
            TokenUsage(
                self.prompt_tokens,
                completion_tokens=len(self.text),
                forward_passes=len(self.text) if passes is None else passes,
            ),
            Timing(queue_ms=self.queue_ms, total_ms=self.total_ms),
            context_length=self.context_length,
            model=f"{self.stage.name}/{request.task}" if is_adapted else self.stage.name,
            is_adapted=is_adapted,
            others=PeerLoad("a", self.peers, ("a",), 0.0) if self.peers else None,
        )

    async def _may_fail(self, count: int) -> None:
        if self.fail_after != count:
            return
        if self.failure is None:
            await asyncio.Event().wait()
        else:
            raise self.failure


@dataclass
class Policy:
    """Starts at the first stage that is available, or where it is told, and escalates by a script.

    script: by place, the stages to escalate to, of which it takes the first that is available. answers: how
    many questions it answers before it is unavailable. expected_ms: of each escalation. on_call: called as
    each question comes, with "plan" or "decide".
    """

    script: dict[int, Sequence[int]] = field(default_factory=dict)
    first: int = 0
    likely_next: int | None = None
    p_escalate: float = 0.9
    plan_failure: AsdError | None = None
    answers: float = math.inf
    expected_ms: float | None = None
    on_call: Callable[[str], None] = lambda step: None
    # The stages that were unavailable at each plan and decision.
    plans: list[set[str]] = field(default_factory=list)
    decisions: list[set[str]] = field(default_factory=list)
    # What each plan and each decision may take, and the cost and the time that decisions are told.
    plan_left_ms: list[float] = field(default_factory=list)
    left_ms: list[float] = field(default_factory=list)
    spent: list[tuple[float, float]] = field(default_factory=list)

    async def plan(
        self,
        request: RoutedRequest,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> PolicyChoice:
        away = _away(conditions)
        _check_time(timeout_ms)
        self.plans.append(away)
        self.plan_left_ms.append(timeout_ms)
        self._asked("plan")
        if self.plan_failure is not None and len(self.plans) > 1:
            raise self.plan_failure
        order = (self.first, *range(len(NAMES)))
        first = next((place for place in order if NAMES[place] not in away), self.first)
        return PolicyChoice(first, "v1", self.p_escalate if self.likely_next else 0.0, self.likely_next)

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
        away = _away(conditions)
        _check_time(timeout_ms)
        self.decisions.append(away)
        self.left_ms.append(timeout_ms)
        self.spent.append((spent_cost, spent_ms))
        self._asked("decide")
        targets = self.script.get(answer.stage.index, ())
        following = next((place for place in targets if NAMES[place] not in away), None)
        if following is None:
            return Decision(DecisionAction.STOP, DecisionReason.VALUE, None, 0.9, policy_version="v1")
        return Decision(
            DecisionAction.ESCALATE,
            DecisionReason.VALUE,
            following,
            0.5,
            expected_ms=self.expected_ms,
            policy_version="v1",
        )

    def _asked(self, step: str) -> None:
        self.on_call(step)
        if len(self.plans) + len(self.decisions) > self.answers:
            raise Unavailable("going away")


class Observer:
    """Keeps which stage calls counted as failed, and why requests were refused."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []
        self.refusals: list[Refusal] = []

    def stage_failed(self, stage: Stage, error: AsdError, duration_ms: float | None) -> None:
        self.failures.append((stage.name, type(error).__name__))

    def request_refused(self, reason: Refusal) -> None:
        self.refusals.append(reason)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def make_planner(
    stages: Sequence[Stage],
    policy: PolicyClient | None,
    static_plan: StaticPlan,
    observer: Any,
    clock: Callable[[], float],
    options: SpeculationOptions | None = None,
    activator: Activator | None = None,
    overload: Overload = Overload.QUEUE,
    patience: Patience | None = None,
) -> Planner:
    """Return a planner that knows nothing of its stages yet."""
    options = options or SpeculationOptions()
    knowledge = Knowledge(stages, clock, activator or AlwaysActive(), has_adaptive_drafts=options.adaptive)
    patience = patience or Patience(clock)
    return Planner(knowledge, policy, static_plan, observer, options, patience, overload)


class SmallCascade:
    """Stages small, medium and large behind a planner. options: of the stages, by name.

    instruments: what counts in the observer's place.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        static_plan: Sequence[int] = (0, 2),
        pipelined: bool = True,
        speculation: SpeculationOptions | None = None,
        activator: Activator | None = None,
        timeout_ms: float = 60_000.0,
        overload: Overload = Overload.QUEUE,
        instruments: Any = None,
        **options: dict[str, Any],
    ) -> None:
        self.clock = Clock()
        self.policy = policy
        places = [
            Stage(name, place, COSTS[place], timeout_ms, f"host:{place}") for place, name in enumerate(NAMES)
        ]
        self.stages = {each.name: FakeStage(each, **options.get(each.name, {})) for each in places}
        self.observer = Observer()
        observer: Any = instruments or self.observer
        self.planner = make_planner(
            places,
            policy,
            StaticPlan(tuple(static_plan), len(NAMES)),
            observer,
            self.clock,
            speculation or SpeculationOptions(pipelined=pipelined),
            activator,
            overload,
        )
        self.load = self.planner.load
        self.cascade = Cascade(tuple(self.stages.values()), self.planner, observer, self.clock)

    async def events(
        self, view: Visibility = Visibility.OUTCOME, *, seconds: float = 60.0, **fields: Any
    ) -> list[Event]:
        """Return what a request's caller sees."""
        request = RoutedRequest(**{"input": "hi", "id": "id", **fields})
        seen: list[Event] = []

        async def emit(event: Event) -> None:
            seen.append(event)

        # What hangs, hangs no longer than a test may.
        async with asyncio.timeout(CALL_S):
            outcome = await self.cascade.answer(request, self.clock() + seconds, view, emit)
        return [*seen, outcome]

    async def ask(
        self, view: Visibility = Visibility.OUTCOME, *, seconds: float = 60.0, **fields: Any
    ) -> RoutedAnswer:
        """Return the outcome of a request. fields: of the request."""
        outcome = (await self.events(view, seconds=seconds, **fields))[-1]
        assert isinstance(outcome, RoutedAnswer)
        return outcome

    def forget_calls(self) -> None:
        for stage in self.stages.values():
            stage.calls.clear()


async def show_nothing(event: Event) -> None:
    """Take what a caller is shown."""
    raise AssertionError(f"the outcome alone was to be shown, not {event}")


def called(cascade: SmallCascade) -> list[str]:
    """Return the stages that were called."""
    return [name for name, stage in cascade.stages.items() if stage.calls]


def answered(outcome: RoutedAnswer) -> list[str]:
    """Return the stages whose answers an outcome has, in order."""
    return [record.answer.stage.name for record in outcome.records]


def shown(events: Sequence[Event]) -> str:
    """Return the text that a stream leaves its caller with, of which all must be final. A token is a byte."""
    text, final = "", 0
    for event in events:
        if isinstance(event, Revision):
            text = text[: event.kept_bytes]
        elif isinstance(event, FinalPart | DraftPart) and event.tokens is not None:
            text += event.tokens.text
        if isinstance(event, FinalPart):
            final = event.count
    assert final == len(text)
    return text


def _check_time(timeout_ms: float) -> None:
    """Fail as a client does, which makes no call without time."""
    if timeout_ms <= 0:
        raise BudgetSpent("no time left")


def _away(conditions: Sequence[StageKnowledge]) -> set[str]:
    return {each.stage for each in conditions if not each.available}
