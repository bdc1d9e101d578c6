"""Admission: whether the stages have room for a request, and when a refused one may call again. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.errors import Overloaded
from asd.values import Preference
from services.router.domain import Overload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asd.values import Objective
    from services.router.domain import OpenCall, Stage
    from services.router.planning.load import Load

# Shorter waits count as none, and the policy is not told of them. Chosen: they change no plan.
MIN_QUEUE_MS = 1.0
# A wait below this share of a call's usual time is no reason to refuse. Chosen: a call that waits for the
# current pass alone waits less, and its answer may be shorter than most.
_SHORT_WAIT = 0.25
# Waits must leave a BALANCED request this share of the largest stage's accuracy. Chosen: two points below
# what BALANCED keeps without waits.
LEAST_SHARE = 0.97
# A waiting request is checked again after half of its spare time, within these bounds in milliseconds.
# Chosen: its caller learns early that the queue became slower, and a check costs little.
_SHORTEST_LOOK_MS, _LONGEST_LOOK_MS = 10.0, 250.0
# Bounds of the delay that a refusal names, in seconds. Chosen: a caller that returns sooner meets the same
# queue, and no estimate reaches further.
LEAST_RETRY_S, MOST_RETRY_S = 0.05, 60.0


class Admission:
    """Says which requests the stages have room for.

    Under QUEUE and SHED, a request is refused if the queue at a stage leaves no time to answer it. A stage
    admits every request in three cases: it has no queue, this router has no call in flight there, or no call
    has waited there yet. Then it is idle, its measurements are old, or its capacity is a guess.
    """

    def __init__(self, load: Load, overload: Overload, clock: Callable[[], float]) -> None:
        self._load = load
        self._overload = overload
        self._clock = clock
        # By stage, the earliest time at which the next refused caller may return, by the clock.
        self._appointments: dict[int, float] = {}

    @property
    def refuses(self) -> bool:
        """Whether requests are refused at all."""
        return self._overload is not Overload.DEGRADE

    def accuracy_share(self, objective: Objective) -> float | None:
        """Return the least share of the largest stage's accuracy that waits must leave a request; None: any.

        1: waits do not count. A caller who asks for the BEST, or sets a lambda, did not ask for speed.
        """
        if self._overload is Overload.DEGRADE or objective.preference == Preference.FASTEST:
            return None
        is_bound = objective.quality_value is not None or objective.preference == Preference.BEST
        return 1.0 if is_bound else LEAST_SHARE

    @staticmethod
    def asks_for_quality(objective: Objective) -> bool:
        """Return whether a request prefers a refusal to an answer that was to be improved."""
        return objective.min_quality is not None or objective.preference == Preference.BEST

    def check(self, stages: Sequence[Stage], left_ms: float) -> None:
        """Raise Overloaded if the stages, one after the other, have no time left to answer a request."""
        missing_ms = self._missing_ms(stages, left_ms) if self.refuses else 0.0
        if missing_ms > 0.0:
            raise self._late(stages[0], sum(map(self._wait_ms, stages)), left_ms, missing_ms)

    def shed(self, stage: Stage) -> None:
        """Under SHED, raise Overloaded if the queue at a stage is longer than one answer takes."""
        wait_ms, service_ms = self._wait_ms(stage), self._load.service_ms(stage.index)
        if self._overload is Overload.SHED and wait_ms > service_ms:
            after_s = self._appointment(stage, wait_ms - service_ms)
            raise Overloaded(
                f"{stage} is busy: a request would wait about {wait_ms:.0f} ms, and none waits for longer "
                f"than an answer takes (overload: shed): call again in {after_s:.2f} s",
                retry_after_s=after_s,
            )

    def late(self, stage: Stage, left_ms: float) -> Overloaded:
        """Return the refusal of a request that has no time left for a stage busy with other requests."""
        missing_ms = self._wait_ms(stage) + self._load.longest_ms(stage.index) - left_ms
        return self._late(stage, self._wait_ms(stage), left_ms, missing_ms)

    def look(self, stage: Stage, call: OpenCall, left_ms: float) -> float:
        """Return after how many milliseconds to check a silent call again.

        Raises Overloaded if the queue leaves no time to answer it.
        """
        wait_ms = self._load.left_to_wait_ms(call)
        if not self.refuses or self._is_short(stage, wait_ms) or call.depth == 1:
            return _LONGEST_LOOK_MS
        spare_ms = left_ms - wait_ms - self._load.longest_ms(stage.index)
        if spare_ms < 0.0:
            raise self._late(stage, wait_ms, left_ms, -spare_ms)
        return min(max(spare_ms / 2.0, _SHORTEST_LOOK_MS), _LONGEST_LOOK_MS)

    def retry_after_s(self, stage: Stage) -> float:
        """Return after how many seconds a stage that refused a call will have served its queue."""
        return self._appointment(stage, self._wait_ms(stage) + self._load.service_ms(stage.index))

    def _appointment(self, stage: Stage, after_ms: float) -> float:
        """Return after how many seconds a refused caller may return, not before after_ms.

        Refused callers get times one after the other, at the rate at which the stage finishes calls. With
        equal delays they would return together and find the same queue.
        """
        now, index = self._clock(), stage.index
        at = max(now + after_ms / 1000.0, self._appointments.get(index, 0.0))
        self._appointments[index] = at + self._load.service_ms(index) / self._load.capacity(index) / 1000.0
        return _bounded(at - now)

    def _is_short(self, stage: Stage, wait_ms: float) -> bool:
        return wait_ms < max(MIN_QUEUE_MS, _SHORT_WAIT * self._load.service_ms(stage.index))

    def _wait_ms(self, stage: Stage) -> float:
        has_calls = self._load.own_calls(stage.index) > 0
        return self._load.certain_queue_ms(stage.index) if has_calls else 0.0

    def _late(self, stage: Stage, wait_ms: float, left_ms: float, missing_ms: float) -> Overloaded:
        after_s = self._appointment(stage, missing_ms)
        return Overloaded(
            f"{stage} is busy: after a wait of about {wait_ms:.0f} ms there is no time for an answer within "
            f"the {max(left_ms, 0.0):.0f} ms to the deadline: allow more time, or call again in "
            f"{after_s:.2f} s",
            retry_after_s=after_s,
        )

    def _missing_ms(self, stages: Sequence[Stage], left_ms: float) -> float:
        """Return how much more time a request needs than it has; 0 or less: it may have enough.

        Without a queue it may have enough, since its answer may be shorter than most.
        """
        if all(self._is_short(stage, self._wait_ms(stage)) for stage in stages):
            return 0.0
        wait_ms = sum(map(self._wait_ms, stages))
        return wait_ms + sum(self._load.longest_ms(stage.index) for stage in stages) - left_ms


def _bounded(seconds: float) -> float:
    return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)
