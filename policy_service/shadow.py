"""Shadow mode: a candidate policy decides beside the live one, and its decisions are only recorded.

The servicer queues each question with the live policy's answer, and does not wait. A separate thread asks the
candidate the same question and records both answers. Its failures are counted and have no other effect.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol

from asd.errors import AsdError
from policy_service.domain import Judgement, Plan
from services.common.documents import parse_json
from services.common.line_log import LineLog, parse_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from policy_service.policy import Policy

logger = logging.getLogger(__name__)

# Size of the candidate's queue; further jobs are dropped. Chosen: about a tenth of a second's work.
CAPACITY = 256
# How long the thread may continue when the service ends, in seconds.
CLOSING_S = 2.0
STOP = "stop"


@dataclass(frozen=True)
class ShadowJob:
    """A question to the live policy and its answer.

    ask: asks a policy the same question. judged: index of the stage whose answer was judged; None for a plan.
    at: seconds since 1970.
    """

    ask: Callable[[Policy], Plan | Judgement]
    live: Plan | Judgement
    live_version: str
    judged: int | None
    request_id: str
    trace_id: str
    at: float


@dataclass(frozen=True)
class ShadowRecord:
    """One line of the file: the actions of both policies.

    step: "plan" or "decide". judged_stage: "" for a plan. Actions: the stage to call, or "stop". p_correct:
    of the judged answer; for a plan, of the first stage. Changes compare the candidate's action with the live
    one: the difference in P(correct) of that stage's answer and in the cost of calling it, as predicted by
    either policy, without the steps after it. They are None if a policy predicts no P(correct), because the
    prompt is unlike all that it was fitted to.
    """

    at: float
    request_id: str
    trace_id: str
    step: str
    judged_stage: str
    live_version: str
    shadow_version: str
    live_action: str
    shadow_action: str
    live_p_correct: float | None
    shadow_p_correct: float | None
    quality_change_by_live: float | None
    quality_change_by_shadow: float | None
    cost_change_by_live: float
    cost_change_by_shadow: float

    @property
    def agrees(self) -> bool:
        """Whether both choose the same action."""
        return self.live_action == self.shadow_action


@dataclass(frozen=True)
class ShadowCounts:
    """Counts of jobs since the start. decisions: the candidate's; agreements: decisions like the live one."""

    version: str
    decisions: int = 0
    agreements: int = 0
    dropped: int = 0
    failures: int = 0


class ShadowObserver(Protocol):
    """Counts the outcomes of jobs."""

    def shadow_compared(self, step: str, stage: str, *, agrees: bool) -> None:
        """The policies were compared. stage: the judged one; for a plan, the live policy's first one."""

    def shadow_dropped(self) -> None:
        """A job was dropped: the queue was full."""

    def shadow_failed(self) -> None:
        """A job failed."""


class Shadow:
    """Asks a candidate the live policy's questions, in a thread that runs while this is entered.

    path: file of JSON lines; None: jobs are only counted. max_bytes: file size from which nothing more is
    written. closing_s: how long leaving waits for the jobs in the queue.
    """

    def __init__(
        self,
        policy: Policy,
        path: Path | None,
        observer: ShadowObserver,
        *,
        capacity: int = CAPACITY,
        max_bytes: float = 2.0**28,
        closing_s: float = CLOSING_S,
    ) -> None:
        self._policy = policy
        self._names = [stage.name for stage in policy.stages]
        self._path = path
        # Fail at start-up rather than at the first record.
        self._file = None if path is None else LineLog(path, log=logger)
        self._observer = observer
        self._max_bytes = max_bytes
        self._closing_s = closing_s
        self._is_full = self._file is not None and self._file.size >= max_bytes
        self._jobs: queue.Queue[ShadowJob | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        # Each field has one writer: the caller's thread for `dropped`, the shadow's thread for the rest.
        self._dropped = 0
        self._compared = ShadowCounts(policy.version)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        """Finish the waiting jobs, for a short time: a candidate that hangs must not delay the shutdown."""
        try:
            self._jobs.put(None, timeout=self._closing_s)
        except queue.Full:
            return
        self._thread.join(self._closing_s)

    @property
    def counts(self) -> ShadowCounts:
        """Counts of the jobs so far."""
        return replace(self._compared, dropped=self._dropped)

    def offer(self, job: ShadowJob) -> None:
        """Queue a job without waiting. Drop it if the queue is full."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._dropped += 1
            self._observer.shadow_dropped()

    def _work(self) -> None:
        has_told = False
        while (job := self._jobs.get()) is not None:
            try:
                self._take(job)
            except AsdError:
                # The record could not be written, which LineLog has logged.
                self._fail()
            except Exception:
                self._fail()
                if not has_told:
                    logger.exception(
                        "the shadow policy %s failed; further failures are only counted", self._policy.version
                    )
                has_told = True

    def _fail(self) -> None:
        self._compared = replace(self._compared, failures=self._compared.failures + 1)
        self._observer.shadow_failed()

    def _take(self, job: ShadowJob) -> None:
        record = compare(job, job.ask(self._policy), self._policy.version, self._names)
        if self._file is not None and not self._is_full:
            self._write(self._file, record)
        done = self._compared
        self._compared = replace(
            done, decisions=done.decisions + 1, agreements=done.agreements + record.agrees
        )
        stage = record.judged_stage or record.live_action
        self._observer.shadow_compared(record.step, stage, agrees=record.agrees)

    def _write(self, file: LineLog, record: ShadowRecord) -> None:
        file.append(json.dumps(asdict(record), separators=(",", ":")))
        self._is_full = file.size >= self._max_bytes
        if self._is_full:
            logger.warning(
                "%s has reached its greatest size: decisions are only counted from here on", self._path
            )


def compare(
    job: ShadowJob, shadow: Plan | Judgement, shadow_version: str, names: Sequence[str]
) -> ShadowRecord:
    """Return the record of one question to both policies. names: of the stages."""
    live_next, shadow_next = _next_stage(job.live), _next_stage(shadow)
    by_live = [_expected(job.live, stage) for stage in (live_next, shadow_next)]
    by_shadow = [_expected(shadow, stage) for stage in (live_next, shadow_next)]
    return ShadowRecord(
        at=job.at,
        request_id=job.request_id,
        trace_id=job.trace_id,
        step="plan" if job.judged is None else "decide",
        judged_stage="" if job.judged is None else names[job.judged],
        live_version=job.live_version,
        shadow_version=shadow_version,
        live_action=STOP if live_next is None else names[live_next],
        shadow_action=STOP if shadow_next is None else names[shadow_next],
        live_p_correct=_p_correct(job.live),
        shadow_p_correct=_p_correct(shadow),
        quality_change_by_live=_change(by_live[0][0], by_live[1][0]),
        quality_change_by_shadow=_change(by_shadow[0][0], by_shadow[1][0]),
        cost_change_by_live=by_live[1][1] - by_live[0][1],
        cost_change_by_shadow=by_shadow[1][1] - by_shadow[0][1],
    )


def read_shadow(path: Path) -> Iterator[ShadowRecord]:
    """Yield the records of a file; damaged lines are skipped and counted in one warning. Raises OSError."""

    def warn(count: int, first: int) -> None:
        logger.warning(
            "%s: damaged lines: %d, the first one is line %d: they are skipped", path, count, first
        )

    return parse_lines(path, parse_shadow, warn)


def parse_shadow(line: str) -> ShadowRecord:
    """Return the record of a line. Raises DamagedFile, TypeError or ValueError if it is not one."""
    record = ShadowRecord(**parse_json(line, "the line"))
    for field in fields(record):
        value = getattr(record, field.name)
        if field.type == "str":
            is_fit = isinstance(value, str)
        elif value is None:
            is_fit = field.type == "float | None"
        else:
            is_fit = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_fit:
            raise TypeError(f"{field.name} is no {field.type}")
    return record


def _next_stage(answer: Plan | Judgement) -> int | None:
    return answer.first_stage if isinstance(answer, Plan) else answer.next_stage


def _change(of: float | None, to: float | None) -> float | None:
    return None if of is None or to is None else to - of


def _expected(answer: Plan | Judgement, stage: int | None) -> tuple[float | None, float]:
    """Return P(correct) and further cost of calling a stage, or of stopping at the judged answer."""
    if stage is None:
        return _p_correct(answer), 0.0
    (estimate,) = (each for each in answer.estimates if each.stage == stage)
    return estimate.p_correct, estimate.cost


def _p_correct(answer: Plan | Judgement) -> float | None:
    if isinstance(answer, Judgement):
        return answer.p_correct
    (first,) = (each for each in answer.estimates if each.stage == answer.first_stage)
    return first.p_correct
