"""Anthropic's /v1/messages. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import FinishReason, Message, Role, Sampling
from services.gateway.answers import told, usage_of
from services.gateway.content import read_text, read_turns
from services.gateway.errors import anthropic_body
from services.gateway.objective import open_body
from services.gateway.openai_completions import MOST_TOKENS
from services.gateway.parameters import MESSAGES
from services.gateway.request import Call, SseEvent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer
    from services.gateway.errors import Problem
    from services.gateway.models import Models

_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM}


class AnthropicMessages:
    """Translates messages; see request.Api."""

    name = MESSAGES

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body."""
        fields, model, route, options = open_body(MESSAGES, body, headers, models)
        turns = read_turns(fields.get("messages"), "messages", _ROLES)
        system = fields.get("system")
        if system is not None:
            turns = [Message(Role.SYSTEM, read_text(system, "system")), *turns]
        sampling = Sampling(
            fields.whole("max_tokens", 1, MOST_TOKENS, is_required=True),
            fields.number("temperature", 1.0) or 0.0,
            fields.number("top_p", 1.0, is_positive=True),
            None,
            fields.stops("stop_sequences", may_be_text=False),
        )
        request = route.request(tuple(turns), sampling, options)
        names = {
            "conversation": "messages",
            "sampling.max_new_tokens": "max_tokens",
            "sampling.temperature": "temperature",
            "sampling.top_p": "top_p",
            "sampling.stop": "stop_sequences",
            "stage": "model",
            "chain": "model",
            **options.fields,
        }
        return Call(model, (request,), names, fields.flag("stream"))

    def answer(self, call: Call, answers: tuple[Answer, ...], created: int) -> dict[str, Any]:
        """Return the body of an answer."""
        (answer,) = answers
        return {
            **_message(call, answer.request_id),
            "content": [{"type": "text", "text": answer.text}],
            **_stop(call, answer),
            "usage": _usage(answer),
            "asd": told(answers),
        }

    def writer(self, call: Call, stream_id: str, created: int) -> MessagesWriter:
        """Return what writes the answer as a stream."""
        return MessagesWriter(call, stream_id)

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the body of an error."""
        return anthropic_body(problem)


class MessagesWriter:
    """Writes the events of a message; see request.StreamWriter."""

    def __init__(self, call: Call, stream_id: str) -> None:
        self._call = call
        self._id = stream_id

    def begin(self) -> list[SseEvent]:
        """Return the events that open message and text. The prompt's tokens are known at the end."""
        message = {
            **_message(self._call, self._id),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        block = {"type": "text", "text": ""}
        return [
            _event("message_start", message=message),
            _event("content_block_start", index=0, content_block=block),
            *self.keep_alive(),
        ]

    def text(self, index: int, text: str) -> list[SseEvent]:
        """Return the event of a text."""
        return [_event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})]

    def finish(self, index: int, answer: Answer) -> list[SseEvent]:
        """Return the events that close text and message."""
        return [
            _event("content_block_stop", index=0),
            _event(
                "message_delta", delta=_stop(self._call, answer), usage=_usage(answer), asd=told([answer])
            ),
            _event("message_stop"),
        ]

    def end(self) -> list[SseEvent]:
        """Return nothing: the message's own end is the stream's."""
        return []

    def keep_alive(self) -> list[SseEvent]:
        """Return a ping."""
        return [_event("ping")]

    def failed(self, problem: Problem) -> list[SseEvent]:
        """Return the error."""
        return [SseEvent(anthropic_body(problem), "error")]


def _message(call: Call, message_id: str) -> dict[str, Any]:
    return {"id": f"msg_{message_id}", "type": "message", "role": "assistant", "model": call.model}


def _stop(call: Call, answer: Answer) -> dict[str, Any]:
    """Return why an answer ended. Which of several stop sequences ended it is not known."""
    if answer.finish_reason == FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if answer.finish_reason == FinishReason.STOP:
        stops = call.requests[0].sampling.stop
        return {"stop_reason": "stop_sequence", "stop_sequence": stops[0] if len(stops) == 1 else None}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(answer: Answer) -> dict[str, Any]:
    """Return Anthropic's usage, where cached tokens are no input tokens, and OpenAI's counts of drafts."""
    usage = usage_of([answer])
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.rejected,
        },
    }


def _event(name: str, **fields: Any) -> SseEvent:
    return SseEvent({"type": name, **fields}, name)
