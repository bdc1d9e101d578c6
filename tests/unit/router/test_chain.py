"""Stages of a chain at work together, and prefix caches that are filled ahead: what ends, what is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, ModelRefusal, PromptTooLong, Unavailable
from asd.values import FinishReason, PlanSource
from services.router.chain import Chain, DraftStream
from services.router.domain import Provenance, RoutedRequest, ScoredTokens, Stage, Step, Verification
from services.router.planning.load import Load
from services.router.prefill import PrefillAhead
from tests.limits import CALL_S
from tests.unit.router.small_cascade import Clock, FakeStage

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from services.router.domain import StageResult
    from services.router.interfaces import Take

SMALL, MEDIUM, LARGE = (Stage(name, index, 1.0, 60_000.0) for index, name in enumerate("sml"))
REQUEST = RoutedRequest("hi", id="id", stage="", chain=("s", "m", "l"))


async def ignore(event: ScoredTokens | Verification) -> None:
    """Take what a stage sends."""


class Reading(FakeStage):
    """Keeps the pieces of the drafts that it verifies, and how the request came."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        super().__init__(stage, **options)
        self.pieces: list[str | FinishReason] = []
        self.chains: list[tuple[str, ...]] = []

    async def verify_stream(
        self,
        request: RoutedRequest,
        drafts: AsyncIterable[ScoredTokens | FinishReason],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        self.chains.append(request.chain)

        async def kept() -> Any:
            async for piece in drafts:
                self.pieces.append(piece.text if isinstance(piece, ScoredTokens) else piece)
                yield piece

        return await super().verify_stream(request, kept(), timeout_ms, emit)


async def test_each_stage_reads_what_the_one_before_it_writes() -> None:
    small, medium, large = FakeStage(SMALL), Reading(MEDIUM, text="abx"), Reading(LARGE)
    chain = Chain(REQUEST, [small, medium], 60_000.0, Clock())
    async with asyncio.timeout(CALL_S):
        result = await chain.verify(large, ignore)
    answers, failures, _ = await chain.close()
    assert result.text == "abc"
    assert medium.pieces == ["a", "b", "c", FinishReason.EOS]
    assert large.pieces == ["a", "b", "x", FinishReason.EOS]
    assert [each.result.text for each in answers] == ["abc", "abx"]
    assert failures == []
    # A drafter that is away is not waited for; the last stage is.
    assert (medium.chains, large.chains) == ([()], [REQUEST.chain])


async def test_the_next_stage_goes_on_alone_from_what_a_drafter_wrote_before_it_failed() -> None:
    small = FakeStage(SMALL, fail_after=2, failure=Unavailable("gone"))
    large = Reading(LARGE)
    chain = Chain(REQUEST, [small], 60_000.0, Clock())
    async with asyncio.timeout(CALL_S):
        await chain.verify(large, ignore)
    answers, failures, _ = await chain.close()
    assert large.pieces == ["a", "b", FinishReason.LENGTH]
    assert [(each.stage, type(each.error), each.has_heard) for each in failures] == [
        (SMALL, Unavailable, True)
    ]
    # What it wrote was paid for.
    assert [(each.result.text, each.is_whole) for each in answers] == [("ab", False)]


async def test_drafters_that_still_write_end_with_the_chain() -> None:
    small = FakeStage(SMALL, fail_after=1)
    chain = Chain(REQUEST, [small], 60_000.0, Clock())
    verifying = asyncio.create_task(chain.verify(FakeStage(LARGE), ignore))
    await asyncio.sleep(0)
    verifying.cancel()
    await asyncio.gather(verifying, return_exceptions=True)
    async with asyncio.timeout(CALL_S):
        answers, failures, _ = await chain.close()
    assert failures == []
    assert not answers[0].is_whole


async def test_a_drafts_reader_may_come_late_and_waited_until_it_began() -> None:
    clock = Clock()
    draft = DraftStream(clock)
    clock.now = 1.5
    draft.add(ScoredTokens((1,), "a"))
    clock.now = 9.0
    draft.add(FinishReason.EOS)
    for _ in range(2):
        assert [each if isinstance(each, FinishReason) else each.text async for each in draft] == [
            "a",
            FinishReason.EOS,
        ]
    assert draft.waited_ms() == pytest.approx(1500.0)


# Prefix caches that are filled ahead.


def step(prefill: Stage | None) -> Step:
    provenance = Provenance(PlanSource.POLICY)
    return Step(SMALL, provenance, 1000.0, 1000.0, is_final=False, prefill=prefill, prefill_ms=500.0)


class Filling(FakeStage):
    """Fills its cache once it may. failure: raised then."""

    def __init__(self, failure: AsdError | None = None) -> None:
        super().__init__(LARGE)
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusal = failure
        self.has_ended = False

    async def prefill(self, request: RoutedRequest, timeout_ms: float) -> int:
        try:
            await self.gate.wait()
            if self.refusal is not None:
                raise self.refusal
            return 7
        finally:
            self.has_ended = True


def prefill_of(large: Filling, clock: Clock) -> tuple[PrefillAhead, Load]:
    load = Load(3, clock)
    return PrefillAhead(REQUEST, [FakeStage(SMALL), FakeStage(MEDIUM), large], load, clock), load


async def test_a_prompt_is_in_the_cache_before_its_stage_is_called() -> None:
    clock, large = Clock(), Filling()
    prefill, load = prefill_of(large, clock)
    large.gate.clear()
    async with prefill, asyncio.timeout(CALL_S):
        prefill.start(step(LARGE))
        # Counted at once, and not waited for by the others.
        assert load.own_calls(2) == 1
        await prefill.wait_for(MEDIUM)
        assert not large.has_ended
        waiting = asyncio.create_task(prefill.wait_for(LARGE))
        await asyncio.sleep(0)
        clock.now += 0.25
        large.gate.set()
        await waiting
        filled = await prefill.close()
    assert filled is not None
    assert (filled.stage, filled.prompt_tokens, filled.latency_ms) == (LARGE, 7, pytest.approx(250.0))
    assert load.own_calls(2) == 0


async def test_a_cache_that_is_being_filled_as_the_request_ends_is_left() -> None:
    large = Filling()
    prefill, load = prefill_of(large, Clock())
    large.gate.clear()
    async with prefill, asyncio.timeout(CALL_S):
        prefill.start(step(LARGE))
        await asyncio.sleep(0)
        assert await prefill.close() is None
    assert large.has_ended
    assert load.own_calls(2) == 0


@pytest.mark.parametrize(
    ("failure", "refused"), [(PromptTooLong("too long"), True), (Unavailable("gone"), False)]
)
async def test_only_a_models_refusal_says_that_its_stage_cannot_take_the_request(
    failure: AsdError, refused: bool
) -> None:
    large = Filling(failure)
    prefill, _ = prefill_of(large, Clock())
    async with prefill, asyncio.timeout(CALL_S):
        prefill.start(step(LARGE))
        await prefill.wait_for(LARGE)
        assert await prefill.close() is None
        assert prefill.refusals() == ({2: failure} if refused else {})
    assert isinstance(failure, ModelRefusal) == refused


async def test_nothing_is_filled_where_no_escalation_is_likely() -> None:
    prefill, load = prefill_of(Filling(), Clock())
    async with prefill:
        prefill.start(step(None))
        assert load.own_calls(2) == 0
        assert await prefill.close() is None
