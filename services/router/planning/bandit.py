"""Which of two ways of answering is faster under the present load, learnt from what requests take. Pure.

With N requests under way, N over the mean time of a request is the throughput (Little's law), so the way with
the shorter time per token is the better one, for the throughput as well. Both ways cannot be seen at the same
time: a pass over many tokens holds up the answers that are being written beside it. So one way holds for a
window of requests, and counts from when no request of the other way is under way any more.

This is a bandit with two arms whose rewards drift (upper confidence bounds: Auer, Cesa-Bianchi and Fischer
2002; with forgetting: Garivier and Moulines 2011). The way that holds gives way to the other one where that
may be faster:

    own seconds per token > seconds per token of the other x exp(noise - doubt x windows since it was seen)

Doubt grows with the windows that the other way was not seen for, so that it is tried the sooner the closer it
was. A trial of a way that is slower by exp(g) costs g for some four windows, and comes every g / doubt of
them: 4 x doubt of the time, whatever g is. A way that was never seen under a load has bounds instead: what
the requests of the way that holds foretell (`Took.otherwise_s`), and what is known of other loads. More
requests at a time make none of them faster, and fewer of them answer no more in all.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

# Weight of the newest request in the mean of how many are under way, by their logarithm; and how many
# doublings that mean is from a level where another one holds. Chosen: eight times the load is another level
# after four requests, and a load between two levels does not change them with every request.
_NEWEST_LOAD = 0.3
_ANOTHER_LEVEL = 0.75
# Requests of a window: as many as are under way, so many at least; up to four times as many, until the
# standard error of their pace is below a tenth. Chosen: the first windows decide within some 40 requests.
_LEAST_ENDED = 4
_MOST_TIMES = 4
_CLEAR = 0.1
# What earlier windows of a way weigh beside a new one; nothing where the two differ by more than noise
# explains, in standard errors and by a tenth. Chosen.
_KEPT = 0.7
_CHANGED = 3.0
# By how much the other way was faster, as a logarithm, for it to hold at once; and what is taken off for
# every window since. Chosen: windows of one way differ by 3%, and trials take one per cent of the time.
_NOISE = 0.03
_DOUBT = 0.0025
# The same at first, while few windows were seen of it, up to a most: the first ones, of stages that were
# idle, are off by as much. Measured in benchmarks/simulation.py.
_FIRST_DOUBT = 0.02
_MOST_FIRST_DOUBT = 0.1
# How far a foretold pace may be off, with one request at a time, and more with each doubling; and what is
# taken off for every window. Measured in benchmarks/simulation.py: up to 1.1 times with one, and 2 times with
# 64.
_FORETOLD = 0.1
_FORETOLD_LEVEL = 0.12
_FORETOLD_DOUBT = 0.01
# A trial ends early where all of its requests, by what they have taken so far, are slower by this factor.
# Chosen: what was chosen before it holds up the first of them.
_MUCH_SLOWER = 1.25
# A window counts from when so many times as many requests as are under way were chosen for in it, whatever
# became of those before it. Chosen: one that waits for minutes must not hold it up.
_LONGEST_SETTLING = 3.0


@dataclass(frozen=True, slots=True)
class Start:
    """Which way was chosen for a request; to be given back when it ends. started: by the clock, in seconds.

    load: requests under way per replica, as far as known. is_known: whether any request had ended, so that
    calls of others had been heard of. turn: how often the way had turned. is_settled: whether none of another
    way was under way.
    """

    is_first: bool
    started: float
    load: float
    is_known: bool
    turn: int
    is_settled: bool


@dataclass(frozen=True, slots=True)
class Took:
    """What a request took. tokens: 0 without an answer. otherwise_s: foretold of the other way, or 0."""

    seconds: float
    tokens: int
    otherwise_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of requests: number, seconds, tokens, their products; seconds and forecasts of those that have one."""

    ended: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    seconds_squared: float = 0.0
    seconds_tokens: float = 0.0
    tokens_squared: float = 0.0
    compared_s: float = 0.0
    otherwise_s: float = 0.0

    @classmethod
    def of(cls, took: Took) -> _Sums:
        s, t = took.seconds, took.tokens
        return cls(1.0, s, t, s * s, s * t, t * t, s if took.otherwise_s else 0.0, took.otherwise_s)

    def plus(self, other: _Sums, weight: float = 1.0) -> _Sums:
        """Return the sums of both."""
        return _Sums(*(a + weight * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def pace(self) -> float:
        """Seconds per token."""
        return self.seconds / self.tokens if self.tokens else math.inf

    @property
    def noise(self) -> float:
        """The standard error of the pace, as a share of it; 1 where it is not known."""
        if not (self.tokens and self.seconds) or self.ended < 2.0:
            return 1.0
        spread = (
            self.seconds_squared - 2 * self.pace * self.seconds_tokens + self.pace**2 * self.tokens_squared
        )
        return math.sqrt(max(spread, 0.0) * self.ended / (self.ended - 1.0)) / self.seconds


@dataclass(frozen=True, slots=True)
class _Pace:
    """Seconds per token, and the window that showed them last. windows: how many have."""

    sums: _Sums
    window: int
    windows: int

    def doubted(self, window: int) -> float:
        """Return the seconds per token that there may be by a later window."""
        age = window - self.window
        first = min(_FIRST_DOUBT * age / self.windows, _MOST_FIRST_DOUBT + self.sums.noise)
        return self.sums.pace * math.exp(_NOISE - first - _DOUBT * age)


class Paces:
    """Chooses between a first way, which holds until something is known, and a second one."""

    def __init__(self) -> None:
        # By way and level, which is the load's binary logarithm. Foretold: with the window of the first
        # forecast.
        self._known: dict[tuple[bool, int], _Pace] = {}
        self._foretold: dict[tuple[bool, int], tuple[float, int]] = {}
        self._is_first = True
        self._level, self._load = 0, -1.0
        self._has_ended = False
        self._mean_tokens = 0.0
        # Requests under way that were chosen since the way turned, with the sum of their starts; and before.
        self._own = self._others = 0
        self._starts = 0.0
        self._turn = self._window = 0
        # Since the last window closed: chosen, most under way, and what they took: all of them, and what
        # counts.
        self._chosen = self._most = 0
        self._all, self._sums = _Sums(), _Sums()
        self._begin(is_trial=True)

    @property
    def is_trial(self) -> bool:
        """Whether the way that holds does so to see how long it takes."""
        return self._is_trial

    def choose(self, calls: int, replicas: int, now: float) -> Start:
        """Choose for a request. calls: under way over all replicas, the next one included."""
        load = max(calls, self._own + self._others + 1) / replicas
        level = math.log2(max(load, 1.0))
        self._load += (_NEWEST_LOAD if self._load >= 0.0 else 1.0) * (level - self._load)
        if abs(self._load - self._level) > _ANOTHER_LEVEL and not self._is_compared():
            self._level = round(self._load)
            self._turn_to(self._faster())
        self._give_up(now)
        self._own += 1
        self._starts += now
        self._chosen += 1
        self._most = max(self._most, self._own + self._others)
        is_settled = not self._others or self._chosen > _LONGEST_SETTLING * (self._own + self._others)
        return Start(self._is_first, now, load, self._has_ended, self._turn, is_settled)

    def ended(self, start: Start, now: float, took: Took, *, counts: bool) -> None:
        """Count a request that has ended. counts: whether it shows how long its way takes."""
        self._has_ended = True
        if start.turn < self._turn:
            self._others -= 1
            return
        self._own -= 1
        self._starts -= start.started
        if not counts:
            return
        if took.tokens:
            self._mean_tokens += (0.1 if self._mean_tokens else 1.0) * (took.tokens - self._mean_tokens)
        one = _Sums.of(took)
        self._all = self._all.plus(one)
        is_of_level = abs(math.log2(max(start.load, 1.0)) - self._level) <= 1.0
        if start.is_settled and (is_of_level or not start.is_known or self._is_compared()):
            self._sums = self._sums.plus(one)
        least = max(_LEAST_ENDED, self._most)
        if self._sums.ended >= (least if self._sums.noise <= _CLEAR else _MOST_TIMES * least):
            self._close(self._sums)
        else:
            self._give_up(now)

    def _is_compared(self) -> bool:
        """Return whether a trial is under way that is to be compared with what is known of the other way.

        It is at the load that the other way had: a slower way has more requests under way at its target.
        """
        is_known = (not self._is_first, self._level) in self._known
        return (
            self._is_trial and is_known and self._chosen <= _LONGEST_SETTLING * (self._own + self._others + 1)
        )

    def _begin(self, *, is_trial: bool) -> None:
        """Begin a window."""
        self._is_trial = is_trial
        self._window += 1
        self._chosen = self._most = 0
        self._all = self._sums = _Sums()

    def _turn_to(self, is_first: bool) -> None:
        """Have a way hold from now on."""
        if is_first != self._is_first:
            self._is_first = is_first
            self._others, self._own, self._starts = self._others + self._own, 0, 0.0
            self._turn += 1
        self._begin(is_trial=(is_first, self._level) not in self._known)

    def _faster(self) -> bool:
        """Return the way that is known to be faster at the present level; else the one that holds."""
        own, other = (self._known.get((way, self._level)) for way in (self._is_first, not self._is_first))
        is_slower = own is not None and other is not None and other.sums.pace < own.sums.pace
        return self._is_first != is_slower

    def _at_best(self, is_first: bool) -> float:
        """Return the seconds per token that a way takes at least at the present level, as far as is known."""
        known = self._known.get((is_first, self._level))
        if known is not None:
            return known.doubted(self._window)
        bounds = [
            (level, pace.doubted(self._window))
            for (way, level), pace in self._known.items()
            if way == is_first
        ]
        # Forecasts are corrected by what was seen where one had been made.
        seen = [
            self._known[arm].sums.pace / pace
            for arm, (pace, _) in self._foretold.items()
            if arm in self._known and arm[0] == is_first
        ]
        error = min([1.0, *seen])
        for (way, level), (pace, since) in self._foretold.items():
            if way == is_first:
                doubt = _FORETOLD + _FORETOLD_LEVEL * level + _FORETOLD_DOUBT * (self._window - since)
                bounds.append((level, error * pace * math.exp(-doubt)))
        return max((pace * 2.0 ** min(self._level - level, 0) for level, pace in bounds), default=0.0)

    def _give_up(self, now: float) -> None:
        """End a trial of what is much slower, by what its requests have taken so far."""
        other = self._known.get((not self._is_first, self._level))
        if not self._is_trial or other is None:
            return
        seconds = self._all.seconds + self._own * now - self._starts
        tokens = self._all.tokens + self._own * self._mean_tokens
        if seconds > _MUCH_SLOWER * other.sums.pace * tokens > 0.0:
            # As if all were alike: what is known is that they are slow, not by how much they differ.
            count = self._all.ended + self._own
            self._close(
                _Sums(count, seconds, tokens, seconds**2 / count, seconds * tokens / count, tokens**2 / count)
            )

    def _close(self, sums: _Sums) -> None:
        """Take a window, and choose the way of the next one."""
        own, other = (self._is_first, self._level), (not self._is_first, self._level)
        windows, known = 1, self._known.get(own)
        if known is not None and 0.0 < sums.pace < math.inf and 0.0 < known.sums.pace < math.inf:
            noise = math.hypot(sums.noise, known.sums.noise)
            if abs(math.log(sums.pace / known.sums.pace)) < _CHANGED * min(noise, 0.5) + 0.1:
                windows, sums = known.windows + 1, sums.plus(known.sums, _KEPT)
        self._known[own] = _Pace(sums, self._window, windows)
        if sums.compared_s:
            # The longest one: from short calls of a target that is hardly busy, too short a pass would
            # follow.
            longest, since = self._foretold.get(other, (0.0, self._window))
            self._foretold[other] = max(longest, sums.pace * sums.otherwise_s / sums.compared_s), since
        was_trial = self._is_trial and other in self._known
        at_best = self._known[other].sums.pace if was_trial else self._at_best(not self._is_first)
        if at_best < sums.pace:
            self._turn_to(not self._is_first)
            self._is_trial = not was_trial
        else:
            self._begin(is_trial=False)
