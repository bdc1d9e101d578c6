"""The `tensorrt_llm` engine: TensorRT-LLM's LLM API on its PyTorch backend, lines 1.2 and 1.3.

It has not been run on hardware: it follows the API's sources and documentation, and is tested against its
signatures and a stand-in that behaves as they say. `asd-engine check` tests a real installation.

Traps that this code avoids: Entry i of prompt_logprobs scores prompt token i + 1. Block reuse silently
shortens that list, and pairs it with tokens from the start. The order of generate_async's arguments differs
between the two lines. The call writes to the SamplingParams that it takes. It refuses max_tokens 0.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from asd.errors import AsdError, ModelRefusal, PreconditionFailed
from services.common.privacy import report_nothing
from services.common.validation import MAX_TOP_LOGPROBS
from services.stage.engines.backend import BackendDied, Piece, TokenScores
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.scoring import ScoringEngine, ScoringOptions
from services.stage.engines.settings import TensorrtLlmSettings
from services.stage.generation.logprobs import Row, make_row

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

    from services.stage.engines.backend import TokenRequest
    from services.stage.engines.checkpoint import Checkpoint

# How long a cancelled request may take to end. Chosen: the pass of a long prompt.
_ABORT_SECONDS = 30.0
MISSING = (
    "tensorrt_llm is not installed: use the image of target stage-tensorrt-llm, which starts from NVIDIA's "
    "container; its wheels are not on the Python index"
)


class TensorrtLlmOptions(TensorrtLlmSettings):
    """How a model is run: the section of its settings, and the options of every engine."""

    max_batch: int = 64
    max_queue: int = 256
    default_max_new_tokens: int = 160
    resync: bool = True


def make_engine(name: str, directory: Path, options: TensorrtLlmOptions) -> ScoringEngine:
    """Return the engine of a model; TensorRT-LLM itself is imported when the model is loaded."""
    checkpoint = read_checkpoint(directory)
    # A prompt longer than one pass is refused, and scoring needs the whole prompt in one pass.
    context = min(checkpoint.context, options.max_model_len or checkpoint.context, options.max_batched_tokens)
    return ScoringEngine(
        "tensorrt_llm",
        name,
        directory,
        checkpoint,
        TensorrtLlmBackend(name, directory, checkpoint, options, context),
        ScoringOptions(
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            context=context,
            default_max_new_tokens=options.default_max_new_tokens,
            resync=options.resync,
            kv_bytes=1 if options.kv_cache_dtype == "fp8" else 2,
            most_top_logprobs=min(options.top_logprobs, checkpoint.vocabulary, MAX_TOP_LOGPROBS),
        ),
    )


class TensorrtLlmBackend:
    """One model in TensorRT-LLM; see services.stage.engines.backend.Backend for the contract."""

    def __init__(
        self,
        name: str,
        directory: Path,
        checkpoint: Checkpoint,
        options: TensorrtLlmOptions,
        context: int,
    ) -> None:
        self._name = name
        self._directory = directory
        self._eos_ids = checkpoint.eos_ids
        self._options = options
        self._context = context
        self._top = min(options.top_logprobs, checkpoint.vocabulary)
        self._library: Any = None
        self._llm: Any = None
        self._drains: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the model."""
        if self._llm is None:
            self._llm = await asyncio.to_thread(self._open)

    async def stop(self) -> None:
        """End the model: the two release lines share no call that makes it sleep."""
        await self.close()

    async def close(self) -> None:
        """End TensorRT-LLM's executor and its processes."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.gather(*self._drains, return_exceptions=True)
            await asyncio.to_thread(llm.shutdown)

    async def generate(self, ids: list[int], request: TokenRequest) -> AsyncGenerator[Piece, None]:
        """Write tokens after a prompt."""
        sampling: dict[str, Any] = {}
        if request.temperature > 0:
            sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        output = self._submit(
            ids,
            streaming=True,
            max_tokens=request.max_tokens,
            logprobs=self._top,
            stop_token_ids=list(self._eos_ids[1:]) or None,
            **sampling,
        )
        is_over = False
        try:
            async for step in output:
                (completion,) = step.outputs
                # Both lists belong to the library, and the next step changes them.
                tokens, entries = list(completion.token_ids_diff), list(completion.logprobs_diff)
                rows = [self._row(*each) for each in zip(tokens, entries, strict=True)]
                reason = completion.finish_reason
                is_over = reason is not None
                if reason not in {None, "stop", "length"}:
                    raise RuntimeError(f"TensorRT-LLM ended an answer with {reason!r}")
                if rows or is_over:
                    yield Piece(rows, is_last=is_over, has_ended=reason == "stop")
                if is_over:
                    break
        finally:
            if not is_over:
                self._abort(output)

    async def score(self, ids: list[int], start: int, adapter: str) -> TokenScores:
        """Score ids[start:] in one pass."""
        # Reused blocks have no rows, so a scored prompt gets a salt of its own, which prevents reuse.
        salt = {"cache_salt": secrets.token_hex(8)} if self._options.prefix_caching else {}
        output = self._submit(
            ids,
            streaming=False,
            submission=salt,
            max_tokens=1,
            logprobs=self._top,
            prompt_logprobs=self._top,
            ignore_eos=True,
        )
        try:
            done = await output
        except asyncio.CancelledError:
            self._abort(output)
            raise
        (completion,) = done.outputs
        known = completion.prompt_logprobs
        if known is None or len(known) != len(ids):
            raise RuntimeError(
                f"TensorRT-LLM gave {0 if known is None else len(known)} rows for {len(ids)} prompt tokens: "
                "a part that was reused is missing, and the others stand at wrong positions"
            )
        # Entry i is for token i + 1; the last one is for the token that was written.
        rows = [self._row(ids[index], known[index - 1]) for index in range(start, len(ids))]
        return TokenScores(rows, self._row(completion.token_ids[0], known[-1]))

    def _submit(
        self,
        ids: list[int],
        *,
        streaming: bool,
        submission: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Any:
        """Submit a request; return its output, which can be awaited or iterated."""
        if self._llm is None:
            raise BackendDied("TensorRT-LLM's executor is not there")
        # Each request needs its own: the call writes to it.
        params = self._library.SamplingParams(end_id=self._eos_ids[0], detokenize=False, **sampling)
        try:
            return self._llm.generate_async(
                inputs={"prompt_token_ids": list(ids)},
                sampling_params=params,
                streaming=streaming,
                **(submission or {}),
            )
        except ValueError as error:
            raise ModelRefusal(f"{self._name} cannot take this request: {error}") from error
        except RuntimeError as error:
            raise BackendDied(f"TensorRT-LLM's executor is gone: {error}") from error

    def _abort(self, output: Any) -> None:
        """Cancel a request, and read on until the library reports its end."""
        output.abort()

        async def drain() -> None:
            # A request cancelled before its first token may end with an error of the library.
            with suppress(Exception):
                async with asyncio.timeout(_ABORT_SECONDS):
                    async for _ in output:
                        pass

        task = asyncio.get_running_loop().create_task(drain())
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    def _row(self, token: int, entries: Mapping[int, Any]) -> Row:
        return make_row(token, {each: (e.logprob, e.rank) for each, e in entries.items()}, self._top)

    def _open(self) -> Any:
        report_nothing()
        try:
            import tensorrt_llm
            from tensorrt_llm.llmapi import KvCacheConfig
        except ModuleNotFoundError as error:
            missing = "" if error.name == "tensorrt_llm" else f" ({error.name} is missing)"
            raise PreconditionFailed(f"{MISSING}{missing}") from error
        self._library = tensorrt_llm
        options = self._options
        try:
            return tensorrt_llm.LLM(
                model=str(self._directory),
                skip_tokenizer_init=True,
                tensor_parallel_size=options.tensor_parallel,
                dtype=options.dtype,
                load_format=options.load_format,
                max_batch_size=options.max_batch,
                max_seq_len=self._context,
                max_num_tokens=options.max_batched_tokens,
                kv_cache_config=KvCacheConfig(
                    enable_block_reuse=options.prefix_caching,
                    free_gpu_memory_fraction=options.gpu_memory_utilization,
                    dtype=options.kv_cache_dtype,
                ),
            )
        except AsdError:
            raise
        except Exception as error:
            raise PreconditionFailed(f"model {self._name}: TensorRT-LLM cannot load it: {error}") from error
