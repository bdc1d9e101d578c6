"""The cost of a stage call, in cost units. Pure."""

from __future__ import annotations

# Cost of scoring one draft token, in decode passes. Measured on a 70B with vLLM on an H200: 64 draft tokens
# are scored in 83 ms and a token is decoded in 34.3 ms, so 83 / 34.3 = 2.42 = 1 + 64 * 0.022.
SCORED_TOKEN_PASSES = 0.022


def generate_cost(cost: float) -> float:
    """Return the cost of an answer that a stage generated: the stage's cost, whatever the length."""
    return cost


def verify_cost(cost: float, proposed_tokens: int, forward_passes: int, answer_tokens: int) -> float:
    """Return the cost of a verified answer: its forward passes as a share of a generated answer's.

    cost: of an answer that the stage generates. forward_passes: all passes of the call, including the
    scoring pass over the draft. answer_tokens: tokens of the answer, without the end-of-sequence token.
    """
    further_passes = max(forward_passes - 1, 0)
    passes = 1 + SCORED_TOKEN_PASSES * proposed_tokens + further_passes
    return cost * min(1.0, passes / max(answer_tokens + 1, 1))


def prefill_cost(cost: float, answer_tokens: int) -> float:
    """Return the cost of one pass over a prompt: one pass of an answer of answer_tokens tokens."""
    return cost / (answer_tokens + 1)


def is_above(cost: float, max_cost: float) -> bool:
    """Return whether a sum of costs exceeds a budget by more than rounding: 1.6 + 4.2 is not above 5.8."""
    return cost > max_cost * (1.0 + 1e-9)
