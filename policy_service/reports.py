"""Keeps what callers report of answers, as JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from services.common.documents import DamagedFile, numbered_lines, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

# Seconds since 1970: the year 9999, which dates end with.
_LATEST = 253_402_300_799.0


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


class ReportLog:
    """Appends reports to a file.

    Of a request that is reported again the file keeps both: drift takes the first, a refit the last.
    Held in memory: the hash of each request id, about 60 bytes.
    observe: is told of the first report of each request, those of the file included.
    """

    def __init__(self, path: Path, observe: Callable[[OutcomeReport], None] | None = None) -> None:
        self._path = path
        self._observe = observe
        self._lock = asyncio.Lock()
        self._seen: dict[str, set[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for report in read_reports(path):
                self._note(report)
        # Fails now rather than at the first report.
        with path.open("ab") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write(b"\n")

    async def add(self, report: OutcomeReport) -> Receipt:
        """Keep a report."""
        line = json.dumps(asdict(report), separators=(",", ":")) + "\n"
        async with self._lock:
            await asyncio.to_thread(self._append, line)
            return self._note(report)

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _note(self, report: OutcomeReport) -> Receipt:
        seen = self._seen.setdefault(report.policy_version, set())
        known = len(seen)
        seen.add(hash(report.request_id))
        reported_before = len(seen) == known
        if self._observe is not None and not reported_before:
            self._observe(report)
        return Receipt(len(seen), reported_before)


def read_reports(path: Path) -> Iterator[OutcomeReport]:
    """Yield the reports of a file in order; lines that are none, such as one that a crash cut off,
    are skipped with one warning.

    Raises OSError, DamagedFile where the file cannot be read.
    """
    skipped, first = 0, 0
    for number, line in numbered_lines(path):
        if line.strip():
            try:
                yield parse_report(line)
            except (TypeError, ValueError, DamagedFile):
                skipped, first = skipped + 1, first or number
    if skipped:
        logger.warning("%s: line %d is no report and is skipped; %d such in all", path, first, skipped)


def first_reports(reports: Iterable[OutcomeReport]) -> list[OutcomeReport]:
    """Return the earliest report of each request under each policy, in time's order: what drift shows in."""
    kept: dict[tuple[str, str], OutcomeReport] = {}
    for report in sorted(reports, key=lambda each: each.reported_at):
        kept.setdefault((report.policy_version, report.request_id), report)
    return list(kept.values())


def last_reports(reports: Iterable[OutcomeReport]) -> list[OutcomeReport]:
    """Return the latest report of each request under each policy: what is true of it."""
    in_time = sorted(reports, key=lambda each: each.reported_at)
    return list({(each.policy_version, each.request_id): each for each in in_time}.values())


def parse_report(line: str) -> OutcomeReport:
    """Return the report of a line. Raises DamagedFile, ValueError or TypeError where it is none."""
    report = OutcomeReport(**parse_json(line, "the line"))
    texts = (report.request_id, report.stage, report.policy_version)
    if not all(isinstance(text, str) for text in texts) or not isinstance(report.correct, bool):
        raise TypeError("a field has another type")
    # A comparison with a text raises TypeError.
    if not (0.0 <= report.p_correct <= 1.0 and 0.0 <= report.reported_at <= _LATEST):
        raise ValueError("a number is out of range")
    return report


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
