"""Anthropic's /v1/messages. Pure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from asd.values import Conversation, FinishReason, Message, Role, Sampling, ToolCall
from services.gateway.answers import content, told, usage_of
from services.gateway.content import read_message, read_text, read_turns
from services.gateway.errors import anthropic_body
from services.gateway.formats import one_constraint, read_format
from services.gateway.objective import open_body
from services.gateway.openai_completions import MOST_TOKENS
from services.gateway.parameters import MESSAGES
from services.gateway.request import Call, SseEvent, invalid
from services.gateway.streaming import encode
from services.gateway.tools import (
    TOOL_FIELDS,
    ShownText,
    ToolForm,
    known,
    read_anthropic_choice,
    read_tools,
    required_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer, Tokens
    from services.gateway.errors import Problem
    from services.gateway.models import Models

_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM}
_TOOL = ToolForm("custom", "", "input_schema")


class AnthropicMessages:
    """Translates messages; see request.Api."""

    name = MESSAGES

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body."""
        fields, model, route, options = open_body(MESSAGES, body, headers, models)
        turns = read_turns(fields.get("messages"), "messages", _read_message)
        system = fields.get("system")
        if system is not None:
            turns = [Message(Role.SYSTEM, read_text(system, "system")), *turns]
        tools = read_tools(fields, _TOOL, read_anthropic_choice(fields))
        wanted = read_format(
            fields.members("output_config", ("format",)).get("format"), "output_config.format"
        )
        constraint, field = one_constraint(wanted, "output_config.format", options, tools)
        sampling = Sampling(
            fields.whole("max_tokens", 1, MOST_TOKENS, is_required=True),
            fields.number("temperature", 1.0) or 0.0,
            fields.number("top_p", 1.0, is_positive=True),
            None,
            fields.stops("stop_sequences", may_be_text=False),
            constraint,
        )
        request = route.request(
            tuple(turns) if tools is None else Conversation(turns, tools), sampling, options
        )
        names = {
            **TOOL_FIELDS,
            "sampling.constraint": field,
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
            "content": _blocks(answer),
            **_stop(call, answer),
            "usage": _usage(answer),
            "asd": told(call.requests, answers),
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
        self._shown = ShownText(call)
        # Whether the text has begun. An answer that is tool calls has none.
        self._is_open = False

    def begin(self) -> list[SseEvent]:
        """Return the events that open the message; the text too, if the answer is sure to have one.

        The prompt's tokens are known at the end.
        """
        message = {
            **_message(self._call, self._id),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return [
            _event("message_start", message=message),
            *([] if self._shown.has_tools else self._open()),
            *self.keep_alive(),
        ]

    def text(self, index: int, tokens: Tokens) -> list[SseEvent]:
        """Return the events of tokens, if they show anything."""
        return self._delta(self._shown.take(index, tokens.text))

    def finish(self, index: int, answer: Answer) -> list[SseEvent]:
        """Return the events that close text and message; between them the tool calls."""
        events = self._delta(self._shown.rest(index))
        for place, block in enumerate(_blocks(answer)):
            if block["type"] == "text":
                events += self._open()
            else:
                events.append(_event("content_block_start", index=place, content_block=block | {"input": {}}))
                delta = {"type": "input_json_delta", "partial_json": encode(block["input"]).decode()}
                events.append(_event("content_block_delta", index=place, delta=delta))
            events.append(_event("content_block_stop", index=place))
        return [
            *events,
            _event(
                "message_delta",
                delta=_stop(self._call, answer),
                usage=_usage(answer),
                asd=told(self._call.requests, [answer]),
            ),
            _event("message_stop"),
        ]

    def _open(self) -> list[SseEvent]:
        """Return the event that opens the text, the first time."""
        if self._is_open:
            return []
        self._is_open = True
        return [_event("content_block_start", index=0, content_block={"type": "text", "text": ""})]

    def _delta(self, text: str) -> list[SseEvent]:
        if not text:
            return []
        delta = {"type": "text_delta", "text": text}
        return [*self._open(), _event("content_block_delta", index=0, delta=delta)]

    def end(self) -> list[SseEvent]:
        """Return nothing: the message's own end is the stream's."""
        return []

    def keep_alive(self) -> list[SseEvent]:
        """Return a ping."""
        return [_event("ping")]

    def failed(self, problem: Problem) -> list[SseEvent]:
        """Return the error."""
        return [SseEvent(anthropic_body(problem), "error")]


def _read_message(value: object, where: str) -> list[Message]:
    """Return the turns of a message: its tool results are turns of their own."""
    blocks = value.get("content") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(blocks, list):
        return [read_message(value, where, _ROLES)]
    kinds = [each.get("type") for each in blocks if isinstance(each, dict)]
    if "tool_use" in kinds and value.get("role") == "assistant":
        return [_read_calls(value, blocks, where)]
    if "tool_result" in kinds and value.get("role") == "user":
        return _read_results(value, blocks, where)
    return [read_message(value, where, _ROLES)]


def _read_calls(value: Mapping[str, Any], blocks: list[Any], where: str) -> Message:
    known(value, where, ("role", "content"))
    texts, calls = [], []
    for index, block in enumerate(blocks):
        at = f"{where}.content[{index}]"
        if isinstance(block, dict) and block.get("type") == "tool_use":
            known(block, at, ("type", "id", "name", "input", "cache_control", "caller"))
            given = block.get("input")
            if not isinstance(given, dict):
                raise invalid(f"{at}.input", "must be an object")
            name = required_text(block, "name", at)
            calls.append(ToolCall(required_text(block, "id", at), name, encode(given).decode()))
        else:
            texts.append(read_text([block], f"{where}.content", is_answer=True, may_be_empty=True))
    return Message(Role.ASSISTANT, "\n".join(filter(None, texts)), tuple(calls))


def _read_results(value: Mapping[str, Any], blocks: list[Any], where: str) -> list[Message]:
    known(value, where, ("role", "content"))
    turns = []
    for index, block in enumerate(blocks):
        at = f"{where}.content[{index}]"
        if isinstance(block, dict) and block.get("type") == "tool_result":
            # That a call failed is in the result's text, or nowhere: no model is told otherwise.
            known(block, at, ("type", "tool_use_id", "content", "is_error", "cache_control"))
            text = read_text(block.get("content"), f"{at}.content", may_be_empty=True)
            turns.append(Message(Role.TOOL, text, tool_call_id=required_text(block, "tool_use_id", at)))
        else:
            turns.append(Message(Role.USER, read_text([block], f"{where}.content")))
    return turns


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    """Return the content of an answer: its text, if it has any or nothing else, and its calls."""
    text = content(answer)
    return [
        *([{"type": "text", "text": text}] if text or not answer.tool_calls else []),
        *(
            {"type": "tool_use", "id": each.id, "name": each.name, "input": json.loads(each.arguments)}
            for each in answer.tool_calls
        ),
    ]


def _message(call: Call, message_id: str) -> dict[str, Any]:
    return {"id": f"msg_{message_id}", "type": "message", "role": "assistant", "model": call.model}


def _stop(call: Call, answer: Answer) -> dict[str, Any]:
    """Return why an answer ended. Which of several stop sequences ended it is not known."""
    if answer.finish_reason == FinishReason.LENGTH:
        # A further call may have been cut off.
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if answer.tool_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
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
