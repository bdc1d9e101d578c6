"""Threads to fit with: side by side where the work splits, and none that wait for one another.

The thread pools of scikit-learn (OpenMP) and numpy (OpenBLAS) split every small step over all cores, and
their threads spin until the last one is done. Where other programs have the cores, or a container may use
fewer than the machine has, most of the processor time goes there.
"""

from __future__ import annotations

import math
import os
import threading
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Made = TypeVar("Made")


@contextmanager
def one_thread() -> Iterator[None]:
    """Have the libraries' pools work in the calling thread alone.

    Libraries that are imported in the body are not bounded: import them before.
    """
    with threadpool_limits(limits=1):
        yield


def run_side_by_side(
    jobs: Sequence[Callable[[], Made]], progress: Callable[[int], None], workers: int | None = None
) -> list[Made]:
    """Return what jobs return, in their order. The first error ends it and is raised.

    progress is told how many are done. workers: threads, at most; by default, one per core that this process
    may use. They are daemons: what is interrupted ends at once, not with the jobs under way.
    """
    waiting: SimpleQueue[tuple[int, Callable[[], Made]]] = SimpleQueue()
    ended: SimpleQueue[tuple[int, Made] | BaseException] = SimpleQueue()
    for numbered in enumerate(jobs):
        waiting.put(numbered)
    stopped = threading.Event()

    def work() -> None:
        # OpenMP counts threads for each thread that asks, and OpenBLAS for the process.
        with threadpool_limits(limits=1, user_api="openmp"):
            while not stopped.is_set():
                try:
                    index, job = waiting.get_nowait()
                except Empty:
                    return
                try:
                    ended.put((index, job()))
                except BaseException as error:
                    stopped.set()
                    ended.put(error)

    made: dict[int, Made] = {}
    with one_thread():
        for _ in range(min(workers or usable_cores(), len(jobs))):
            threading.Thread(target=work, name="fit", daemon=True).start()
        try:
            while len(made) < len(jobs):
                result = ended.get()
                if isinstance(result, BaseException):
                    raise result
                made[result[0]] = result[1]
                progress(len(made))
        finally:
            stopped.set()
    return [made[index] for index in range(len(jobs))]


def usable_cores() -> int:
    """Return how many cores this process may use: those it may run on, or what its container may take."""
    # Not on every system: macOS has none.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many cores' time the control groups of this process may take; infinite where none says.

    A container has all cores of its machine, and the kernel stops it where it has used its share of them.
    root: the file system's.
    Source: the kernel's cgroup-v2.rst (cpu.max) and sched-bwc.rst (cpu.cfs_quota_us).
    """
    mounted = root / "sys" / "fs" / "cgroup"
    quota = math.inf
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mounted / controllers if controllers else mounted
        # The parents bound it, too. In a container, its own group may be what is mounted.
        place = PurePosixPath(group.lstrip("/"))
        for each in (place, *place.parents):
            quota = min(quota, _quota_of(base / each))
    return quota


def _quota_of(directory: Path) -> float:
    allowed, _, period = _read(directory / "cpu.max").partition(" ")
    if not allowed:
        allowed, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
    try:
        # "max", or -1 of old, is no bound.
        return int(allowed) / int(period) if int(allowed) > 0 else math.inf
    except (ValueError, ZeroDivisionError):
        return math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
