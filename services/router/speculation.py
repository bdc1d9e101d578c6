"""Whether drafts are worth verifying: how much work and time they saved of late. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from services.common.cost import verify_cost
from services.router.domain import StageAction

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.domain import Answer

# What a verification takes, as a share of writing anew, from which on drafts are not verified. Chosen: below
# 1, since the drafting itself takes time too.
_WORTHLESS = 0.9
# Weight of the newest verification in the mean of that, and their number from which on it says something.
# Chosen: some forty carry nine tenths, so that a few bad drafts in a row do not turn it; while drafts are
# worthless few are verified, and some seven do.
_NEWEST = 0.05
_NEWEST_WORTHLESS = 0.3
_LEAST_VERIFIED = 8
# While drafts are worthless, one in so many is verified all the same, to see whether that changed; each time
# that it has not, twice as many are left out, up to the most. Chosen: at ten per cent more per attempt, they
# cost one per cent at first.
_PROBE_EVERY = 16
_PROBE_EVERY_AT_MOST = 128
# Calls under way at a target from which on times are compared as well. Chosen: with fewer, what a pass takes
# hardly depends on how many tokens it scores, and counting passes says enough.
BUSY = 8
# Weight of the newest call in the mean of how many are under way. As above, some ten.
_NEWEST_DEPTH = 0.2
# Answers of a window at least, and of a trial that shows the other way to be slower by the factor. Chosen:
# fewer say little where their lengths differ.
_LEAST_ANSWERS = 16
_LEAST_TRIED = 8
_CLEARLY_SLOWER = 1.5
# Windows of the better way before the other one is tried again: at first, and at most, doubling while it
# stays the better one, and more by as much as it is better. Chosen: a trial takes the time of some three
# windows of its own way, four per cent of the most.
_FIRST_WINDOWS = 16
_MOST_WINDOWS = 64
# Calls under way that differ by more than this factor are another load: what was learnt is learnt again.
# Chosen: leaving drafts out moves requests from the drafter to the target, which must not count as one.
_SAME_LOAD = 4.0


class Skip(Enum):
    """Why a draft is left out."""

    # Verifying it would take as many passes as writing anew.
    WORTHLESS = "worthless"
    # Verifying drafts takes longer than writing anew, under a load like the present one.
    LOAD = "load"
    # To see how long writing takes under the present load.
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


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether a target verifies a draft: why not, or None; and what to give back with its answer.

    started: by the clock. window: of the target's, 0 where no times are compared.
    """

    reason: Skip | None = None
    started: float = 0.0
    window: int = 0


class Speculation:
    """Means over recent answers. enabled: False, and every draft is verified. clock: monotonic seconds.

    Two rules. By passes: where verifications of a pair of stages took about as many as writing anew, its
    drafts save nothing whatever the load. By time: a busy target is bound by its arithmetic, and a pass over
    a draft, or over the prompt once more, takes long; see `_Trials`.
    """

    def __init__(self, clock: Callable[[], float], *, enabled: bool = True) -> None:
        self._clock = clock
        self._enabled = enabled
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._trials: dict[str, _Trials] = {}

    def choose(self, drafter: str, target: str, depth: int) -> Choice:
        """Choose whether a target verifies a drafter's draft or writes its next answer without.

        depth: calls under way at the target, the next one included.
        """
        if not self._enabled:
            return Choice()
        pair = self._pairs.get((drafter, target))
        if pair is not None and pair.is_worthless():
            return Choice(Skip.WORTHLESS)
        if depth < BUSY and target not in self._trials:
            return Choice()
        return self._trials.setdefault(target, _Trials()).choose(depth, self._clock())

    def answered(self, answer: Answer, choice: Choice | None = None) -> None:
        """Learn from an answer. choice: what was chosen for it, if anything was."""
        usage, target = answer.result.usage, answer.stage.name
        if answer.verification is not None:
            share = verify_cost(1.0, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens)
            self._pairs.setdefault((answer.draft_stage, target), _Pair()).learn(share)
        if choice is None or not choice.window or not answer.is_whole:
            return
        if (choice.reason is None) == (answer.action is StageAction.VERIFY):
            # The token that ends an answer is one of those that it took.
            tokens = usage.completion_tokens + 1
            self._trials[target].answered(choice, self._clock() - choice.started, tokens)


class _Pair:
    """What the drafts of one stage are worth to another."""

    def __init__(self) -> None:
        # Mean of the passes that verifications took, as a share of writing anew.
        self._share = 0.0
        self._verified = 0
        self._is_worthless = False
        self._left_out = 0
        self._every = _PROBE_EVERY

    def learn(self, share: float) -> None:
        """Learn from a verification."""
        # More than writing anew says no more: it would only take longer to forget.
        share = min(share, 1.0)
        if share < _WORTHLESS:
            self._every = _PROBE_EVERY
        self._verified += 1
        weight = max(_NEWEST_WORTHLESS if self._is_worthless else _NEWEST, 1.0 / self._verified)
        self._share += weight * (share - self._share)
        self._is_worthless = self._share >= _WORTHLESS and self._verified >= _LEAST_VERIFIED

    def is_worthless(self) -> bool:
        """Return whether the next draft is to be left out."""
        if not self._is_worthless:
            return False
        self._left_out += 1
        if self._left_out < self._every:
            return True
        self._left_out = 0
        self._every = min(2 * self._every, _PROBE_EVERY_AT_MOST)
        return False


@dataclass(frozen=True, slots=True)
class _Pace:
    """Seconds per token of a window, and the calls that were under way."""

    seconds: float
    depth: float

    def is_of(self, depth: float) -> bool:
        """Return whether the load was about this."""
        return depth / _SAME_LOAD <= self.depth <= depth * _SAME_LOAD


class _Trials:
    """Which of two ways gives answers sooner at a busy target: verifying drafts, or writing without them.

    Both cannot be seen at the same time: a pass over many tokens holds up the answers that are being written
    beside it, and is itself soon done. So a way holds for a window of answers, at first one of each, then the
    better one with the other tried again now and then. Compared is the time per token from the choice on, the
    drafting of chains included: with as many requests under way, that is the throughput. Answers chosen while
    those of the window before are still under way do not count.
    """

    def __init__(self) -> None:
        self._paces: dict[bool, _Pace] = {}
        self._verifies = True
        # Windows of the better way that are left; 0 while the other one is tried.
        self._left = 1
        self._interval = _FIRST_WINDOWS
        self._window = 0
        self._depth = 0.0

    def choose(self, depth: int, now: float) -> Choice:
        """Choose by the window that holds."""
        if not self._window:
            self._open(depth)
        self._depth += _NEWEST_DEPTH * (depth - self._depth)
        if not self._verifies and depth < BUSY:
            # Nothing is to be saved by leaving it out, and nothing is learnt about a busy target.
            return Choice()
        counts = self._settling <= 0
        self._settling -= 1
        reason = None if self._verifies else Skip.LOAD if self._left else Skip.PROBE
        return Choice(reason, now, self._window if counts else 0)

    def answered(self, choice: Choice, seconds: float, tokens: int) -> None:
        """Count an answer that was chosen in the window that holds."""
        if choice.window != self._window:
            return
        self._seconds += seconds
        self._tokens += tokens
        self._answers += 1
        if self._answers >= max(_LEAST_ANSWERS, self._depth) or self._has_failed():
            self._close()

    def _has_failed(self) -> bool:
        """Return whether a trial can be ended early: the way that is tried is much slower."""
        other = self._paces.get(not self._verifies)
        if self._left or other is None or self._answers < _LEAST_TRIED:
            return False
        return self._seconds / self._tokens > _CLEARLY_SLOWER * other.seconds

    def _open(self, settling: float) -> None:
        """Open a window. settling: choices that do not count at first."""
        self._window += 1
        self._settling = settling
        self._seconds, self._tokens, self._answers = 0.0, 0, 0
        self._depth = self._depth or settling

    def _close(self) -> None:
        """Take a window's pace, and choose the way of the next one."""
        own, held = _Pace(self._seconds / self._tokens, self._depth), self._verifies
        self._paces[held] = own
        other = self._paces.get(not held)
        if other is None or not other.is_of(self._depth):
            # Nothing is known of the other way under this load.
            self._verifies, self._left, self._interval = not held, 0, _FIRST_WINDOWS // 2
        elif self._left == 0:
            is_better = own.seconds < other.seconds
            self._interval = _FIRST_WINDOWS if is_better else min(2 * self._interval, _MOST_WINDOWS)
            ratio = max(own.seconds / other.seconds, other.seconds / own.seconds)
            self._left = int(self._interval * ratio)
            self._verifies = held if is_better else not held
        else:
            self._left -= 1
            if self._left == 0:
                self._verifies = not held
        self._open(0.0 if self._verifies == held else self._depth)
