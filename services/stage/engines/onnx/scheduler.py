"""The scheduler of the `onnx` engine: one thread per model that owns all of its computation.

Batching. A slot is one library generator of one or more requests; the thread steps its slots in turn.
Requests that wait together form a slot together, so a request never waits for a batch to fill, and newcomers
start beside what runs. Prompts of a slot are padded on the right, which GroupQueryAttention masks exactly.
The gain depends on the model (benchmarks.service batching): on two cores, 64 requests at once were 1.1, 0.7
and 1.75 times as fast in slots of eight as one by one, for the small, medium and large model. The library's
own Engine is not used: it gives tokens without log-probabilities, in static batches of four.

Prefix reuse. A request alone in its slot takes a sequence from a small pool, rolled back to the longest
prefix that it shares with what the sequence holds; its tokens are therefore computed once per conversation,
and once more whenever it outgrows the sequence's cache.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from asd.errors import AsdError, PreconditionFailed, QueueFull
from services.stage.engines.onnx.memory import capacity_for
from services.stage.engines.onnx.slots import BatchSlot, GenerateSlot, SoloSlot, VerifySlot

if TYPE_CHECKING:
    from services.stage.engines.onnx.engine import OnnxOptions
    from services.stage.engines.onnx.generators import CachedSequence, Generators
    from services.stage.engines.onnx.slots import SlotRequest

logger = logging.getLogger(__name__)

# Most slots, ready or waiting for a draft, per slot that may compute. Chosen: each has a cache of its own.
_WAITING_SLOTS = 8
# Fewest shared tokens that make a prefix worth keeping: a chat template's own marks are shared by all.
_LEAST_SHARED = 8


class SchedulerUsage(NamedTuple):
    """What a scheduler holds. used_capacity, kept_capacity: tokens of KV caches, in use and in the pool."""

    queued: int
    running: int
    used_capacity: int
    kept_capacity: int
    kept_sequences: int


class Scheduler:
    """Computes a model's requests. context: most tokens of prompt and answer. pass_tokens: most of one pass.

    completed, cancelled: requests so far.
    """

    def __init__(self, name: str, options: OnnxOptions, context: int, pass_tokens: int) -> None:
        self.completed = 0
        self.cancelled = 0
        self._name = name
        self._options = options
        self._context = context
        self._pass_tokens = pass_tokens
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._waiting: deque[SlotRequest] = deque()
        self._slots: list[SoloSlot | BatchSlot] = []
        self._pool: list[CachedSequence] = []
        self._stopping = False

    def start(self, generators: Generators) -> None:
        """Start the thread over a loaded model."""
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(generators,), name=f"model-{self._name}", daemon=True
        )
        self._thread.start()

    async def stop(self) -> None:
        """End the thread and free its caches; requests in flight end with PreconditionFailed."""
        if self._thread is None:
            return
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        self._pool.clear()

    def submit(self, request: SlotRequest) -> None:
        """Have a request computed. Raises QueueFull."""
        with self._wake:
            if len(self._waiting) >= self._options.max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait for {self._name} already: try again later"
                )
            self._waiting.append(request)
            self._wake.notify()

    def wake(self) -> None:
        """Wake the thread: a request was cancelled or taken, or has more of its draft."""
        with self._wake:
            self._wake.notify()

    def usage(self) -> SchedulerUsage:
        """Return its requests and caches at this moment."""
        with self._wake:
            return SchedulerUsage(
                queued=len(self._waiting),
                running=sum(len(slot.requests) for slot in self._slots),
                used_capacity=sum(slot.capacity for slot in self._slots),
                kept_capacity=sum(sequence.capacity for sequence in self._pool),
                kept_sequences=len(self._pool),
            )

    # The methods below run on the model's thread.

    def _run(self, generators: Generators) -> None:
        while self._wait():
            self._take_turn(generators)
        with self._wake:
            requests = [*self._waiting, *(request for slot in self._slots for request in slot.requests)]
            self._waiting.clear()
            self._slots.clear()
        for request in requests:
            request.send(PreconditionFailed(f"model {self._name} was unloaded"))

    def _wait(self) -> bool:
        """Wait for something to compute; return False once the model shall stop."""
        with self._wake:
            while not (self._stopping or self._has_work()):
                self._wake.wait()
            return not self._stopping

    def _take_turn(self, generators: Generators) -> None:
        """Admit waiting requests and advance each slot once.

        It is apart from the waiting loop, whose variables would keep the last slot's KV cache alive.
        """
        with self._wake:
            admitted = self._admit()
        if admitted:
            self._open_slot(admitted, generators)
        for slot in list(self._slots):
            if not self._advance(slot):
                with self._wake:
                    self._slots.remove(slot)

    @property
    def _has_room(self) -> bool:
        """Whether a further slot may be opened; called with the lock held.

        A slot that waits for its draft computes nothing, so it does not count, up to a bound on the caches.
        """
        ready = sum(slot.is_ready for slot in self._slots)
        most = self._options.max_lanes
        return ready < most and len(self._slots) < most * _WAITING_SLOTS

    def _has_work(self) -> bool:
        """Whether anything can be computed now; called with the lock held."""
        if self._waiting and self._has_room:
            return True
        return any(slot.is_ready or any(r.is_cancelled for r in slot.requests) for slot in self._slots)

    def _admit(self) -> list[SlotRequest]:
        """Take the waiting requests that fit into one slot; called with the lock held."""
        if not self._waiting or not self._has_room:
            return []
        admitted: list[SlotRequest] = []
        kept: deque[SlotRequest] = deque()
        longest = most = 0
        # All rows of a slot get the capacity of the longest one, so their lengths must be similar.
        least = self._context
        while self._waiting and len(admitted) < self._options.max_batch:
            request = self._waiting.popleft()
            if request.is_cancelled:
                self.cancelled += 1
                continue
            # Only greedy generations share a slot; a request that needs a cache of its own gets its own slot.
            call = request.call
            now_longest, now_most = max(longest, len(call.prompt)), max(most, call.most_tokens)
            together = now_longest + now_most
            now_least = min(least, self._capacity(request))
            is_wide = (len(admitted) + 1) * now_longest > self._pass_tokens
            is_long = together > self._context or capacity_for(together, self._context) > now_least
            if admitted and (not request.is_plain or is_wide or is_long):
                kept.append(request)
                continue
            admitted.append(request)
            longest, most, least = now_longest, now_most, now_least
            if not request.is_plain:
                break
        self._waiting.extendleft(reversed(kept))
        return admitted

    def _open_slot(self, requests: list[SlotRequest], generators: Generators) -> None:
        now = time.monotonic()
        for request in requests:
            request.start(now)
        slot: SoloSlot | BatchSlot
        try:
            if len(requests) == 1:
                request = requests[0]
                kind = GenerateSlot if request.is_plain or request.only_prefill else VerifySlot
                slot = kind(request, self._take_sequence(request, generators))
            else:
                most = max(request.call.most_tokens for request in requests)
                prompts = [request.call.prompt for request in requests]
                capacity = len(requests) * (max(map(len, prompts)) + most)
                slot = BatchSlot(requests, generators.batch(prompts, most), capacity)
                for request in requests:
                    request.call.passes = 1
                    request.call.mark_prefilled(cached=0)
        except Exception as error:
            self._fail(requests, error)
            return
        with self._wake:
            self._slots.append(slot)

    def _advance(self, slot: SoloSlot | BatchSlot) -> bool:
        """Advance a slot that is ready; return whether it has work left."""
        for request in [r for r in slot.requests if r.is_cancelled]:
            slot.requests.remove(request)
            self.cancelled += 1
        if not slot.requests:
            return False
        if not slot.is_ready:
            return True
        try:
            finished = slot.step()
            for request in finished:
                slot.requests.remove(request)
                self.completed += 1
                request.send(None)
            for request, error in slot.failed if isinstance(slot, BatchSlot) else ():
                slot.requests.remove(request)
                self._fail([request], error)
            if not slot.requests and isinstance(slot, SoloSlot):
                self._keep_sequence(slot.sequence)
        except Exception as error:
            self._fail(slot.requests, error)
            return False
        return bool(slot.requests)

    def _fail(self, requests: list[SlotRequest], error: Exception) -> None:
        if not isinstance(error, AsdError):
            logger.error("model %s failed", self._name, exc_info=error)
            error = AsdError(f"model {self._name} failed on this request")
        for request in requests:
            request.send(error)

    def _take_sequence(self, request: SlotRequest, generators: Generators) -> CachedSequence:
        """Return a kept sequence, rolled back to the prefix that it shares with the prompt, or a new one."""
        prompt = request.call.prompt
        best, shared = None, 0
        for sequence in self._pool:
            # The last prompt token is computed anew, since its logits are wanted.
            common = min(_shared_length(sequence.tokens, prompt), len(prompt) - 1)
            if common > shared:
                best, shared = sequence, common
        is_full = len(self._pool) >= self._options.cached_sequences
        if best is None or shared < _LEAST_SHARED:
            best, shared = (min(self._pool, key=lambda s: s.used), 0) if is_full and self._pool else (None, 0)
        capacity = self._capacity(request)
        if best is not None:
            with self._wake:
                self._pool.remove(best)
            # A sequence of another size is dropped, unless it shares a prefix and is large enough.
            if best.capacity >= capacity if shared else best.capacity == capacity:
                best.roll_back(shared)
                return best
        # Freed before the new one is made.
        del best
        return generators.sequence(capacity)

    def _keep_sequence(self, sequence: CachedSequence) -> None:
        sequence.used = time.monotonic()
        # The last token was chosen but never run: the cache holds the tokens before it.
        sequence.roll_back(len(sequence.tokens) - 1)
        with self._wake:
            self._pool.append(sequence)
            if len(self._pool) > self._options.cached_sequences:
                self._pool.remove(min(self._pool, key=lambda s: s.used))

    def _capacity(self, request: SlotRequest) -> int:
        """Return the capacity of a cache for one request: a token more than it fills, up to the context."""
        return capacity_for(len(request.call.prompt) + request.call.most_tokens + 1, self._context)


def _shared_length(left: list[int], right: list[int]) -> int:
    most = min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
