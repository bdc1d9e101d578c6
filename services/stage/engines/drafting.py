"""Verification by a library that verifies a draft while it writes: one request, with the draft beside it."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from services.stage.engines.backend import RequestDraft, TokenRequest
from services.stage.generation.logprobs import take_rows
from services.stage.generation.verification import Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from services.stage.domain import Event, TokenChunk, VerificationResult
    from services.stage.engines.arriving_draft import ArrivingDraft
    from services.stage.engines.backend import DraftingBackend
    from services.stage.generation.call import Call
    from services.stage.generation.logprobs import Row


async def verify_inside(
    backend: DraftingBackend, call: Call[Row], draft: ArrivingDraft, *, resync: bool
) -> AsyncGenerator[Event, None]:
    """Write an answer to its end with a draft beside it; say how the draft fared once that is known.

    Of a draft that is there as a whole the verification comes first, as the contract has it. resync: whether
    the rest of the draft is proposed after a correction.
    """
    own = RequestDraft(secrets.token_hex(8), tuple(draft.ids), resync)
    holds = draft.is_complete
    comparison = _Comparison(draft)
    held: list[TokenChunk] = []
    async with aclosing(_write(backend, call, draft, own, len(own.ids))) as written:
        async for rows, chunk in written:
            comparison.add(rows)
            if chunk is not None:
                held.append(chunk)
            if not comparison.is_verified and (comparison.is_decided or call.is_over()):
                verification = await comparison.verify(backend, own.key)
                yield replace(verification, resampled=call.is_sampled, while_writing=True)
            if comparison.is_verified or not holds:
                for each in held:
                    yield each
                held.clear()
    for event in call.end():
        yield event


async def continue_inside(
    backend: DraftingBackend, call: Call[Row], draft: ArrivingDraft
) -> AsyncGenerator[Event, None]:
    """Write the rest of an answer that has departed from its draft, with the rest of the draft beside it."""
    own = RequestDraft(secrets.token_hex(8), tuple(draft.ids[draft.accepted + 1 :]))
    async with aclosing(_write(backend, call, draft, own, len(draft.ids))) as written:
        async for _, chunk in written:
            if chunk is not None:
                yield chunk
    for event in call.end():
        yield event


async def _write(
    backend: DraftingBackend, call: Call[Row], draft: ArrivingDraft, own: RequestDraft, known: int
) -> AsyncGenerator[tuple[Sequence[Row], TokenChunk | None], None]:
    """Write an answer to its end, and hand over what comes of its draft; count the steps that this took.

    known: ids of the draft that the library has.
    """
    feeding = asyncio.create_task(_feed(backend, own.key, draft, known))
    # An error that comes once the answer is written concerns nobody.
    feeding.add_done_callback(lambda task: task.cancelled() or task.exception())
    first, passes = len(call.ids), call.passes
    try:
        async with aclosing(backend.generate([*call.prompt, *call.ids], _request(call, own))) as pieces:
            async for piece in pieces:
                if feeding.done():
                    # Raises what makes the draft unreadable.
                    feeding.result()
                call.mark_prefilled(piece.cached)
                call.passes += 1
                yield piece.rows, take_rows(call, piece.rows, has_ended=piece.has_ended)
                # Only a stop sequence ends an answer before the library does. Leaving the loop cancels it.
                if call.is_over() and not piece.is_last:
                    break
        if not call.is_over():
            raise RuntimeError(f"the library ended an answer after {len(call.ids)} tokens, without a reason")
        # A piece may hold the tokens of several steps: the library alone knows the steps.
        outcome = await backend.outcome(own.key)
        if outcome.steps:
            call.passes = passes + outcome.steps
            for span, proposed in outcome.verify_steps:
                call.emitted.append(range(first + span.start, first + span.stop))
                call.proposed += proposed
                call.accepted += len(span) - 1
    finally:
        feeding.cancel()
        backend.forget(own.key)


class _Comparison:
    """A draft beside the tokens that the library wrote, the end-of-sequence token included."""

    def __init__(self, draft: ArrivingDraft) -> None:
        # Whether a token differs from the draft's, and whether the verification was given.
        self.has_departed = False
        self.is_verified = False
        self._draft = draft
        self._rows: list[Row] = []
        self._alike = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Take what was written."""
        self._rows += rows
        draft, written = self._draft.ids, self._rows
        while self._alike < min(len(written), len(draft)) and not self.has_departed:
            self.has_departed = draft[self._alike] != written[self._alike].token
            self._alike += not self.has_departed

    @property
    def is_decided(self) -> bool:
        """Whether it is known how much of the draft the answer begins with."""
        is_whole = self._draft.is_complete and self._alike == len(self._draft.ids)
        return self.has_departed or is_whole

    async def verify(self, backend: DraftingBackend, key: str) -> VerificationResult:
        """Judge the draft, and return how it fared."""
        kept = self._rows[: self._alike]
        ranks, logprobs = [row.rank for row in kept], [row.logprob for row in kept]
        if self.has_departed:
            outcome = await backend.outcome(key)
            if not outcome.ranks:
                outcome = replace(outcome, **self._bounds())
            ranks += outcome.ranks
            logprobs += outcome.logprobs
        self._draft.judge(Verdict(self._alike, np.array(ranks, np.int64), np.array(logprobs, np.float32)))
        self.is_verified = True
        return self._draft.evidence()

    def _bounds(self) -> dict[str, Any]:
        """Return rank and log-probability of the token that the answer departed from, which no pass scored:
        of one that is not among the likeliest, the best that it can be."""
        row, token = self._rows[self._alike], self._draft.ids[self._alike]
        known = row.of(token)
        if known is not None:
            return {"ranks": (known.rank,), "logprobs": (known.logprob,)}
        return {"ranks": (len(row.top_ids),), "logprobs": (row.top_logprobs[-1],)}


def _request(call: Call[Row], draft: RequestDraft) -> TokenRequest:
    """Return the request of a call, without a seed: rejection sampling would draw otherwise anyway."""
    top_p = 1.0 if call.sampling.top_p is None else call.sampling.top_p
    return TokenRequest(call.room, call.sampling.temperature, top_p, draft=draft)


async def _feed(backend: DraftingBackend, key: str, draft: ArrivingDraft, known: int) -> None:
    """Hand over what comes of a draft. known: ids that the library has."""
    while not (draft.is_complete and known == len(draft.ids)):
        await draft.more(known)
        fresh = draft.ids[known:]
        if fresh:
            known += len(fresh)
            await backend.grow(key, fresh)
