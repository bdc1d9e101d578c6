"""Settings of the engines: each has a section, which any other engine refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from services.common.settings import Section

if TYPE_CHECKING:
    from collections.abc import Collection

Count = Annotated[int, Field(ge=1)]
# Chosen: no machine has more cores, and each thread takes memory.
Threads = Annotated[int, Field(ge=1, le=1024)]
# Most requests or batches that one model computes or keeps at a time. Chosen: several times the engines'
# defaults on the largest GPUs. Each takes memory, so a number that is too large would fail only under load.
MOST_AT_A_TIME = 4096
AtATime = Annotated[int, Field(ge=1, le=MOST_AT_A_TIME)]
# Tokens of prompt and answer together: at least one of each.
ContextLength = Annotated[int, Field(ge=2)]
Share = Annotated[float, Field(gt=0, le=1)]
EngineName = Literal["onnx", "vllm", "tensorrt_llm"]
# A stage's and a request's `model` names an adapter as model/task.
TaskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]


class VllmBase(Section):
    """Options of the `vllm` engine, but for verify_inside; docs/engines.md describes them.

    max_model_len None: the model's own. kv_cache_gib None: what gpu_memory_utilization leaves.
    cuda_graph_tokens None: vLLM's choice. proposed_tokens: of verification inside, most in a step. lora: path
    of an adapter by the type of task that it is for.
    sleep_level 0: unloading ends the engine's process; 1: it keeps the weights in main memory; 2: it drops
    them and reads them again.
    """

    tensor_parallel: Count = 1
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: ContextLength | None = None
    max_batched_tokens: Count | None = None
    gpu_memory_utilization: Share = 0.9
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    prefix_caching: bool = True
    cached_scoring: bool = True
    constraints: bool = True
    top_logprobs: Annotated[int, Field(ge=2)] = 20
    cuda_graph_tokens: Count | None = 512
    proposed_tokens: Annotated[int, Field(ge=1, le=128)] = 64
    enforce_eager: bool = False
    sleep_level: Literal[0, 1, 2] = 0
    lora: dict[TaskName, Path] = Field(default_factory=dict)
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16

    def check_proposals(self) -> None:
        """Raise ValueError if no step of verification inside would have room for its proposal."""
        if self.max_model_len is not None and self.max_model_len <= self.proposed_tokens:
            raise ValueError(
                f"verify_inside would propose nothing: max_model_len ({self.max_model_len}) must exceed "
                f"proposed_tokens ({self.proposed_tokens}) by the tokens of a prompt: raise max_model_len, "
                "lower proposed_tokens, or set verify_inside: false"
            )


class VllmSettings(VllmBase):
    """The section of the `vllm` engine.

    verify_inside: whether vLLM verifies drafts while it decodes; else a request of its own scores them.
    """

    verify_inside: StrictBool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.verify_inside:
            self.check_proposals()
        return self


class TensorrtLlmSettings(Section):
    """Options of the `tensorrt_llm` engine; docs/engines.md describes them.

    max_model_len None: the model's own, max_batched_tokens at most. prefix_caching: reuse of blocks between
    answers; a scoring pass never reuses any. top_logprobs: of each token.
    """

    tensor_parallel: Count = 1
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: ContextLength | None = None
    max_batched_tokens: Count = 8192
    gpu_memory_utilization: Share = 0.9
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    prefix_caching: bool = False
    top_logprobs: Count = 2


# The onnx engine's options stand beside the model's other settings: it was the first engine.
ONNX_OPTIONS = ("threads", "max_lanes", "cached_sequences", "max_model_len")
# Default number of requests at a time: a CPU gains from a few, a GPU from many.
_MOST_AT_A_TIME = {"onnx": 8, "vllm": 64, "tensorrt_llm": 64}


def check_options(engine: str, given: Collection[str]) -> None:
    """Raise ValueError for options of another engine. given: names that are set."""
    for section in ("vllm", "tensorrt_llm"):
        if section in given and section != engine:
            raise ValueError(
                f"section {section} is for engine {section}, and this model's is {engine}: remove it"
            )
    if engine != "onnx":
        wrong = [name for name in ONNX_OPTIONS if name in given]
        if wrong:
            raise ValueError(
                f"{wrong[0]} is an option of engine onnx, and this model's is {engine}: remove it, and set "
                f"what {engine} has in section {engine}"
            )


def most_at_a_time(engine: str, max_batch: int | None) -> int:
    """Return how many requests an engine computes at a time."""
    return _MOST_AT_A_TIME[engine] if max_batch is None else max_batch
