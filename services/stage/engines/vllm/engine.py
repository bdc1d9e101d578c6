"""The `vllm` engine: vLLM 0.25.1's AsyncLLM, which keeps its engine in a process of its own.

It follows vLLM's source at that version; tests check every call against its signatures. docs/engines.md has
the measurements.

A request with prompt_logprobs computes its whole prompt again: vLLM cannot give log-probabilities of tokens
that it took from the prefix cache. It still fills the cache, so that the answer continues from there. With
`cached_scoring` the prompt is taken from the cache and only the tail is computed. Its rows are then found
from the end of the list, and if the cache reached into the draft the pass is repeated without it. Cached and
computed keys differ by rounding, so a near tie may fall the other way.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import secrets
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from asd.errors import AsdError, ModelRefusal, PreconditionFailed
from services.common.privacy import report_nothing
from services.common.validation import MAX_TOP_LOGPROBS
from services.stage.engines.backend import BackendDied, DraftOutcome, Piece, TokenScores
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.scoring import ScoringEngine, ScoringOptions
from services.stage.engines.settings import VllmSettings
from services.stage.engines.vllm import proposer
from services.stage.generation.logprobs import Row
from services.stage.model_files import read_json_file

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from services.stage.engines.backend import TokenRequest
    from services.stage.engines.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Defaults of vLLM's environment variables. spawn: gRPC's threads do not survive a fork. The flashinfer
# sampler has no seed per request, and needs a package that the image does not have.
_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
# vLLM's workers import it by name.
_PROPOSER = "services.stage.engines.vllm.proposer"
_CONSTRAINT = "services.stage.engines.vllm.constraint:ConstraintProcessor"
# A worker answers between two steps. Chosen: far longer than any step.
_WORKERS_S = 60.0
MISSING = (
    "vllm is not installed: use the image of target stage-vllm, or pip install '.[vllm]' in asd's directory, "
    "with Python 3.12 on Linux with an NVIDIA GPU"
)


class VllmOptions(VllmSettings):
    """How a model is run: the section of its settings, and the options of every engine."""

    max_batch: int = 64
    max_queue: int = 256
    default_max_new_tokens: int = 160
    resync: bool = True


def make_engine(name: str, directory: Path, options: VllmOptions) -> ScoringEngine:
    """Return the engine of a model; vLLM itself is imported when the model is loaded."""
    checkpoint = read_checkpoint(directory)
    context = min(checkpoint.context, options.max_model_len or checkpoint.context)
    if options.max_model_len is not None:
        # vLLM refuses a longer context than the model's.
        options = options.model_copy(update={"max_model_len": context})
    backend = VllmBackend(name, directory, checkpoint, options)
    return ScoringEngine(
        "vllm",
        name,
        directory,
        checkpoint,
        backend,
        ScoringOptions(
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            context=context,
            default_max_new_tokens=options.default_max_new_tokens,
            resync=options.resync,
            kv_bytes=4 if options.dtype == "float32" else 2,
            cache_bytes=int((options.kv_cache_gib or 0) * 2**30),
            constrains=options.constraints and _keeps_first_runner(),
            most_top_logprobs=min(options.top_logprobs, checkpoint.vocabulary, MAX_TOP_LOGPROBS),
        ),
        backend,
    )


def check_adapter(task: str, directory: Path, max_rank: int) -> None:
    """Raise PreconditionFailed for an adapter that vLLM would fail on at the first request, or score wrongly.

    task: type of task that it is for. max_rank: that the engine is made for.
    """
    name = f"adapter {task}: {directory}"
    try:
        config = read_json_file(directory / "adapter_config.json", "name a folder of PEFT's")
        rank, modules = int(config["r"]), config["target_modules"]
        # A string is a pattern, a list has names.
        changes = [
            *([modules] if isinstance(modules, str) else modules),
            *(config.get("modules_to_save") or ()),
        ]
    except PreconditionFailed as error:
        raise PreconditionFailed(f"adapter {task}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PreconditionFailed(
            f"{name}: adapter_config.json is not a LoRA adapter's as PEFT writes it: {error!r}"
        ) from error
    if rank > max_rank:
        raise PreconditionFailed(f"{name}: its rank is {rank}: set max_lora_rank, which is {max_rank}, to it")
    # vLLM applies an adapter of the head to the rows that it samples, not to all that it scores.
    if changed := [each for each in changes if "lm_head" in each or "embed_tokens" in each]:
        raise PreconditionFailed(
            f"{name}: it changes {changed[0]}, which vLLM leaves out in verification: train it without"
        )


class VllmBackend:
    """One model in vLLM; see services.stage.engines.backend.Backend for the contract."""

    def __init__(self, name: str, directory: Path, checkpoint: Checkpoint, options: VllmOptions) -> None:
        self._name = name
        self._directory = directory
        self._eos_ids = list(checkpoint.eos_ids)
        # A longer list would repeat tokens.
        self._top = min(options.top_logprobs, checkpoint.vocabulary)
        self._options = options
        self._vllm: Any = None
        self._llm: Any = None
        self._adapters: dict[str, Any] = {}
        self._can_draft = options.verify_inside
        self._is_on_cpu = False
        self._forgetting: set[asyncio.Task[Sequence[Any]]] = set()

    @property
    def takes_drafts(self) -> bool:
        """Whether vLLM verifies drafts while it decodes; see services.stage.engines.vllm.proposer."""
        return self._can_draft

    @property
    def draws_with_drafts(self) -> bool:
        """Whether it does so above temperature 0, too.

        Not in vLLM's build for CPUs: there its rejection sampler divides by a temperature that it never set
        (`_expand_kernel_impl` of 0.25.1 fills a copy), so that draws are not the model's.
        """
        return self._can_draft and not self._is_on_cpu

    async def start(self) -> None:
        """Load the model, or wake it."""
        if self._llm is None:
            # This takes minutes for a large model; the event loop serves other calls meanwhile.
            self._llm = await asyncio.to_thread(self._open)
            await self._attach()
        elif self._options.sleep_level == 1:
            await self._llm.wake_up()
        else:
            # Level 2 dropped the weights, so they are read again before the rest wakes.
            await self._llm.wake_up(tags=["weights"])
            await self._llm.collective_rpc("reload_weights")
            await self._llm.wake_up(tags=["kv_cache"])

    async def stop(self) -> None:
        """Put the model to sleep, or end it."""
        if self._llm is not None and self._options.sleep_level:
            await self._llm.sleep(level=self._options.sleep_level)
        else:
            await self.close()

    async def close(self) -> None:
        """End vLLM's engine and its process."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    async def generate(self, ids: list[int], request: TokenRequest) -> AsyncGenerator[Piece, None]:
        """Write tokens after a prompt."""
        params = self._vllm.SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            logprobs=self._top,
            # Flat lists: an object for each candidate of each token takes up to a hundred times as long.
            flat_logprobs=True,
            # vLLM has no tokenizer here, so the end tokens are given explicitly.
            stop_token_ids=self._eos_ids,
            detokenize=False,
            output_kind=self._output_kind.DELTA,
            **_extra_args(request),
        )
        cached = 0
        async with aclosing(self._ask(ids, params, request.adapter)) as outputs:
            async for output in outputs:
                (completion,) = output.outputs
                cached = output.num_cached_tokens or cached
                rows = [self._row(completion.logprobs, place) for place in range(len(completion.token_ids))]
                if completion.finish_reason not in {None, "stop", "length"}:
                    raise RuntimeError(f"vLLM ended an answer with {completion.finish_reason!r}")
                yield Piece(
                    rows,
                    cached,
                    is_last=completion.finish_reason is not None,
                    has_ended=completion.finish_reason == "stop",
                )

    async def score(self, ids: list[int], start: int, adapter: str) -> TokenScores:
        """Score ids[start:] in one pass."""
        if self._options.cached_scoring and self._options.prefix_caching:
            scores = await self._score(ids, start, adapter, skips_cache=False)
            if scores is not None:
                return scores
        scores = await self._score(ids, start, adapter, skips_cache=True)
        if scores is None:
            raise RuntimeError(f"vLLM gave log-probabilities of a part of {len(ids)} prompt tokens alone")
        return scores

    async def grow(self, key: str, ids: Sequence[int]) -> None:
        """Hand over more of a request's draft."""
        await self._call_workers("asd_grow", key, list(ids))

    async def outcome(self, key: str) -> DraftOutcome:
        """Return how a request's draft fared, so far or to its end."""
        (scores, steps, verify_steps), *_ = await self._call_workers("asd_outcome", key)
        return DraftOutcome(
            ranks=tuple(rank for rank, _ in scores),
            logprobs=tuple(logprob for _, logprob in scores),
            steps=steps,
            verify_steps=tuple(
                (range(start, start + count), proposed) for start, count, proposed in verify_steps
            ),
        )

    def forget(self, key: str) -> None:
        """Have the workers drop all of a request's draft. This does not wait."""
        task = asyncio.create_task(self._call_workers("asd_forget", key))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)
        # Where this fails, the workers are gone, and what they kept with them.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _attach(self) -> None:
        """Let the proposer see requests, where drafts are verified inside."""
        if self._can_draft:
            if self._options.constraints:
                await self._call_workers("asd_constrain")
            lacking, *_ = await self._call_workers("asd_attach")
            logger.info("model %s: vLLM verifies drafts while it decodes", self._name)
            if lacking:
                logger.warning(
                    "vLLM %s lacks %s: with model %s, ranks of tokens that it does not accept are bounds, or "
                    "drafts are not followed to the end of the context",
                    self._vllm.__version__,
                    ", ".join(lacking),
                    self._name,
                )

    async def _call_workers(self, method: str, *arguments: Any) -> Sequence[Any]:
        """Return what a method of services.stage.engines.vllm.proposer.WorkerExtension gives, by worker."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm is None:
            raise BackendDied("vLLM's engine is not there")
        try:
            found: Sequence[Any] = await self._llm.collective_rpc(method, timeout=_WORKERS_S, args=arguments)
        except EngineDeadError as error:
            raise BackendDied(f"vLLM's engine died: {error}") from error
        return found

    async def _score(
        self, ids: list[int], start: int, adapter: str, *, skips_cache: bool
    ) -> TokenScores | None:
        """Score ids[start:] in one pass; None if the prefix cache reached into them."""
        params = self._vllm.SamplingParams(
            # vLLM refuses None and 0, so every pass writes a token.
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self._top,
            logprobs=self._top,
            flat_logprobs=True,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._output_kind.FINAL_ONLY,
            skip_reading_prefix_cache=skips_cache,
        )
        last = None
        async with aclosing(self._ask(ids, params, adapter)) as outputs:
            async for output in outputs:
                last = output
        if last is None or not last.finished or last.prompt_logprobs is None:
            raise RuntimeError("vLLM gave no log-probabilities of a prompt")
        (completion,) = last.outputs
        cached = last.num_cached_tokens or 0
        # The row of ids[start] comes from the position before it, which must have been computed.
        if cached >= start:
            return None
        known, wanted = last.prompt_logprobs, len(ids) - start
        # Entry t is for prompt token t if nothing was cached. Otherwise the list may be shorter; its last
        # entry is for the last token.
        if len(known) < wanted + 1 or (not cached and len(known) != len(ids)):
            return None
        rows = [self._row(known, len(known) - wanted + i) for i in range(wanted)]
        return TokenScores(rows, self._row(completion.logprobs, 0), cached)

    async def _ask(self, ids: list[int], params: Any, adapter: str) -> AsyncGenerator[Any, None]:
        """Yield vLLM's outputs. Closing this aborts the request."""
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self._llm
        if llm is None:
            raise BackendDied("vLLM's engine is not there")
        outputs = llm.generate(
            {"prompt_token_ids": ids},
            params,
            secrets.token_hex(8),
            lora_request=self._adapters[adapter] if adapter else None,
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise BackendDied(f"vLLM's engine died: {error}") from error
        except ValueError as error:
            # vLLM refuses the request, for example a prompt that no cache can hold.
            raise ModelRefusal(f"{self._name} cannot take this request: {error}") from error

    def _row(self, known: Any, place: int) -> Row:
        """Return a row of vLLM's FlatLogprobs: the token itself, then the likeliest ones, likeliest first."""
        first, end = known.start_indices[place], known.end_indices[place]
        places = list(range(first + 1, end))
        if len(places) < self._top:
            # Where vLLM has joined outputs, a token that is among the likeliest is there once.
            places = sorted([first, *places], key=lambda each: known.ranks[each])
        token, top_ids = known.token_ids[first], tuple(known.token_ids[each] for each in places)
        return Row(
            token=token,
            logprob=known.logprobs[first],
            # Of tokens that are as likely, vLLM counts all.
            rank=top_ids.index(token) if token in top_ids else known.ranks[first] - 1,
            top_ids=top_ids,
            top_logprobs=tuple(known.logprobs[each] for each in places),
        )

    @property
    def _output_kind(self) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return RequestOutputKind

    def _open(self) -> Any:
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        report_nothing()
        try:
            import vllm
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ModuleNotFoundError as error:
            missing = "" if error.name == "vllm" else f" ({error.name} is missing)"
            raise PreconditionFailed(f"{MISSING}{missing}") from error
        self._vllm = vllm
        self._is_on_cpu = bool(current_platform.is_cpu())
        self._can_draft = self._options.verify_inside and _takes_proposers()
        if self._options.verify_inside and not self._can_draft:
            logger.warning(
                "vLLM %s takes no proposer of its user's: model %s verifies drafts by requests of their own",
                vllm.__version__,
                self._name,
            )
        for task, path in self._options.lora.items():
            check_adapter(task, path, self._options.max_lora_rank)
        self._adapters = {
            task: LoRARequest(lora_name=task, lora_int_id=index, lora_path=str(path))
            for index, (task, path) in enumerate(self._options.lora.items(), start=1)
        }
        try:
            return AsyncLLM.from_engine_args(vllm.AsyncEngineArgs(**self.arguments()))
        except AsdError:
            raise
        except Exception as error:
            raise PreconditionFailed(f"model {self._name}: vLLM cannot load it: {error}") from error

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of vLLM's engine."""
        options = self._options
        arguments: dict[str, Any] = {
            "model": str(self._directory),
            "skip_tokenizer_init": True,
            "dtype": options.dtype,
            "load_format": options.load_format,
            "tensor_parallel_size": options.tensor_parallel,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "enable_prefix_caching": options.prefix_caching,
            "max_num_seqs": options.max_batch,
            "max_logprobs": self._top,
            "enforce_eager": options.enforce_eager,
            # The checkpoint's sampling defaults must not apply to requests.
            "generation_config": "vllm",
            "disable_log_stats": True,
            "seed": 0,
        }
        if options.max_model_len is not None:
            arguments["max_model_len"] = options.max_model_len
        if options.max_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = options.max_batched_tokens
        if options.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 2**30)
        if options.cuda_graph_tokens is not None:
            arguments["max_cudagraph_capture_size"] = options.cuda_graph_tokens
        if options.quantization is not None:
            arguments["quantization"] = options.quantization
        if self._can_draft:
            arguments |= {
                "speculative_config": {
                    "method": "custom_class",
                    "model": f"{_PROPOSER}.DraftProposer",
                    "num_speculative_tokens": options.proposed_tokens,
                    # Says that the number varies. Else vLLM fills the first step of a request up to it.
                    "num_speculative_tokens_per_batch_size": [
                        (1, options.max_batch, options.proposed_tokens)
                    ],
                },
                "worker_extension_cls": f"{_PROPOSER}.WorkerExtension",
                # A proposer sees what was written only in steps that end one after the other.
                "async_scheduling": False,
                # Else vLLM rounds the tokens of every step up to a multiple of the longest proposal.
                "compilation_config": {"cudagraph_mode": "PIECEWISE"},
            }
        elif options.constraints and _keeps_first_runner():
            # vLLM's second runner takes none.
            arguments["logits_processors"] = [_CONSTRAINT]
        if options.sleep_level:
            arguments["enable_sleep_mode"] = True
        if options.lora:
            arguments |= {
                "enable_lora": True,
                "max_loras": len(options.lora),
                "max_lora_rank": options.max_lora_rank,
            }
        return arguments


def _keeps_first_runner() -> bool:
    """Return whether vLLM runs models with its first runner, where a user's class proposes or constrains.

    It does so by itself, unless the environment says otherwise.
    """
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") == "0"


def _takes_proposers() -> bool:
    """Return whether this vLLM takes a proposer class of its user's. Its interface may change, says vLLM."""
    if not _keeps_first_runner():
        return False
    try:
        importlib.import_module("vllm.v1.spec_decode.custom_class_proposer")
    except ImportError:
        return False
    return True


def _extra_args(request: TokenRequest) -> dict[str, Any]:
    """Return what takes a request's draft and its grammar to the workers."""
    own: dict[str, Any] = {}
    if (draft := request.draft) is not None:
        own |= {proposer.KEY: draft.key, proposer.IDS: list(draft.ids), proposer.RESYNC: draft.resync}
    if request.grammar:
        own |= {proposer.GRAMMAR: request.grammar, proposer.WRITTEN: list(request.written)}
    return {"extra_args": own} if own else {}
