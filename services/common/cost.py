"""What a stage call costs, in cost units. Pure."""

from __future__ import annotations

# Cost of scoring one draft token, in decode passes. Measured on a 70B with vLLM on an H200: 64 draft tokens
# are scored in 83 ms and a token is decoded in 34.3 ms, so 83 / 34.3 = 2.42 = 1 + 64 * 0.022.
SCORED_TOKEN_PASSES = 0.022


def generate_cost(cost: float) -> float:
    """Return the cost of an answer that a stage wrote by itself: the stage's cost, whatever the length."""
    return cost


def verify_cost(cost: float, proposed_tokens: int, forward_passes: int, answer_tokens: int) -> float:
    """Return the cost of a verified answer: the share of a whole answer's forward passes that it took.

    cost: cost of a whole answer written by the stage. forward_passes: all passes of the call, the scoring
    pass over the draft included. answer_tokens: tokens of the answer, the end-of-sequence token not counted.
    """
    further_passes = max(forward_passes - 1, 0)
    passes = 1 + SCORED_TOKEN_PASSES * proposed_tokens + further_passes
    return cost * min(1.0, passes / max(answer_tokens + 1, 1))


def prefill_cost(cost: float, answer_tokens: int) -> float:
    """Return the cost of one pass over a prompt: its share of an answer of so many tokens."""
    return cost / (answer_tokens + 1)


def is_above(cost: float, max_cost: float) -> bool:
    """Return whether a sum of costs is above a budget by more than rounding: 1.6 + 4.2 is not above 5.8."""
    return cost > max_cost * (1.0 + 1e-9)
