"""What the router tells the policy of its stages, as messages."""

from __future__ import annotations

from asd.v1 import policy_pb2
from services.router.convert import conditions_to
from services.router.domain import StageKnowledge


def test_the_policy_is_told_each_stages_queue_and_whether_it_is_there() -> None:
    known = [
        StageKnowledge("small", available=True, queue_depth=3, expected_queue_ms=40.5),
        StageKnowledge("large", available=False),
    ]
    assert conditions_to(known) == [
        policy_pb2.StageCondition(stage="small", available=True, queue_depth=3, expected_queue_ms=40.5),
        policy_pb2.StageCondition(stage="large", available=False),
    ]
