"""Protocols of what the cascade needs. `clients` implements them over gRPC, and tests with fakes."""

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

    # Takes an event of a stage. The stage continues once the event has been taken.
    Take = Callable[[ScoredTokens | Verification], Awaitable[None]]


class StageClient(Protocol):
    """Calls one stage. Every call raises the AsdError that the stage's status stands for.

    emit: is awaited with each message, in order. An error that it raises ends the call.
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

        The draft can be read several times, each time from its start: a retry reads it again.
        """

    async def prefill(self, request: RoutedRequest, timeout_ms: float) -> int:
        """Put the prompt into the prefix cache; return its number of tokens."""


class PolicyClient(Protocol):
    """Calls the policy service. Raises Unavailable if it is unreachable, BudgetSpent if it is late."""

    async def plan(
        self,
        request: RoutedRequest,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> PolicyChoice:
        """Return the first stage. min_accuracy_share: see the contract."""

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
    """Knows which stages are scaled to zero, and activates them."""

    @property
    def scaled_to_zero(self) -> frozenset[int]:
        """Indices of the stages that have no replica."""

    def activate(self, stage: Stage) -> None:
        """Start a replica of a stage, in the background."""

    async def until_active(self, stage: Stage, timeout_ms: float) -> None:
        """Activate a stage and wait for it. Raises BudgetSpent if it has no replica in time."""


class Observer(Protocol):
    """Records events as metrics."""

    def static_plan_used(self, step: str) -> None:
        """The static plan replaced the policy at a step, "plan" or "decide"."""

    def stage_answered(self, answer: StageAnswer, task: str, *, is_adapted: bool) -> None:
        """A stage answered. task: the request's type of task, or "". is_adapted: if an adapter was used."""

    def draft_skipped(self, stage: Stage, reason: SkipReason) -> None:
        """A stage works without a draft although there is one."""

    def request_refused(self, reason: Refusal) -> None:
        """A request was refused for lack of capacity."""

    def stage_failed(self, stage: Stage, error: AsdError, duration_ms: float | None) -> None:
        """A stage call failed. duration_ms: None if no call was made, and for drafters."""

    def request_answered(self, outcome: RoutedAnswer, stage_count: int) -> None:
        """A request was answered. stage_count: stages of the cascade."""
