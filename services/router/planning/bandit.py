"""A bandit that learns which of two arms answers faster under the present load. Pure.

With N requests in flight, throughput is N over the mean time of a request (Little's law). So the arm with the
shorter time per token also has the higher throughput. The arms cannot be measured side by side: a pass over
many tokens delays the answers that are being written beside it. So one arm holds for a window of requests.
The window starts to count when no request of the other arm is in flight.

The bandit has two arms whose rewards drift (upper confidence bounds: Auer, Cesa-Bianchi and Fischer 2002;
with forgetting: Garivier and Moulines 2011). It switches to the other arm when that one may be faster:

    own seconds per token > the other's seconds per token x exp(noise - doubt x windows since its last one)

Doubt grows with the windows since the other arm was last seen. The closer the other arm was, the sooner it is
tried. A trial of an arm that is slower by exp(g) costs g for about four windows, once per g / doubt windows.
That is 4 x doubt of the time, whatever g is. An arm that was never seen under a load has bounds instead. They
come from forecasts (`Took.otherwise_s`) and from other loads: more concurrent requests make none of them
faster, and fewer do not raise the throughput.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

# The load is averaged by its logarithm. The first constant is the newest request's weight in that mean. The
# second is how many doublings the mean must move before the level changes. Chosen: eight times the load is
# another level after four requests, and a load between two levels does not switch with every request.
_NEWEST_LOAD = 0.3
_ANOTHER_LEVEL = 0.75
# A window has as many requests as are in flight, and at least _LEAST_ENDED. It grows up to _MOST_TIMES as
# many until the standard error of its pace is at most _CLEAR. Chosen: the first windows decide within 40
# requests.
_LEAST_ENDED = 4
_MOST_TIMES = 4
_CLEAR = 0.1
# Weight of an arm's earlier windows beside a new one. They are dropped when both differ by more than noise
# explains: _CHANGED standard errors and a tenth. Chosen.
_KEPT = 0.7
_CHANGED = 3.0
# Logarithms. The other arm holds at once if it was faster by _NOISE. _DOUBT is subtracted for every window
# since it was seen. Chosen: windows of one arm differ by 3%, and trials take one per cent of the time.
_NOISE = 0.03
_DOUBT = 0.0025
# The doubt and its maximum while few windows of an arm were seen. The first windows, of stages that were
# idle, are off by this much. Measured in benchmarks/simulation.py.
_FIRST_DOUBT = 0.02
_MOST_FIRST_DOUBT = 0.1
# Logarithms. How far a forecast pace may be off with one request at a time, how much more with each doubling,
# and what is subtracted for every window. Measured in benchmarks/simulation.py: up to 1.1 times with one
# request, and 2 times with 64.
_FORETOLD = 0.1
_FORETOLD_LEVEL = 0.12
_FORETOLD_DOUBT = 0.01
# A trial ends early if its requests together, by the time they took so far, are slower by this factor.
# Chosen: requests of the other arm delay the first ones of a trial.
_MUCH_SLOWER = 1.25
# A window starts to count at the latest after this many times the in-flight requests were assigned in it.
# Chosen: an earlier request that waits for minutes must not delay it.
_LONGEST_SETTLING = 3.0


@dataclass(frozen=True, slots=True)
class Start:
    """The arm chosen for a request; to be given back when it ends. started: by the clock, in seconds.

    load: requests in flight per replica, as far as known. is_known: whether any request had ended, since only
    answers tell of other routers' calls. turn: how often the arm had changed. is_settled: whether no request
    of the other arm was in flight.
    """

    is_first: bool
    started: float
    load: float
    is_known: bool
    turn: int
    is_settled: bool


@dataclass(frozen=True, slots=True)
class Took:
    """Time and tokens of a request. tokens: 0 without an answer.

    otherwise_s: forecast of its time with the other arm; 0: none.
    """

    seconds: float
    tokens: int
    otherwise_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over requests: number, seconds, tokens, products; seconds and forecasts if there is a forecast."""

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
        """Return the lowest seconds per token that are plausible by a later window."""
        age = window - self.window
        first = min(_FIRST_DOUBT * age / self.windows, _MOST_FIRST_DOUBT + self.sums.noise)
        return self.sums.pace * math.exp(_NOISE - first - _DOUBT * age)


class Paces:
    """Chooses between a first arm, which holds until something is known, and a second one."""

    def __init__(self) -> None:
        # By arm and level. The level is the load's binary logarithm. A forecast has the window of the first
        # one.
        self._known: dict[tuple[bool, int], _Pace] = {}
        self._foretold: dict[tuple[bool, int], tuple[float, int]] = {}
        self._is_first = True
        self._level, self._load = 0, -1.0
        self._has_ended = False
        self._mean_tokens = 0.0
        # In-flight requests of the arm that holds, and of the other one; the sum of the former's starts.
        self._own = self._others = 0
        self._starts = 0.0
        self._turn = self._window = 0
        # Since the last window closed: requests assigned, most in flight, and what requests took: all of
        # them, and those that count.
        self._chosen = self._most = 0
        self._all, self._sums = _Sums(), _Sums()
        self._begin(is_trial=True)

    @property
    def is_trial(self) -> bool:
        """Whether the arm that holds is being tried, to see how long it takes."""
        return self._is_trial

    def choose(self, calls: int, replicas: int, now: float) -> Start:
        """Choose an arm for a request. calls: in flight over all replicas, the next one included."""
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
        """Count a request that has ended. counts: whether it shows how long its arm takes."""
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
        """Return whether a trial is running whose result will be compared with the other arm's.

        It keeps the other arm's level: a slower arm has more requests in flight at its target.
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
        """Have an arm hold from now on."""
        if is_first != self._is_first:
            self._is_first = is_first
            self._others, self._own, self._starts = self._others + self._own, 0, 0.0
            self._turn += 1
        self._begin(is_trial=(is_first, self._level) not in self._known)

    def _faster(self) -> bool:
        """Return the arm that is known to be faster at the present level; else the one that holds."""
        own, other = (self._known.get((arm, self._level)) for arm in (self._is_first, not self._is_first))
        is_slower = own is not None and other is not None and other.sums.pace < own.sums.pace
        return self._is_first != is_slower

    def _at_best(self, is_first: bool) -> float:
        """Return a lower bound of an arm's seconds per token at the present level; 0: nothing is known."""
        known = self._known.get((is_first, self._level))
        if known is not None:
            return known.doubted(self._window)
        bounds = [
            (level, pace.doubted(self._window))
            for (arm, level), pace in self._known.items()
            if arm == is_first
        ]
        # Earlier forecasts that were too high correct the others.
        seen = [
            self._known[arm, level].sums.pace / pace
            for (arm, level), (pace, _) in self._foretold.items()
            if (arm, level) in self._known and arm == is_first
        ]
        error = min([1.0, *seen])
        for (arm, level), (pace, since) in self._foretold.items():
            if arm == is_first:
                doubt = _FORETOLD + _FORETOLD_LEVEL * level + _FORETOLD_DOUBT * (self._window - since)
                bounds.append((level, error * pace * math.exp(-doubt)))
        return max((pace * 2.0 ** min(self._level - level, 0) for level, pace in bounds), default=0.0)

    def _give_up(self, now: float) -> None:
        """End a trial early if its requests are much slower than the other arm's, by their time so far."""
        other = self._known.get((not self._is_first, self._level))
        if not self._is_trial or other is None:
            return
        seconds = self._all.seconds + self._own * now - self._starts
        tokens = self._all.tokens + self._own * self._mean_tokens
        if seconds > _MUCH_SLOWER * other.sums.pace * tokens > 0.0:
            # The requests count as if all were alike: they are known to be slow, not by how much they differ.
            count = self._all.ended + self._own
            self._close(
                _Sums(count, seconds, tokens, seconds**2 / count, seconds * tokens / count, tokens**2 / count)
            )

    def _close(self, sums: _Sums) -> None:
        """Record a window, and choose the next one's arm."""
        own, other = (self._is_first, self._level), (not self._is_first, self._level)
        windows, known = 1, self._known.get(own)
        if known is not None and 0.0 < sums.pace < math.inf and 0.0 < known.sums.pace < math.inf:
            noise = math.hypot(sums.noise, known.sums.noise)
            if abs(math.log(sums.pace / known.sums.pace)) < _CHANGED * min(noise, 0.5) + 0.1:
                windows, sums = known.windows + 1, sums.plus(known.sums, _KEPT)
        self._known[own] = _Pace(sums, self._window, windows)
        if sums.compared_s:
            # Keep the longest forecast: short calls of a target that is hardly busy give too short a pass.
            longest, since = self._foretold.get(other, (0.0, self._window))
            self._foretold[other] = max(longest, sums.pace * sums.otherwise_s / sums.compared_s), since
        was_trial = self._is_trial and other in self._known
        at_best = self._known[other].sums.pace if was_trial else self._at_best(not self._is_first)
        if at_best < sums.pace:
            self._turn_to(not self._is_first)
            self._is_trial = not was_trial
        else:
            self._begin(is_trial=False)
