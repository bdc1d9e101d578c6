"""Stores the outcomes that callers report, as JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from services.common.documents import parse_json
from services.common.line_log import LineLog, parse_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from services.common.line_log import Appendable

logger = logging.getLogger(__name__)

# Seconds since 1970: the end of the year 9999, the last year of datetime.
_LATEST = 253_402_300_799.0
# How many of a policy's latest reported requests are remembered, at least; at most twice as many. Chosen: 12
# MB at most. A request that was forgotten counts as new when it is reported again.
KNOWN_REQUESTS = 100_000


@dataclass(frozen=True)
class OutcomeReport:
    """Whether one answer was correct. p_correct: as predicted then. reported_at: seconds since 1970."""

    request_id: str
    stage: str
    p_correct: float
    policy_version: str
    correct: bool
    reported_at: float


@dataclass(frozen=True)
class Receipt:
    """The result of a report. reports: requests reported for its policy version, including this one."""

    reports: int
    reported_before: bool


class _Requests:
    """The reported requests of a policy: all are counted, and the latest ones are remembered.

    It keeps the hashes of at most 2 * KNOWN_REQUESTS ids in memory, about 60 bytes each.
    """

    def __init__(self, known: int) -> None:
        self._known = known
        self._newer: set[int] = set()
        self._older: set[int] = set()
        self.count = 0

    def add(self, request_id: str) -> bool:
        """Return whether a request is new; count it if so."""
        key = hash(request_id)
        if key in self._newer or key in self._older:
            return False
        self.count += 1
        self._newer.add(key)
        if len(self._newer) >= self._known:
            self._older, self._newer = self._newer, set()
        return True


class ReportLog:
    """Appends reports to a file.

    If a request is reported again, the file keeps both reports: drift uses the first, a refit the last.
    observe: is called with the first report of each request, including those in the file. opened: as in
    LineLog. known: see KNOWN_REQUESTS.
    """

    def __init__(
        self,
        path: Path,
        observe: Callable[[OutcomeReport], None] | None = None,
        *,
        opened: Callable[[Path], AbstractContextManager[Appendable]] | None = None,
        known: int = KNOWN_REQUESTS,
    ) -> None:
        self._observe = observe
        self._known = known
        self._lock = asyncio.Lock()
        self._requests: dict[str, _Requests] = {}
        # Fail at start-up rather than at the first report.
        self._file = LineLog(path, opened=opened, log=logger)
        if path.exists():
            for report in read_reports(path):
                self._note(report)

    async def add(self, report: OutcomeReport) -> Receipt:
        """Store a report. Raises ResourceExhausted on a full disk, PreconditionFailed on other failures."""
        line = json.dumps(asdict(report), separators=(",", ":"))
        async with self._lock:
            await asyncio.to_thread(self._file.append, line)
            return self._note(report)

    def _note(self, report: OutcomeReport) -> Receipt:
        requests = self._requests.get(report.policy_version)
        if requests is None:
            requests = self._requests[report.policy_version] = _Requests(self._known)
        is_new = requests.add(report.request_id)
        if self._observe is not None and is_new:
            self._observe(report)
        return Receipt(requests.count, not is_new)


def read_reports(path: Path) -> Iterator[OutcomeReport]:
    """Yield the reports of a file in order; damaged lines are skipped and counted in one warning.

    Raises OSError or DamagedFile if the file cannot be read.
    """

    def warn(count: int, first: int) -> None:
        logger.warning(
            "%s: damaged lines: %d, the first one is line %d: they are skipped", path, count, first
        )

    return parse_lines(path, parse_report, warn)


def first_reports(reports: Iterable[OutcomeReport]) -> list[OutcomeReport]:
    """Return the earliest report of each request under each policy, by time, to look for drift."""
    kept: dict[tuple[str, str], OutcomeReport] = {}
    for report in sorted(reports, key=lambda each: each.reported_at):
        kept.setdefault((report.policy_version, report.request_id), report)
    return list(kept.values())


def last_reports(reports: Iterable[OutcomeReport]) -> list[OutcomeReport]:
    """Return the latest report of each request under each policy, which is the valid one."""
    in_time = sorted(reports, key=lambda each: each.reported_at)
    return list({(each.policy_version, each.request_id): each for each in in_time}.values())


def parse_report(line: str) -> OutcomeReport:
    """Return the report of a line. Raises DamagedFile, ValueError or TypeError if it is not one."""
    report = OutcomeReport(**parse_json(line, "the line"))
    texts = (report.request_id, report.stage, report.policy_version)
    if not all(isinstance(text, str) for text in texts) or not isinstance(report.correct, bool):
        raise TypeError("a field has another type")
    if isinstance(report.p_correct, bool) or isinstance(report.reported_at, bool):
        raise TypeError("true is no number")
    # A comparison with a string raises TypeError.
    if not (0.0 <= report.p_correct <= 1.0 and 0.0 <= report.reported_at <= _LATEST):
        raise ValueError("a number is out of range")
    return report
