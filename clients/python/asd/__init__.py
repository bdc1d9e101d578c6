"""Python client of asd: a cascade of language models behind one gRPC API.

>>> from asd import Client
>>> Client("127.0.0.1:50050").ask("What is 12 plus 30?", min_quality=0.95).text  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.errors import (
    AsdError,
    Away,
    BudgetSpent,
    ConversationRefused,
    InvalidRequest,
    ModelRefusal,
    NotFound,
    Overloaded,
    PreconditionFailed,
    PromptTooLong,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from asd.values import (
    Acceptance,
    Answer,
    BatchItem,
    Candidate,
    Committed,
    Constraint,
    Conversation,
    Description,
    Drafted,
    Event,
    Failure,
    FinishReason,
    Message,
    Objective,
    PlanSource,
    Preference,
    Request,
    Revised,
    Role,
    Sampling,
    StageRecord,
    StageStarted,
    StreamedText,
    TokenDetail,
    Tokens,
    Tool,
    ToolCall,
    ToolChoice,
    Tools,
)

if TYPE_CHECKING:
    from asd.client import AsyncClient, Client
    from asd.transport.tls import Tls

__all__ = [
    "Acceptance",
    "Answer",
    "AsdError",
    "AsyncClient",
    "Away",
    "BatchItem",
    "BudgetSpent",
    "Candidate",
    "Client",
    "Committed",
    "Constraint",
    "Conversation",
    "ConversationRefused",
    "Description",
    "Drafted",
    "Event",
    "Failure",
    "FinishReason",
    "InvalidRequest",
    "Message",
    "ModelRefusal",
    "NotFound",
    "Objective",
    "Overloaded",
    "PlanSource",
    "PreconditionFailed",
    "Preference",
    "PromptTooLong",
    "Request",
    "ResourceExhausted",
    "Revised",
    "Role",
    "Sampling",
    "StageRecord",
    "StageStarted",
    "StreamedText",
    "Tls",
    "TokenDetail",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "Tools",
    "Unauthenticated",
    "Unavailable",
]

# Imported at first use: a program that needs only values or stubs does not wait for gRPC.
_LATER = {"AsyncClient": "asd.client", "Client": "asd.client", "Tls": "asd.transport.tls"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'asd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
