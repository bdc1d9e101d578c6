"""How much of each draft an engine verifies in its next step, where it verifies while it decodes. Pure.

Such an engine computes one token of each request in a step anyway. Every draft token beside it makes the
step a little longer, and saves a step of its request if it is accepted. Two things are learned from what the
engine writes: how likely a draft's next tokens are (`DraftFollower`), and what a step of so many tokens takes
(`StepTimes`). `share_out` then proposes the tokens that raise the tokens per second of the whole batch.
Nothing here decides what is accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from services.stage.generation.resync import longest_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

# Probability that a draft which has lost the answer agrees with its next token all the same. Chosen.
_CHANCE = 0.1
# Probability per token that a draft loses the answer for good. Chosen: once in an answer of usual length.
_LOSS = 1 / 160
# A draft is never given up for good: where its text comes back, it is found again.
_LEAST_BELIEF = 1e-3
# Tokens that differ in a row after which the draft is searched. Chosen: one in a row is a replacement.
_DOUBTS = 2
# What a found run of tokens says at least: it may be chance.
_FOUND = 0.5
# Tokens that the average draft counts for beside a draft's own. Chosen.
_AVERAGE_TOKENS = 6.0
# Weight of the newest draft in the average one, and bounds that leave room to learn. Chosen.
_NEWEST_DRAFT = 0.1
_LEAST_SHARE, _MOST_SHARE = 0.05, 0.995
# Weight that what was observed before keeps at a new step. Chosen: the last 200 steps count.
_KEPT = 0.995
# What a further token of a step takes of a step's fixed time, until steps have shown it: a 34B on an H200.
_PRIOR_SLOPE = 1 / 400
# How many steps that prior counts for. A step counts as so many times its expected time at most: another
# process may hold one up, and if that counted in full, few tokens would be proposed for a long time.
_PRIOR_STEPS = 4.0
_LONGEST = 1.5
# Weight of a step that took longer than another of its size, and most that a size counts for. Chosen: steps
# of one size, which most are, must not outweigh what the others show.
_NEWEST_STEP = 0.05
_MOST_WEIGHT = 20.0
# Two or three suffice; and bisections of the price that keeps a step within its most tokens.
_ROUNDS = 8
_BISECTIONS = 16


@dataclass(slots=True)
class AverageDraft:
    """What drafts were like so far. follows: share that agreed at all. agrees: of those, the share of tokens.

    It starts with trust: a draft is made because it is expected to be right.
    """

    follows: float = 0.9
    agrees: float = 0.97

    def learn(self, hits: float, misses: float) -> None:
        """Learn from a draft that is done with: tokens that agreed, and that did not."""
        seen = hits + misses
        if not seen:
            return
        share = hits / seen
        # Noise agrees by chance alone.
        has_followed = share > 2 * _CHANCE
        self.follows = _moved(self.follows, 1.0 if has_followed else 0.0)
        if has_followed:
            self.agrees = _moved(self.agrees, share)


class DraftFollower:
    """One draft beside the answer that a target writes: where the draft would go on, and how likely that is.

    Two states: the draft follows the answer, where each token agrees with probability s, or it has lost it.
    The belief in the first is updated by Bayes' rule with each token of the answer, proposed or not. s is the
    mean of what this draft and the average one showed. A token that differs counts as a replacement of one
    token by one; after two in a row the answer's last tokens are looked for in the rest of the draft.
    """

    def __init__(self, average: AverageDraft, ids: Iterable[int] = ()) -> None:
        self.ids = list(ids)
        # Length of the prefix that the answer begins with, and whether it has departed from the draft.
        self.prefix = 0
        self.has_departed = False
        self._average = average
        self._answer: list[int] = []
        # The next of the draft's tokens, and the answer's that it is to be compared with.
        self._position = self._compared = 0
        self._belief = average.follows
        self._hits = self._misses = 0.0
        self._misses_in_row = 0

    @property
    def agreement(self) -> float:
        """Probability that a token of the draft agrees while the draft follows the answer."""
        seen = self._hits + self._misses
        agrees = (_AVERAGE_TOKENS * self._average.agrees + self._hits) / (_AVERAGE_TOKENS + seen)
        return agrees * (1.0 - _LOSS)

    def took(self, tokens: Sequence[int]) -> None:
        """Take what the engine wrote in a step."""
        self._answer += tokens
        # A draft that is still being written may be behind: what comes of it is compared with what there is.
        while self._compared < len(self._answer) and self._position < len(self.ids):
            self._compare(self._answer[self._compared])
        # Most tokens of noise are not in the draft at all: a search for each would slow every step.
        if self._misses_in_row >= _DOUBTS and self._answer[-1] in self.ids:
            self._find()

    def rest(self, room: int) -> Sequence[int]:
        """Return the tokens that would come next, up to room."""
        start = self._position + len(self._answer) - self._compared
        return self.ids[start : start + room]

    @property
    def likely(self) -> float:
        """Probability that the draft follows the answer."""
        return self._belief

    def close(self) -> None:
        """The answer is written: let the average draft learn from this one."""
        self._average.learn(self._hits, self._misses)

    def _compare(self, token: int) -> None:
        agrees, belief = self.agreement, self._belief
        is_hit = self.ids[self._position] == token
        if is_hit:
            belief = belief * agrees / (belief * agrees + (1.0 - belief) * _CHANCE)
            self._hits += 1
            self._misses_in_row = 0
            self.prefix += not self.has_departed
        else:
            missed = belief * (1.0 - agrees)
            belief = missed / (missed + (1.0 - belief) * (1.0 - _CHANCE))
            # Tokens of a draft that has lost the answer say nothing of those that follow it.
            self._misses += belief if self._hits else 1.0
            self._misses_in_row += 1
            self.has_departed = True
        self._belief = max(belief * (1.0 - _LOSS), _LEAST_BELIEF)
        self._position += 1
        self._compared += 1

    def _find(self) -> None:
        found = longest_run(self.ids, self._answer, self.prefix, self._position)
        if found is not None:
            self._position, self._compared = found, len(self._answer)
            self._belief = max(self._belief, _FOUND)


class StepTimes:
    """What a step takes, in seconds: a fixed part and a part for each token.

    Steps of about as many tokens count together, by the least time that one took lately: whatever else
    happens in a step only adds, such as a kernel that is compiled on its first use. A line is fitted to these
    by least squares. Before the first step, the fixed part is not known and counts as 1.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._steps = 0
        self._line = (1.0, _PRIOR_SLOPE)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        if self._steps > _PRIOR_STEPS:
            seconds = min(seconds, _LONGEST * self.seconds(tokens))
        # Two groups for each doubling.
        group = int(2 * math.log2(max(tokens, 1)))
        size = self._sizes.get(group)
        if size is None:
            self._sizes[group] = _Size(float(tokens), seconds, 1.0, self._steps)
        else:
            size.weight = min(size.weight * _KEPT ** (self._steps - size.seen) + 1.0, _MOST_WEIGHT)
            size.seen = self._steps
            # As if both were of the same number of tokens.
            moved = _NEWEST_STEP * (tokens - size.tokens)
            size.seconds += self._line[1] * moved
            size.tokens += moved
            seconds -= self._line[1] * (tokens - size.tokens)
            size.seconds = min(seconds, size.seconds + _NEWEST_STEP * (seconds - size.seconds))
        self._line = self._fitted()

    def seconds(self, tokens: int) -> float:
        """Return what a step of so many tokens takes."""
        fixed, slope = self._line
        return fixed + slope * tokens

    @property
    def line(self) -> tuple[float, float]:
        """The fixed part, and that of each token."""
        return self._line

    def _fitted(self) -> tuple[float, float]:
        weight = x = y = xx = xy = 0.0
        for size in self._sizes.values():
            w = size.weight * _KEPT ** (self._steps - size.seen)
            weight += w
            x += w * size.tokens
            y += w * size.seconds
            xx += w * size.tokens**2
            xy += w * size.tokens * size.seconds
        mean_x, mean_y = x / weight, y / weight
        spread, together = max(xx - weight * mean_x**2, 0.0), xy - weight * mean_x * mean_y
        prior = _PRIOR_SLOPE * mean_y / (1.0 + _PRIOR_SLOPE * mean_x)
        # As if some steps had shown the prior slope, a token apart from the mean each.
        slope = (together + _PRIOR_STEPS * prior) / (spread + _PRIOR_STEPS)
        slope = min(max(slope, 0.0), mean_y / max(mean_x, 1.0))
        return mean_y - slope * mean_x, slope


@dataclass(slots=True)
class _Size:
    """Steps of about so many tokens: the least time lately, and how much they count. seen: the last one."""

    tokens: float
    seconds: float
    weight: float
    seen: int


def share_out(
    likely: npt.NDArray[np.float64],
    agreement: npt.NDArray[np.float64],
    most: npt.NDArray[np.int64],
    running: int,
    times: StepTimes,
    most_tokens: int | None = None,
) -> npt.NDArray[np.int64]:
    """Return how many tokens to propose of each draft, so that the batch writes most per second: int64 [n].

    likely: [n], probability that a draft follows its answer; agreement: [n], that its next token then agrees,
    below 1; so the i-th token is accepted with likely * agreement**i. most: [n], tokens that may be proposed.
    running: requests of the step, with those that have no draft. most_tokens: of the step, if more would
    take far longer than the line says.
    A token pays where its probability is above what its time is worth at the rate of the whole step. The rate
    grows with each round until it no longer does: Dinkelbach 1967, for a ratio of two sums.
    """
    fixed, slope = times.line
    rate = running / (fixed + slope * running)
    log_agreement = np.log(agreement)

    def counts_at(price: float) -> npt.NDArray[np.int64]:
        with np.errstate(divide="ignore"):
            enough = np.log(price / likely) / log_agreement
        counts: npt.NDArray[np.int64] = np.clip(np.floor(np.minimum(enough, most)), 0, most).astype(np.int64)
        return counts

    counts = np.zeros(len(likely), np.int64)
    for _ in range(_ROUNDS):
        counts = counts_at(rate * slope)
        accepted = likely * agreement * (1.0 - agreement**counts) / (1.0 - agreement)
        better = (running + accepted.sum()) / (fixed + slope * (running + counts.sum()))
        if better <= rate * (1.0 + 1e-6):
            break
        rate = better
    if most_tokens is None or running + counts.sum() <= most_tokens:
        return counts
    # At the price of 1 nothing is proposed.
    low, high = rate * slope, 1.0
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        if running + counts_at(price).sum() <= most_tokens:
            high = price
        else:
            low = price
    return counts_at(high)


def _moved(mean: float, value: float) -> float:
    moved = mean + _NEWEST_DRAFT * (value - mean)
    return min(max(moved, _LEAST_SHARE), _MOST_SHARE)
