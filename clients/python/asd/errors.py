"""Errors that asd raises on purpose, with text that a caller may read.

AsdError                    anything else: INTERNAL
├── InvalidRequest          malformed request, unspecified enum; names the field
│   └── ModelRefusal        a model cannot take a request that is well formed; another model may
│       ├── PromptTooLong           its context is too short for the prompt
│       └── ConversationRefused     its chat template refuses the conversation
├── NotFound                unknown stage, model or policy version
├── PreconditionFailed      artifact absent, or not made for this cascade
│   └── InputFailed             a model's template or tokenizer fails on this input
├── Unauthenticated         no token, or an unknown one
├── ResourceExhausted       no room: a disk, or a message over a limit
│   ├── QueueFull               an engine's queue or memory is full
│   └── Overloaded              there is no room for the request now; says when to ask again
├── Unavailable             stage or policy unreachable, or draining
│   ├── Away                it has not answered: gone, not there yet, or about to end
│   └── BrokenOff           it ended the call, and why is not known
└── BudgetSpent             the deadline or a time budget passed

asd.transport.status holds the table from these to gRPC status codes.
"""

# ruff: noqa: N818 - an error is named by its cause, as in the table of asd.transport.status
from __future__ import annotations

from asd.visible import OneLineError


class AsdError(OneLineError):
    """An error with a public message and, where one request field is at fault, its path.

    retry_after_s: after how many seconds the same request may succeed; None: not known.
    """

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(AsdError):
    """The request breaks the contract; `field` names where, as in `sampling.temperature`."""


class ModelRefusal(InvalidRequest):
    """A model cannot take a request that the contract allows; another model may take it."""


class PromptTooLong(ModelRefusal):
    """The prompt leaves no room for an answer in the model's context."""


class ConversationRefused(ModelRefusal):
    """The model's chat template has no form for the conversation, such as one with a system message."""


class NotFound(AsdError):
    """The request names something that does not exist."""


class PreconditionFailed(AsdError):
    """The service is not in a state in which the request could succeed."""


class InputFailed(PreconditionFailed):
    """A model's chat template or tokenizer fails on this input, and is not known to fail on others."""


class Unauthenticated(AsdError):
    """The caller shows no token, or one that is not known."""


class ResourceExhausted(AsdError):
    """There is no room: on a disk, within the limit on messages, or for one more request."""


class QueueFull(ResourceExhausted):
    """An engine's queue or memory is full with other requests; the same one may succeed later."""


class Overloaded(ResourceExhausted):
    """More is asked than can be computed in time; the same request may succeed after retry_after_s."""


class Unavailable(AsdError):
    """A service is unreachable or draining; the same request may succeed elsewhere or later."""


class Away(Unavailable):
    """A service could not be reached, or is about to end and has sent nothing: it may be back soon."""


class BrokenOff(Unavailable):
    """A service ended a call while it was still being sent; what it said of the reason is lost."""


class BudgetSpent(AsdError):
    """The time for the request has passed."""
