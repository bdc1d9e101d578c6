"""Slots of the `onnx` engine: requests that share a generator, advanced in turn on a model's thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from services.stage.generation.resync import Resynchroniser
from services.stage.generation.verification import choose_token, verify_draft

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asd.errors import AsdError
    from services.stage.domain import Event
    from services.stage.engines.onnx.generators import CachedSequence
    from services.stage.generation.call import Call
    from services.stage.generation.draft import ReceivedDraft

    Logits = npt.NDArray[np.float32]

# The first chunk is sent this long after the model started, and each later one this much later: a small
# model's whole answer is one chunk. Every hand-over to the event loop's thread makes the model's thread wait
# for the interpreter for about half a millisecond. A chunk every 5 ms cost the large model 10% of its speed.
# Chosen.
_FIRST_CHUNK_SECONDS = 0.005
_CHUNK_SECONDS = 0.02
# How long a request alone in its slot is decoded before other slots have their turn. Chosen: many tokens of a
# small model, one of a large one.
_SLICE_SECONDS = 0.001


@dataclass(slots=True, eq=False)
class SlotRequest:
    """A call on the model's thread, and the events that wait for delivery to its caller.

    deliver: hands events over; None ends the call. threshold: of a tolerant verification. resync: whether
    parts of the draft are proposed again after a correction. only_prefill: whether to fill the cache with the
    prompt and stop. is_taken: False while the caller must take a delivery before the next pass.
    """

    call: Call[Logits]
    deliver: Callable[[list[Event | AsdError | None]], None]
    draft: ReceivedDraft | None = None
    threshold: float | None = None
    resync: bool = True
    only_prefill: bool = False
    is_cancelled: bool = False
    is_taken: bool = True
    chunk_due: float = 0.0
    outbox: list[Event | AsdError | None] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether it is greedy generation, which can share a slot with other requests.

        There the library picks the tokens, which knows no constraint.
        """
        call = self.call
        return self.draft is None and not (call.is_sampled or self.only_prefill or call.matcher is not None)

    def start(self, now: float) -> None:
        """Mark the start of its computation."""
        self.call.queued, self.chunk_due = now - self.call.arrived, now + _FIRST_CHUNK_SECONDS

    def add(self, token: int, logits: Logits) -> bool:
        """Add a token to the answer; return whether the answer has ended.

        The last events are delivered together with the end.
        """
        return self.call.add(token, logits) and self._end()

    def flush(self) -> bool:
        """Make the tokens since the last flush due; return whether a stop sequence has ended the answer."""
        chunk = self.call.flush()
        if chunk is not None:
            self.outbox.append(chunk)
        return self.call.is_over() and self._end()

    def deliver_due(self, now: float) -> bool:
        """Deliver the tokens so far if a chunk is due; return whether a stop sequence ended the answer."""
        if now >= self.chunk_due:
            self.chunk_due = now + _CHUNK_SECONDS
            if self.flush():
                return True
            self.send()
        return False

    def send(self, *events: Event | AsdError | None) -> None:
        """Deliver the waiting events and then these; None ends the call."""
        outbox, self.outbox = [*self.outbox, *events], []
        self.deliver(outbox)

    def _end(self) -> bool:
        self.outbox += self.call.end()
        return True


class SoloSlot:
    """One request with a cache of its own. Subclasses implement its decoding."""

    def __init__(self, request: SlotRequest, sequence: CachedSequence) -> None:
        self.requests = [request]
        self.sequence = sequence
        self._request = request
        self._call = request.call
        self._has_begun = False

    @property
    def is_ready(self) -> bool:
        """Whether there is something to compute now."""
        return True

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for; once the request has left, it belongs to the prefix cache."""
        return self.sequence.capacity if self.requests else 0

    def step(self) -> list[SlotRequest]:
        """Advance by a pass, or for a slice of time; return the request if it finished."""
        if self._has_begun:
            has_ended = self._go_on()
        else:
            self._has_begun = True
            cached = len(self.sequence.tokens)
            has_ended = self._begin(self._call.prompt[cached:], cached)
        return [self._request] if has_ended else []

    def _begin(self, prompt: list[int], cached: int) -> bool:
        """Process the part of the prompt that is not cached; return whether the request is finished."""
        raise NotImplementedError

    def _go_on(self) -> bool:
        """Continue to decode; return whether the request is finished."""
        raise NotImplementedError


class GenerateSlot(SoloSlot):
    """Greedy generation, or a prefill alone."""

    def _begin(self, prompt: list[int], cached: int) -> bool:
        # The logits are not needed here: the library picks the first token from them.
        self.sequence.run(prompt)
        self._call.mark_prefilled(cached)
        # The pass that processed the prompt also yields the first token, and is counted with it.
        return self._request.only_prefill

    def _go_on(self) -> bool:
        request, call, tokens = self._request, self._call, self.sequence.tokens
        generate_next_token = self.sequence.generator.generate_next_token
        get_next_tokens = self.sequence.generator.get_next_tokens
        get_output = self.sequence.generator.get_output
        now = time.monotonic()
        until = now + _SLICE_SECONDS
        while now < until and not request.is_cancelled:
            # The library's own step is the fastest: it runs the last token and picks the next in one call.
            generate_next_token()
            token = int(get_next_tokens()[0])
            tokens.append(token)
            call.passes += 1
            now = time.monotonic()
            if request.add(token, get_output("logits")[0, -1]) or request.deliver_due(now):
                return True
        return False


class VerifySlot(SoloSlot):
    """Verification of a draft. Sampled or constrained generation is that of an empty draft.

    After every pass, the target's own next token is sent at once. It is then pending: the next pass runs it
    together with a proposal, and keeps what the target agrees with. While the target agrees with the draft
    (`_agrees`), the proposal is the part of the draft that has arrived. After the first correction, the
    Resynchroniser makes the proposals. An empty proposal is plain decoding.
    """

    def __init__(self, request: SlotRequest, sequence: CachedSequence) -> None:
        super().__init__(request, sequence)
        self._agrees = request.draft is not None
        # Logits that the last id was chosen from, the id, and the likeliest one there.
        self._row: Logits = np.zeros(0, np.float32)
        self._pending = _Own(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._resync: Resynchroniser | None = None

    @property
    def is_ready(self) -> bool:
        """Whether to run a pass now: not while the draft's next part or the caller's taking is awaited."""
        draft = self._request.draft
        if not self._request.is_taken:
            return False
        if not self._agrees or draft is None or draft.is_complete:
            return True
        if not self._has_begun:
            # Under TOLERANT, the target's own choice is final only once the draft's token there is known.
            return self._request.threshold is None
        return len(draft.ids) > draft.accepted

    def step(self) -> list[SlotRequest]:
        """Advance by a pass; return the request if it finished."""
        finished = super().step()
        if finished and self._agrees:
            # The answer ended before the draft did. The verdict so far is sent before the result.
            self._request.outbox.insert(-1, self._draft.evidence())
        return finished

    def _begin(self, prompt: list[int], cached: int) -> bool:
        proposal = list(self._draft.ids) if self._agrees else []
        rows = self.sequence.append([*prompt, *proposal], len(prompt) - 1)
        self._call.mark_prefilled(cached)
        return self._judge(proposal, rows)

    def _go_on(self) -> bool:
        call = self._call
        proposal = self._next_in_draft() if self._agrees else None
        if self._agrees and proposal is None:
            return False
        if proposal is None:
            proposal = self._resync.propose(call.ids, call.room) if self._resync is not None else []
            if call.matcher is not None:
                proposal = proposal[: call.matcher.allowed(proposal)]
        return self._judge(proposal, self.sequence.append([call.ids[-1], *proposal]))

    @property
    def _draft(self) -> ReceivedDraft:
        assert self._request.draft is not None
        return self._request.draft

    def _next_in_draft(self) -> list[int] | None:
        """Return the draft's tokens after the pending one; None if none came, or that one differs."""
        draft = self._draft
        is_complete, arrived = draft.is_complete, draft.ids[draft.accepted :]
        if arrived and self._score(arrived[:1], self._row[None], self._pending):
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
        request, call, now = self._request, self._call, time.monotonic()
        call.passes += 1
        position = len(call.ids)
        own = _choose(call, proposal, rows)
        accepted = self._accept(proposal, rows[:-1], own)
        kept = [*proposal[:accepted], int(own.choices[accepted])]
        for index, token in enumerate(kept):
            if request.add(token, rows[index]):
                self.sequence.roll_back(len(call.prompt) + position + index)
                return True
        self._row, self._pending = rows[accepted], own.part(accepted, accepted + 1)
        # The last token was chosen but not run.
        self.sequence.roll_back(len(call.prompt) + len(call.ids) - 1)
        if self._agrees:
            if request.flush():
                return True
            # Certain tokens are sent while the draft is still being written, before the next pass: a pass
            # holds the interpreter's lock and would delay them.
            request.is_taken = False
            request.send()
            return False
        return request.deliver_due(now)

    def _accept(self, proposal: list[int], rows: Logits, own: _Own) -> int:
        """Return how many tokens of a proposal are accepted. rows: float32 [k, V]."""
        call, draft = self._call, self._request.draft
        agreed, is_complete = self._agrees, draft is not None and draft.is_complete
        position = len(call.ids)
        accepted = self._score(proposal, rows, own.part(0, len(proposal))) if proposal else 0
        if proposal:
            call.emitted.append(range(position, position + accepted + 1))
        if not agreed:
            if self._resync is not None:
                self._resync.judged(len(proposal), accepted)
        elif accepted < len(proposal) or (is_complete and draft and draft.accepted == len(draft.ids)):
            self._depart()
        return accepted

    def _score(self, proposal: list[int], rows: Logits, own: _Own) -> int:
        """Return how many proposed tokens are accepted; keep the verdict. own: at their places."""
        call = self._call
        # Proposals after a correction are guesses. Tolerance applies only to the draft at its own position.
        threshold = self._request.threshold if self._agrees else None
        ids = np.array(proposal, np.int64)
        verdict = verify_draft(ids, rows, threshold, own.choices, own.likeliest)
        call.proposed += len(proposal)
        call.accepted += verdict.accepted
        if self._agrees:
            self._draft.judge(verdict)
        return verdict.accepted

    def _depart(self) -> None:
        """The target has corrected the draft, or all of it is accepted."""
        self._agrees = False
        self._request.outbox.append(self._draft.evidence())
        if self._request.resync:
            self._resync = Resynchroniser(self._draft.ids, self._draft.accepted)


class BatchSlot:
    """Several greedy generations in one generator; a row that has ended is skipped until all have ended."""

    def __init__(self, requests: list[SlotRequest], generator: Any, capacity: int = 0) -> None:
        self.requests = list(requests)
        self._capacity = capacity
        self._rows = list(requests)
        self._generator = generator
        self._steps = 0
        # Requests that failed in the last step, and their errors; the rest of the batch continues.
        self.failed: list[tuple[SlotRequest, Exception]] = []

    @property
    def is_ready(self) -> bool:
        """Whether there is something to compute now."""
        return True

    @property
    def capacity(self) -> int:
        """Tokens that the caches have room for; a row that has ended keeps its own until all have."""
        return self._capacity if self.requests else 0

    def step(self) -> list[SlotRequest]:
        """Advance each request by a token; return those that finished."""
        self._generator.generate_next_token()
        tokens = self._generator.get_next_tokens()
        output = self._generator.get_output("logits")
        now = time.monotonic()
        finished = []
        self.failed.clear()
        for request in self.requests:
            row = self._rows.index(request)
            # After the prompt, logits stand for every padded position; the row's own last one counts.
            position = len(request.call.prompt) - 1 if self._steps == 0 else -1
            if self._steps:
                request.call.passes += 1
            try:
                if request.add(int(tokens[row]), output[row, position]) or request.deliver_due(now):
                    finished.append(request)
            except Exception as error:
                self.failed.append((request, error))
        self._steps += 1
        return finished


class _Own(NamedTuple):
    """The target's own tokens at positions of the answer, int64 [k]: chosen, and likeliest of the allowed."""

    choices: npt.NDArray[np.int64]
    likeliest: npt.NDArray[np.int64]

    def part(self, start: int, end: int) -> _Own:
        """Return some of the positions."""
        return _Own(self.choices[start:end], self.likeliest[start:end])


def _choose(call: Call[Logits], proposal: Sequence[int], rows: Logits) -> _Own:
    """Return the model's own tokens after the answer and each part of a proposal. rows: float32 [k + 1, V].

    The constraint, if there is one, allows the proposal.
    """
    matcher = call.matcher
    if matcher is None:
        likeliest = rows.argmax(axis=1)
        if not call.is_sampled:
            return _Own(likeliest, likeliest)
        drawn = [_draw(call, row, len(call.ids) + i) for i, row in enumerate(rows)]
        return _Own(np.array(drawn, np.int64), likeliest)
    chosen = []
    for index, row in enumerate(rows):
        best = matcher.likeliest(row)
        own = _draw(call, matcher.masked(row), len(call.ids) + index) if call.is_sampled else best
        chosen.append((own, best))
        matcher.take(proposal[index : index + 1])
    matcher.roll_back(len(proposal))
    choices, likeliest = np.array(chosen, np.int64).T
    return _Own(choices, likeliest)


def _draw(call: Call[Logits], logits: Logits, position: int) -> int:
    """Draw a token for a position of the answer. logits: float32 [V]."""
    sampling = call.sampling
    assert sampling.seed is not None
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return choose_token(logits, sampling.temperature, top_p, sampling.seed, position)
