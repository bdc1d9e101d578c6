"""Whether drafts are worth verifying: how much work they saved of late, by drafter and target. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from services.common.cost import verify_cost
from services.router.domain import StageAction

if TYPE_CHECKING:
    from services.router.domain import Answer

Key = TypeVar("Key")

# Weight of the newest answer in a mean. Chosen: some ten of them carry nine tenths of it.
_NEWEST = 0.2
# What a verification takes, as a share of writing anew, from which on drafts are not verified. Chosen: below
# 1, since the drafting itself takes time too.
_WORTHLESS = 0.9
# While drafts are worthless, one in so many is verified all the same, to see whether that changed. Chosen: at
# ten per cent more per attempt, it costs one per cent.
_PROBE_EVERY = 16
# Calls under way at a target from which on times are compared as well. Chosen: with fewer, what a pass takes
# hardly depends on how many tokens it scores, and counting passes says enough.
_BUSY = 8
# Of so many drafts for a busy target, one is left out where nothing was written there without one, to see how
# long that takes. Chosen: where a verification takes a third of the time, it costs three per cent.
_WRITE_EVERY = 64


class Skip(Enum):
    """Why a draft is left out."""

    # Verifying it would take as many passes as writing anew.
    WORTHLESS = "worthless"
    # Verifying it would take as long as writing anew, with as many calls under way as now.
    LOAD = "load"
    # To see how long writing takes with as many calls under way as now.
    PROBE = "probe"


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """Which ways of working ahead are used.

    pipelined: the stages of a chain work at the same time. prefill_ahead: a likely target's prefix cache is
    warmed while the first stage drafts. early_abandon: a hopeless draft is not finished. adaptive: drafts
    that saved nothing of late, or that save nothing under the present load, are not verified.
    """

    pipelined: bool = True
    prefill_ahead: bool = True
    early_abandon: bool = True
    adaptive: bool = True


class Speculation:
    """Means over recent answers. enabled: False, and every draft is verified.

    Two rules. By passes: where verifications of a pair of stages took about as many as writing anew, its
    drafts save nothing whatever the load. By time: a busy target is bound by its arithmetic, and a pass over
    a draft, or over the prompt once more, takes long; so with 8 calls or more under way there, what a token
    of a verified answer took is compared with what a token of a written one took, at about the same number of
    calls under way (within a factor of 2). Pipelined verifications, whose times have their drafter's in them,
    are no part of the second.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._shares: dict[tuple[str, str], float] = {}
        self._skipped: dict[tuple[str, str], int] = {}
        # Milliseconds per token, by drafter ("": written without one), target and level of load.
        self._paces: dict[tuple[str, str, int], float] = {}
        # Drafts for a target, by level of load, since an answer was written there without one.
        self._unwritten: dict[tuple[str, int], int] = {}

    def reason_to_skip(self, drafter: str, target: str, depth: int) -> Skip | None:
        """Return why a target had better write its next answer without a drafter's draft; None: verify it.

        depth: calls under way at the target, the next one included.
        """
        if not self._enabled:
            return None
        pair = (drafter, target)
        if self._shares.get(pair, 0.0) >= _WORTHLESS:
            reason = Skip.WORTHLESS
        elif depth < _BUSY:
            return None
        else:
            place = (target, _level(depth))
            count = self._unwritten.get(place, 0)
            self._unwritten[place] = (count + 1) % _WRITE_EVERY
            if count == 0:
                return Skip.PROBE
            verified = self._paces.get((drafter, *place))
            written = self._paces.get(("", *place))
            if verified is None or written is None or verified < _WORTHLESS * written:
                return None
            reason = Skip.LOAD
        self._skipped[pair] = (self._skipped.get(pair, 0) + 1) % _PROBE_EVERY
        return reason if self._skipped[pair] else None

    def answered(self, answer: Answer, depth: int) -> None:
        """Learn from an answer. depth: calls under way at its stage as it began, itself included."""
        usage, target = answer.result.usage, answer.stage.name
        if answer.verification is not None:
            share = verify_cost(1.0, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens)
            _learn(self._shares, (answer.draft_stage, target), share)
        has_draft = answer.action is StageAction.VERIFY
        if depth < _BUSY or not answer.is_whole or has_draft != bool(answer.draft_stage):
            return
        if answer.is_pipelined:
            # Its time is its drafter's as well.
            return
        level = _level(depth)
        if not has_draft:
            self._unwritten[target, level] = 1
        timing = answer.result.timing
        # The token that ends an answer is one of those that it took.
        pace = (timing.total_ms - timing.queue_ms) / (usage.completion_tokens + 1)
        _learn(self._paces, (answer.draft_stage, target, level), pace)


def _level(depth: int) -> int:
    """Return one number for 8 to 15 calls under way, one for 16 to 31, and so on."""
    return depth.bit_length()


def _learn(means: dict[Key, float], key: Key, value: float) -> None:
    old = means.get(key, value)
    means[key] = old + _NEWEST * (value - old)
