"""Keeps the outcomes that callers report, as JSON lines."""

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

# Seconds since 1970: the year 9999, which dates end with.
_LATEST = 253_402_300_799.0
# Latest requests of a policy that are known to have been reported; up to twice as many are. Chosen: 12 MB at
# most. A request that is reported again after so many further ones counts as new.
KNOWN_REQUESTS = 100_000


@dataclass(frozen=True)
class OutcomeReport:
    """How one answer turned out. p_correct: as predicted at the time. reported_at: seconds since 1970."""

    request_id: str
    stage: str
    p_correct: float
    policy_version: str
    correct: bool
    reported_at: float


@dataclass(frozen=True)
class Receipt:
    """What became of a report. reports: requests that were reported for its policy version, it included."""

    reports: int
    reported_before: bool


class _Requests:
    """Which requests were reported of a policy: all are counted, and the latest ones known again.

    Held in memory: the hashes of 2 * KNOWN_REQUESTS ids at most, about 60 bytes each.
    """

    def __init__(self, known: int) -> None:
        self._known = known
        self._newer: set[int] = set()
        self._older: set[int] = set()
        self.count = 0

    def add(self, request_id: str) -> bool:
        """Return whether a request is a new one, and count it then."""
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

    Of a request that is reported again the file keeps both: drift takes the first, a refit the last.
    observe: is told of the first report of each request, those of the file included. opened: as in LineLog.
    known: latest requests of a policy that are known to have been reported, from one to two times so many.
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
        # Fail now rather than at the first report.
        self._file = LineLog(path, opened=opened, log=logger)
        if path.exists():
            for report in read_reports(path):
                self._note(report)

    async def add(self, report: OutcomeReport) -> Receipt:
        """Keep a report. Raises ResourceExhausted on a full disk, PreconditionFailed where it fails."""
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

    Raises OSError, DamagedFile where the file cannot be read.
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
    """Return the report of a line. Raises DamagedFile, ValueError or TypeError where it is none."""
    report = OutcomeReport(**parse_json(line, "the line"))
    texts = (report.request_id, report.stage, report.policy_version)
    if not all(isinstance(text, str) for text in texts) or not isinstance(report.correct, bool):
        raise TypeError("a field has another type")
    if isinstance(report.p_correct, bool) or isinstance(report.reported_at, bool):
        raise TypeError("true is no number")
    # A comparison with a text raises TypeError.
    if not (0.0 <= report.p_correct <= 1.0 and 0.0 <= report.reported_at <= _LATEST):
        raise ValueError("a number is out of range")
    return report
