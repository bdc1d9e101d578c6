"""A stage's own values: drafts, and the events of an answer; asd.values has the rest. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from asd.values import FinishReason, TokenDetail


@dataclass(frozen=True, slots=True)
class DraftText:
    """An answer to verify. ids are used if the fingerprint is the target's, else the text is encoded.

    is_prediction: whether the caller wrote it, so that it is refused if it breaks the constraint.
    """

    text: str
    ids: tuple[int, ...]
    fingerprint: str
    finish: FinishReason
    is_prediction: bool = False


@dataclass(frozen=True, slots=True)
class DraftPiece:
    """Part of a draft that is still being written: ids of its tokenizer, and the text that they add.

    fingerprint: of that tokenizer; the first piece's holds for all.
    """

    ids: tuple[int, ...]
    text: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens in order. logprobs, entropies (nats), margins: float32 [tokens], as in the contract.

    details: one per token, if the request asks for them.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float32]
    details: tuple[TokenDetail, ...] = ()


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """What the target made of a draft. ranks: int64 [proposed]; target_logprobs: float32 [proposed].

    resampled: whether tokens were accepted by rejection sampling, and not by the seed's draws.
    while_writing: whether the request that wrote the answer verified the draft as it went.
    allowed: how many of the draft's tokens the constraint allows; None: all that were judged.
    """

    proposed: int
    accepted: int
    ranks: npt.NDArray[np.int64]
    target_logprobs: npt.NDArray[np.float32]
    ids_used: bool
    resampled: bool = False
    while_writing: bool = False
    allowed: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of a call; times in milliseconds.

    proposed_tokens, accepted_tokens: of the draft, and of proposals after a correction. Tokens accepted after
    the final one do not count.
    accept_lengths: tokens emitted by each pass that scored a proposal: accepted + 1, or up to the token that
    ended the answer; an end-of-sequence token counts.
    constrained: whether a constraint was kept.
    """

    text: str
    ids: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int
    cached_prompt_tokens: int
    proposed_tokens: int
    accepted_tokens: int
    forward_passes: int
    accept_lengths: tuple[int, ...]
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float
    constrained: bool = False


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Outcome of a prefill."""

    prompt_tokens: int
    cached_prompt_tokens: int
    total_ms: float


Event = TokenChunk | VerificationResult | Result
