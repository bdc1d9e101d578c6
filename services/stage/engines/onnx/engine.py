"""The `onnx` engine: onnxruntime-genai on the CPU, one thread per model that owns all of its computation.

Batching. A lane is one library generator of one or more requests; the thread steps its lanes in turn.
Requests that wait together form a lane together, so a request never waits for a batch to fill, and newcomers
start beside what runs. Prompts of a lane are padded on the right, which GroupQueryAttention masks exactly.
What it gains depends on the model (benchmarks.service batching): on two cores, 64 requests at once were 1.1,
0.7 and 1.75 times as fast in lanes of eight as one by one for the small, medium and large model. The
library's Engine gives tokens without log-probabilities, in static batches of four.

Prefix reuse. A request alone in its lane takes a generator from a small pool, rolled back to the longest
prefix that it shares with what the generator holds; its tokens are therefore computed once per conversation,
and once more whenever it outgrows the generator's cache.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import threading
import time
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from services.common.errors import AsdError, PreconditionFailed, QueueFull
from services.stage.domain import (
    DraftPiece,
    DraftText,
    Event,
    FinishReason,
    PrefillResult,
    SamplingOptions,
    Turn,
)
from services.stage.engines.engine import EngineStatus, ModelState
from services.stage.engines.onnx.binding import load_binding, remember_array_formats
from services.stage.engines.onnx.export import prepare, served_shape
from services.stage.engines.onnx.memory import pass_tokens, places_for, weight_bytes
from services.stage.engines.onnx.scheduler import (
    BatchLane,
    CachedSequence,
    GenerateLane,
    SoloLane,
    VerifyLane,
    Work,
)
from services.stage.engines.probe import ANSWER_TOKENS, probe, probe_prompts
from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.draft import DraftFeed
from services.stage.generation.inputs import RequestReader
from services.stage.generation.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

logger = logging.getLogger(__name__)

# onnxruntime-genai 0.18 holds the interpreter's lock while a model runs, so a thread that waits for it, such
# as the event loop's, gets it no sooner than this. At Python's 5 ms every chunk was that late. Measured:
# 0.2 ms makes the small model's answers 8% faster to have.
_SWITCH_SECONDS = 0.0002
# Lanes at most, ready or waiting for a draft, per lane that may compute. Chosen: a cache each.
_WAITING_LANES = 8
# A prefix of fewer shared tokens is not worth keeping a generator for: a chat template's own marks.
_LEAST_SHARED = 8


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a model is run.

    threads: of the operators. max_batch: requests of one lane. max_lanes: lanes at a time. cached_sequences:
    generators kept for prefix reuse. max_model_len: tokens of prompt and answer at most; None: the model's.
    max_queue: requests that may wait. resync: whether parts of a draft are proposed again after a correction.
    """

    threads: int = 1
    max_batch: int = 8
    max_lanes: int = 4
    cached_sequences: int = 4
    max_model_len: int | None = None
    max_queue: int = 256
    default_max_new_tokens: int = 160
    resync: bool = True


_Deliveries = asyncio.Queue["list[Event | AsdError | None]"]


class OnnxEngine:
    """Runs one Llama model; see services.stage.engines.engine.Engine for the contract."""

    kind = "onnx"

    def __init__(self, name: str, directory: Path, options: OnnxOptions) -> None:
        self._name = name
        self._directory = directory
        self._options = options
        # Its tables are for what is served alone.
        self._shape = served_shape(directory, options.max_model_len)
        self._context = min(self._shape.context, options.max_model_len or self._shape.context)
        self._pass_tokens = pass_tokens(self._shape)
        self._tokenizer = ChatTokenizer(directory)
        self._reader = RequestReader(
            name, self._tokenizer, self._context, self._shape.vocabulary, self._shape.eos_ids
        )
        self._reader.check_shortest_prompt()
        self._state = ModelState.UNLOADED
        self._error = ""
        self._loading = asyncio.Lock()
        self._model: Any = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._lanes: list[SoloLane | BatchLane] = []
        self._pool: list[CachedSequence] = []
        self._stopping = False
        self._completed = 0
        self._cancelled = 0

    async def load(self) -> None:
        """Derive the ONNX form if need be, and load it; a loaded model stays as it is."""
        async with self._loading:
            if self._state is ModelState.READY:
                return
            self._state = ModelState.LOADING
            try:
                await self._load()
            except Exception as error:
                self._model = None
                self._state, self._error = ModelState.FAILED, str(error)
                if isinstance(error, AsdError):
                    raise
                raise PreconditionFailed(f"model {self._name} cannot be loaded: {error}") from error
            self._stopping = False
            sys.setswitchinterval(_SWITCH_SECONDS)
            self._thread = threading.Thread(target=self._run, name=f"model-{self._name}", daemon=True)
            self._thread.start()
            self._state, self._error = ModelState.READY, ""

    async def unload(self) -> None:
        """Stop the model's thread and free the model; calls under way end with PreconditionFailed."""
        async with self._loading:
            if self._thread is None:
                return
            # From here on a call finds the model unloaded, and its user loads it again once this is over.
            self._state = ModelState.UNLOADED
            with self._wake:
                self._stopping = True
                self._wake.notify()
            await asyncio.to_thread(self._thread.join)
            self._thread = None
            self._pool.clear()
            self._model = None

    async def generate(
        self, turns: tuple[Turn, ...], sampling: SamplingOptions
    ) -> AsyncGenerator[Event, None]:
        """Write an answer."""
        async with aclosing(self._events(*await self._work(turns, sampling))) as events:
            async for event in events:
                yield event

    async def verify(
        self, turns: tuple[Turn, ...], sampling: SamplingOptions, draft: DraftText, threshold: float | None
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of a draft and go on from there."""
        work, deliveries = await self._work(turns, sampling)
        work.threshold = threshold
        feed = work.draft = DraftFeed(work.most_tokens)
        await self._reader.read_draft(draft, feed)
        async with aclosing(self._events(work, deliveries)) as events:
            async for event in events:
                yield event

    async def verify_stream(
        self,
        turns: tuple[Turn, ...],
        sampling: SamplingOptions,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        threshold: float | None,
    ) -> AsyncGenerator[Event, None]:
        """Verify a draft while it is being written."""
        work, deliveries = await self._work(turns, sampling)
        work.threshold = threshold
        feed = work.draft = DraftFeed(work.most_tokens)

        def notify(error: AsdError | None) -> None:
            if error is not None:
                deliveries.put_nowait([error])
                return
            with self._wake:
                self._wake.notify()

        reader = asyncio.create_task(self._reader.follow_draft(pieces, feed, notify))
        try:
            async with aclosing(self._events(work, deliveries)) as events:
                async for event in events:
                    yield event
        finally:
            reader.cancel()

    async def prefill(self, turns: tuple[Turn, ...]) -> PrefillResult:
        """Put a prompt into the prefix cache."""
        work, queue = await self._work(turns, SamplingOptions(max_new_tokens=1))
        work.only_prefill = True
        async for _ in self._events(work, queue):
            pass
        return PrefillResult(len(work.prompt), work.cached, (work.prefilled - work.arrived) * 1e3)

    def status(self) -> EngineStatus:
        """Say what is loaded, queued and running."""
        with self._wake:
            queued = len(self._waiting)
            running = sum(len(lane.works) for lane in self._lanes)
            in_use = sum(lane.places for lane in self._lanes)
            kept = sum(sequence.places for sequence in self._pool)
            cached = len(self._pool)
        return EngineStatus(
            state=self._state,
            parameters=self._shape.parameters,
            context_length=self._context,
            fingerprint=self._tokenizer.fingerprint,
            memory_bytes=self._memory_bytes(in_use + kept),
            kv_cache_bytes=in_use * self._shape.kv_bytes_per_token,
            queued=queued,
            running=running,
            cached_sequences=cached,
            completed=self._completed,
            cancelled=self._cancelled,
            error=self._error,
        )

    def _memory_bytes(self, places: int) -> int:
        """Weights and KV caches: those that there are, places in all, or kept ones of short conversations.

        The latter is what a model that is loaded will soon take; a budget must not give it to another.
        """
        soon = self._options.cached_sequences * places_for(1, self._context)
        return weight_bytes(self._shape) + max(places, soon) * self._shape.kv_bytes_per_token

    async def _load(self) -> None:
        """Load the prepared model, and try whether it computes; once more where it had to be made anew."""
        form = await asyncio.to_thread(self._prepare)
        made = form.stat().st_ino
        try:
            await self._try(form)
        except Exception:
            # Content of large files is not compared before: that would take as long as loading them.
            form = await asyncio.to_thread(self._prepare, reads_all=True)
            if form.stat().st_ino == made:
                raise
            self._model = None
            await self._try(form)

    async def _try(self, form: Path) -> None:
        self._model = await asyncio.to_thread(self._open, form)
        prompts = probe_prompts(self._tokenizer, self._shape.vocabulary, self._context)
        await probe(self._name, prompts, lambda batch: asyncio.to_thread(self._answer_probe, batch))

    def _prepare(self, *, reads_all: bool = False) -> Path:
        return prepare(self._directory, most_tokens=self._options.max_model_len, reads_all=reads_all)

    def _open(self, form: Path) -> Any:
        og = load_binding()
        remember_array_formats()
        config = og.Config(str(form))
        overlay = {"decoder": {"session_options": {"intra_op_num_threads": self._options.threads}}}
        config.overlay(json.dumps({"model": overlay}))
        return og.Model(config)

    def _answer_probe(self, prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
        """Compute prompts as lanes do; return logits, float32 [rows, V]. Only while nothing else is computed.

        A prompt alone is also written on, rolled back and gone on from, as in verification.
        """
        longest = max(len(prompt) for prompt in prompts)
        if len(prompts) == 1:
            sequence = self._new_sequence(longest + ANSWER_TOKENS + 1)
            generator, rows = sequence.generator, [sequence.append(prompts[0])]
        else:
            generator = self._new_batch(prompts, ANSWER_TOKENS)
            logits = generator.get_output("logits")
            rows = [logits[row, : len(prompt)] for row, prompt in enumerate(prompts)]
        for _ in range(ANSWER_TOKENS):
            if not generator.is_done():
                generator.generate_next_token()
                rows.append(generator.get_output("logits")[:, -1])
        if len(prompts) == 1:
            generator.rewind_to(longest)
            rows.append(sequence.append(prompts[0][:1]))
        return np.concatenate(rows)

    async def _work(self, turns: tuple[Turn, ...], sampling: SamplingOptions) -> tuple[Work, _Deliveries]:
        prompt = await self._reader.read_prompt(turns)
        room = self._context - len(prompt)
        wanted = sampling.max_new_tokens or self._options.default_max_new_tokens
        queue: _Deliveries = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event | AsdError | None]) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, events)
            except RuntimeError:
                # The loop closed while the model was at work: nobody listens.
                work.is_cancelled = True

        seed = None
        if sampling.temperature > 0:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        answer = AnswerBuilder(self._tokenizer.stream(), sampling.stop)
        work = Work(prompt, min(wanted, room), sampling, answer, deliver, time.monotonic(), seed)
        work.resync = self._options.resync
        return work, queue

    async def _events(self, work: Work, deliveries: _Deliveries) -> AsyncGenerator[Event, None]:
        if self._state is not ModelState.READY:
            raise PreconditionFailed(f"model {self._name} is not loaded")
        with self._wake:
            if len(self._waiting) >= self._options.max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait for {self._name} already: try again later"
                )
            self._waiting.append(work)
            self._wake.notify()
        has_ended = False
        try:
            while not has_ended:
                for event in await deliveries.get():
                    if event is None:
                        has_ended = True
                    elif isinstance(event, AsdError):
                        raise event
                    else:
                        yield event
                if not work.is_taken:
                    work.is_taken = True
                    with self._wake:
                        self._wake.notify()
        finally:
            if not has_ended:
                work.is_cancelled = True
                with self._wake:
                    self._wake.notify()

    # What follows runs on the model's thread.

    def _run(self) -> None:
        while self._wait():
            self._take_turn()
        with self._wake:
            works = [*self._waiting, *(work for lane in self._lanes for work in lane.works)]
            self._waiting.clear()
            self._lanes.clear()
        for work in works:
            work.send(PreconditionFailed(f"model {self._name} was unloaded"))

    def _wait(self) -> bool:
        """Wait for something to compute; return False once the model is to stop."""
        with self._wake:
            while not (self._stopping or self._has_work()):
                self._wake.wait()
            return not self._stopping

    def _take_turn(self) -> None:
        """Let newcomers in and advance each lane once.

        Apart from the waiting, whose variables would keep the last lane, and its KV cache, from being freed.
        """
        with self._wake:
            admitted = self._admit()
        if admitted:
            self._open_lane(admitted)
        for lane in list(self._lanes):
            if not self._advance(lane):
                with self._wake:
                    self._lanes.remove(lane)

    @property
    def _has_room(self) -> bool:
        """Whether a further lane may be opened; called with the lock held.

        A lane that waits for its draft computes nothing, so it does not count, up to a bound on the caches.
        """
        ready = sum(lane.is_ready for lane in self._lanes)
        most = self._options.max_lanes
        return ready < most and len(self._lanes) < most * _WAITING_LANES

    def _has_work(self) -> bool:
        """Whether anything can be computed now; called with the lock held."""
        if self._waiting and self._has_room:
            return True
        return any(lane.is_ready or any(w.is_cancelled for w in lane.works) for lane in self._lanes)

    def _admit(self) -> list[Work]:
        """Take the requests that wait, as far as they fit one lane; called with the lock held."""
        if not self._waiting or not self._has_room:
            return []
        admitted: list[Work] = []
        kept: deque[Work] = deque()
        longest = most = 0
        # Rows of a lane have as many places as the longest of them: none may take far more than it needs.
        least = self._context
        while self._waiting and len(admitted) < self._options.max_batch:
            work = self._waiting.popleft()
            if work.is_cancelled:
                self._cancelled += 1
                continue
            # Rows of a lane are decoded greedily side by side; what needs a cache of its own goes alone.
            now_longest, now_most = max(longest, len(work.prompt)), max(most, work.most_tokens)
            together = now_longest + now_most
            now_least = min(least, self._places(work))
            is_wide = (len(admitted) + 1) * now_longest > self._pass_tokens
            is_long = together > self._context or places_for(together, self._context) > now_least
            if admitted and (not work.is_plain or is_wide or is_long):
                kept.append(work)
                continue
            admitted.append(work)
            longest, most, least = now_longest, now_most, now_least
            if not work.is_plain:
                break
        self._waiting.extendleft(reversed(kept))
        return admitted

    def _open_lane(self, works: list[Work]) -> None:
        now = time.monotonic()
        for work in works:
            work.start(now)
        lane: SoloLane | BatchLane
        try:
            if len(works) == 1:
                work = works[0]
                kind = GenerateLane if work.is_plain or work.only_prefill else VerifyLane
                lane = kind(work, self._take_sequence(work), self._shape.eos_ids)
            else:
                most = max(work.most_tokens for work in works)
                prompts = [work.prompt for work in works]
                places = len(works) * (max(map(len, prompts)) + most)
                lane = BatchLane(works, self._new_batch(prompts, most), self._shape.eos_ids, places)
                now = time.monotonic()
                for work in works:
                    work.passes, work.prefilled = 1, now
        except Exception as error:
            self._fail(works, error)
            return
        with self._wake:
            self._lanes.append(lane)

    def _advance(self, lane: SoloLane | BatchLane) -> bool:
        """Advance a lane that is ready; return whether it goes on."""
        for work in [w for w in lane.works if w.is_cancelled]:
            lane.works.remove(work)
            self._cancelled += 1
        if not lane.works:
            return False
        if not lane.is_ready:
            return True
        try:
            finished = lane.step()
            for work in finished:
                lane.works.remove(work)
                self._completed += 1
                work.send(None)
            for work, error in lane.failed if isinstance(lane, BatchLane) else ():
                lane.works.remove(work)
                self._fail([work], error)
            if not lane.works and isinstance(lane, SoloLane):
                self._keep_sequence(lane.sequence)
        except Exception as error:
            self._fail(lane.works, error)
            return False
        return bool(lane.works)

    def _fail(self, works: list[Work], error: Exception) -> None:
        logger.error("model %s failed", self._name, exc_info=error)
        for work in works:
            work.send(AsdError(f"model {self._name} failed on this request"))

    def _take_sequence(self, work: Work) -> CachedSequence:
        """Return a sequence rolled back to what it shares with the prompt; a new one if there is none."""
        best, shared = None, 0
        for sequence in self._pool:
            # The last prompt token is computed anew, since its logits are wanted.
            common = min(_shared_length(sequence.tokens, work.prompt), len(work.prompt) - 1)
            if common > shared:
                best, shared = sequence, common
        is_full = len(self._pool) >= self._options.cached_sequences
        if best is None or shared < _LEAST_SHARED:
            best, shared = (min(self._pool, key=lambda s: s.used), 0) if is_full and self._pool else (None, 0)
        places = self._places(work)
        if best is not None:
            with self._wake:
                self._pool.remove(best)
            # Of another size, it makes room for one that fits; a prefix is worth more than a size.
            if best.places >= places if shared else best.places == places:
                best.roll_back(shared)
                work.cached = shared
                return best
        # Freed before the new one is made.
        del best
        return self._new_sequence(places)

    def _keep_sequence(self, sequence: CachedSequence) -> None:
        sequence.used = time.monotonic()
        # The last token was chosen but never run: only what stands before it is in the cache.
        sequence.roll_back(len(sequence.tokens) - 1)
        with self._wake:
            self._pool.append(sequence)
            if len(self._pool) > self._options.cached_sequences:
                self._pool.remove(min(self._pool, key=lambda s: s.used))

    def _places(self, work: Work) -> int:
        """Return the places of a cache for a request alone; one more than it fills, where there is one."""
        return places_for(len(work.prompt) + work.most_tokens + 1, self._context)

    def _new_sequence(self, places: int) -> CachedSequence:
        og = load_binding()
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=places, do_sample=False)
        return CachedSequence(og.Generator(self._model, parameters), places, self._pass_tokens)

    def _new_batch(self, prompts: Sequence[list[int]], most_tokens: int) -> Any:
        """Return a generator that has read prompts side by side, with room for answers of most_tokens."""
        og = load_binding()
        longest = max(len(prompt) for prompt in prompts)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=longest + most_tokens, batch_size=len(prompts), do_sample=False
        )
        generator = og.Generator(self._model, parameters)
        padded = np.full((len(prompts), longest), self._shape.pad_id, np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        generator.append_tokens(padded)
        return generator


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
