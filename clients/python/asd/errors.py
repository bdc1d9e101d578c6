"""The errors of asd, with messages for the caller.

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
    """An error with a public message and, if one request field is at fault, its path.

    retry_after_s: seconds after which the same request may succeed; None: not known.
    """

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(AsdError):
    """The request breaks the contract; `field` names the field, such as `sampling.temperature`."""


class ModelRefusal(InvalidRequest):
    """A model cannot take a request that the contract allows; another model may take it."""


class PromptTooLong(ModelRefusal):
    """The prompt leaves no room for an answer in the model's context."""


class ConversationRefused(ModelRefusal):
    """The model's chat template does not support the conversation, such as one with a system message."""


class NotFound(AsdError):
    """The request names something that does not exist."""


class PreconditionFailed(AsdError):
    """The service is not in a state in which the request could succeed."""


class InputFailed(PreconditionFailed):
    """A model's chat template or tokenizer fails on this input, but maybe not on other inputs."""


class Unauthenticated(AsdError):
    """The call has no token, or an unknown one."""


class ResourceExhausted(AsdError):
    """A resource is exhausted: a disk, the limit on messages, or the capacity for requests."""


class QueueFull(ResourceExhausted):
    """An engine's queue or memory is full; the same request may succeed later."""


class Overloaded(ResourceExhausted):
    """There are more requests than can be answered in time; retry after retry_after_s."""


class Unavailable(AsdError):
    """A service is unreachable or draining; the same request may succeed elsewhere or later."""


class Away(Unavailable):
    """A service is unreachable, or shuts down and has sent nothing: it may be back soon."""


class BrokenOff(Unavailable):
    """A service ended a call while the request was still being sent; its reason is lost."""


class BudgetSpent(AsdError):
    """The time for the request has passed."""
