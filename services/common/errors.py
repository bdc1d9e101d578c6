"""The errors of asd.errors, and one that a service alone raises."""

from __future__ import annotations

from asd.errors import (
    AsdError,
    Away,
    BrokenOff,
    BudgetSpent,
    ConversationRefused,
    InputFailed,
    InvalidRequest,
    ModelRefusal,
    NotFound,
    Overloaded,
    PreconditionFailed,
    PromptTooLong,
    QueueFull,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "AsdError",
    "Away",
    "BrokenOff",
    "BudgetSpent",
    "ConversationRefused",
    "Draining",
    "InputFailed",
    "InvalidRequest",
    "ModelRefusal",
    "NotFound",
    "Overloaded",
    "PreconditionFailed",
    "PromptTooLong",
    "QueueFull",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
]


class Draining(Unavailable):
    """This service is about to end, and has not begun with the request. Callers see Away."""
