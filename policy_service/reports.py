"""Keeps what callers report of answers, as JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutcomeReport:
    """How one answer turned out. p_correct: as predicted at the time. reported_at: seconds since 1970."""

    request_id: str
    stage: str
    p_correct: float
    policy_version: str
    correct: bool
    reported_at: float


class ReportLog:
    """Appends reports to a file. A later report of a request replaces the earlier one.

    The file keeps both; readers take the last. Held in memory: the hash of each request id, about 60 bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._seen: dict[str, set[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for report in read_reports(path):
            self._note(report)
        # Fails now rather than at the first report.
        with path.open("ab") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write(b"\n")

    async def add(self, report: OutcomeReport) -> int:
        """Keep a report; return how many requests were reported for its policy version."""
        line = json.dumps(asdict(report), separators=(",", ":")) + "\n"
        async with self._lock:
            await asyncio.to_thread(self._append, line)
            return self._note(report)

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _note(self, report: OutcomeReport) -> int:
        seen = self._seen.setdefault(report.policy_version, set())
        seen.add(hash(report.request_id))
        return len(seen)


def read_reports(path: Path) -> Iterator[OutcomeReport]:
    """Yield the reports of a file in order; a line that a crash cut off is skipped with a warning."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield OutcomeReport(**json.loads(line))
            except (TypeError, ValueError):
                logger.warning("%s: line %d is no report and is skipped", path, number)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
