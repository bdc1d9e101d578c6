"""Verification by a library that verifies a draft while it writes: one request, with the draft beside it."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from services.stage.engines.backend import OwnDraft, TokenRequest
from services.stage.generation.logprobs import take_rows
from services.stage.generation.verification import Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from services.stage.domain import Event, TokenChunk, VerificationResult
    from services.stage.engines.arriving_draft import ArrivingDraft
    from services.stage.engines.backend import DraftFate, DraftingBackend
    from services.stage.generation.call import Call
    from services.stage.generation.logprobs import Row


async def verify_inside(
    backend: DraftingBackend, call: Call[Row], draft: ArrivingDraft
) -> AsyncGenerator[Event, None]:
    """Write an answer to its end with a draft beside it; say how the draft fared once that is known.

    Of a draft that is there as a whole the verification comes first, as the contract has it.
    """
    own = OwnDraft(secrets.token_hex(8), tuple(draft.ids))
    holds = draft.is_complete
    comparison = _Comparison(draft)
    held: list[TokenChunk] = []
    feeding = asyncio.create_task(_feed(backend, own.key, draft, len(own.ids)))
    # An error that comes once the answer is written concerns nobody.
    feeding.add_done_callback(lambda task: task.cancelled() or task.exception())
    try:
        async with aclosing(backend.generate(call.prompt, _request(call, own))) as pieces:
            async for piece in pieces:
                if feeding.done():
                    # Raises what makes the draft unreadable.
                    feeding.result()
                call.mark_prefilled(piece.cached)
                call.passes += 1
                if len(piece.rows) > 1:
                    call.emitted.append(range(len(call.ids), len(call.ids) + len(piece.rows)))
                chunk = take_rows(call, piece.rows, has_ended=piece.has_ended)
                comparison.add(piece.rows)
                if chunk is not None:
                    held.append(chunk)
                if not comparison.is_told and (comparison.is_decided or call.is_over()):
                    evidence = await comparison.tell(backend, own.key)
                    yield replace(evidence, resampled=call.is_sampled)
                if comparison.is_told or not holds:
                    for each in held:
                        yield each
                    held.clear()
                # Only a stop sequence ends an answer before the library does. Leaving the loop cancels it.
                if call.is_over() and not piece.is_last:
                    break
    finally:
        feeding.cancel()
    if not call.is_over():
        raise RuntimeError(f"the library ended an answer after {len(call.ids)} tokens, without a reason")
    call.proposed = call.accepted = draft.accepted
    if comparison.has_departed:
        _count(call, await backend.fate(own.key))
    for event in call.end():
        yield event


class _Comparison:
    """A draft beside the tokens that the library wrote, the end-of-sequence token included."""

    def __init__(self, draft: ArrivingDraft) -> None:
        # Whether a token differs from the draft's, and whether the draft's fate was told.
        self.has_departed = False
        self.is_told = False
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

    async def tell(self, backend: DraftingBackend, key: str) -> VerificationResult:
        """Judge the draft, and return how it fared."""
        kept = self._rows[: self._alike]
        ranks, logprobs = [row.rank for row in kept], [row.logprob for row in kept]
        if self.has_departed:
            fate = await backend.fate(key)
            if not fate.ranks:
                fate = replace(fate, **self._bounds())
            ranks += fate.ranks
            logprobs += fate.logprobs
        self._draft.judge(Verdict(self._alike, np.array(ranks, np.int64), np.array(logprobs, np.float32)))
        self.is_told = True
        return self._draft.evidence()

    def _bounds(self) -> dict[str, Any]:
        """Return rank and log-probability of the token that the answer departed from, which no pass scored:
        of one that is not among the likeliest, the best that it can be."""
        row, token = self._rows[self._alike], self._draft.ids[self._alike]
        known = row.of(token)
        if known is not None:
            return {"ranks": (known.rank,), "logprobs": (known.logprob,)}
        return {"ranks": (len(row.top_ids),), "logprobs": (row.top_logprobs[-1],)}


def _request(call: Call[Row], draft: OwnDraft) -> TokenRequest:
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


def _count(call: Call[Row], fate: DraftFate) -> None:
    """Count the passes of a call as the library saw them."""
    call.passes = fate.steps
    call.emitted = [span for span, _ in fate.passes]
    call.proposed = sum(proposed for _, proposed in fate.passes)
    call.accepted = sum(len(span) - 1 for span in call.emitted)
