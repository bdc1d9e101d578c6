"""How busy the stages are: the wait to be expected there, and the calls under way."""

from __future__ import annotations

import pytest

from services.router.load import Load


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load(2, clock)


def test_a_stage_that_was_never_asked_is_idle(load: Load, clock: Clock) -> None:
    clock.now += 1000.0
    assert [load.expected_queue_ms(stage) for stage in (0, 1)] == [0.0, 0.0]
    assert [load.queue_depth(stage) for stage in (0, 1)] == [0, 0]


def test_a_new_wait_weighs_a_fifth(load: Load) -> None:
    # 0.2 * 100; 20 + 0.2 * (50 - 20); 26 + 0.2 * (0 - 26).
    for queue_ms, mean_ms in ((100.0, 20.0), (50.0, 26.0), (0.0, 20.8)):
        load.waited(0, queue_ms)
        assert load.expected_queue_ms(0) == pytest.approx(mean_ms)
    assert load.expected_queue_ms(1) == 0.0


def test_equal_waits_are_what_is_expected_in_the_end(load: Load) -> None:
    for _ in range(10):
        load.waited(1, 30.0)
    # 1 - 0.8 ** 10 = 0.89263: ten calls carry nine tenths.
    assert load.expected_queue_ms(1) == pytest.approx(30.0 * 0.8926258176)


def test_a_mean_that_nothing_renews_halves_in_five_seconds(load: Load, clock: Clock) -> None:
    load.waited(0, 400.0)
    seen = []
    for _ in range(4):
        seen.append(load.expected_queue_ms(0))
        # Looking does not keep it fresh.
        assert load.expected_queue_ms(0) == seen[-1]
        clock.now += 5.0
    assert seen == pytest.approx([80.0, 40.0, 20.0, 10.0])
    clock.now += 1e6
    assert load.expected_queue_ms(0) == 0.0


def test_a_new_wait_is_added_to_what_has_faded(load: Load, clock: Clock) -> None:
    load.waited(0, 400.0)
    clock.now += 5.0
    # 40 are left of the 80: 40 + 0.2 * (100 - 40).
    load.waited(0, 100.0)
    assert load.expected_queue_ms(0) == pytest.approx(52.0)
    # And the fading starts again from here.
    clock.now += 5.0
    assert load.expected_queue_ms(0) == pytest.approx(26.0)


def test_calls_under_way_are_counted_per_stage(load: Load) -> None:
    with load.calling(0):
        with load.calling(0), load.calling(1):
            assert [load.queue_depth(stage) for stage in (0, 1)] == [2, 1]
        assert [load.queue_depth(stage) for stage in (0, 1)] == [1, 0]
    assert load.queue_depth(0) == 0


def test_a_call_that_fails_is_no_longer_under_way(load: Load) -> None:
    with pytest.raises(RuntimeError), load.calling(1):
        raise RuntimeError
    assert load.queue_depth(1) == 0
