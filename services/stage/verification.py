"""The acceptance rule: how much of a draft a target keeps. Pure: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class ShapeMismatch(ValueError):  # noqa: N818 - named as in the house's style
    """Logits and draft ids do not belong together."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of scoring a draft of k tokens.

    accepted: length of the accepted prefix, 0 to k. ranks: int64 [k], place of each draft token in the
    target's order (0: likeliest). logprobs: float32 [k], the target's log-probability of each.
    """

    accepted: int
    ranks: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]


def verify_draft(
    draft_ids: npt.NDArray[np.int64], target_logits: npt.NDArray[np.float32], threshold: float | None = None
) -> Verdict:
    """Accept the longest prefix of a draft that the target agrees with.

    draft_ids: int64 [k]. target_logits: float32 [k, V]; row t conditions on draft_ids[:t]. Without a
    threshold a token is accepted where it is the target's argmax (the first one, on a tie), so that greedy
    output is kept exactly; with one, where its probability is at least threshold times the largest.
    Raises ShapeMismatch if k disagrees or an id is not below V.
    Source: greedy acceptance of Leviathan et al. 2023, section 3; typical-acceptance-style threshold relative
    to the mode as in Stern et al. 2018, section 5.3 (there a distance), our parametrisation.
    """
    if target_logits.ndim != 2 or draft_ids.shape != (target_logits.shape[0],):
        raise ShapeMismatch(f"draft_ids {draft_ids.shape} against target_logits {target_logits.shape}")
    if draft_ids.size and (draft_ids.min() < 0 or draft_ids.max() >= target_logits.shape[1]):
        raise ShapeMismatch(f"a draft id is not below the vocabulary of {target_logits.shape[1]}")
    rows = np.arange(draft_ids.size)
    own = target_logits[rows, draft_ids]
    top = target_logits.max(axis=1, initial=-np.inf)
    # A token of equal logit and lower id goes first, as argmax has it.
    columns = np.arange(target_logits.shape[1])
    is_before = (target_logits > own[:, None]) | (
        (target_logits == own[:, None]) & (columns[None] < draft_ids[:, None])
    )
    ranks = is_before.sum(axis=1)
    fits = ranks == 0 if threshold is None else own - top >= np.log(threshold)
    misses = np.flatnonzero(~fits)
    shifted = target_logits - top[:, None]
    logprobs = own - top - np.log(np.exp(shifted).sum(axis=1))
    return Verdict(
        accepted=int(misses[0]) if misses.size else int(draft_ids.size),
        ranks=ranks.astype(np.int64),
        logprobs=logprobs.astype(np.float32),
    )


def token_signals(
    logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return (log-probabilities of ids, entropies in nats, top-2 probability margins), float32 [k] each.

    logits: float32 [k, V], the rows that the ids were chosen from, at temperature 1.
    """
    rows = np.arange(ids.size)
    likeliest = logits.argmax(axis=1)
    shifted = logits - logits[rows, likeliest][:, None]
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1)
    log_totals = np.log(totals)
    entropies = log_totals - np.einsum("ij,ij->i", exponentials, shifted) / totals
    logprobs = shifted[rows, ids] - log_totals
    # Of the likeliest, exp(0) = 1 is left; without it, the second is the largest.
    exponentials[rows, likeliest] = 0.0
    margins = (1.0 - exponentials.max(axis=1)) / totals
    return logprobs.astype(np.float32), entropies.astype(np.float32), margins.astype(np.float32)


def choose_token(
    logits: npt.NDArray[np.float32], temperature: float, top_p: float, rng: np.random.Generator
) -> int:
    """Draw a token from logits (float32 [V]) at a temperature above 0, from the nucleus of mass top_p.

    Source: Holtzman et al. 2020 (nucleus sampling): the fewest likeliest tokens whose mass reaches top_p.
    """
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if top_p < 1.0:
        order = np.argsort(-probs, kind="stable")
        mass = np.cumsum(probs[order])
        kept = order[: int(np.searchsorted(mass, top_p)) + 1]
        nucleus = np.zeros_like(probs)
        nucleus[kept] = probs[kept]
        probs = nucleus / nucleus.sum()
    return int(rng.choice(probs.size, p=probs))
