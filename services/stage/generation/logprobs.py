"""Log-probabilities of the likeliest tokens, for engines that do not show their logits. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log
from typing import TYPE_CHECKING

import numpy as np

from asd.values import FinishReason
from services.stage.generation.verification import Verdict, accept_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from services.stage.domain import TokenChunk
    from services.stage.generation.call import Call
    from services.stage.generation.constraint import Matcher

    Signals = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Row:
    """A token, and the distribution at temperature 1 that it was chosen from or scored by.

    rank: of the token, 0 for the likeliest. top_ids, top_logprobs: the likeliest tokens, likeliest first.
    """

    token: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    @property
    def own(self) -> Row:
        """The same position with the model's own choice as the token."""
        return Row(self.top_ids[0], self.top_logprobs[0], 0, self.top_ids, self.top_logprobs)

    def allowed(self, matcher: Matcher) -> Row | None:
        """Return the same position with the model's choice under a constraint, as `Matcher.likeliest` has it.

        None: none of the likeliest tokens is allowed, so it is not known.
        """
        if matcher.allowed(self.top_ids[:1]):
            return self.own
        mask = matcher.mask()
        token = next((each for each in self.top_ids if mask[each]), None)
        return None if token is None else self.of(token)

    def of(self, token: int) -> Row | None:
        """Return the same position with another token; None if it is not among the likeliest."""
        if token not in self.top_ids:
            return None
        rank = self.top_ids.index(token)
        return Row(token, self.top_logprobs[rank], rank, self.top_ids, self.top_logprobs)


def make_row(token: int, entries: Mapping[int, tuple[float, int]], most: int) -> Row:
    """Return the row of a token from (log-probability, rank from 1) by token.

    entries: the `most` likeliest tokens, and the token itself, which may be one of them.
    """
    ranked = sorted((rank, each) for each, (_, rank) in entries.items() if rank <= most)
    ids = tuple(each for _, each in ranked[:most])
    logprob, rank = entries[token]
    return Row(token, logprob, rank - 1, ids, tuple(entries[each][0] for each in ids))


def own_rows(proposal: Sequence[int], rows: Sequence[Row], matcher: Matcher | None) -> list[Row | None]:
    """Return rows with the model's own choices as the tokens; None where a constraint leaves it unknown.

    rows: [k + 1], of the proposal's tokens, and of the library's own choice after them. matcher: before the
    proposal, which it allows; None: there is no constraint.
    """
    if matcher is None:
        return [*(row.own for row in rows[:-1]), rows[-1]]
    found: list[Row | None] = []
    for index, row in enumerate(rows):
        # Where nothing but the end may follow, no other token can be the choice.
        found.append(row if matcher.is_over else row.allowed(matcher))
        matcher.take(proposal[index : index + 1])
    matcher.roll_back(len(proposal))
    return found


def verify_rows(
    draft_ids: Sequence[int],
    rows: Sequence[Row],
    threshold: float | None = None,
    own: Sequence[Row | None] | None = None,
) -> Verdict:
    """Accept the longest prefix of a draft that the target agrees with, as `verify_draft` does by logits.

    rows: of the draft tokens, in order. own: with the model's own choices as the tokens, where they are
    known; None: they are the likeliest tokens. Where a choice is not known, no draft token is accepted.
    """
    own = [row.own for row in rows] if own is None else own
    choices = np.array([-1 if each is None else each.token for each in own], np.int64)
    log_ratios = np.array(
        [-inf if each is None else row.logprob - each.logprob for row, each in zip(rows, own, strict=True)],
        np.float64,
    )
    return Verdict(
        accepted=accept_prefix(np.array(draft_ids, np.int64), choices, log_ratios, threshold),
        ranks=np.array([row.rank for row in rows], np.int64),
        logprobs=np.array([row.logprob for row in rows], np.float32),
    )


def likeliest_of(row: Row, most: int) -> Iterable[tuple[int, float]]:
    """Return so many of a row's likeliest tokens with their log-probabilities, likeliest first."""
    return zip(row.top_ids[:most], row.top_logprobs[:most], strict=True)


def row_signals(rows: Sequence[Row]) -> Signals:
    """Return (log-probabilities, entropies in nats, top-2 probability margins) of rows, float32 [k] each.

    The margin is exact if two tokens are known, else a lower bound. The entropy treats all other tokens as
    one: it is exact if the whole vocabulary is known, else a lower bound, which is short of the true value by
    at most (mass of the other tokens) x ln(their number).
    """
    signals = np.array([_signals(row) for row in rows], np.float32).reshape(-1, 3)
    return signals[:, 0], signals[:, 1], signals[:, 2]


def _signals(row: Row) -> tuple[float, float, float]:
    probs = [exp(each) for each in row.top_logprobs]
    entropy = -sum(p * each for p, each in zip(probs, row.top_logprobs, strict=True))
    beyond = 1.0 - sum(probs)
    # A smaller mass is rounding: log-probabilities are float32.
    if beyond > 1e-6:
        entropy -= beyond * log(beyond)
    margin = probs[0] - (probs[1] if len(probs) > 1 else 1.0 - probs[0])
    return min(row.logprob, 0.0), max(entropy, 0.0), min(max(margin, 0.0), 1.0)


def take_rows(call: Call[Row], rows: Sequence[Row], *, has_ended: bool = False) -> TokenChunk | None:
    """Add tokens up to the one that ends the answer; return the chunk that may go out now, or None.

    has_ended: the library says that the model ended the answer after them.
    """
    for row in rows:
        if call.add(row.token, row):
            break
    if has_ended:
        call.finish = FinishReason.EOS
    return call.flush()
