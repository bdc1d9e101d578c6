"""Threads for fitting: independent jobs run in parallel, and the libraries' own pools are off.

The thread pools of scikit-learn (OpenMP) and NumPy (OpenBLAS) split every small step over all cores, and
their threads spin until the last one is done. If other programs use the cores, or a container may use fewer
than the machine has, most of the processor time is spent spinning.
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
    """Limit the libraries' pools to the calling thread.

    Libraries that are imported in the body are not limited: import them before.
    """
    with threadpool_limits(limits=1):
        yield


def run_side_by_side(
    jobs: Sequence[Callable[[], Made]], progress: Callable[[int], None], workers: int | None = None
) -> list[Made]:
    """Run jobs in threads and return their results, in order. Raises the first error at once.

    progress: is called with the number of finished jobs. workers: most threads; by default, one per core that
    this process may use. They are daemons, so an interrupted program ends at once.
    """
    waiting: SimpleQueue[tuple[int, Callable[[], Made]]] = SimpleQueue()
    ended: SimpleQueue[tuple[int, Made] | BaseException] = SimpleQueue()
    for numbered in enumerate(jobs):
        waiting.put(numbered)
    stopped = threading.Event()

    def work() -> None:
        # OpenMP's limit is per calling thread, OpenBLAS's per process.
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
    """Return how many cores this process may use, by its affinity and its container's quota."""
    # macOS has no sched_getaffinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many cores' time the control groups of this process allow; infinite without a quota.

    A container sees all cores of its machine, but the kernel stops it once it has used its quota. root: of
    the file system.
    Source: the kernel's cgroup-v2.rst (cpu.max) and sched-bwc.rst (cpu.cfs_quota_us).
    """
    mounted = root / "sys" / "fs" / "cgroup"
    quota = math.inf
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mounted / controllers if controllers else mounted
        # Parent groups have limits too. In a container, its own group may be the mounted root.
        place = PurePosixPath(group.lstrip("/"))
        for each in (place, *place.parents):
            quota = min(quota, _quota_of(base / each))
    return quota


def _quota_of(directory: Path) -> float:
    allowed, _, period = _read(directory / "cpu.max").partition(" ")
    if not allowed:
        allowed, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
    try:
        # "max", or -1 in cgroup v1, means no limit.
        return int(allowed) / int(period) if int(allowed) > 0 else math.inf
    except (ValueError, ZeroDivisionError):
        return math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
