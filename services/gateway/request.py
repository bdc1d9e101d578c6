"""A request as every API of the gateway understands it. Pure: no HTTP, no gRPC, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from asd.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer, Request, Tokens
    from services.gateway.errors import Problem
    from services.gateway.models import Models

# The most answers to one request. Chosen: the design's bound on `n`.
MOST_CHOICES = 8
# Most choices of a body with several prompts. Chosen: far more than evaluation harnesses send in one.
MOST_ANSWERS = 64
# The contract's bound on stop sequences.
MOST_STOPS = 8
# The contract's bound on the bytes of a request.
MOST_BYTES = 4 << 20
_SEEDS = 2**64
# Odd, so that its multiples differ modulo 2**64. Chosen: the golden ratio's, as in SplitMix64.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Call:
    """One request to the gateway.

    model: as the caller named it. requests: one for each choice, in order of the choices. fields: the API's
    names of the contract's fields, for errors. prompts: how many prompts there are; the choices of one follow
    each other. has_usage: whether a stream ends with usage. echo: values of the body that its answer repeats.
    """

    model: str
    requests: tuple[Request, ...]
    fields: Mapping[str, str]
    is_stream: bool = False
    has_usage: bool = False
    prompts: int = 1
    echo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text_bytes(self) -> int:
        """Bytes of the longest prompt or conversation."""
        inputs = {each.input for each in self.requests}
        texts = [(each,) if isinstance(each, str) else [turn.content for turn in each] for each in inputs]
        return max(sum(len(text.encode(errors="replace")) for text in each) for each in texts)


@dataclass(frozen=True)
class SseEvent:
    """An event of a stream. name: its `event`; "" for none. data: a JSON value, or a text sent as it is."""

    data: Any
    name: str = ""


class StreamWriter(Protocol):
    """Writes a stream in an API's form. Every method returns the events to send now."""

    def begin(self) -> list[SseEvent]:
        """Return what comes before the first text."""

    def text(self, index: int, tokens: Tokens) -> list[SseEvent]:
        """Return the events of tokens that are final, of one choice."""

    def finish(self, index: int, answer: Answer) -> list[SseEvent]:
        """Return the events of a choice's end."""

    def end(self) -> list[SseEvent]:
        """Return what comes once all choices have ended."""

    def keep_alive(self) -> list[SseEvent]:
        """Return an event without content."""

    def failed(self, problem: Problem) -> list[SseEvent]:
        """Return the events of an error after the stream has begun, and of the stream's end."""


class Api(Protocol):
    """One API of the gateway: what its bodies mean, and how its answers look."""

    name: str

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body. Raises InvalidRequest or NotFound, naming the parameter."""

    def answer(self, call: Call, answers: tuple[Answer, ...], created: int) -> dict[str, Any]:
        """Return the body of an answer. created: seconds since 1970."""

    def writer(self, call: Call, stream_id: str, created: int) -> StreamWriter:
        """Return what writes the answer as a stream."""

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the body of an error."""


def choices(request: Request, count: int) -> tuple[Request, ...]:
    """Return a request for each of several choices, with seeds that differ.

    The first choice has the caller's seed. Without one, the router draws one for each.
    """
    seed = request.sampling.seed
    if seed is None:
        return (request,) * count
    return tuple(
        replace(request, sampling=replace(request.sampling, seed=(seed + index * _SEED_STEP) % _SEEDS))
        for index in range(count)
    )


def api_field(fields: Mapping[str, str], name: str) -> str:
    """Return the API's name of a contract's field, or of the one that it is within; "" if it has none.

    fields: the API's names, by the contract's. A place within the conversation stays:
    "messages[3].content" for "conversation.messages[3].content".
    """
    name = name.removeprefix("request.")
    for known, api_name in fields.items():
        if name == known or name.startswith((f"{known}.", f"{known}[")):
            return api_name + (name[len(known) :] if known == "conversation.messages" else "")
    return ""


def invalid(param: str, message: str) -> InvalidRequest:
    """Return the error of a parameter, whose name begins the message."""
    return InvalidRequest(f"{param}: {message}", field=param)
