"""The probe: a model counts as loaded once it has answered, alone and in a batch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from asd.errors import PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy.typing as npt

    from services.stage.generation.tokenizer import ChatTokenizer

# Their lengths differ, so that a batch of them is padded.
_TEXTS = ("A probe.", "A longer probe, so that the two of them differ in length.")
# For both answers. Chosen: a few passes, the first of which may compile a GPU library's kernels.
_SECONDS = 300.0
# Tokens of a probe's answer.
ANSWER_TOKENS = 2


async def probe(
    name: str,
    prompts: Sequence[list[int]],
    answer: Callable[[Sequence[list[int]]], Awaitable[npt.NDArray[np.floating]]],
) -> None:
    """Have a model answer alone, then in a batch. No metric counts these requests.

    answer: computes prompts together and returns logits or log-probabilities, of any shape. Raises
    PreconditionFailed with the reason if it fails, takes minutes, or gives numbers that are not finite.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            for way, batch in (("alone", prompts[:1]), ("in a batch", prompts)):
                try:
                    values = await answer(batch)
                except PreconditionFailed:
                    raise
                except TimeoutError:
                    raise
                except Exception as error:
                    raise PreconditionFailed(f"model {name} cannot answer {way}: {error}") from error
                if not np.isfinite(values).all():
                    raise PreconditionFailed(
                        f"model {name} computes numbers that are not finite, {way}: its weights are damaged, "
                        "or do not fit the configuration or the dtype"
                    )
    except TimeoutError as error:
        raise PreconditionFailed(f"model {name} did not answer a probe within {_SECONDS:.0f} s") from error


def probe_prompts(tokenizer: ChatTokenizer, vocabulary: int, context: int) -> list[list[int]]:
    """Return two prompts of different lengths, in ids of the vocabulary, that leave room for an answer."""
    most = max(context - ANSWER_TOKENS - 1, 1)
    encoded = [[each for each in tokenizer.encode_text(text) if each < vocabulary] for text in _TEXTS]
    return [(ids or [0])[:most] for ids in encoded]
