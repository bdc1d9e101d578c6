"""OpenAI's /v1/responses, without state. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import Conversation, FinishReason, Message, Role, Sampling, ToolCall
from services.gateway.answers import content, told, usage_of
from services.gateway.content import read_message, read_text, read_turns
from services.gateway.errors import openai_body
from services.gateway.formats import one_constraint, read_format
from services.gateway.objective import open_body
from services.gateway.openai_completions import MOST_TOKENS
from services.gateway.parameters import RESPONSES
from services.gateway.request import Call, SseEvent, invalid
from services.gateway.scores import MOST_LIKELIEST, scores_of
from services.gateway.tools import (
    TOOL_FIELDS,
    ShownText,
    ToolForm,
    known,
    read_arguments,
    read_choice,
    read_tools,
    required_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer, Tokens
    from services.gateway.errors import Problem
    from services.gateway.models import Models
    from services.gateway.parameters import Body

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}
_TOOL = ToolForm("function", "", "parameters")
_LOGPROBS = "message.output_text.logprobs"
# Fields of a message in the input that only an earlier answer has.
_INERT = ("type", "id", "status", "phase")
# Texts without effect that a response repeats.
_ECHOED = ("user", "safety_identifier", "prompt_cache_key")


class OpenAiResponses:
    """Translates responses; see request.Api."""

    name = RESPONSES

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body."""
        fields, model, route, options = open_body(RESPONSES, body, headers, models)
        turns = _turns(fields.get("input"))
        tools = read_tools(fields, _TOOL, read_choice(fields, _TOOL.nested))
        text = fields.members("text", ("format", "verbosity"))
        if text.get("verbosity", "medium") != "medium":
            raise invalid("text.verbosity", "is not honoured here: the models have no such setting")
        wanted = read_format(text.get("format"), "text.format")
        constraint, field = one_constraint(wanted, "text.format", options, tools)
        instructions = fields.text("instructions")
        if instructions:
            turns = [Message(Role.SYSTEM, instructions), *turns]
        if fields.includes_usage():
            raise invalid("stream_options.include_usage", "there is no such parameter: usage always comes")
        sampling = Sampling(
            fields.whole("max_output_tokens", 1, MOST_TOKENS),
            fields.number("temperature", 2.0) or 0.0,
            fields.number("top_p", 1.0, is_positive=True),
            constraint=constraint,
            top_logprobs=_read_scores(fields),
        )
        request = route.request(
            tuple(turns) if tools is None else Conversation(turns, tools), sampling, options
        )
        names = {
            **TOOL_FIELDS,
            "conversation": "input",
            "sampling.constraint": field,
            "sampling.top_logprobs": "top_logprobs",
            "sampling.max_new_tokens": "max_output_tokens",
            "sampling.temperature": "temperature",
            "sampling.top_p": "top_p",
            "stage": "model",
            "chain": "model",
            **options.fields,
        }
        echo = {
            "instructions": instructions,
            "max_output_tokens": sampling.max_new_tokens,
            "metadata": fields.labels("metadata"),
            "parallel_tool_calls": tools is None or not tools.single_call,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": [_told_tool(each) for each in fields.get("tools") or []],
            "top_logprobs": sampling.top_logprobs or 0,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            **{name: fields.text(name, may_be_empty=True) for name in _ECHOED},
        }
        return Call(model, (request,), names, fields.flag("stream"), echo=echo)

    def answer(self, call: Call, answers: tuple[Answer, ...], created: int) -> dict[str, Any]:
        """Return the body of an answer."""
        return _response(call, answers[0].request_id, created, answers[0])

    def writer(self, call: Call, stream_id: str, created: int) -> ResponsesWriter:
        """Return what writes the answer as a stream."""
        return ResponsesWriter(call, stream_id, created)

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the body of an error."""
        return openai_body(problem)


class ResponsesWriter:
    """Writes the events of a response; see request.StreamWriter."""

    def __init__(self, call: Call, stream_id: str, created: int) -> None:
        self._call = call
        self._id = stream_id
        self._created = created
        self._sequence = 0
        self._shown = ShownText(call)
        # Whether the message has begun. An answer that is tool calls has none.
        self._is_open = False

    def begin(self) -> list[SseEvent]:
        """Return the events that open the response; the message too, if the answer is sure to have one."""
        started = _response(self._call, self._id, self._created, None)
        return [
            self._event("response.created", response=started),
            self._event("response.in_progress", response=started),
            *([] if self._shown.has_tools else self._open()),
        ]

    def text(self, index: int, tokens: Tokens) -> list[SseEvent]:
        """Return the events of tokens, if they show anything."""
        text = self._shown.take(index, tokens.text)
        # Tokens of what may be a call open no message.
        return self._delta(text, [] if self._shown.has_tools and not text else scores_of(tokens))

    def finish(self, index: int, answer: Answer) -> list[SseEvent]:
        """Return the events that close message and response; between them the tool calls."""
        response = _response(self._call, self._id, self._created, answer)
        events = self._delta(self._shown.rest(index), [])
        for place, item in enumerate(response["output"]):
            if item["type"] == "message":
                events += [*self._open(), *self._close(item)]
            else:
                events += self._whole_call(item, place)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def end(self) -> list[SseEvent]:
        """Return nothing: the response's own end is the stream's."""
        return []

    def keep_alive(self) -> list[SseEvent]:
        """Return a text that is empty, or the response as it is if it has no message yet."""
        if self._is_open:
            return [self._event("response.output_text.delta", **self._place(), delta="", logprobs=[])]
        started = _response(self._call, self._id, self._created, None)
        return [self._event("response.in_progress", response=started)]

    def failed(self, problem: Problem) -> list[SseEvent]:
        """Return the failure of the response."""
        response = _response(self._call, self._id, self._created, None) | {
            "status": "failed",
            "error": {"code": _failure(problem), "message": problem.message},
        }
        return [self._event("response.failed", response=response)]

    def _open(self) -> list[SseEvent]:
        """Return the events that open the message, the first time."""
        if self._is_open:
            return []
        self._is_open = True
        item = _message(self._id, [], "in_progress")
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def _delta(self, text: str, scores: list[dict[str, Any]]) -> list[SseEvent]:
        if not text and not scores:
            return []
        opening = self._open()
        return [
            *opening,
            self._event("response.output_text.delta", **self._place(), delta=text, logprobs=scores),
        ]

    def _close(self, item: dict[str, Any]) -> list[SseEvent]:
        (part,) = item["content"]
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            self._event("response.output_text.done", **self._place(), **done),
            self._event("response.content_part.done", **self._place(), part=part),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _whole_call(self, item: dict[str, Any], place: int) -> list[SseEvent]:
        at = {"item_id": item["id"], "output_index": place}
        arguments = {"arguments": item["arguments"], "name": item["name"]}
        begun = item | {"arguments": "", "status": "in_progress"}
        return [
            self._event("response.output_item.added", output_index=place, item=begun),
            self._event("response.function_call_arguments.delta", **at, delta=item["arguments"]),
            self._event("response.function_call_arguments.done", **at, **arguments),
            self._event("response.output_item.done", output_index=place, item=item),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}

    def _event(self, name: str, /, **fields: Any) -> SseEvent:
        self._sequence += 1
        return SseEvent({"type": name, "sequence_number": self._sequence - 1, **fields}, name)


def _turns(value: object) -> list[Message]:
    if isinstance(value, str):
        if not value:
            raise invalid("input", "is empty: send at least one character")
        return [Message(Role.USER, value)]
    turns: list[Message] = []
    for turn in read_turns(value, "input", _read_item):
        if turns and turn.tool_calls and turns[-1].role is Role.ASSISTANT:
            # The calls of one answer are items of their own.
            before = turns.pop()
            turn = Message(Role.ASSISTANT, before.content, before.tool_calls + turn.tool_calls)  # noqa: PLW2901
        turns.append(turn)
    return turns


def _read_item(value: object, where: str) -> list[Message]:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if not isinstance(value, dict) or kind == "message":
        return [read_message(value, where, _ROLES, _INERT)]
    if kind == "function_call":
        known(value, where, ("type", "id", "status", "call_id", "name", "arguments", "parsed_arguments"))
        name, call_id = required_text(value, "name", where), required_text(value, "call_id", where)
        return [Message(Role.ASSISTANT, "", (ToolCall(call_id, name, read_arguments(value, where)),))]
    if kind == "function_call_output":
        known(value, where, ("type", "id", "status", "call_id", "output"))
        output = read_text(value.get("output"), f"{where}.output", ("input_text",), may_be_empty=True)
        return [Message(Role.TOOL, output, tool_call_id=required_text(value, "call_id", where))]
    raise invalid(f"{where}.type", "must be message, function_call or function_call_output")


def _read_scores(fields: Body) -> int | None:
    """Return how many of the likeliest tokens are asked for; None for no log-probabilities."""
    count = fields.whole("top_logprobs", 0, MOST_LIKELIEST)
    wanted = fields.get("include") or []
    if not isinstance(wanted, list) or any(each != _LOGPROBS for each in wanted):
        raise invalid("include", f"must be a list of nothing but {_LOGPROBS}")
    return count if count or not wanted else 0


def _told_tool(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as answers repeat it: SDKs expect every field."""
    return {"description": None, "parameters": None, "strict": False, **value}


def _response(call: Call, response_id: str, created: int, answer: Answer | None) -> dict[str, Any]:
    """Return a response: with its answer, or without while it is in progress."""
    is_cut = answer is not None and answer.finish_reason == FinishReason.LENGTH
    done = "incomplete" if is_cut else "completed"
    response: dict[str, Any] = {
        "id": f"resp_{response_id}",
        "object": "response",
        "created_at": created,
        "status": "in_progress" if answer is None else done,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": call.echo["instructions"],
        "max_output_tokens": call.echo["max_output_tokens"],
        "max_tool_calls": None,
        "model": call.model,
        "output": [],
        "parallel_tool_calls": call.echo["parallel_tool_calls"],
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": call.echo["temperature"],
        "text": call.echo["text"],
        "tool_choice": call.echo["tool_choice"],
        "tools": call.echo["tools"],
        "top_logprobs": call.echo["top_logprobs"],
        "top_p": call.echo["top_p"],
        "truncation": "disabled",
        "usage": None,
        **{name: call.echo[name] for name in _ECHOED},
        "metadata": call.echo["metadata"],
    }
    if answer is None:
        return response
    usage = usage_of([answer])
    text = content(answer)
    if text or not answer.tool_calls:
        part = _part(text) | {"logprobs": scores_of(answer.scored_tokens)}
        response["output"].append(_message(response_id, [part], done))
    response["output"] += [
        {
            "id": f"fc_{each.id}",
            "type": "function_call",
            "call_id": each.id,
            "name": each.name,
            "arguments": each.arguments,
            "status": "completed",
        }
        for each in answer.tool_calls
    ]
    response["usage"] = {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.rejected,
        },
        "total_tokens": usage.prompt + usage.completion,
    }
    response["asd"] = told(call.requests, [answer])
    return response


def _message(response_id: str, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{response_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _failure(problem: Problem) -> str:
    """Return the code of a failed response, of those that OpenAI's clients know."""
    if problem.row.http == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if problem.row.http < 500 else "server_error"
