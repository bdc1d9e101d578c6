"""How many passes a stage takes to verify a draft, told from the target's own answer. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.stage.generation.resync import Resynchroniser

if TYPE_CHECKING:
    from collections.abc import Sequence


def count_passes(
    draft: Sequence[int], answer: Sequence[int], accepted: int, most_tokens: int
) -> tuple[int, int]:
    """Return the passes that a stage needs to verify a draft and go on to its own answer, as it does them.

    draft, answer: ids, the end mark included where they end with it; at most most_tokens without it.
    accepted: tokens that they have in common at their start. The first pass scores the draft and yields what
    is accepted and one token more; each later one yields what it accepts of a proposal and one token more.
    Second: the tokens proposed in the later ones.
    """
    passes, proposed_again = 1, 0
    written = accepted + 1
    resync = Resynchroniser(draft, accepted)
    while written < len(answer):
        proposal = resync.propose(answer[:written], most_tokens - written)
        pairs = list(zip(proposal, answer[written:], strict=False))
        kept = next((place for place, (ours, own) in enumerate(pairs) if ours != own), len(pairs))
        resync.judged(len(proposal), kept)
        proposed_again += len(proposal)
        written += kept + 1
        passes += 1
    return passes, proposed_again
