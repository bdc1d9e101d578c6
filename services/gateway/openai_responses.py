"""OpenAI's /v1/responses, without state. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import FinishReason, Message, Role, Sampling
from services.gateway.answers import told, usage_of
from services.gateway.content import read_turns
from services.gateway.errors import openai_body
from services.gateway.objective import open_body
from services.gateway.openai_completions import MOST_TOKENS
from services.gateway.parameters import RESPONSES
from services.gateway.request import Call, SseEvent, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer
    from services.gateway.errors import Problem
    from services.gateway.models import Models

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}
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
        instructions = fields.text("instructions")
        if instructions:
            turns = [Message(Role.SYSTEM, instructions), *turns]
        if fields.includes_usage():
            raise invalid("stream_options.include_usage", "there is no such parameter: usage always comes")
        sampling = Sampling(
            fields.whole("max_output_tokens", 1, MOST_TOKENS),
            fields.number("temperature", 2.0) or 0.0,
            fields.number("top_p", 1.0, is_positive=True),
        )
        request = route.request(tuple(turns), sampling, options)
        names = {
            "conversation": "input",
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

    def begin(self) -> list[SseEvent]:
        """Return the events that open response, message and text."""
        started = _response(self._call, self._id, self._created, None)
        item = {**_message(self._id, [], "in_progress")}
        return [
            self._event("response.created", response=started),
            self._event("response.in_progress", response=started),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def text(self, index: int, text: str) -> list[SseEvent]:
        """Return the event of a text."""
        return [self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])]

    def finish(self, index: int, answer: Answer) -> list[SseEvent]:
        """Return the events that close text, message and response."""
        response = _response(self._call, self._id, self._created, answer)
        (item,) = response["output"]
        place = self._place()
        return [
            self._event("response.output_text.done", **place, text=answer.text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(answer.text)),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{response['status']}", response=response),
        ]

    def end(self) -> list[SseEvent]:
        """Return nothing: the response's own end is the stream's."""
        return []

    def keep_alive(self) -> list[SseEvent]:
        """Return a text that is empty."""
        return [self._event("response.output_text.delta", **self._place(), delta="", logprobs=[])]

    def failed(self, problem: Problem) -> list[SseEvent]:
        """Return the failure of the response."""
        response = _response(self._call, self._id, self._created, None) | {
            "status": "failed",
            "error": {"code": _failure(problem), "message": problem.message},
        }
        return [self._event("response.failed", response=response)]

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}

    def _event(self, name: str, **fields: Any) -> SseEvent:
        self._sequence += 1
        return SseEvent({"type": name, "sequence_number": self._sequence - 1, **fields}, name)


def _turns(value: object) -> list[Message]:
    if isinstance(value, str):
        if not value:
            raise invalid("input", "is empty: send at least one character")
        return [Message(Role.USER, value)]
    if isinstance(value, list):
        for index, each in enumerate(value):
            kind = each.get("type", "message") if isinstance(each, dict) else "message"
            if kind != "message":
                raise invalid(f"input[{index}].type", "must be message: the models read text alone")
    return read_turns(value, "input", _ROLES, _INERT)


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
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": call.echo["temperature"],
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": 0,
        "top_p": call.echo["top_p"],
        "truncation": "disabled",
        "usage": None,
        **{name: call.echo[name] for name in _ECHOED},
        "metadata": call.echo["metadata"],
    }
    if answer is None:
        return response
    usage = usage_of([answer])
    response["output"] = [_message(response_id, [_part(answer.text)], done)]
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
    response["asd"] = told([answer])
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
