"""Which replica a conversation is sent to."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.router.clients.affinity import choose_replica

IDLE = {f"10.0.0.{number}:50061": 0 for number in range(5)}


def test_a_conversation_stays_on_its_replica_and_moves_only_if_that_leaves():
    keys = [f"session-{number}" for number in range(400)]
    before = {key: choose_replica(key, IDLE) for key in keys}
    assert before == {key: choose_replica(key, dict(reversed(IDLE.items()))) for key in keys}
    rest = {address: 0 for address in IDLE if address != "10.0.0.3:50061"}
    moved = [key for key in keys if choose_replica(key, rest) != before[key]]
    assert moved == [key for key in keys if before[key] == "10.0.0.3:50061"]


def test_conversations_spread_over_the_replicas():
    counts = Counter(choose_replica(f"session-{number}", IDLE) for number in range(2000))
    # 400 each, within four standard deviations of a binomial share.
    assert all(abs(counts[address] - 400) < 72 for address in IDLE)


def test_a_busy_replica_is_passed_over():
    home = choose_replica("session", IDLE)
    # Mean 2 of ten calls; 1.25 times the share of eleven is 2.75, so 3 are too many.
    assert choose_replica("session", {**dict.fromkeys(IDLE, 2), home: 2}) == home
    assert choose_replica("session", {**dict.fromkeys(IDLE, 2), home: 3}) != home


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 50), min_size=1), st.text())
def test_there_is_always_a_replica_and_never_one_above_its_share(loads, key):
    chosen = choose_replica(key, loads)
    assert loads[chosen] <= 1.25 * (sum(loads.values()) + 1) / len(loads) + 1
