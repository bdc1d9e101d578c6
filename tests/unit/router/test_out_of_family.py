"""A request that the policy predicts nothing for: what the router records, counts and sends of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asd.v1 import policy_pb2
from asd.values import DecisionAction, DecisionReason
from services.router.convert import response_to
from services.router.domain import Decision
from tests.unit.router.small_cascade import Policy, SmallCascade, answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.router.domain import RoutedRequest, StageAnswer, StageKnowledge


class Unknowing(Policy):
    """Predicts nothing and goes to the last stage. stops: for a budget, after the first answer."""

    stops = False

    async def decide(
        self,
        request: RoutedRequest,
        answer: StageAnswer,
        spent_cost: float,
        spent_ms: float,
        conditions: Sequence[StageKnowledge],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> Decision:
        if self.stops:
            return Decision(DecisionAction.STOP, DecisionReason.MAX_COST, is_out_of_family=True)
        is_last = answer.stage.index == 2
        action = DecisionAction.STOP if is_last else DecisionAction.ESCALATE
        following = None if is_last else 2
        return Decision(action, DecisionReason.OUT_OF_FAMILY, following, is_out_of_family=True)


async def test_it_is_answered_by_the_last_stage_which_verifies_the_draft():
    cascade = SmallCascade(Unknowing())
    outcome = await cascade.ask()
    assert answered(outcome) == ["small", "large"]
    assert cascade.stages["large"].calls == ["verify"]
    response = response_to(outcome, "")
    assert response.out_of_family
    assert not response.HasField("p_correct")
    assert [record.HasField("p_correct") for record in response.stages] == [False, False]
    assert {record.reason for record in response.stages} == {policy_pb2.DECISION_REASON_OUT_OF_FAMILY}


async def test_a_budget_that_stops_it_does_not_hide_it():
    policy = Unknowing()
    policy.stops = True
    outcome = await SmallCascade(policy).ask()
    assert answered(outcome) == ["small"]
    assert outcome.records[-1].decision.reason is DecisionReason.MAX_COST
    assert response_to(outcome, "").out_of_family


@pytest.mark.parametrize("fields", [{}, {"stage": "large"}])
async def test_others_are_not_marked(fields: dict[str, str]):
    outcome = await SmallCascade(Policy()).ask(**fields)
    assert not outcome.is_out_of_family
    assert not response_to(outcome, "").out_of_family
