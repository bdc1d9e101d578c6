"""Whether there is room for a request: what is done where stages have lines. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.errors import Overloaded
from asd.values import Preference
from services.router.domain import Overload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asd.values import Objective
    from services.router.domain import Call, Stage
    from services.router.planning.load import Load

# Shorter waits than this count as none, and are not told to the policy. Chosen: no plan turns on them.
MIN_QUEUE_MS = 1.0
# Nor is a request refused for a shorter wait than this share of what a call takes at the stage. Chosen: a
# call that only waits for the pass under way waits less, and its answer may be shorter than most.
_SHORT_WAIT = 0.25
# Share of the largest stage's accuracy below which waits do not take a BALANCED request. Chosen: two points
# less than what BALANCED keeps without waits.
LEAST_SHARE = 0.97
# A request in a line is looked at again after half of the time that it has to spare, within these bounds, in
# milliseconds. Chosen: its caller hears early of a line that became slower, and looking costs little.
_SHORTEST_LOOK_MS, _LONGEST_LOOK_MS = 10.0, 250.0
# Least and most that a caller is told to wait, in seconds. Chosen: sooner it would meet the same line, and
# what is further away nobody knows.
LEAST_RETRY_S, MOST_RETRY_S = 0.05, 60.0


class Admission:
    """Says which requests the stages have room for.

    Under QUEUE and SHED a request is refused where the line at a stage leaves it no time to be answered.
    Where there is no line, or this router has no call under way at the stage, every request is let in: the
    stage is idle, or what is known of it is old. So it is where no call has waited yet: how many the stage
    computes at a time is then a guess.
    """

    def __init__(self, load: Load, overload: Overload, clock: Callable[[], float]) -> None:
        self._load = load
        self._overload = overload
        self._clock = clock
        # By the stage, when the next one that is refused there is told to come, by the clock.
        self._appointments: dict[int, float] = {}

    @property
    def refuses(self) -> bool:
        """Whether requests are refused at all."""
        return self._overload is not Overload.DEGRADE

    def accuracy_share(self, objective: Objective) -> float | None:
        """Return down to which share of the largest stage's accuracy waits may take a request; None: to any.

        1: they do not count. Who asks for the BEST, or says what a right answer is worth, asked for no speed.
        """
        if self._overload is Overload.DEGRADE or objective.preference is Preference.FASTEST:
            return None
        is_bound = objective.quality_value is not None or objective.preference == Preference.BEST
        return 1.0 if is_bound else LEAST_SHARE

    @staticmethod
    def asks_for_quality(objective: Objective) -> bool:
        """Return whether a request had rather be refused than be given an answer that was to be improved."""
        return objective.min_quality is not None or objective.preference == Preference.BEST

    def check(self, stages: Sequence[Stage], left_ms: float) -> None:
        """Raise Overloaded where the stages, one after the other, have no time left to answer a request."""
        missing_ms = self._missing_ms(stages, left_ms) if self.refuses else 0.0
        if missing_ms > 0.0:
            raise self._late(stages[0], sum(map(self._wait_ms, stages)), left_ms, missing_ms)

    def shed(self, stage: Stage) -> None:
        """Raise Overloaded where a stage has a line of more than an answer, and such lines are shed."""
        wait_ms, service_ms = self._wait_ms(stage), self._load.service_ms(stage.index)
        if self._overload is Overload.SHED and wait_ms > service_ms:
            after_s = self._appointment(stage, wait_ms - service_ms)
            raise Overloaded(
                f"{stage} is busy: a request would wait about {wait_ms:.0f} ms, and none waits for longer "
                f"than an answer takes (overload: shed): call again in {after_s:.2f} s",
                retry_after_s=after_s,
            )

    def late(self, stage: Stage, left_ms: float) -> Overloaded:
        """Return the refusal of a request that has no time left for a stage that is busy with others."""
        missing_ms = self._wait_ms(stage) + self._load.longest_ms(stage.index) - left_ms
        return self._late(stage, self._wait_ms(stage), left_ms, missing_ms)

    def look(self, stage: Stage, call: Call, left_ms: float) -> float:
        """Return after how many milliseconds to look again at a call that nothing has come of.

        Raises Overloaded where its line leaves no time for it.
        """
        wait_ms = self._load.left_to_wait_ms(call)
        if not self.refuses or self._is_short(stage, wait_ms) or call.depth == 1:
            return _LONGEST_LOOK_MS
        spare_ms = left_ms - wait_ms - self._load.longest_ms(stage.index)
        if spare_ms < 0.0:
            raise self._late(stage, wait_ms, left_ms, -spare_ms)
        return min(max(spare_ms / 2.0, _SHORTEST_LOOK_MS), _LONGEST_LOOK_MS)

    def retry_after_s(self, stage: Stage) -> float:
        """Return after how many seconds a stage that refused a call will have gone through its line."""
        return self._appointment(stage, self._wait_ms(stage) + self._load.service_ms(stage.index))

    def _appointment(self, stage: Stage, after_ms: float) -> float:
        """Return after how many seconds one who is refused at a stage is told to come again.

        Not before so many milliseconds; and one after the other, at the rate at which the stage finishes
        calls: told the same, they would come together and find the same line.
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
        """Return how much time more a request needs than it has; 0 or less where it may have enough.

        Without a line it may: its answer may be shorter than others.
        """
        if all(self._is_short(stage, self._wait_ms(stage)) for stage in stages):
            return 0.0
        wait_ms = sum(map(self._wait_ms, stages))
        return wait_ms + sum(self._load.longest_ms(stage.index) for stage in stages) - left_ms


def _bounded(seconds: float) -> float:
    return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)
