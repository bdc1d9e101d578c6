"""Whether drafts are worth verifying: how much work they saved of late, by drafter and target. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common.cost import verify_cost

if TYPE_CHECKING:
    from services.router.domain import Answer

# Weight of the newest verification in the mean. Chosen: some ten of them carry nine tenths of it.
_NEWEST = 0.2
# Mean cost of a verification, as a share of writing anew, from which on drafts are not verified. Chosen:
# below 1, since the drafting itself takes time too.
_WORTHLESS = 0.9
# While drafts are worthless, one in so many is verified all the same, to see whether that changed. Chosen: at
# ten per cent more per attempt, it costs one per cent.
_PROBE_EVERY = 16


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """Which ways of working ahead are used.

    pipelined: the stages of a chain work at the same time. prefill_ahead: a likely target's prefix cache is
    warmed while the first stage drafts. early_abandon: a hopeless draft is not finished. adaptive: drafts
    that saved nothing of late are not verified.
    """

    pipelined: bool = True
    prefill_ahead: bool = True
    early_abandon: bool = True
    adaptive: bool = True


class Speculation:
    """Means over recent verifications. enabled: False, and every draft is verified."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._shares: dict[tuple[str, str], float] = {}
        self._skipped: dict[tuple[str, str], int] = {}

    def is_worthwhile(self, drafter: str, target: str) -> bool:
        """Return whether to have a target verify a drafter's next draft. A probe counts as worthwhile."""
        pair = (drafter, target)
        if not self._enabled or self._shares.get(pair, 0.0) < _WORTHLESS:
            return True
        self._skipped[pair] = (self._skipped.get(pair, 0) + 1) % _PROBE_EVERY
        return self._skipped[pair] == 0

    def verified(self, answer: Answer) -> None:
        """Learn from a verified answer; of any other one, nothing."""
        if answer.verification is None:
            return
        usage = answer.result.usage
        share = verify_cost(1.0, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens)
        pair = (answer.draft_stage, answer.stage.name)
        old = self._shares.get(pair, share)
        self._shares[pair] = old + _NEWEST * (share - old)
