"""What services.stage.engines.scoring needs of a GPU library: tokens in, rows out. No text, no gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from services.stage.generation.logprobs import Row


class BackendDied(Exception):  # noqa: N818 - named by its cause, as in asd.errors
    """The library's engine is gone; it has to be loaded again."""


@dataclass(frozen=True, slots=True)
class RequestDraft:
    """The draft of one request.

    key: made for it alone. ids: what there is of it when the request starts. resync: whether the rest is
    proposed after a token that the answer does not have.
    """

    key: str
    ids: tuple[int, ...]
    resync: bool = True


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """How to continue a prompt. temperature: 0 decodes greedily. adapter: "" for the model itself.

    draft: to verify meanwhile, for a DraftingBackend. grammar: as `services.stage.generation.constraint`
    writes it, that the answer keeps; "" for none. written: tokens of the answer that the prompt ends with.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    adapter: str = ""
    draft: RequestDraft | None = None
    grammar: str = ""
    written: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that were written, with or without the end-of-sequence token.

    cached: prompt tokens taken from the prefix cache. is_last: nothing follows. has_ended: at the
    model's own end, not at the length.
    """

    rows: Sequence[Row]
    cached: int = 0
    is_last: bool = False
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Outcome of a scoring pass: a row for each scored token, and the model's own token after the last."""

    rows: Sequence[Row]
    following: Row
    cached: int = 0


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """How a draft fared in a request.

    ranks, logprobs: of the draft's tokens from the one on that the answer departed from, as far as that pass
    scored them. steps: of the request; 0: not known. verify_steps: of those that scored a proposal, the
    positions in the answer of what they wrote, and how many tokens were proposed.
    """

    ranks: tuple[int, ...]
    logprobs: tuple[float, ...]
    steps: int
    verify_steps: tuple[tuple[range, int], ...]


class Backend(Protocol):
    """One model in a GPU library.

    Closing `generate` early, or cancelling `score`, ends the library's work on it. Raises BackendDied if the
    library's engine is gone, ModelRefusal if the library refuses the request.
    """

    async def start(self) -> None:
        """Load the model, or wake it."""

    async def stop(self) -> None:
        """Free the model's memory, as far as the options say."""

    async def close(self) -> None:
        """End the library's engine and its processes."""

    def generate(self, ids: list[int], request: TokenRequest) -> AsyncGenerator[Piece, None]:
        """Write tokens after a prompt."""

    async def score(self, ids: list[int], start: int, adapter: str) -> TokenScores:
        """Score ids[start:] in one pass. start: 1 or more."""


class DraftingBackend(Backend, Protocol):
    """A library that verifies a draft while it writes, in one request."""

    @property
    def takes_drafts(self) -> bool:
        """Whether it does so for the model that is loaded."""

    @property
    def draws_with_drafts(self) -> bool:
        """Whether it does so above temperature 0 too, by rejection sampling without a seed."""

    async def grow(self, key: str, ids: Sequence[int]) -> None:
        """Hand over more of a request's draft."""

    async def outcome(self, key: str) -> DraftOutcome:
        """Return how a request's draft fared, so far or to its end."""

    def forget(self, key: str) -> None:
        """Have the library drop all of a request's draft. This does not wait."""
