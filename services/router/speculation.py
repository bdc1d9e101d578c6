"""Whether drafts are worth verifying: how much work and time they saved of late. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
# Requests under way per replica from which on times are compared as well. Chosen: with fewer, what a pass
# takes hardly depends on how many tokens it scores, and counting passes says enough.
BUSY = 8
# Weight of the newest request in the mean of how many are under way. Chosen: some ten carry nine tenths.
_NEWEST_LOAD = 0.2
# Requests of a window at least, and of a trial that shows the other way to be slower by the factor. Chosen:
# fewer say little where their lengths differ.
_LEAST_ENDED = 16
_LEAST_TRIED = 8
_CLEARLY_SLOWER = 1.5
# Windows of the better way before the other one is tried again: at first, and at most, doubling while it
# stays the better one, and more by as much as it is better, up to the factor. Chosen: a trial takes the time
# of some three windows of its own way, five per cent of the most.
_FIRST_WINDOWS = 16
_MOST_WINDOWS = 64
_MOST_RATIO = 3.0
# How much slower than the other way was last the held one must be for a trial before its time. Chosen: what
# two windows of the same way differ by.
_SLOWER = 1.1
# Requests under way that differ by more than this factor are another load, where nothing is known yet.
# Chosen.
_SAME_LOAD = 2.0
# A window counts from when so many times as many requests as are under way were chosen for in it, whatever
# became of those before it. Chosen: one that waits for minutes must not hold it up.
_LONGEST_SETTLING = 3.0


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
    """Whether a target verifies a draft: why not, or None. To be given back, once, when its request ends.

    started: by the clock. window: of the target's, 0 where none is kept. counts: whether it shows how long
    that takes.
    """

    reason: Skip | None = None
    target: str = ""
    started: float = 0.0
    window: int = 0
    counts: bool = False


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

    def choose(self, drafter: str, target: str, calls: int, replicas: int = 1) -> Choice:
        """Choose whether a target verifies a drafter's draft or writes its next answer without.

        calls: under way at the target, over its replicas, the next one and those of other routers included.
        replicas: how many it has.
        """
        if not self._enabled:
            return Choice()
        pair = self._pairs.get((drafter, target))
        if pair is not None and pair.is_worthless():
            return Choice(Skip.WORTHLESS)
        return self._trials.setdefault(target, _Trials(target)).choose(calls, replicas, self._clock())

    def answered(self, answer: Answer, choice: Choice | None = None) -> None:
        """Learn from an answer. choice: what was chosen for it, if anything was; its request has ended."""
        usage = answer.result.usage
        if answer.verification is not None:
            share = verify_cost(1.0, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens)
            self._pairs.setdefault((answer.draft_stage, answer.stage.name), _Pair()).learn(share)
        if choice is None:
            return
        if not answer.is_whole or (choice.reason is None) != (answer.action is StageAction.VERIFY):
            self.ended(replace(choice, counts=False))
            return
        # The stages of a pipeline start together, and an earlier one's answer is only heard of at the end.
        seconds = answer.latency_ms / 1000.0 if answer.is_pipelined else self._clock() - choice.started
        # One for the end, which is a token too where the answer was not cut.
        self._end(choice, seconds, usage.completion_tokens + 1)

    def ended(self, choice: Choice) -> None:
        """A request has ended without an answer of the target: that took its time and gave nothing."""
        self._end(choice, self._clock() - choice.started, 0)

    def _end(self, choice: Choice, seconds: float, tokens: int) -> None:
        if choice.window:
            self._trials[choice.target].ended(choice, seconds, tokens)


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
    """Seconds per token of a window, and the requests that were under way."""

    seconds: float
    load: float

    def is_of(self, load: float) -> bool:
        """Return whether the load was about this."""
        return load / _SAME_LOAD <= self.load <= load * _SAME_LOAD


class _Trials:
    """Which of two ways gives answers sooner at a busy target: verifying drafts, or writing without them.

    Both cannot be seen at the same time: a pass over many tokens holds up the answers that are being written
    beside it, and is itself soon done. So a way holds for a window of requests: at first one of each, then
    the better one with the other tried again now and then. Compared is the time per token from the choice to
    the end of the answer, the drafting of chains included: with as many requests under way, that is the
    throughput. What was chosen while requests of the other way were under way does not count. All drafters of
    a target share its windows, and so do chains and escalations.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._paces: dict[bool, _Pace] = {}
        self._verifies = True
        # Windows of the better way that are left; 0 while the other one is tried.
        self._left = 1
        self._interval = _FIRST_WINDOWS
        self._load = 0.0
        # Requests under way: of the window that holds, and of those before it that went the other way.
        self._own = self._others = 0
        # The window that holds, and the last one that went the other way.
        self._window = self._turned = 0
        self._open(has_turned=False)

    def choose(self, calls: int, replicas: int, now: float) -> Choice:
        """Choose by the window that holds. calls, replicas: as in Speculation.choose."""
        load = max(calls, self._own + self._others + 1)
        self._load += (_NEWEST_LOAD if self._load else 1.0) * (load - self._load)
        self._own += 1
        self._chosen += 1
        is_settled = not self._others or self._chosen > _LONGEST_SETTLING * self._load
        if load < BUSY * replicas:
            # Nothing is to be saved by leaving it out, and nothing is learnt about a busy target.
            return Choice(None, self._target, now, self._window)
        reason = None if self._verifies else Skip.LOAD if self._left else Skip.PROBE
        return Choice(reason, self._target, now, self._window, is_settled)

    def ended(self, choice: Choice, seconds: float, tokens: int) -> None:
        """Count a request that has ended. tokens: 0 without an answer."""
        if choice.window <= self._turned:
            self._others -= 1
            return
        self._own -= 1
        if not choice.counts:
            return
        self._seconds += seconds
        self._tokens += tokens
        self._ended += 1
        if self._ended >= max(_LEAST_ENDED, self._load) or self._has_failed():
            self._close()

    def _pace(self) -> _Pace:
        return _Pace(self._seconds / self._tokens if self._tokens else math.inf, self._load)

    def _known(self, verifies: bool) -> _Pace | None:
        """Return the pace of a way under the present load; None where it is not known."""
        pace = self._paces.get(verifies)
        return pace if pace is not None and pace.is_of(self._load) else None

    def _has_failed(self) -> bool:
        """Return whether a trial can be ended early: the way that is tried is much slower."""
        other = self._known(not self._verifies)
        if self._left or other is None or self._ended < _LEAST_TRIED:
            return False
        return self._pace().seconds > _CLEARLY_SLOWER * other.seconds

    def _open(self, *, has_turned: bool) -> None:
        """Open a window. has_turned: it goes the other way than the one before it."""
        if has_turned:
            # Whatever is under way went another way, or is of the window that did.
            self._others, self._own = self._others + self._own, 0
            self._turned = self._window
        self._window += 1
        self._chosen = self._ended = self._tokens = 0
        self._seconds = 0.0

    def _close(self) -> None:
        """Take a window's pace, and choose the way of the next one."""
        own, held = self._pace(), self._verifies
        self._paces[held] = own
        other = self._known(not held)
        if other is None:
            # Nothing is known of the other way under this load.
            self._verifies, self._left, self._interval = not held, 0, _FIRST_WINDOWS // 2
        elif self._left == 0:
            is_better = own.seconds < other.seconds
            self._interval = _FIRST_WINDOWS if is_better else min(2 * self._interval, _MOST_WINDOWS)
            faster, slower = sorted((own.seconds, other.seconds))
            is_far = slower >= _MOST_RATIO * faster
            self._left = int(self._interval * (_MOST_RATIO if is_far else slower / faster))
            self._verifies = held if is_better else not held
        else:
            self._left -= 1
            if self._left == 0 or own.seconds > _SLOWER * other.seconds:
                self._left, self._verifies = 0, not held
        self._open(has_turned=self._verifies != held)
