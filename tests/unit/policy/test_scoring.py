"""Calls that come together are scored as one batch per view, and answered as if each had come alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asd.v1 import common_pb2, policy_pb2
from policy_service.artifact import build_policy, load_artifact
from policy_service.domain import State
from policy_service.scoring import Scoring
from policy_service.servicer import PolicyServicer
from suites import split

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

ARTIFACT = Path(__file__).parents[3] / "policy_service" / "policy.zip"
CASCADE = ["small", "medium", "large"]


class Doubling:
    """A policy whose scores are twice its features. fails: the view that it cannot score."""

    def __init__(self, fails: int | None = None) -> None:
        self.passes: list[tuple[int, int]] = []
        self._fails = fails

    def score(self, states: Sequence[State]) -> list[list[float]]:
        (view,) = {each.view for each in states}
        self.passes.append((view, len(states)))
        if view == self._fails:
            raise ValueError("this view fails")
        return [[2.0 * float(each.features[0])] for each in states]


def state(view: int, value: float) -> State:
    return State(view, np.array([value], np.float32))


async def score(scoring: Scoring, *asked: tuple[Any, State]) -> list[Any]:
    """Return what becomes of calls that come in the same turn of the loop: the first score, or an error."""
    calls = (scoring.scores(policy, each) for policy, each in asked)
    found = await asyncio.gather(*calls, return_exceptions=True)
    return [each if isinstance(each, BaseException) else each.values[0] for each in found]


async def test_of_what_comes_together_the_first_is_not_held_up_and_the_rest_is_one_pass_per_view():
    policy, scoring = Doubling(), Scoring()
    asked = [(policy, state(view, 10.0 * view + index)) for index in range(3) for view in (0, 4)]
    assert await score(scoring, *asked) == [0.0, 80.0, 2.0, 82.0, 4.0, 84.0]
    assert policy.passes[0] == (0, 1)
    assert sorted(policy.passes[1:]) == [(0, 2), (4, 3)]


async def test_nothing_is_waited_for_and_nothing_is_scored_twice():
    policy, scoring = Doubling(), Scoring()
    for index in range(3):
        assert await score(scoring, (policy, state(0, index))) == [2.0 * index]
    assert policy.passes == [(0, 1)] * 3


async def test_a_policy_that_comes_into_force_meanwhile_scores_its_own_calls_alone():
    before, after, scoring = Doubling(), Doubling(), Scoring()
    asked = [(policy, state(0, index)) for index in range(3) for policy in (before, after)]
    assert await score(scoring, *asked) == [0.0, 0.0, 2.0, 2.0, 4.0, 4.0]
    assert (before.passes, after.passes) == ([(0, 1), (0, 2)], [(0, 3)])


async def test_a_view_that_fails_fails_its_own_calls_alone():
    policy, scoring = Doubling(fails=1), Scoring()
    found = await score(scoring, (policy, state(1, 1.0)), (policy, state(0, 1.0)), (policy, state(1, 2.0)))
    assert [type(each) for each in found] == [ValueError, float, ValueError]
    assert await score(scoring, (policy, state(0, 3.0))) == [6.0]


async def test_a_caller_that_has_gone_is_left_out():
    policy: Any = Doubling()
    scoring = Scoring()
    first, gone, kept = (asyncio.ensure_future(scoring.scores(policy, state(0, n))) for n in (1.0, 2.0, 3.0))
    # It goes between its call and the end of the turn in which it came.
    asyncio.get_running_loop().call_soon(gone.cancel)
    # What fails here would hang.
    await asyncio.wait([first, gone, kept], timeout=10.0)
    assert gone.cancelled()
    assert kept.done()
    assert [list((await each).values) for each in (first, kept)] == [[2.0], [6.0]]
    assert policy.passes == [(0, 1), (0, 1)]


class Counting:
    """A predictor that counts the states of each pass."""

    def __init__(self, predictor: Any) -> None:
        self.sizes: list[int] = []
        self._predictor = predictor

    def scores(self, view: int, features: npt.NDArray[np.float32]) -> Any:
        self.sizes.append(1)
        return self._predictor.scores(view, features)

    def score_rows(self, view: int, features: npt.NDArray[np.float32]) -> Any:
        self.sizes.append(len(features))
        return self._predictor.score_rows(view, features)


def plans() -> list[policy_pb2.PlanRequest]:
    return [policy_pb2.PlanRequest(prompt=task.prompt, cascade=CASCADE) for task in split("demo", 24)]


def decisions() -> list[policy_pb2.DecideRequest]:
    """Return questions about answers of every kind: written, verified, and cut."""
    rng = np.random.default_rng(0)
    found = []
    for index, task in enumerate(split("demo", 24)):
        count = int(rng.integers(2, 30))
        stage = index % 3
        request = policy_pb2.DecideRequest(
            prompt=task.prompt,
            cascade=CASCADE,
            stage=CASCADE[stage],
            draft=policy_pb2.DraftEvidence(
                text=task.solution,
                logprobs=-rng.exponential(0.5, count),
                entropies=rng.exponential(0.5, count),
                top2_margins=rng.random(count),
                finish_reason="FINISH_REASON_LENGTH" if index % 5 == 0 else "FINISH_REASON_EOS",
            ),
        )
        if stage and index % 2:
            ranks = rng.integers(0, 3, count).tolist()
            request.verification.CopyFrom(
                policy_pb2.VerificationEvidence(
                    proposed_tokens=count, accepted_tokens=1, ranks=ranks, draft_stage=CASCADE[stage - 1]
                )
            )
        request.objective.preference = common_pb2.PREFERENCE_BALANCED
        found.append(request)
    return found


@pytest.mark.parametrize(("method", "requests"), [("Plan", plans()), ("Decide", decisions())])
async def test_answers_together_are_those_given_alone_bit_for_bit(method: str, requests: list[Any]) -> None:
    _, document, own_predictor = load_artifact(ARTIFACT)
    predictor = Counting(own_predictor)
    servicer = PolicyServicer(build_policy(document, predictor), document, None)
    ask: Any = getattr(servicer, method)
    alone = [await ask(request, None) for request in requests]
    assert predictor.sizes == [1] * len(requests)
    predictor.sizes.clear()
    together = await asyncio.gather(*(ask(request, None) for request in requests))
    # The first, and one pass for each view that was asked about.
    assert sum(predictor.sizes) == len(requests)
    assert len(predictor.sizes) <= 1 + len(document.views)
    for each in (*alone, *together):
        if method == "Decide":
            assert each.predict_us > 0.0
            each.ClearField("predict_us")
    assert together == alone
