"""Lanes of the `onnx` engine: what runs on a model's thread, one library generator each."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from services.stage.domain import FinishReason, Result, VerificationResult
from services.stage.generation.resync import Resynchroniser
from services.stage.generation.verification import choose_token, verify_draft

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.common.errors import AsdError
    from services.stage.domain import Event, SamplingOptions
    from services.stage.generation.answer import AnswerBuilder
    from services.stage.generation.draft import DraftFeed

    Logits = npt.NDArray[np.float32]

# The first chunk goes out once this much time has passed since the model started, later ones after this much
# more: a small model's whole answer is one chunk. Every hand-over to the event loop's thread stalls the
# model's, which waits for the interpreter meanwhile, for about half a millisecond; a chunk every 5 ms cost
# the large model 10% of its speed. Chosen.
_FIRST_CHUNK_SECONDS = 0.005
_CHUNK_SECONDS = 0.02
# A request alone in its lane is decoded for this long before other lanes have their turn. Chosen: many tokens
# of a small model, one of a large one.
_SLICE_SECONDS = 0.001


@dataclass(slots=True, eq=False)
class Work:
    """One call on its way through the model's thread.

    seed: of the draws, None for greedy decoding. resync: whether parts of a draft are proposed again after a
    correction.
    """

    prompt: list[int]
    most_tokens: int
    sampling: SamplingOptions
    answer: AnswerBuilder
    deliver: Callable[[list[Event | AsdError | None]], None]
    arrived: float
    seed: int | None = None
    draft: DraftFeed | None = None
    threshold: float | None = None
    resync: bool = True
    only_prefill: bool = False
    is_cancelled: bool = False
    started: float = 0.0
    prefilled: float = 0.0
    chunk_due: float = 0.0
    cached: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    # Of each pass that scored a proposal, the places in the answer of what it emitted: what was accepted, and
    # one token more. The answer may end among them.
    emitted: list[range] = field(default_factory=list)
    rows: list[Logits] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    outbox: list[Event | AsdError | None] = field(default_factory=list)
    # False while something waits to be taken that must not wait for the next pass.
    is_taken: bool = True

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return self.answer.count + len(self.new)

    @property
    def is_plain(self) -> bool:
        """Whether it is greedy generation, which can share a lane with others."""
        return self.draft is None and self.seed is None and not self.only_prefill

    def start(self, now: float) -> None:
        """The model starts on it."""
        self.started, self.chunk_due = now, now + _FIRST_CHUNK_SECONDS

    def choose(self, logits: Logits, place: int) -> int:
        """Return the model's own token at a place of the answer. logits: float32 [V]."""
        if self.seed is None:
            return int(logits.argmax())
        return choose_token(logits, self.sampling.temperature, self.sampling.top_p, self.seed, place)

    def send(self, *events: Event | AsdError | None) -> None:
        """Deliver what is due, with these events last; None ends the call."""
        outbox, self.outbox = [*self.outbox, *events], []
        self.deliver(outbox)


class CachedSequence:
    """A generator of one row and the tokens that its KV cache holds.

    places: tokens that the cache has room for. pass_tokens: tokens of one pass at most; None: any number.
    """

    def __init__(self, generator: Any, places: int = 0, pass_tokens: int | None = None) -> None:
        self.generator = generator
        self.places = places
        self._pass_tokens = pass_tokens
        self.tokens: list[int] = []
        self.used = 0.0

    def roll_back(self, length: int) -> None:
        """Forget the tokens from a place on."""
        if length < len(self.tokens):
            self.generator.rewind_to(length)
            del self.tokens[length:]

    def run(self, tokens: Sequence[int]) -> None:
        """Append tokens, in as few passes as may be."""
        for piece in self._pieces(tokens):
            self._run(piece)

    def append(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Append tokens; return the logits after tokens[first:], float32 [tokens - first, V]."""
        rows: list[Logits] = []
        place = 0
        for piece in self._pieces(tokens):
            self._run(piece)
            if place + len(piece) > first:
                logits: Logits = self.generator.get_output("logits")[0]
                rows.append(logits[max(first - place, 0) - len(piece) :])
            place += len(piece)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _run(self, tokens: Sequence[int]) -> None:
        self.generator.append_tokens(np.array([tokens], np.int32))
        self.tokens += tokens

    def _pieces(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        step = self._pass_tokens or len(tokens)
        if len(tokens) <= step:
            return [tokens]
        return [tokens[start : start + step] for start in range(0, len(tokens), step)]


class Lane(Protocol):
    """Requests that share a generator, advanced in turn with other lanes."""

    works: list[Work]

    @property
    def is_ready(self) -> bool:
        """Whether there is something to compute now."""

    @property
    def places(self) -> int:
        """Tokens that the KV cache has room for, all rows together, on behalf of the requests under way."""

    def step(self) -> list[Work]:
        """Advance; return the requests that finished."""


class SoloLane:
    """One request with a cache of its own. A subclass says how it is decoded."""

    def __init__(self, work: Work, sequence: CachedSequence, eos_ids: tuple[int, ...]) -> None:
        self.works = [work]
        self.sequence = sequence
        self._work = work
        self._eos_ids = eos_ids
        self._is_open = False

    @property
    def is_ready(self) -> bool:
        """Whether there is something to compute now."""
        return True

    @property
    def places(self) -> int:
        """Places of the KV cache; once the request has left, the sequence is the prefix cache's."""
        return self.sequence.places if self.works else 0

    def step(self) -> list[Work]:
        """Advance by a pass, or for a slice of time; return the request if it finished."""
        if self._is_open:
            has_ended = self._go_on()
        else:
            self._is_open = True
            has_ended = self._begin(self._work.prompt[len(self.sequence.tokens) :])
        return [self._work] if has_ended else []

    def _begin(self, prompt: list[int]) -> bool:
        """Process what is not cached of the prompt; return whether the request is finished."""
        raise NotImplementedError

    def _go_on(self) -> bool:
        """Decode on; return whether the request is finished."""
        raise NotImplementedError


class GenerateLane(SoloLane):
    """Greedy generation, or a prompt that is only put into the cache."""

    def _begin(self, prompt: list[int]) -> bool:
        # Nobody looks at the logits: the library picks the first token from them.
        self.sequence.run(prompt)
        self._work.prefilled = time.monotonic()
        # The pass that processed the prompt also yields the first token, and is counted with it.
        return self._work.only_prefill

    def _go_on(self) -> bool:
        work, tokens = self._work, self.sequence.tokens
        generate_next_token = self.sequence.generator.generate_next_token
        get_next_tokens = self.sequence.generator.get_next_tokens
        get_output = self.sequence.generator.get_output
        now = time.monotonic()
        until = now + _SLICE_SECONDS
        while now < until and not work.is_cancelled:
            # The library's own step is the fastest: it runs the last token and picks the next in one call.
            generate_next_token()
            token = int(get_next_tokens()[0])
            tokens.append(token)
            work.passes += 1
            now = time.monotonic()
            if take_token(work, token, get_output("logits")[0, -1], self._eos_ids, now):
                return True
        return False


class VerifyLane(SoloLane):
    """Verification of a draft; also sampled generation, which is verification of nothing.

    After every pass the target's own choice of the next token goes out at once and is `_pending`: the next
    pass runs it together with a proposal, and keeps what the target agrees with. As long as it agrees with
    the draft (`_agrees`), the proposal is what has come of the draft; after its first correction, what the
    Resynchroniser finds. A proposal of nothing is plain decoding.
    """

    def __init__(self, work: Work, sequence: CachedSequence, eos_ids: tuple[int, ...]) -> None:
        super().__init__(work, sequence, eos_ids)
        self._agrees = work.draft is not None
        # Draft tokens that were accepted while the target agreed.
        self._cursor = 0
        self._ids: list[int] = []
        # The last of the ids, chosen from `_row` and not yet in the cache.
        self._pending = -1
        self._row: Logits = np.zeros(0, np.float32)
        self._ranks = [np.zeros(0, np.int64)]
        self._logprobs = [np.zeros(0, np.float32)]
        self._resync: Resynchroniser | None = None

    @property
    def is_ready(self) -> bool:
        """Not while all that has come of the draft is judged and more is to come, or tokens wait to go."""
        draft = self._work.draft
        if not self._work.is_taken:
            return False
        if not self._agrees or draft is None or draft.is_complete:
            return True
        if not self._is_open:
            # A tolerant target's own choice is final only once the draft is known there.
            return self._work.threshold is None
        return len(draft.ids) > self._cursor

    def step(self) -> list[Work]:
        """Advance by a pass; return the request if it finished."""
        finished = super().step()
        if finished and self._agrees:
            # The answer ended before the draft did: what is known of it precedes the result.
            self._work.outbox.insert(-1, self._evidence())
        return finished

    def _begin(self, prompt: list[int]) -> bool:
        draft = self._work.draft
        proposal = list(draft.ids) if draft is not None else []
        rows = self.sequence.append([*prompt, *proposal], len(prompt) - 1)
        self._work.prefilled = time.monotonic()
        return self._judge(proposal, rows)

    def _go_on(self) -> bool:
        proposal = self._next_in_draft() if self._agrees else None
        if self._agrees and proposal is None:
            return False
        if proposal is None:
            room = self._work.most_tokens - len(self._ids)
            proposal = self._resync.propose(self._ids, room) if self._resync is not None else []
        return self._judge(proposal, self.sequence.append([self._pending, *proposal]))

    def _next_in_draft(self) -> list[int] | None:
        """Return what has come of the draft after the pending token; None: nothing, or it departs there."""
        draft = self._work.draft
        assert draft is not None
        is_complete, arrived = draft.is_complete, draft.ids[self._cursor :]
        if arrived and self._score(arrived[:1], self._row[None], len(self._ids) - 1):
            # The pending token is the draft's as well.
            arrived = arrived[1:]
            if arrived:
                return arrived
        elif arrived or is_complete:
            self._depart()
        return None

    def _judge(self, proposal: list[int], rows: Logits) -> bool:
        """Keep the accepted part of a proposal, then choose the token after it. rows: float32 [k + 1, V].

        Returns whether the request is finished.
        """
        work, now = self._work, time.monotonic()
        work.passes += 1
        accepted = self._accept(proposal, rows[:-1])
        kept = [*proposal[:accepted], work.choose(rows[accepted], len(self._ids) + accepted)]
        for place, token in enumerate(kept):
            if add_token(work, token, rows[place], self._eos_ids):
                self.sequence.roll_back(len(work.prompt) + len(self._ids))
                return True
            self._ids.append(token)
        self._pending, self._row = kept[-1], rows[accepted]
        self.sequence.roll_back(len(work.prompt) + len(self._ids) - 1)
        if self._agrees:
            if flush(work):
                return _finish(work, FinishReason.STOP)
            # What is certain goes out while the draft is still being written, and before the next pass: that
            # would hold the interpreter's lock, and with it what is to be sent.
            work.is_taken = False
            work.send()
            return False
        return deliver_due(work, now)

    def _accept(self, proposal: list[int], rows: Logits) -> int:
        """Return how many tokens of a proposal are accepted. rows: float32 [k, V]."""
        work, draft = self._work, self._work.draft
        agreed, is_complete = self._agrees, draft is not None and draft.is_complete
        accepted = self._score(proposal, rows, len(self._ids)) if proposal else 0
        if proposal:
            start = len(self._ids)
            work.emitted.append(range(start, start + accepted + 1))
        if not agreed:
            if self._resync is not None:
                self._resync.judged(len(proposal), accepted)
        elif accepted < len(proposal) or (is_complete and draft and self._cursor == len(draft.ids)):
            self._depart()
        return accepted

    def _score(self, proposal: list[int], rows: Logits, place: int) -> int:
        """Return how many proposed tokens are accepted from a place of the answer on; keep what shows."""
        work = self._work
        choices = None
        if work.seed is not None:
            choices = np.array([work.choose(row, place + index) for index, row in enumerate(rows)], np.int64)
        # What is proposed after a correction is a guess: tolerance is for the draft where it stands.
        threshold = work.threshold if self._agrees else None
        verdict = verify_draft(np.array(proposal, np.int64), rows, threshold, choices)
        work.proposed += len(proposal)
        work.accepted += verdict.accepted
        if self._agrees:
            self._cursor += verdict.accepted
            self._ranks.append(verdict.ranks)
            self._logprobs.append(verdict.logprobs)
        return verdict.accepted

    def _depart(self) -> None:
        """The target has corrected the draft, or all of it is accepted."""
        work = self._work
        assert work.draft is not None
        self._agrees = False
        work.outbox.append(self._evidence())
        if work.resync:
            self._resync = Resynchroniser(work.draft.ids, self._cursor)

    def _evidence(self) -> VerificationResult:
        draft = self._work.draft
        assert draft is not None
        ranks = np.concatenate(self._ranks)
        return VerificationResult(
            len(ranks), self._cursor, ranks, np.concatenate(self._logprobs), draft.ids_used
        )


class BatchLane:
    """Several greedy generations in one generator; a row that ends is passed over until all have ended."""

    def __init__(self, works: list[Work], generator: Any, eos_ids: tuple[int, ...], places: int = 0) -> None:
        self.works = list(works)
        self._places = places
        self._rows = list(works)
        self._generator = generator
        self._eos_ids = eos_ids
        self._steps = 0
        # Requests that went wrong in the last step, and how: those beside them go on.
        self.failed: list[tuple[Work, Exception]] = []

    @property
    def is_ready(self) -> bool:
        """Whether there is something to compute now."""
        return True

    @property
    def places(self) -> int:
        """Places of the KV cache, all rows together; a row that has ended keeps its own until all have."""
        return self._places if self.works else 0

    def step(self) -> list[Work]:
        """Advance each request by a token; return those that finished."""
        self._generator.generate_next_token()
        tokens = self._generator.get_next_tokens()
        output = self._generator.get_output("logits")
        now = time.monotonic()
        finished = []
        self.failed.clear()
        for work in self.works:
            row = self._rows.index(work)
            # After the prompt, logits stand for every padded place; the row's own last one counts.
            place = len(work.prompt) - 1 if self._steps == 0 else -1
            if self._steps:
                work.passes += 1
            try:
                if take_token(work, int(tokens[row]), output[row, place], self._eos_ids, now):
                    finished.append(work)
            except Exception as error:
                self.failed.append((work, error))
        self._steps += 1
        return finished


def take_token(work: Work, token: int, logits: Logits, eos_ids: tuple[int, ...], now: float) -> bool:
    """Add a token to a request's answer, deliver what is due, and say whether the answer has ended.

    What is due at the end is left to be delivered with the end itself.
    """
    return add_token(work, token, logits, eos_ids) or deliver_due(work, now)


def add_token(work: Work, token: int, logits: Logits, eos_ids: tuple[int, ...]) -> bool:
    """Add a token to a request's answer, and say whether the answer has ended."""
    if token in eos_ids:
        return _finish(work, FinishReason.EOS)
    work.new.append(token)
    work.rows.append(logits)
    return work.count >= work.most_tokens and _finish(work, FinishReason.LENGTH)


def deliver_due(work: Work, now: float) -> bool:
    """Deliver the tokens so far if a chunk is due; return whether a stop sequence has ended the answer."""
    if now >= work.chunk_due:
        work.chunk_due = now + _CHUNK_SECONDS
        if flush(work):
            return _finish(work, FinishReason.STOP)
        work.send()
    return False


def flush(work: Work) -> bool:
    """Make the tokens since the last flush due; return whether a stop sequence appeared."""
    if work.new:
        chunk = work.answer.extend(work.new, np.concatenate(work.rows).reshape(len(work.new), -1))
        work.new, work.rows = [], []
        if chunk is not None:
            work.outbox.append(chunk)
    return work.answer.has_stopped


def _finish(work: Work, finish: FinishReason) -> bool:
    answer = work.answer
    flush(work)
    last = answer.finish()
    if answer.has_stopped:
        finish = FinishReason.STOP
    if last is not None:
        work.outbox.append(last)
    # What a pass accepted beyond the token that ended the answer was given to nobody. That token is seen
    # late where it completes a stop sequence: whole passes may lie beyond it.
    end = answer.taken + (finish is FinishReason.EOS)
    lengths = tuple(len(range(places.start, min(places.stop, end))) for places in work.emitted)
    unused = sum(
        max(len(places) - 1 - length, 0) for places, length in zip(work.emitted, lengths, strict=True)
    )
    now = time.monotonic()
    work.outbox.append(
        Result(
            text=answer.text,
            ids=answer.ids,
            finish=finish,
            prompt_tokens=len(work.prompt),
            cached_prompt_tokens=work.cached,
            proposed_tokens=work.proposed,
            accepted_tokens=work.accepted - unused,
            forward_passes=work.passes,
            accept_lengths=lengths,
            queue_ms=(work.started - work.arrived) * 1e3,
            prefill_ms=(work.prefilled - work.started) * 1e3,
            decode_ms=(now - work.prefilled) * 1e3,
            total_ms=(now - work.arrived) * 1e3,
        )
    )
    return True
