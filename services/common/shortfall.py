"""Whether an answer keeps what its request wished for. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asd.values import Answer, Objective

# Why an answer stands that a better one was wanted for. The caller's budgets come before a minimum.
_BEFORE_QUALITY = ("max_cost", "max_latency", "deadline", "stage_unavailable")


def is_late(answer: Answer, max_latency_ms: float | None) -> bool:
    """Return whether an answer took longer than the request wished."""
    return max_latency_ms is not None and answer.latency_ms > max_latency_ms


def gave_up_quality(answer: Answer, min_quality: float | None) -> bool:
    """Return whether an answer stands although a minimum was asked for that nobody says it keeps."""
    reason = next((record.reason for record in reversed(answer.stages) if record.decision == "stop"), "")
    return min_quality is not None and reason in _BEFORE_QUALITY


def missed(answer: Answer, objective: Objective) -> dict[str, bool]:
    """Return which wishes of a request its answer does not keep, as answers in JSON have it."""
    return {
        "missed_max_latency": is_late(answer, objective.max_latency_ms),
        "missed_min_quality": gave_up_quality(answer, objective.min_quality),
    }
