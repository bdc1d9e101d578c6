"""What is recorded of a stage that is given up: what its messages showed, and no more."""

from __future__ import annotations

import pytest

from asd.values import FinishReason, StageAction
from services.router.domain import ScoredTokens, Stage, StageResult, Timing, TokenUsage, Verification
from services.router.stage_call import StageCall

LARGE = Stage("large", 2, 8.0, 1000.0)


def given_up(action: StageAction, *messages: int | tuple[int, int]) -> tuple[TokenUsage, float]:
    """Return usage and cost of a call cut off. messages: numbers of tokens; of proposed and accepted ones."""
    run = StageCall(LARGE, action, "small", lambda: 0.0)
    for message in messages:
        run.take(
            Verification(*message)
            if isinstance(message, tuple)
            else ScoredTokens(range(message), "x" * message, [-0.5] * message)
        )
    answer = run.unfinished_answer()
    return answer.result.usage, answer.cost


@pytest.mark.parametrize(
    ("messages", "passes"),
    [
        ((), 0),
        # A pass each, while the draft is followed; text alone is no pass.
        ((1, 4, 3), 3),
        ((1, 4, 0), 2),
        # The first pass gave one token of the five that are accepted, the second four and the correction.
        ((1, (8, 5), 5), 2),
        # They may come in two messages; each token after them took a pass at most.
        ((1, (8, 5), 2, 3), 2),
        ((1, (8, 5), 2, 6), 5),
        # The first token turned out to be the correction.
        ((1, (1, 0), 2), 3),
        # Verification of a whole draft comes before all tokens, which one pass gave.
        (((6, 6),), 0),
        (((6, 4), 5), 1),
        (((6, 4), 7), 3),
    ],
)
def test_passes_of_a_verification_that_was_given_up_are_those_that_its_messages_show(messages, passes):
    usage, cost = given_up(StageAction.VERIFY, *messages)
    judged = next((message for message in messages if isinstance(message, tuple)), (0, 0))
    tokens = sum(message for message in messages if isinstance(message, int))
    assert usage == TokenUsage(
        completion_tokens=tokens,
        proposed_tokens=judged[0],
        accepted_tokens=judged[1],
        forward_passes=passes,
    )
    share = (1 + 0.022 * judged[0] + max(passes - 1, 0)) / (tokens + 1)
    assert cost == pytest.approx(8.0 * min(share, 1.0))


def test_a_draft_that_was_given_up_took_a_pass_for_each_token():
    usage, _ = given_up(StageAction.GENERATE, 1, 4, 3)
    assert usage == TokenUsage(completion_tokens=8, forward_passes=8)


def test_an_answer_took_until_its_result_came_not_until_its_call_is_closed():
    now = [10.0]
    run = StageCall(LARGE, StageAction.GENERATE, "", lambda: now[0])
    now[0] = 10.25
    run.finish(StageResult("x", (1,), "", FinishReason.EOS, TokenUsage(completion_tokens=1), Timing()))
    now[0] = 12.0
    assert run.answer().latency_ms == pytest.approx(250.0)
