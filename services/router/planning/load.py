"""How busy the stages are, as far as this router knows. Pure."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from services.router.domain import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.router.domain import PeerLoad

# Weight of the newest measurement in a mean. Chosen: some ten calls carry nine tenths of it.
NEWEST = 0.2
# Time in which what was heard of others halves: the mean of the waits that they cause, unless it is gone
# before, and their calls. Chosen: a stage that plans avoid for its queue would otherwise never be asked
# again, and so never be seen to be idle; and one that is seldom asked says little of now.
HALF_LIFE_S = 5.0
# Calls that a stage is taken to compute at a time before it has shown it. Chosen: the onnx engine's default.
# Where it is more, calls beyond it that did not wait say so.
FIRST_CAPACITY = 8.0
# Share of a call's computing time from which on a wait says that the stage was full. Chosen: a call that only
# waits for the pass under way, where there is room, waits less.
FULL = 0.25
# Weight of the newest measurement in the mean deviation of a call's time. RFC 6298, section 2, has the same
# for the round-trip times of a connection.
NEWEST_DEVIATION = 0.25
# Few calls take longer than so many deviations above the mean. Chosen: half of that RFC's, since answers vary
# more than connections, and a request that might just not fit is better tried than refused.
DEVIATIONS = 2.0
# Least weight of the newest answer of the policy in the shares. Chosen: some forty carry nine tenths.
NEWEST_CHOICE = 0.05


class Question(StrEnum):
    """What the policy is asked. Each kind of answer has stages of its own that it mostly names."""

    PLAN = "plan"
    DECIDE = "decide"


class Load:
    """Calls under way at each stage, and the wait to be expected there. clock: monotonic seconds.

    Two estimates of the wait, of which the larger holds. The line of this router's own calls is known at
    once: what is beyond the stage's capacity waits, at the rate at which the stage finishes calls. Capacity
    and rate are learned. What finished calls waited beyond that is of other routers' doing: its mean comes
    late, and fades. Waits in the own line are no part of it, or a burst that has passed would count on.
    """

    def __init__(self, stage_count: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        # The numbers of the calls under way, ascending.
        self._under_way: list[list[int]] = [[] for _ in range(stage_count)]
        self._begun = 0
        self._others_ms = [0.0] * stage_count
        self._measured = [0.0] * stage_count
        # When it last sent something of a call.
        self._sent = [0.0] * stage_count
        self._service_ms = [0.0] * stage_count
        self._deviation_ms = [0.0] * stage_count
        self._capacity = [FIRST_CAPACITY] * stage_count
        # Whether a call has waited in this router's own line.
        self._has_shown = [False] * stage_count
        # By the replica's address.
        self._others: list[dict[str, PeerLoad]] = [{} for _ in range(stage_count)]
        self._replicas = [1] * stage_count
        self._asking = dict.fromkeys(Question, 0)
        self._choices = dict.fromkeys(Question, 0)
        self._shares = {question: [0.0] * stage_count for question in Question}

    @contextmanager
    def calling(self, stage: int) -> Iterator[Call]:
        """Count the block as a call under way at a stage."""
        line, expected_ms = self._under_way[stage], self.expected_queue_ms(stage)
        self._begun += 1
        line.append(self._begun)
        call = Call(stage, self._begun, len(line), self._clock(), expected_ms)
        try:
            yield call
        finally:
            del line[bisect_left(line, call.number)]

    @contextmanager
    def asking(self, question: Question) -> Iterator[None]:
        """Count the block as a request that will be a call soon: where, the policy is being asked.

        Until it answers, the request counts at every stage by that stage's share of recent answers. Requests
        that come together would otherwise all be told of the same short line.
        """
        self._asking[question] += 1
        try:
            yield
        finally:
            self._asking[question] -= 1

    def chosen(self, question: Question, stage: int | None) -> None:
        """The policy answered a question with a stage to call; None: with none."""
        self._choices[question] += 1
        weight = max(NEWEST_CHOICE, 1.0 / self._choices[question])
        shares = self._shares[question]
        for each, share in enumerate(shares):
            shares[each] = share + weight * ((each == stage) - share)

    def answered(self, stage: int, depth: int, queue_ms: float, service_ms: float) -> None:
        """A call waited and was computed for so long, by the stage's clock.

        service_ms: 0 where it is not known. depth: calls of this router under way at the stage as it began,
        itself included. By Little's law, depth * service / (queue + service) of them were being computed.
        Where the call had to wait, that is the stage's capacity, or this router's part of it; where it did
        not, the capacity is at least that.
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
            # So many were computed, and nothing says that more cannot be.
            self._capacity[stage] = computed
            self._has_shown[stage] = has_waited
        elif has_waited or computed > capacity:
            # What a call waits that has a place by what is known may be of others' doing.
            self._has_shown[stage] = self._has_shown[stage] or depth > capacity
            # 1 at least: what others ask of the stage is not in this router's line, and the mean fades.
            self._capacity[stage] = max(capacity + NEWEST * (computed - capacity), 1.0)

    def ran_out(self, call: Call) -> None:
        """A call ran out of time that something had come of: what it had is the least that it takes.

        A stage that is too slow for every caller would otherwise never be known to be slow.
        """
        taken_ms = (self._clock() - call.began) * 1000.0 - call.expected_ms
        if taken_ms > self._service_ms[call.stage] > 0.0:
            self._took(call.stage, taken_ms)

    def _took(self, stage: int, service_ms: float) -> None:
        """Learn how long a call was computed."""
        known_ms = self._service_ms[stage]
        if not known_ms:
            self._service_ms[stage], self._deviation_ms[stage] = service_ms, service_ms / 2.0
            return
        deviation_ms = self._deviation_ms[stage]
        newest_ms = abs(service_ms - known_ms)
        self._deviation_ms[stage] = deviation_ms + NEWEST_DEVIATION * (newest_ms - deviation_ms)
        self._service_ms[stage] = known_ms + NEWEST * (service_ms - known_ms)

    def heard(self, stage: int, others: PeerLoad) -> None:
        """An answer told of calls of others at a replica. Answers of a chain may be heard of out of order."""
        known = self._others[stage]
        last = known.get(others.replica)
        if last is not None and last.when > others.when:
            return
        known[others.replica] = others
        self._replicas[stage] = max(len(others.replicas), 1)
        for gone in known.keys() - {others.replica, *others.replicas}:
            del known[gone]

    def own_calls(self, stage: int) -> int:
        """Return the number of this router's calls under way at a stage."""
        return len(self._under_way[stage])

    def calls(self, stage: int) -> int:
        """Return how many calls are under way at a stage: this router's, and others' as last heard."""
        return len(self._under_way[stage]) + round(sum(map(self._left_of, self._others[stage].values())))

    def replicas(self, stage: int) -> int:
        """Return how many replicas a stage had as an answer of it last came; 1 before the first one."""
        return self._replicas[stage]

    def under_way(self) -> int:
        """Return how many calls are at stages, or on their way to one."""
        return sum(map(len, self._under_way)) + sum(self._asking.values())

    def service_ms(self, stage: int) -> float:
        """Return the mean time that a stage computes a call, waits not counted; 0 where none has ended."""
        return self._service_ms[stage]

    def heard_from(self, stage: int) -> None:
        """A stage has sent something of a call that is under way."""
        self._sent[stage] = self._clock()

    def has_answered_since(self, stage: int, began: float) -> bool:
        """Return whether a stage has answered a call since a time by the clock, in seconds."""
        return self._measured[stage] > began

    def has_sent_since(self, stage: int, began: float) -> bool:
        """Return whether a stage has sent something, of any call, since a time by the clock, in seconds."""
        return self._sent[stage] > began

    def longest_ms(self, stage: int) -> float:
        """Return the time that few calls take longer than at a stage, waits not counted; 0 as above."""
        return self._service_ms[stage] + DEVIATIONS * self._deviation_ms[stage]

    def capacity(self, stage: int) -> float:
        """Return how many of this router's calls a stage is taken to compute at a time, 1 or more."""
        return self._capacity[stage]

    def expected_queue_ms(self, stage: int) -> float:
        """Return how long a call that comes now will wait, in milliseconds.

        Not the sum: a capacity that was learned beside other routers has their waits in it already.
        """
        return max(self._faded_ms(stage), self._line_ms(stage))

    def certain_queue_ms(self, stage: int) -> float:
        """Return how much of the expected wait was measured.

        A line is none before calls have waited in one: the stage may compute more at a time than is thought.
        """
        return self.expected_queue_ms(stage) if self._has_shown[stage] else self._faded_ms(stage)

    def left_to_wait_ms(self, call: Call) -> float:
        """Return how long a call under way that nothing has come of is certain to wait still; 0: it may be
        computed.

        Stages take calls in the order in which they came.
        """
        waited_ms = (self._clock() - call.began) * 1000.0
        measured_ms = self._faded_ms(call.stage) - waited_ms
        if not self._has_shown[call.stage]:
            return max(measured_ms, 0.0)
        ahead = bisect_left(self._under_way[call.stage], call.number)
        return max(measured_ms, self._behind_ms(call.stage, ahead + 1.0))

    def _line_ms(self, stage: int) -> float:
        """Return the wait behind this router's calls, those that are being planned among them."""
        # Every request asks this a dozen times, mostly while nothing else is being planned.
        depth = len(self._under_way[stage]) + 1.0
        for question, asking in self._asking.items():
            if asking:
                depth += asking * self._shares[question][stage]
        return self._behind_ms(stage, depth)

    def _behind_ms(self, stage: int, depth: float) -> float:
        """Return how long a call waits in this router's line. depth: calls under way, itself included."""
        capacity = self._capacity[stage]
        return max(depth - capacity, 0.0) * self._service_ms[stage] / capacity

    def _faded_ms(self, stage: int) -> float:
        """Return the mean of the waits that others cause, fading while none is measured."""
        mean_ms = self._others_ms[stage]
        if mean_ms <= 0.0:
            return 0.0
        elapsed_s = self._clock() - self._measured[stage]
        faded_ms: float = mean_ms * 0.5 ** (elapsed_s / HALF_LIFE_S)
        return max(min(faded_ms, mean_ms - elapsed_s * 1000.0), 0.0)

    def _left_of(self, others: PeerLoad) -> float:
        """Return how many of the calls that were under way at a time are taken to be so still."""
        left: float = others.calls * 0.5 ** ((self._clock() - others.when) / HALF_LIFE_S)
        return left
