"""How busy the stages are, as far as this router knows. Pure."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from services.router.domain import OpenCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.router.domain import PeerLoad

# Weight of the newest measurement in a mean. Chosen: the last ten calls carry nine tenths of it.
NEWEST = 0.2
# Half-life of other routers' load: the mean wait that they cause, and their calls. Chosen: plans avoid a
# stage with a queue, and without a half-life would never learn that it is idle again.
HALF_LIFE_S = 5.0
# Assumed number of calls that a stage computes at a time, before it was measured. Chosen: the onnx engine's
# default. Calls beyond it that do not wait show that it is more.
FIRST_CAPACITY = 8.0
# A wait of at least this share of a call's computing time shows that the stage was full. Chosen: a call that
# waits for the current pass alone waits less.
FULL = 0.25
# Weight of the newest measurement in the mean deviation of a call's time. RFC 6298, section 2, has the same
# for the round-trip times of a connection.
NEWEST_DEVIATION = 0.25
# Few calls take longer than this many deviations above the mean. Chosen: half of that RFC's, since answers
# vary more than connections, and a request in doubt is better tried than refused.
DEVIATIONS = 2.0
# Least weight of the policy's newest answer in the shares. Chosen: the last forty carry nine tenths.
NEWEST_CHOICE = 0.05


class Question(StrEnum):
    """The policy's two questions. Each has its own distribution of answers over the stages."""

    PLAN = "plan"
    DECIDE = "decide"


class Load:
    """Calls in flight at each stage, and the expected wait there. clock: monotonic seconds.

    The expected wait is the larger of two estimates. The queue of this router's own calls is known at once:
    calls beyond the stage's capacity wait, at the rate at which the stage finishes calls. Capacity and rate
    are learned. Waits of finished calls beyond that come from other routers. Their mean is late, and fades.
    It leaves out waits in this router's own queue, or a burst would count after it has passed.
    """

    def __init__(self, stage_count: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        # The numbers of the calls in flight, ascending.
        self._under_way: list[list[int]] = [[] for _ in range(stage_count)]
        self._begun = 0
        self._others_ms = [0.0] * stage_count
        self._measured = [0.0] * stage_count
        # When the stage last sent part of an answer.
        self._sent = [0.0] * stage_count
        self._service_ms = [0.0] * stage_count
        self._deviation_ms = [0.0] * stage_count
        self._capacity = [FIRST_CAPACITY] * stage_count
        # Whether a call has waited in this router's own queue.
        self._has_shown = [False] * stage_count
        # By the replica's address.
        self._others: list[dict[str, PeerLoad]] = [{} for _ in range(stage_count)]
        self._replicas = [1] * stage_count
        self._asking = dict.fromkeys(Question, 0)
        self._choices = dict.fromkeys(Question, 0)
        self._shares = {question: [0.0] * stage_count for question in Question}

    @contextmanager
    def calling(self, stage: int) -> Iterator[OpenCall]:
        """Count the block as a call in flight at a stage."""
        line, expected_ms = self._under_way[stage], self.expected_queue_ms(stage)
        self._begun += 1
        line.append(self._begun)
        call = OpenCall(stage, self._begun, len(line), self._clock(), expected_ms)
        try:
            yield call
        finally:
            del line[bisect_left(line, call.number)]

    @contextmanager
    def asking(self, question: Question) -> Iterator[None]:
        """Count the block as a request that will be a call once the policy has named a stage.

        Until then, the request counts at every stage by the stage's share of recent answers. Otherwise
        simultaneous requests would all be planned for the same short queue.
        """
        self._asking[question] += 1
        try:
            yield
        finally:
            self._asking[question] -= 1

    def chosen(self, question: Question, stage: int | None) -> None:
        """Count the policy's answer to a question. stage: the one to call; None: it named none."""
        self._choices[question] += 1
        weight = max(NEWEST_CHOICE, 1.0 / self._choices[question])
        shares = self._shares[question]
        for each, share in enumerate(shares):
            shares[each] = share + weight * ((each == stage) - share)

    def answered(self, stage: int, depth: int, queue_ms: float, service_ms: float) -> None:
        """Learn from the times of an answered call, by the stage's clock.

        service_ms: 0 if it is not known. depth: this router's calls in flight at the stage when the call
        began, itself included. By Little's law, depth * service / (queue + service) of them were being
        computed. If the call had to wait, that is the stage's capacity, or this router's part of it. If it
        did not wait, the capacity is at least that.
        """
        old, own_ms = self._faded_ms(stage), self._behind_ms(stage, depth)
        self._others_ms[stage] = old + NEWEST * (max(queue_ms - own_ms, 0.0) - old)
        self._measured[stage] = self._clock()
        if service_ms <= 0.0:
            return
        self._took(stage, service_ms)
        mean_ms = self._service_ms[stage]
        computed, capacity = depth * mean_ms / (queue_ms + mean_ms), self._capacity[stage]
        has_waited = queue_ms >= FULL * mean_ms
        if not self._has_shown[stage] and computed > capacity:
            # The stage computed this many, and may be able to compute more.
            self._capacity[stage] = computed
            self._has_shown[stage] = has_waited
        elif has_waited or computed > capacity:
            # If the call was within the known capacity, other routers may have caused its wait.
            self._has_shown[stage] = self._has_shown[stage] or depth > capacity
            # At least 1: other routers' calls are not in this router's queue, and the mean fades.
            self._capacity[stage] = max(capacity + NEWEST * (computed - capacity), 1.0)

    def ran_out(self, call: OpenCall) -> None:
        """Learn from a call that ran out of time while the stage was answering: it takes at least that long.

        Otherwise a stage that is too slow for every caller would never count as slow.
        """
        taken_ms = (self._clock() - call.began) * 1000.0 - call.expected_ms
        if taken_ms > self._service_ms[call.stage] > 0.0:
            self._took(call.stage, taken_ms)

    def _took(self, stage: int, service_ms: float) -> None:
        """Learn how long the stage computed a call."""
        known_ms = self._service_ms[stage]
        if not known_ms:
            self._service_ms[stage], self._deviation_ms[stage] = service_ms, service_ms / 2.0
            return
        deviation_ms = self._deviation_ms[stage]
        newest_ms = abs(service_ms - known_ms)
        self._deviation_ms[stage] = deviation_ms + NEWEST_DEVIATION * (newest_ms - deviation_ms)
        self._service_ms[stage] = known_ms + NEWEST * (service_ms - known_ms)

    def heard(self, stage: int, others: PeerLoad) -> None:
        """Learn other routers' calls at a replica. Answers of a chain may come out of order."""
        known = self._others[stage]
        last = known.get(others.replica)
        if last is not None and last.when > others.when:
            return
        known[others.replica] = others
        self._replicas[stage] = max(len(others.replicas), 1)
        for gone in known.keys() - {others.replica, *others.replicas}:
            del known[gone]

    def own_calls(self, stage: int) -> int:
        """Return the number of this router's calls in flight at a stage."""
        return len(self._under_way[stage])

    def calls(self, stage: int) -> int:
        """Return how many calls are in flight at a stage: this router's, and other routers' as last heard."""
        return len(self._under_way[stage]) + round(sum(map(self._left_of, self._others[stage].values())))

    def replicas(self, stage: int) -> int:
        """Return how many replicas a stage had at its last answer; 1 before the first one."""
        return self._replicas[stage]

    def under_way(self) -> int:
        """Return how many calls are at a stage or being planned."""
        return sum(map(len, self._under_way)) + sum(self._asking.values())

    def service_ms(self, stage: int) -> float:
        """Return the mean time that a stage computes a call, without waits; 0: no call has ended."""
        return self._service_ms[stage]

    def heard_from(self, stage: int) -> None:
        """Note that a stage has sent part of an answer."""
        self._sent[stage] = self._clock()

    def has_answered_since(self, stage: int, began: float) -> bool:
        """Return whether a stage has answered a call since a time by the clock, in seconds."""
        return self._measured[stage] > began

    def has_sent_since(self, stage: int, began: float) -> bool:
        """Return whether a stage has sent part of any answer since a time by the clock, in seconds."""
        return self._sent[stage] > began

    def longest_ms(self, stage: int) -> float:
        """Return a time that few calls at a stage exceed, without waits; 0: no call has ended."""
        return self._service_ms[stage] + DEVIATIONS * self._deviation_ms[stage]

    def capacity(self, stage: int) -> float:
        """Return the estimated number of this router's calls that a stage computes at a time, 1 or more."""
        return self._capacity[stage]

    def expected_queue_ms(self, stage: int) -> float:
        """Return how long a call that comes now will wait, in milliseconds.

        Not the sum: a capacity that was learned beside other routers already includes their waits.
        """
        return max(self._faded_ms(stage), self._line_ms(stage))

    def certain_queue_ms(self, stage: int) -> float:
        """Return how much of the expected wait was measured.

        This router's queue counts once a call has waited in it. Before, the capacity is a guess.
        """
        return self.expected_queue_ms(stage) if self._has_shown[stage] else self._faded_ms(stage)

    def left_to_wait_ms(self, call: OpenCall) -> float:
        """Return how much longer a silent call is certain to wait; 0: the stage may be computing it.

        Stages take calls in the order in which they came.
        """
        waited_ms = (self._clock() - call.began) * 1000.0
        measured_ms = self._faded_ms(call.stage) - waited_ms
        if not self._has_shown[call.stage]:
            return max(measured_ms, 0.0)
        ahead = bisect_left(self._under_way[call.stage], call.number)
        return max(measured_ms, self._behind_ms(call.stage, ahead + 1.0))

    def _line_ms(self, stage: int) -> float:
        """Return the wait behind this router's calls, including those that are being planned."""
        # Every request asks this a dozen times, mostly while nothing else is being planned.
        depth = len(self._under_way[stage]) + 1.0
        for question, asking in self._asking.items():
            if asking:
                depth += asking * self._shares[question][stage]
        return self._behind_ms(stage, depth)

    def _behind_ms(self, stage: int, depth: float) -> float:
        """Return how long a call waits in this router's queue. depth: calls in flight, itself included."""
        capacity = self._capacity[stage]
        return max(depth - capacity, 0.0) * self._service_ms[stage] / capacity

    def _faded_ms(self, stage: int) -> float:
        """Return the mean wait that other routers cause. It fades while none is measured."""
        mean_ms = self._others_ms[stage]
        if mean_ms <= 0.0:
            return 0.0
        elapsed_s = self._clock() - self._measured[stage]
        faded_ms: float = mean_ms * 0.5 ** (elapsed_s / HALF_LIFE_S)
        return max(min(faded_ms, mean_ms - elapsed_s * 1000.0), 0.0)

    def _left_of(self, others: PeerLoad) -> float:
        """Return how many of the other routers' calls are estimated to be still in flight."""
        left: float = others.calls * 0.5 ** ((self._clock() - others.when) / HALF_LIFE_S)
        return left
