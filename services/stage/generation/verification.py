"""The acceptance rules: how much of a draft a target keeps. Pure: arrays in, arrays out.

Three rules. EXACT keeps the tokens that the target would have chosen itself, greedily or by its own draw.
TOLERANT keeps tokens that are likely enough. Speculative sampling (`sample_draft`) keeps the target's
distribution, but needs the draft's probabilities. Services do not send them: that would be one number per
vocabulary entry for each token. Instead the stages share their noise (`choose_token`). Draft and target then
mostly draw the same tokens, EXACT keeps the agreed prefix, and the answer is the target's own draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence


class ShapeMismatch(ValueError):  # noqa: N818 - named by its cause
    """Draft and target do not belong together: their shapes differ, or an id is not below V."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of scoring a draft of k tokens.

    accepted: length of the accepted prefix, 0 to k. ranks: int64 [k], rank of each draft token in the
    target's order (0: likeliest). logprobs: float32 [k], the target's log-probability of each.
    """

    accepted: int
    ranks: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampledVerdict:
    """Outcome of speculative sampling. accepted: 0 to k. next_id: the token that follows the prefix."""

    accepted: int
    next_id: int


def verify_draft(
    draft_ids: npt.NDArray[np.int64],
    target_logits: npt.NDArray[np.float32],
    threshold: float | None = None,
    choices: npt.NDArray[np.int64] | None = None,
    likeliest: npt.NDArray[np.int64] | None = None,
) -> Verdict:
    """Accept the longest prefix of a draft that the target agrees with.

    draft_ids: int64 [k]. target_logits: float32 [k, V]; row t conditions on draft_ids[:t]. choices:
    int64 [k], the token that the target chose at each position; None: the likeliest one. likeliest:
    int64 [k], the likeliest token at each position that the constraint allows; None: the argmax (the first
    one, on a tie). Ranks and log-probabilities are those before any constraint.
    Without a threshold, a token is accepted if it is the target's choice, so the target's own output is kept
    exactly. With one, it is accepted if its probability is at least threshold times that of the likeliest.
    Raises ShapeMismatch if k disagrees or an id is not below V.
    Source: greedy acceptance of Leviathan et al. 2023, section 3; typical-acceptance-style threshold relative
    to the mode as in Stern et al. 2018, section 5.3 (there a distance), our parametrisation.
    """
    _check_ids(draft_ids, target_logits, target_logits.shape[:1])
    rows = np.arange(draft_ids.size)
    first = target_logits.argmax(axis=1)
    likeliest = first if likeliest is None else likeliest
    own = target_logits[rows, draft_ids]
    top = target_logits[rows, first]
    # Of tokens with equal logits, the lowest id ranks first, as in argmax.
    columns = np.arange(target_logits.shape[1])
    is_before = (target_logits > own[:, None]) | (
        (target_logits == own[:, None]) & (columns[None] < draft_ids[:, None])
    )
    shifted = target_logits - top[:, None]
    logprobs = own - top - np.log(np.exp(shifted).sum(axis=1))
    return Verdict(
        accepted=accept_prefix(
            draft_ids,
            likeliest if choices is None else choices,
            own - target_logits[rows, likeliest],
            threshold,
        ),
        ranks=is_before.sum(axis=1).astype(np.int64),
        logprobs=logprobs.astype(np.float32),
    )


def accept_prefix(
    draft_ids: npt.NDArray[np.int64],
    choices: npt.NDArray[np.int64],
    log_ratios: npt.NDArray[np.floating],
    threshold: float | None = None,
) -> int:
    """Return how many of the first draft tokens the target accepts. The rule of EXACT and TOLERANT.

    draft_ids, choices: int64 [k], the proposed tokens and the target's own at the same positions. log_ratios:
    [k], log of the target's probability of the draft token over that of its likeliest token.
    """
    fits = draft_ids == choices if threshold is None else log_ratios >= np.log(threshold)
    return int(fits.size if fits.all() else fits.argmin())


def sample_draft(
    draft_ids: npt.NDArray[np.int64],
    draft_probs: npt.NDArray[np.float32],
    target_probs: npt.NDArray[np.float32],
    rng: np.random.Generator,
) -> SampledVerdict:
    """Accept a prefix of a sampled draft and draw one more token; all follow the target's distribution.

    draft_ids: int64 [k], drawn from draft_probs. draft_probs: float32 [k, V]. target_probs: float32
    [k + 1, V]; row t conditions on draft_ids[:t]. A token is accepted with probability
    min(1, target / draft); the first that is not is replaced by a draw from the normalised positive part of
    target - draft.
    Raises ShapeMismatch if k or V disagree or an id is not below V.
    Source: Leviathan et al. 2023, Algorithm 1.
    """
    _check_ids(draft_ids, draft_probs, draft_probs.shape[:1])
    if target_probs.shape != (draft_ids.size + 1, draft_probs.shape[1]):
        raise ShapeMismatch(f"target_probs {target_probs.shape} against draft_probs {draft_probs.shape}")
    rows = np.arange(draft_ids.size)
    # Comparing the product avoids a division by a draft probability of 0.
    is_refused = rng.random(draft_ids.size) * draft_probs[rows, draft_ids] >= target_probs[rows, draft_ids]
    misses = np.flatnonzero(is_refused)
    if not misses.size:
        return SampledVerdict(int(draft_ids.size), _draw(target_probs[-1], rng))
    position = int(misses[0])
    rest = np.maximum(target_probs[position].astype(np.float64) - draft_probs[position], 0.0)
    # Equal distributions refuse a token only by rounding; the target's own draw then replaces it.
    return SampledVerdict(position, _draw(rest if rest.any() else target_probs[position], rng))


def choose_token(
    logits: npt.NDArray[np.float32], temperature: float, top_p: float, seed: int, position: int
) -> int:
    """Draw a token from logits (float32 [V]) at a temperature above 0, from the nucleus of mass top_p.

    The noise depends on the seed and the position in the answer alone. Two models that agree therefore draw
    the same token, and one model draws the same answer however its passes are split.
    Source: Gumbel-max draws with shared noise, Daliri et al. 2024, section 3; Holtzman et al. 2020 for the
    nucleus: the fewest likeliest tokens whose mass reaches top_p.
    """
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    noise = np.random.Generator(np.random.Philox(key=[seed, position])).gumbel(size=scaled.size)
    if top_p < 1.0:
        order = np.argsort(-scaled, kind="stable")
        mass = np.cumsum(np.exp(scaled[order]))
        kept = int(np.searchsorted(mass, top_p * mass[-1])) + 1
        noise[order[kept:]] = -np.inf
    return int(np.argmax(scaled + noise))


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
    # The likeliest has exp(0) = 1; without it, the second likeliest is the largest.
    exponentials[rows, likeliest] = 0.0
    margins = (1.0 - exponentials.max(axis=1)) / totals
    return logprobs.astype(np.float32), entropies.astype(np.float32), margins.astype(np.float32)


def evidence_signals(
    ids: Sequence[int], rows: Sequence[npt.NDArray[np.float32]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the signals of tokens by the logits that each was chosen from, float32 [V] each."""
    return token_signals(np.concatenate(rows).reshape(len(ids), -1), np.array(ids, np.int64))


def likeliest_tokens(logits: npt.NDArray[np.float32], most: int) -> list[tuple[int, float]]:
    """Return the likeliest tokens with their log-probabilities, likeliest first. logits: float32 [V]."""
    if not most:
        return []
    # Of equal ones, the lowest id is first, as in argmax.
    edge = np.partition(logits, -min(most, logits.size))[-min(most, logits.size)]
    near = np.flatnonzero(logits >= edge)
    ids = near[np.argsort(-logits[near], kind="stable")][:most]
    top = logits[ids[0]]
    logprobs = logits[ids] - top - np.log(np.exp(logits - top).sum())
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))


def _draw(weights: npt.NDArray[np.floating], rng: np.random.Generator) -> int:
    """Return an index drawn with probability proportional to its weight. weights: [V], 0 or more."""
    mass = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))


def _check_ids(ids: npt.NDArray[np.int64], rows: npt.NDArray[np.floating], shape: tuple[int, ...]) -> None:
    if rows.ndim != 2 or ids.shape != shape:
        raise ShapeMismatch(f"draft_ids {ids.shape} against rows {rows.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= rows.shape[1]):
        raise ShapeMismatch(f"a draft id is not below the vocabulary of {rows.shape[1]}")
