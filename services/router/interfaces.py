"""What the cascade needs of the outside: protocols that clients.py meets with gRPC, and tests with fakes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Sequence

    from asd.errors import AsdError
    from asd.values import FinishReason
    from services.router.domain import (
        Decision,
        PolicyChoice,
        Refusal,
        RoutedAnswer,
        RoutedRequest,
        ScoredTokens,
        Stage,
        StageAnswer,
        StageKnowledge,
        StageResult,
        Verification,
    )
    from services.router.planning.draft_selection import SkipReason

    # Takes what a stage sends while it works; the stage goes on once it has been taken.
    Take = Callable[[ScoredTokens | Verification], Awaitable[None]]


class StageClient(Protocol):
    """Calls one stage. Every call raises the AsdError that the stage's status stands for.

    emit: is awaited with each message, in the order in which they come. What it raises ends the call.
    """

    @property
    def stage(self) -> Stage:
        """The stage that is called."""

    async def generate(self, request: RoutedRequest, timeout_ms: float, emit: Take) -> StageResult:
        """Emit tokens as the stage writes them; return its result."""

    async def verify(
        self, request: RoutedRequest, draft: StageResult, timeout_ms: float, emit: Take
    ) -> StageResult:
        """Emit the verification of the draft, then tokens; return the result."""

    async def verify_stream(
        self,
        request: RoutedRequest,
        drafts: AsyncIterable[ScoredTokens | FinishReason],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        """Verify a draft that is still being written; a FinishReason ends it. Tokens may come first.

        Each reader of the draft has it from its beginning: another call may need it, too.
        """

    async def prefill(self, request: RoutedRequest, timeout_ms: float) -> int:
        """Put the prompt into the prefix cache; return its number of tokens."""


class PolicyClient(Protocol):
    """Calls the policy service. Unavailable and BudgetSpent mean that it is away or late."""

    async def plan(
        self,
        request: RoutedRequest,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> PolicyChoice:
        """Return the first stage. min_accuracy_share: how far waits may lower quality, as in the contract."""

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
        """Return what to do with an answer. A stage to escalate to is later than the answer's."""


class Activator(Protocol):
    """Knows which stages are scaled to zero, by their indices, and activates them."""

    @property
    def scaled_to_zero(self) -> frozenset[int]:
        """Indices of the stages that have no replica."""

    def activate(self, stage: Stage) -> None:
        """Have a stage get a replica, in the background."""

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        """Activate a stage and wait for it. Raises BudgetSpent where it has no replica in time."""


class Observer(Protocol):
    """Counts what happens."""

    def static_plan_used(self, step: str) -> None:
        """The static plan stood in for the policy at a step, "plan" or "decide"."""

    def stage_answered(self, answer: StageAnswer, task: str, *, is_adapted: bool) -> None:
        """A stage gave an answer to a request of a type of task, or of none (""), with its adapter or not."""

    def draft_skipped(self, stage: Stage, reason: SkipReason) -> None:
        """A stage works without a draft that it could have had."""

    def request_refused(self, reason: Refusal) -> None:
        """There was no room for a request."""

    def stage_failed(self, stage: Stage, error: AsdError) -> None:
        """A stage call failed."""

    def request_answered(self, outcome: RoutedAnswer, stage_count: int) -> None:
        """A request was answered, in a cascade of so many stages."""
