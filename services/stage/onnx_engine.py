"""The `onnx` engine: onnxruntime-genai on the CPU, one thread per model that owns all of its computation.

Batching. The library's Engine/Request form was tried first: its events carry tokens without
log-probabilities, and its batches are static unless the model is paged, so it buys nothing here. Instead a
lane is one library generator of one or more requests; the thread steps its lanes in turn. Requests that wait
together form a lane together, so a request never waits for a batch to fill, and newcomers start beside what
runs. Prompts of a lane are padded on the right, which GroupQueryAttention masks exactly.

Prefix reuse. A request alone in its lane takes a generator from a small pool, rolled back to the longest
prefix that it shares with what the generator holds; its tokens are therefore computed once per conversation.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from services.common.errors import AsdError, InvalidRequest, PreconditionFailed, ResourceExhausted
from services.stage.answer import AnswerBuilder
from services.stage.engine import (
    DraftText,
    EngineStatus,
    Event,
    FinishReason,
    ModelState,
    PrefillResult,
    Result,
    SamplingOptions,
    Turn,
    VerificationResult,
)
from services.stage.onnx_binding import remember_array_formats
from services.stage.onnx_export import prepare, read_shape
from services.stage.tokenizer import ChatTokenizer
from services.stage.verification import choose_token, verify_draft

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

# The first chunk goes out once this much time has passed since the model started, later ones after this much
# more: a small model's whole answer is one chunk. Every hand-over to the event loop's thread stalls the
# model's, which waits for the interpreter meanwhile, for about half a millisecond; a chunk every 5 ms cost
# the large model 10% of its speed. Chosen.
_FIRST_CHUNK_SECONDS = 0.005
_CHUNK_SECONDS = 0.02
# A request alone in its lane is decoded for this long before other lanes have their turn. Chosen: many tokens
# of a small model, one of a large one.
_SLICE_SECONDS = 0.001
# onnxruntime-genai 0.18 holds the interpreter's lock while a model runs, so a thread that waits for it, such
# as the event loop's, gets it no sooner than this. At Python's 5 ms every chunk was that late. Measured:
# 0.2 ms makes the small model's answers 8% faster to have.
_SWITCH_SECONDS = 0.0002
# A prefix of fewer shared tokens is not worth keeping a generator for: a chat template's own marks.
_LEAST_SHARED = 8


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a model is run.

    threads: of the operators. max_batch: requests of one lane. max_lanes: lanes at a time. cached_sequences:
    generators kept for prefix reuse. max_queue: requests that may wait.
    """

    threads: int = 1
    max_batch: int = 8
    max_lanes: int = 4
    cached_sequences: int = 4
    max_queue: int = 256
    default_max_new_tokens: int = 160


_Deliveries = asyncio.Queue["list[Event | AsdError | None]"]


@dataclass(slots=True, eq=False)
class _Work:
    """One call on its way through the model's thread."""

    prompt: list[int]
    most_tokens: int
    sampling: SamplingOptions
    deliver: Callable[[list[Event | AsdError | None]], None]
    arrived: float
    draft: list[int] | None = None
    draft_ended: bool = False
    ids_used: bool = False
    threshold: float | None = None
    only_prefill: bool = False
    is_cancelled: bool = False
    answer: AnswerBuilder | None = None
    rng: np.random.Generator | None = None
    started: float = 0.0
    prefilled: float = 0.0
    chunk_due: float = 0.0
    cached: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    rows: list[npt.NDArray[np.float32]] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    outbox: list[Event | AsdError | None] = field(default_factory=list)

    def send(self, *events: Event | AsdError | None) -> None:
        """Deliver what is due, with these events last; None ends the call."""
        outbox, self.outbox = [*self.outbox, *events], []
        self.deliver(outbox)


class _Sequence:
    """A generator of one row and the tokens that its cache holds."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.tokens: list[int] = []
        self.used = 0.0

    def roll_back(self, length: int) -> None:
        if length < len(self.tokens):
            self.generator.rewind_to(length)
            del self.tokens[length:]

    def run(self, tokens: list[int]) -> None:
        """Append tokens in one pass."""
        self.generator.append_tokens(np.array([tokens], np.int32))
        self.tokens += tokens

    def append(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Append tokens in one pass; return their logits, float32 [tokens, V]."""
        self.run(tokens)
        logits: npt.NDArray[np.float32] = self.generator.get_output("logits")[0]
        return logits[-len(tokens) :]


class OnnxEngine:
    """Runs one Llama model; see services.stage.engine.Engine for the contract."""

    kind = "onnx"

    def __init__(self, name: str, directory: Path, options: OnnxOptions) -> None:
        self._name = name
        self._directory = directory
        self._options = options
        self._shape = read_shape(directory)
        self._tokenizer = ChatTokenizer(directory)
        self._state = ModelState.UNLOADED
        self._error = ""
        self._loading = asyncio.Lock()
        self._model: Any = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._lanes: list[_SoloLane | _BatchLane] = []
        self._pool: list[_Sequence] = []
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
                self._model = await asyncio.to_thread(self._open)
            except Exception as error:
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
        """Stop the model's thread and free the model; calls under way end as cancelled."""
        async with self._loading:
            if self._thread is None:
                return
            with self._wake:
                self._stopping = True
                self._wake.notify()
            await asyncio.to_thread(self._thread.join)
            self._thread = None
            self._pool.clear()
            self._model = None
            self._state = ModelState.UNLOADED

    def generate(self, turns: tuple[Turn, ...], sampling: SamplingOptions) -> AsyncGenerator[Event, None]:
        """Write an answer."""
        return self._events(*self._work(turns, sampling))

    def verify(
        self, turns: tuple[Turn, ...], sampling: SamplingOptions, draft: DraftText, threshold: float | None
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of a draft and go on from there."""
        if sampling.temperature > 0:
            raise InvalidRequest(
                "Verify needs temperature 0: call Generate for a sampled answer", field="sampling.temperature"
            )
        work, queue = self._work(turns, sampling)
        self._set_draft(work, draft)
        work.threshold = threshold
        return self._events(work, queue)

    async def prefill(self, turns: tuple[Turn, ...]) -> PrefillResult:
        """Put a prompt into the prefix cache."""
        work, queue = self._work(turns, SamplingOptions(max_new_tokens=1))
        work.only_prefill = True
        async for _ in self._events(work, queue):
            pass
        return PrefillResult(len(work.prompt), work.cached, (work.prefilled - work.arrived) * 1e3)

    def status(self) -> EngineStatus:
        """Say what is loaded, queued and running."""
        with self._wake:
            queued = len(self._waiting)
            running = sum(lane.running for lane in self._lanes)
            held = sum(lane.held_tokens for lane in self._lanes)
            cached = len(self._pool)
        return EngineStatus(
            state=self._state,
            parameters=self._shape.parameters,
            context_length=self._shape.context,
            fingerprint=self._tokenizer.fingerprint,
            memory_bytes=self.memory_bytes,
            kv_cache_bytes=held * self._shape.kv_bytes_per_token,
            queued=queued,
            running=running,
            cached_sequences=cached,
            completed=self._completed,
            cancelled=self._cancelled,
            error=self._error,
        )

    @property
    def memory_bytes(self) -> int:
        """Weights in float32 (tied embeddings are held twice) and the caches of pooled generators."""
        head = self._shape.vocabulary * self._shape.hidden if self._shape.is_tied else 0
        caches = self._options.cached_sequences * self._shape.context * self._shape.kv_bytes_per_token
        return 4 * (self._shape.parameters + head) + caches

    def _open(self) -> Any:
        import onnxruntime_genai as og

        remember_array_formats()
        config = og.Config(str(prepare(self._directory)))
        overlay = {"decoder": {"session_options": {"intra_op_num_threads": self._options.threads}}}
        config.overlay(json.dumps({"model": overlay}))
        return og.Model(config)

    def _work(self, turns: tuple[Turn, ...], sampling: SamplingOptions) -> tuple[_Work, _Deliveries]:
        prompt = self._tokenizer.encode_chat(turns)
        room = self._shape.context - len(prompt)
        if room < 1:
            where = "prompt" if len(turns) == 1 else "conversation"
            raise InvalidRequest(
                f"{where} has {len(prompt)} tokens; {self._name} takes at most {self._shape.context - 1}",
                field=where,
            )
        wanted = sampling.max_new_tokens or self._options.default_max_new_tokens
        queue: _Deliveries = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event | AsdError | None]) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, events)
            except RuntimeError:
                # The loop closed while the model was at work: nobody listens.
                work.is_cancelled = True

        work = _Work(prompt, min(wanted, room), sampling, deliver, time.monotonic())
        work.answer = AnswerBuilder(self._tokenizer.stream(), sampling.stop)
        if sampling.temperature > 0:
            work.rng = np.random.default_rng(sampling.seed)
        return work, queue

    def _set_draft(self, work: _Work, draft: DraftText) -> None:
        """Take the draft's ids where they are this tokenizer's; else encode its text."""
        work.ids_used = bool(draft.ids) and draft.fingerprint == self._tokenizer.fingerprint
        if work.ids_used:
            wrong = next(
                (i for i in draft.ids if i >= self._shape.vocabulary or i in self._shape.eos_ids), None
            )
            if wrong is not None:
                raise InvalidRequest(
                    f"id {wrong} is not a text token of the tokenizer {draft.fingerprint[:12]}…",
                    field="draft.token_ids",
                )
            ids = list(draft.ids)
        elif draft.ids and not draft.text:
            raise InvalidRequest(
                f"the draft's ids are of another tokenizer than {self._name}'s, "
                f"{self._tokenizer.fingerprint}: send its text as well",
                field="draft.tokenizer_fingerprint",
            )
        else:
            ids = self._tokenizer.encode_text(draft.text)
        work.draft = ids[: work.most_tokens]
        work.draft_ended = draft.finish is FinishReason.EOS and len(ids) < work.most_tokens

    async def _events(self, work: _Work, deliveries: _Deliveries) -> AsyncGenerator[Event, None]:
        if self._state is not ModelState.READY:
            raise PreconditionFailed(f"model {self._name} is not loaded")
        with self._wake:
            if len(self._waiting) >= self._options.max_queue:
                raise ResourceExhausted(
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
        finally:
            if not has_ended:
                work.is_cancelled = True

    # What follows runs on the model's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._lanes or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    works = [*self._waiting, *(work for lane in self._lanes for work in lane.works)]
                    self._waiting.clear()
                    self._lanes.clear()
                    break
                admitted = self._admit()
            if admitted:
                self._open_lane(admitted)
            for lane in list(self._lanes):
                if not self._step(lane):
                    with self._wake:
                        self._lanes.remove(lane)
        for work in works:
            work.send(PreconditionFailed(f"model {self._name} was unloaded"))

    def _admit(self) -> list[_Work]:
        """Take the requests that wait, as far as they fit one lane; called with the lock held."""
        if not self._waiting or len(self._lanes) >= self._options.max_lanes:
            return []
        admitted: list[_Work] = []
        kept: deque[_Work] = deque()
        longest = most = 0
        while self._waiting and len(admitted) < self._options.max_batch:
            work = self._waiting.popleft()
            if work.is_cancelled:
                self._cancelled += 1
                continue
            # Rows of a lane are decoded greedily side by side; what needs a cache of its own goes alone.
            is_plain = work.draft is None and work.rng is None and not work.only_prefill
            now_longest, now_most = max(longest, len(work.prompt)), max(most, work.most_tokens)
            if admitted and (not is_plain or now_longest + now_most > self._shape.context):
                kept.append(work)
                continue
            admitted.append(work)
            longest, most = now_longest, now_most
            if not is_plain:
                break
        self._waiting.extendleft(reversed(kept))
        return admitted

    def _open_lane(self, works: list[_Work]) -> None:
        now = time.monotonic()
        for work in works:
            work.started, work.chunk_due = now, now + _FIRST_CHUNK_SECONDS
        lane: _SoloLane | _BatchLane
        try:
            if len(works) == 1:
                lane = _SoloLane(works[0], self._take_sequence(works[0]), self._shape.eos_ids)
            else:
                lane = _BatchLane(works, self._new_batch(works), self._shape.eos_ids)
        except Exception as error:
            self._fail(works, error)
            return
        with self._wake:
            self._lanes.append(lane)

    def _step(self, lane: _SoloLane | _BatchLane) -> bool:
        """Advance a lane by one token; return whether it goes on."""
        for work in [w for w in lane.works if w.is_cancelled]:
            lane.works.remove(work)
            self._cancelled += 1
        if not lane.works:
            return False
        try:
            finished = lane.step()
        except Exception as error:
            self._fail(lane.works, error)
            return False
        for work in finished:
            lane.works.remove(work)
            self._completed += 1
            work.send(None)
        if not lane.works and isinstance(lane, _SoloLane):
            self._keep_sequence(lane.sequence)
        return bool(lane.works)

    def _fail(self, works: list[_Work], error: Exception) -> None:
        logger.error("model %s failed", self._name, exc_info=error)
        for work in works:
            work.send(AsdError(f"model {self._name} failed on this request"))

    def _take_sequence(self, work: _Work) -> _Sequence:
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
        if best is None:
            return self._new_sequence()
        with self._wake:
            self._pool.remove(best)
        best.roll_back(shared)
        work.cached = shared
        return best

    def _keep_sequence(self, sequence: _Sequence) -> None:
        sequence.used = time.monotonic()
        # The last token was chosen but never run: only what stands before it is in the cache.
        sequence.roll_back(len(sequence.tokens) - 1)
        with self._wake:
            self._pool.append(sequence)
            if len(self._pool) > self._options.cached_sequences:
                self._pool.remove(min(self._pool, key=lambda s: s.used))

    def _new_sequence(self) -> _Sequence:
        import onnxruntime_genai as og

        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._shape.context, do_sample=False)
        return _Sequence(og.Generator(self._model, parameters))

    def _new_batch(self, works: list[_Work]) -> Any:
        import onnxruntime_genai as og

        longest = max(len(work.prompt) for work in works)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=longest + max(work.most_tokens for work in works),
            batch_size=len(works),
            do_sample=False,
        )
        generator = og.Generator(self._model, parameters)
        padded = np.full((len(works), longest), self._shape.pad_id, np.int32)
        for row, work in enumerate(works):
            padded[row, : len(work.prompt)] = work.prompt
        generator.append_tokens(padded)
        now = time.monotonic()
        for work in works:
            work.passes, work.prefilled = 1, now
        return generator


class _SoloLane:
    """One request: generation, verification or prefill, with a cache that can be rolled back."""

    def __init__(self, work: _Work, sequence: _Sequence, eos_ids: tuple[int, ...]) -> None:
        self.works = [work]
        self.sequence = sequence
        self._work = work
        self._eos_ids = eos_ids
        self._is_open = False
        self._logits = np.zeros(0, np.float32)

    @property
    def running(self) -> int:
        return len(self.works)

    @property
    def held_tokens(self) -> int:
        # Once the request has left, the sequence is the prefix cache's.
        return len(self.sequence.tokens) if self.works else 0

    def step(self) -> list[_Work]:
        if not self._is_open:
            self._is_open = True
            has_ended = self._begin()
        elif self._work.rng is None:
            has_ended = self._decode_slice()
        else:
            has_ended = self._sample()
        return [self._work] if has_ended else []

    def _decode_slice(self) -> bool:
        """Decode greedily for a slice of time; return whether the request is finished."""
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
            if _take_token(work, token, get_output("logits")[0, -1], self._eos_ids, now):
                return True
        return False

    def _sample(self) -> bool:
        """Draw one token; return whether the request is finished."""
        work, logits = self._work, self._logits
        assert work.rng is not None
        assert work.answer is not None
        token = choose_token(logits, work.sampling.temperature, work.sampling.top_p, work.rng)
        if token not in self._eos_ids and len(work.new) + work.answer.count + 1 < work.most_tokens:
            self._logits = self.sequence.append([token])[-1]
        work.passes += 1
        return _take_token(work, token, logits, self._eos_ids, time.monotonic())

    def _begin(self) -> bool:
        """Process the prompt, and the draft where there is one; return whether the request is finished."""
        work, sequence = self._work, self.sequence
        draft = work.draft or []
        proposed = [*draft, self._eos_ids[0]] if work.draft_ended else draft
        tokens = work.prompt[len(sequence.tokens) :]
        if work.draft is None and work.rng is None:
            # Nobody looks at the logits: the library picks the first token from them.
            sequence.run(tokens)
            logits = self._logits
        else:
            logits = sequence.append([*tokens, *proposed])
            self._logits = logits[-1]
        work.passes = 1
        work.prefilled = time.monotonic()
        if work.only_prefill:
            return True
        if work.draft is None:
            # The pass that processed the prompt also yields the first token.
            work.passes = 0
            return False
        return self._accept(np.array(proposed, np.int64), logits[len(tokens) - 1 :])

    def _accept(self, proposed: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> bool:
        """Keep the accepted prefix and emit the target's own next token.

        proposed: int64 [k]. logits: float32 [k + 1, V].
        """
        work = self._work
        verdict = verify_draft(proposed, logits[: proposed.size], work.threshold)
        work.proposed, work.accepted = int(proposed.size), verdict.accepted
        work.send(
            VerificationResult(work.proposed, work.accepted, verdict.ranks, verdict.logprobs, work.ids_used)
        )
        for place in range(verdict.accepted):
            if _take_token(work, int(proposed[place]), logits[place], self._eos_ids, work.prefilled):
                self.sequence.roll_back(len(work.prompt) + place + 1)
                return True
        self.sequence.roll_back(len(work.prompt) + verdict.accepted)
        row = logits[verdict.accepted]
        token = int(row.argmax())
        if _take_token(work, token, row, self._eos_ids, work.prefilled):
            return True
        self._logits = self.sequence.append([token])[-1]
        return False


class _BatchLane:
    """Several greedy generations in one generator; a row that ends is passed over until all have ended."""

    def __init__(self, works: list[_Work], generator: Any, eos_ids: tuple[int, ...]) -> None:
        self.works = list(works)
        self._rows = list(works)
        self._generator = generator
        self._eos_ids = eos_ids
        self._steps = 0

    @property
    def running(self) -> int:
        return len(self.works)

    @property
    def held_tokens(self) -> int:
        return sum(len(work.prompt) + self._steps for work in self.works)

    def step(self) -> list[_Work]:
        self._generator.generate_next_token()
        tokens = self._generator.get_next_tokens()
        output = self._generator.get_output("logits")
        now = time.monotonic()
        finished = []
        for work in self.works:
            row = self._rows.index(work)
            # After the prompt, logits stand for every padded place; the row's own last one counts.
            place = len(work.prompt) - 1 if self._steps == 0 else -1
            if self._steps:
                work.passes += 1
            if _take_token(work, int(tokens[row]), output[row, place], self._eos_ids, now):
                finished.append(work)
        self._steps += 1
        return finished


def _take_token(
    work: _Work, token: int, logits: npt.NDArray[np.float32], eos_ids: tuple[int, ...], now: float
) -> bool:
    """Add a token to a request's answer, deliver what is due, and say whether the answer has ended.

    What is due at the end is left to be delivered with the end itself.
    """
    answer = work.answer
    assert answer is not None
    if token in eos_ids:
        return _finish(work, FinishReason.EOS)
    work.new.append(token)
    work.rows.append(logits)
    count = answer.count + len(work.new)
    if count >= work.most_tokens:
        return _finish(work, FinishReason.LENGTH)
    if now >= work.chunk_due:
        work.chunk_due = now + _CHUNK_SECONDS
        if _flush(work):
            return _finish(work, FinishReason.STOP)
        work.send()
    return False


def _flush(work: _Work) -> bool:
    """Make the tokens since the last flush due; return whether a stop sequence appeared."""
    assert work.answer is not None
    if work.new:
        chunk = work.answer.extend(work.new, np.concatenate(work.rows).reshape(len(work.new), -1))
        work.new, work.rows = [], []
        if chunk is not None:
            work.outbox.append(chunk)
    return work.answer.has_stopped


def _finish(work: _Work, finish: FinishReason) -> bool:
    answer = work.answer
    assert answer is not None
    if _flush(work):
        finish = FinishReason.STOP
    last = answer.finish()
    if last is not None:
        work.outbox.append(last)
    now = time.monotonic()
    work.outbox.append(
        Result(
            text=answer.text,
            ids=answer.ids,
            finish=finish,
            prompt_tokens=len(work.prompt),
            cached_prompt_tokens=work.cached,
            proposed_tokens=work.proposed,
            accepted_tokens=work.accepted,
            forward_passes=work.passes,
            queue_ms=(work.started - work.arrived) * 1e3,
            prefill_ms=(work.prefilled - work.started) * 1e3,
            decode_ms=(now - work.prefilled) * 1e3,
            total_ms=(now - work.arrived) * 1e3,
        )
    )
    return True


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
