"""The router's pure parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.clients.breaker import Breaker
from services.router.planning.static_plan import StaticPlan


def test_static_plan():
    plan = StaticPlan((0, 2), 4)
    assert plan.first((), ()) == 0
    assert plan.first({0}, ()) == 2
    assert plan.first((), {0, 2}) == 3
    assert plan.first({0, 1, 2, 3}, ()) == 0
    assert plan.first((), {0, 1, 2, 3}) is None
    assert [plan.next_after(stage) for stage in range(4)] == [2, 2, None, None]
    assert plan.next_after(0, {2}) is None


@pytest.mark.parametrize("stages", [(), (1, 0), (1, 1), (4,), (-1,)])
def test_static_plan_must_fit_the_cascade(stages):
    with pytest.raises(ValueError, match="static plan"):
        StaticPlan(stages, 4)


@given(st.sets(st.integers(0, 5), min_size=1), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_static_plan_never_names_what_is_excluded(stages, avoid, excluded):
    plan = StaticPlan(tuple(sorted(stages)), 6)
    first = plan.first(avoid, excluded)
    assert (first is None) == (excluded == set(range(6)))
    assert first not in excluded or first is None
    assert first not in avoid or not set(range(6)) - excluded - avoid


def test_breaker_opens_probes_and_closes():
    now = [0.0]
    breaker = Breaker(lambda: now[0], failures=3, interval_s=1.0)
    for _ in range(3):
        assert breaker.allows()
        breaker.failed(now[0])
    assert not breaker.allows()
    now[0] = 1.0
    assert breaker.allows()
    assert not breaker.allows()
    breaker.failed(now[0])
    now[0] = 1.9
    assert not breaker.allows()
    now[0] = 2.0
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    breaker.failed(now[0])
    assert breaker.allows()


def test_calls_that_fail_together_are_one_failure():
    now = [0.0]
    breaker = Breaker(lambda: now[0], failures=3)
    for _ in range(2):
        began = now[0]
        now[0] += 0.1
        for _ in range(8):
            breaker.failed(began)
        assert not breaker.is_open
    breaker.failed(now[0])
    assert breaker.is_open
