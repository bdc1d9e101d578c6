"""One call of any engine: its answer so far, and its passes and times. Pure."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from asd.values import FinishReason
from services.stage.domain import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asd.values import Sampling, TokenDetail
    from services.stage.domain import Event, TokenChunk
    from services.stage.generation.answer import AnswerBuilder, Signals
    from services.stage.generation.constraint import Matcher

# An engine's evidence of the distribution that a token was chosen from: logits, or the likeliest tokens.
Evidence = TypeVar("Evidence")


@dataclass(slots=True, eq=False)
class Call(Generic[Evidence]):
    """One call: its options, its answer so far, and its passes and times. Times in seconds.

    seed_is_free: whether it draws and nobody gave a seed, so that another one would do.
    ids: chosen so far, including those that a stop sequence may still cut off. signals: computes the signals
    of tokens from their ids and evidence; details: what the request asks of each token besides, if anything.
    matcher: of the constraint, after the ids so far; None: there is none. queued: wait for a slot in the
    batch; queued_at_first: the part of it before the first pass. emitted: for each pass that scored a
    proposal, the positions in the answer of the tokens that it emitted: the accepted ones and one more. The
    answer may end among them.
    """

    prompt: list[int]
    most_tokens: int
    sampling: Sampling
    answer: AnswerBuilder
    eos_ids: tuple[int, ...]
    signals: Callable[[Sequence[int], Sequence[Evidence]], Signals]
    arrived: float = field(default_factory=time.monotonic)
    seed_is_free: bool = False
    details: Callable[[Sequence[int], Sequence[Evidence]], Sequence[TokenDetail]] | None = None
    matcher: Matcher | None = None
    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    queued: float = 0.0
    queued_at_first: float = 0.0
    prefilled: float = 0.0
    cached: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    emitted: list[range] = field(default_factory=list)
    # Evidence of the last ids, which are not part of the answer's text yet.
    held: list[Evidence] = field(default_factory=list)

    def is_over(self) -> bool:
        """Whether the answer has ended."""
        return self.finish is not None

    @property
    def is_sampled(self) -> bool:
        """Whether its tokens are drawn; else the likeliest ones are taken."""
        return self.sampling.temperature > 0

    @property
    def room(self) -> int:
        """Tokens that the answer may still take."""
        return self.most_tokens - len(self.ids)

    def mark_prefilled(self, cached: int) -> None:
        """The first pass is over. cached: prompt tokens that were taken from the prefix cache."""
        if not self.prefilled:
            self.prefilled, self.cached, self.queued_at_first = time.monotonic(), cached, self.queued

    def add(self, token: int, evidence: Evidence) -> bool:
        """Add a token; return whether it ends the answer, as the last one that a constraint allows does."""
        if self.matcher is not None and not self.matcher.take([token]):
            raise RuntimeError(f"the library chose token {token}, which the constraint does not allow")
        if token in self.eos_ids:
            self.finish = FinishReason.EOS
            return True
        self.ids.append(token)
        self.held.append(evidence)
        if self.matcher is not None and self.matcher.is_over:
            self.finish = FinishReason.EOS
        elif len(self.ids) >= self.most_tokens:
            self.finish = FinishReason.LENGTH
        return self.finish is not None

    def flush(self) -> TokenChunk | None:
        """Turn the tokens since the last flush into text; return the chunk that may be sent now, if any.

        A stop sequence in it ends the answer.
        """
        chunk = None
        if self.held:
            ids = self.ids[-len(self.held) :]
            details = self.details(ids, self.held) if self.details is not None else ()
            chunk = self.answer.extend(ids, self.signals(ids, self.held), details)
            self.held.clear()
        if self.answer.has_stopped:
            self.finish = FinishReason.STOP
        return chunk

    def end(self) -> list[Event]:
        """Return the last events of an answer that has ended: its last tokens, and the result."""
        chunks = (self.flush(), self.answer.finish())
        if self.answer.has_stopped:
            self.finish = FinishReason.STOP
        return [*(chunk for chunk in chunks if chunk is not None), self._result()]

    def _result(self) -> Result:
        assert self.finish is not None
        # Tokens accepted after the final one are not returned, so do not count them. Whole passes may follow
        # it, because a stop sequence is recognised only after its last token.
        end = self.answer.taken + (self.finish is FinishReason.EOS)
        lengths = tuple(len(range(span.start, min(span.stop, end))) for span in self.emitted)
        unused = sum(
            max(len(span) - 1 - length, 0) for span, length in zip(self.emitted, lengths, strict=True)
        )
        now = time.monotonic()
        return Result(
            text=self.answer.text,
            ids=self.answer.ids,
            finish=self.finish,
            prompt_tokens=len(self.prompt),
            cached_prompt_tokens=min(self.cached, len(self.prompt)),
            proposed_tokens=self.proposed,
            accepted_tokens=self.accepted - unused,
            forward_passes=self.passes,
            accept_lengths=lengths,
            queue_ms=self.queued * 1e3,
            prefill_ms=(self.prefilled - self.arrived - self.queued_at_first) * 1e3,
            decode_ms=(now - self.prefilled - (self.queued - self.queued_at_first)) * 1e3,
            total_ms=(now - self.arrived) * 1e3,
            constrained=self.matcher is not None,
        )
