"""Fitting keeps to threads that never wait for one another: no library's pool splits its steps."""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_info, threadpool_limits

from policy_service.train import compare, predictor, threads
from policy_service.train.predictor import fit_head
from policy_service.train.threads import one_thread, run_side_by_side
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def pools_of_two() -> Iterator[None]:
    """A machine of two cores, whatever this one is."""
    with threadpool_limits(limits=2):
        yield


def pools() -> set[int]:
    """Return how many threads the libraries' pools would split a step of the calling thread over."""
    return {pool["num_threads"] for pool in threadpool_info()}


def test_pools_have_one_thread_within_and_what_they_had_after():
    assert pools() == {2}
    with one_thread():
        assert pools() == {1}
    assert pools() == {2}


def test_jobs_are_bounded_in_their_own_threads():
    """OpenMP counts threads for each thread that asks: a limit of the main thread holds for no other."""
    assert run_side_by_side([pools] * 4, lambda _: None, workers=2) == [{1}] * 4
    assert pools() == {2}


def test_a_head_is_fitted_in_one_thread(monkeypatch):
    seen: list[set[int]] = []

    class Trees(HistGradientBoostingClassifier):
        def fit(self, *given):
            seen.append(pools())
            return super().fit(*given)

    monkeypatch.setattr(predictor, "HistGradientBoostingClassifier", Trees)
    features = np.arange(200, dtype=np.float32)[:, None]
    correct = np.arange(200) % 3 > 0
    fit_head(features, correct, 0)
    assert seen == [{1}]


def test_predictors_are_compared_in_one_thread():
    seen: list[set[int]] = []

    class Outcomes:
        @property
        def cascade(self):
            seen.append(pools())
            raise LookupError

    with pytest.raises(LookupError):
        compare.compare_predictors(Outcomes(), Outcomes(), 0, lambda _: None)
    assert seen == [{1}]


def test_jobs_run_side_by_side_and_their_results_keep_the_order():
    meeting = threading.Barrier(2, timeout=CALL_S)
    told: list[int] = []

    def job(number: int) -> int:
        meeting.wait()
        return number

    jobs = [partial(job, number) for number in range(6)]
    assert run_side_by_side(jobs, told.append, workers=2) == [0, 1, 2, 3, 4, 5]
    assert told == [1, 2, 3, 4, 5, 6]


def test_no_jobs_are_done_at_once():
    assert run_side_by_side([], lambda _: None) == []


def test_the_first_error_is_raised_and_begins_nothing_more():
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        raise ValueError(f"job {number}")

    with pytest.raises(ValueError, match="job 0"):
        run_side_by_side([partial(job, number) for number in range(3)], lambda _: None, workers=1)
    assert begun == [0]


def test_an_interrupted_wait_ends_with_jobs_under_way(monkeypatch):
    """As Ctrl-C does: in the main thread, while a job runs on."""
    release = threading.Event()

    def interrupt(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([lambda: None, lambda: release.wait(CALL_S)], interrupt, workers=2)
    running = [each for each in threading.enumerate() if each.name == "fit"]
    assert all(each.daemon for each in running)
    release.set()
    for each in running:
        each.join(CALL_S)
    assert not any(each.is_alive() for each in running)


@pytest.mark.parametrize(("quota", "cores"), [(math.inf, 3), (8.0, 3), (2.0, 2), (1.5, 2), (0.1, 1)], ids=str)
def test_workers_are_as_many_as_the_process_may_use(monkeypatch, quota: float, cores: int):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert threads.usable_cores() == cores
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: None)
    assert threads.usable_cores() == 1


V2, V1 = "0::/kubepods/pod1/box\n", "4:memory:/m\n3:cpu,cpuacct:/kubepods/pod1\n1:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("", {}, math.inf),
        (V2, {}, math.inf),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        (V2, {"kubepods/pod1/box/cpu.max": "max 100000", "kubepods/pod1/cpu.max": "50000 100000"}, 0.5),
        # Where the container's own group is what is mounted, its path on the machine is not there.
        (V2, {"cpu.max": "150000 100000"}, 1.5),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2.0),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, math.inf),
        (V2, {"cpu.max": "200000 0"}, math.inf),
        (V2, {"cpu.max": "much"}, math.inf),
    ],
)
def test_the_quota_is_the_least_of_a_groups_and_its_parents(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float
):
    contents = {"proc/self/cgroup": groups}
    contents |= {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert threads.cpu_quota(tmp_path) == quota
