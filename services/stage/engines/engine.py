"""The protocol of an engine, whatever library runs the model. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from asd.values import FinishReason, Message, Sampling
    from services.stage.domain import DraftPiece, DraftText, Event, PrefillResult


class ModelState(Enum):
    """Whether a model can answer."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """State of a model at one moment; sizes in bytes.

    verifies_inside: whether a draft is verified while the answer is written, in one request; resamples: also
    that of a draw without a seed, by rejection sampling. constrains: whether it keeps constraints.
    takes_tools: whether the chat template knows tools. most_top_logprobs: largest `top_logprobs` that it
    serves.
    """

    state: ModelState
    parameters: int
    context_length: int
    fingerprint: str
    memory_bytes: int
    kv_cache_bytes: int
    queued: int
    running: int
    cached_sequences: int
    completed: int
    cancelled: int
    error: str
    verifies_inside: bool = False
    constrains: bool = False
    takes_tools: bool = False
    most_top_logprobs: int = 0
    resamples: bool = False


class Engine(Protocol):
    """Runs one model.

    `generate` and `verify` yield events, a Result last. Closing the generator early cancels the call: its
    computation stops and its cache is freed. Errors: ModelRefusal (PromptTooLong, ConversationRefused) for a
    request that another model may take, InvalidRequest for a draft that cannot be used, QueueFull,
    PreconditionFailed for a missing artifact.
    """

    @property
    def kind(self) -> str:
        """Name of the engine: "onnx", "vllm" or "tensorrt_llm"."""

    async def load(self) -> None:
        """Load the model; a loaded one stays as it is."""

    async def unload(self) -> None:
        """Free the model. The caller ensures that no call is in flight."""

    def generate(self, turns: tuple[Message, ...], sampling: Sampling) -> AsyncGenerator[Event, None]:
        """Write an answer."""

    def verify(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        draft: DraftText,
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of a draft and continue the answer. threshold: of TOLERANT; None: EXACT.

        seed_is_free: whether nobody asked for the seed, so that draws without one would do.
        Yields a VerificationResult first.
        """

    def verify_stream(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Verify a draft while it is being written; a FinishReason ends it.

        Tokens that are certain are yielded before all of the draft has come. Yields a VerificationResult
        once, before the Result.
        """

    async def prefill(self, turns: tuple[Message, ...]) -> PrefillResult:
        """Put a prompt into the prefix cache."""

    def status(self) -> EngineStatus:
        """Return whether the model is loaded, and how many calls wait and run."""
