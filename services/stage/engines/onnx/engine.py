"""The `onnx` engine: onnxruntime-genai on the CPU. It hands calls to the scheduler, on the model's thread."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asd.errors import AsdError, PreconditionFailed
from asd.values import FinishReason, Message, Sampling
from services.common.validation import MAX_TOP_LOGPROBS
from services.stage.domain import DraftPiece, DraftText, Event, PrefillResult
from services.stage.engines.engine import EngineStatus, ModelState
from services.stage.engines.onnx.binding import load_binding, remember_array_formats
from services.stage.engines.onnx.export import prepare, served_shape
from services.stage.engines.onnx.generators import Generators
from services.stage.engines.onnx.memory import capacity_for, pass_tokens, weight_bytes
from services.stage.engines.onnx.scheduler import Scheduler
from services.stage.engines.onnx.slots import SlotRequest
from services.stage.engines.probe import ANSWER_TOKENS, probe, probe_prompts
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.inputs import RequestReader
from services.stage.generation.tokenizer import ChatTokenizer
from services.stage.generation.verification import evidence_signals, likeliest_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

# onnxruntime-genai 0.18 holds the interpreter's lock while a model runs. A thread that waits for it, such as
# the event loop's, waits at least this long. With Python's 5 ms, every chunk was 5 ms late. Measured: with
# 0.2 ms, the small model's answers come 8% sooner.
_SWITCH_SECONDS = 0.0002


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a model is run.

    threads: of the operators. max_batch: requests of one slot. max_lanes: slots at a time. cached_sequences:
    kept for prefix reuse. max_model_len: tokens of prompt and answer at most; None: the model's. max_queue:
    requests that may wait. resync: whether parts of a draft are proposed again after a correction.
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
        # The served context sizes its position tables.
        self._shape = served_shape(directory, options.max_model_len)
        self._context = min(self._shape.context, options.max_model_len or self._shape.context)
        self._pass_tokens = pass_tokens(self._shape)
        self._scheduler = Scheduler(name, options, self._context, self._pass_tokens)
        self._tokenizer = ChatTokenizer(directory)
        self._reader = RequestReader(
            name,
            self._tokenizer,
            self._context,
            self._shape.vocabulary,
            self._shape.eos_ids,
            options.default_max_new_tokens,
            constrains=True,
            most_top_logprobs=MAX_TOP_LOGPROBS,
        )
        self._reader.check_shortest_prompt()
        self._state = ModelState.UNLOADED
        self._error = ""
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        """Derive the ONNX form if needed, and load it; a loaded model stays as it is."""
        async with self._loading:
            if self._state is ModelState.READY:
                return
            self._state = ModelState.LOADING
            try:
                generators = await self._load()
            except Exception as error:
                self._state, self._error = ModelState.FAILED, str(error)
                if isinstance(error, AsdError):
                    raise
                raise PreconditionFailed(f"model {self._name} cannot be loaded: {error}") from error
            sys.setswitchinterval(_SWITCH_SECONDS)
            self._scheduler.start(generators)
            self._state, self._error = ModelState.READY, ""

    async def unload(self) -> None:
        """Free the model; calls in flight end with PreconditionFailed."""
        async with self._loading:
            if self._state is not ModelState.READY:
                return
            # New calls find the model unloaded, and load it again afterwards.
            self._state = ModelState.UNLOADED
            await self._scheduler.stop()

    async def generate(self, turns: tuple[Message, ...], sampling: Sampling) -> AsyncGenerator[Event, None]:
        """Write an answer."""
        async with aclosing(self._events(*await self._open(turns, sampling))) as events:
            async for event in events:
                yield event

    async def verify(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        draft: DraftText,
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of a draft and continue the answer."""
        request, deliveries = await self._open(turns, sampling)
        request.threshold = threshold
        request.draft = ReceivedDraft(request.call.most_tokens, request.call.matcher)
        await self._reader.read_draft(draft, request.draft)
        async with aclosing(self._events(request, deliveries)) as events:
            async for event in events:
                yield event

    async def verify_stream(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Verify a draft while it is being written."""
        request, deliveries = await self._open(turns, sampling)
        request.threshold = threshold
        request.draft = ReceivedDraft(request.call.most_tokens, request.call.matcher)

        def notify(error: AsdError | None) -> None:
            if error is not None:
                deliveries.put_nowait([error])
            else:
                self._scheduler.wake()

        reader = asyncio.create_task(self._reader.follow_draft(pieces, request.draft, notify))
        try:
            async with aclosing(self._events(request, deliveries)) as events:
                async for event in events:
                    yield event
        finally:
            reader.cancel()

    async def prefill(self, turns: tuple[Message, ...]) -> PrefillResult:
        """Put a prompt into the prefix cache."""
        request, deliveries = await self._open(turns, Sampling(max_new_tokens=1))
        request.only_prefill = True
        async for _ in self._events(request, deliveries):
            pass
        call = request.call
        return PrefillResult(len(call.prompt), call.cached, (call.prefilled - call.arrived) * 1e3)

    def status(self) -> EngineStatus:
        """Return whether the model is loaded, and how many calls wait and run."""
        usage = self._scheduler.usage()
        return EngineStatus(
            state=self._state,
            parameters=self._shape.parameters,
            context_length=self._context,
            fingerprint=self._tokenizer.fingerprint,
            memory_bytes=self._memory_bytes(usage.used_capacity + usage.kept_capacity),
            kv_cache_bytes=usage.used_capacity * self._shape.kv_bytes_per_token,
            queued=usage.queued,
            running=usage.running,
            cached_sequences=usage.kept_sequences,
            completed=self._scheduler.completed,
            cancelled=self._scheduler.cancelled,
            error=self._error,
            constrains=self._reader.constrains,
            most_top_logprobs=MAX_TOP_LOGPROBS,
        )

    def _memory_bytes(self, capacity: int) -> int:
        """Return the memory of weights and KV caches, at least that of a pool of short conversations.

        A loaded model will soon need that much, so the budget must not give it to another model.
        """
        soon = self._options.cached_sequences * capacity_for(1, self._context)
        return weight_bytes(self._shape) + max(capacity, soon) * self._shape.kv_bytes_per_token

    async def _load(self) -> Generators:
        """Load the prepared model and probe it. If it is damaged, derive it again and retry once."""
        form = await asyncio.to_thread(self._prepare)
        made = form.stat().st_ino
        try:
            return await self._try(form)
        except Exception:
            # At first, large files are not checked: that would take as long as loading them.
            form = await asyncio.to_thread(self._prepare, reads_all=True)
            if form.stat().st_ino == made:
                raise
        return await self._try(form)

    async def _try(self, form: Path) -> Generators:
        generators = await asyncio.to_thread(self._read, form)
        prompts = probe_prompts(self._tokenizer, self._shape.vocabulary, self._context)
        await probe(self._name, prompts, lambda batch: asyncio.to_thread(_answer_probe, generators, batch))
        return generators

    def _prepare(self, *, reads_all: bool = False) -> Path:
        return prepare(self._directory, most_tokens=self._options.max_model_len, reads_all=reads_all)

    def _read(self, form: Path) -> Generators:
        og = load_binding()
        remember_array_formats()
        config = og.Config(str(form))
        overlay = {"decoder": {"session_options": {"intra_op_num_threads": self._options.threads}}}
        config.overlay(json.dumps({"model": overlay}))
        return Generators(og.Model(config), self._shape.pad_id, self._pass_tokens)

    async def _open(self, turns: tuple[Message, ...], sampling: Sampling) -> tuple[SlotRequest, _Deliveries]:
        call = await self._reader.open_call(turns, sampling, evidence_signals, likeliest_tokens)
        deliveries: _Deliveries = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event | AsdError | None]) -> None:
            try:
                loop.call_soon_threadsafe(deliveries.put_nowait, events)
            except RuntimeError:
                # The loop closed while the model was running, so nobody waits for the answer.
                request.is_cancelled = True

        request = SlotRequest(call, deliver, resync=self._options.resync)
        return request, deliveries

    async def _events(self, request: SlotRequest, deliveries: _Deliveries) -> AsyncGenerator[Event, None]:
        if self._state is not ModelState.READY:
            raise PreconditionFailed(f"model {self._name} is not loaded")
        self._scheduler.submit(request)
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
                if not request.is_taken:
                    request.is_taken = True
                    self._scheduler.wake()
        finally:
            if not has_ended:
                request.is_cancelled = True
                self._scheduler.wake()


def _answer_probe(generators: Generators, prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
    """Compute prompts as slots do; return logits, float32 [rows, V]. Call it while nothing else is computed.

    A single prompt is also rolled back and continued, as in verification.
    """
    longest = max(len(prompt) for prompt in prompts)
    if len(prompts) == 1:
        sequence = generators.sequence(longest + ANSWER_TOKENS + 1)
        generator, rows = sequence.generator, [sequence.append(prompts[0])]
    else:
        generator = generators.batch(prompts, ANSWER_TOKENS)
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
