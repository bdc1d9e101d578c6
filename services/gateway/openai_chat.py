"""OpenAI's /v1/chat/completions. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asd.values import Conversation, Role
from services.gateway import openai_completions
from services.gateway.answers import content, finish_reason
from services.gateway.content import read_message, read_text, read_turns
from services.gateway.formats import one_constraint, read_format
from services.gateway.objective import open_body
from services.gateway.openai_completions import CompletionsWriter, sampling_of
from services.gateway.parameters import CHAT, Body
from services.gateway.request import Call, choices, invalid
from services.gateway.scores import read_chat_scores, scores_of
from services.gateway.tools import TOOL_FIELDS, ToolForm, openai_call, read_choice, read_tools

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer, Sampling, Tokens
    from services.gateway.models import Models

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
_TOOL = ToolForm("function", "function", "parameters")


class OpenAiChat(openai_completions.OpenAiBase):
    """Translates chat completions; see request.Api."""

    name = CHAT
    prefix = "chatcmpl-"
    kind = "chat.completion"

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body."""
        fields, model, route, options = open_body(CHAT, body, headers, models)
        turns = tuple(
            read_turns(fields.get("messages"), "messages", lambda each, at: [read_message(each, at, _ROLES)])
        )
        tools = read_tools(fields, _TOOL, read_choice(fields, _TOOL.nested))
        sampling, names, count = _sampling(fields)
        wanted = read_format(fields.get("response_format"), "response_format", "json_schema")
        constraint, field = one_constraint(wanted, "response_format", options, tools)
        sampling = replace(sampling, constraint=constraint, top_logprobs=read_chat_scores(fields))
        request = route.request(
            turns if tools is None else Conversation(turns, tools), sampling, options, _prediction(fields)
        )
        names |= {
            **TOOL_FIELDS,
            "conversation.messages": "messages",
            "conversation": "messages",
            "sampling.constraint": field,
            "sampling.top_logprobs": "top_logprobs",
            "prediction": "prediction",
        }
        return Call(
            model,
            choices(request, count),
            {**names, **options.fields},
            fields.flag("stream"),
            fields.includes_usage(),
        )

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return an answer as a choice."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content(answer) or (None if answer.tool_calls else ""),
            "refusal": None,
            "annotations": [],
        }
        if answer.tool_calls:
            message["tool_calls"] = [openai_call(each) for each in answer.tool_calls]
        return {
            "index": index,
            "message": message,
            "logprobs": _scores(answer.scored_tokens),
            "finish_reason": finish_reason(answer),
        }

    def writer(self, call: Call, stream_id: str, created: int) -> CompletionsWriter:
        """Return what writes the answer as a stream."""
        return ChatWriter(self, call, stream_id, created)


class ChatWriter(CompletionsWriter):
    """Writes chat.completion.chunk objects: first the role, last the reason for the end."""

    kind = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the choice that begins an answer."""
        return self.part(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, index: int, text: str, tokens: Tokens | None = None) -> dict[str, Any]:
        """Return the choice of a text."""
        return self.part(index, {"content": text} if text else {}, scores=_scores(tokens))

    def calls(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """Return the choices of tool calls: of each, the name first, then the arguments."""
        parts = []
        for place, call in enumerate(answer.tool_calls):
            whole = openai_call(call)
            opened = {**whole, "function": {**whole["function"], "arguments": ""}}
            parts.append(self.part(index, {"tool_calls": [{"index": place, **opened}]}))
            rest = {"index": place, "function": {"arguments": call.arguments}}
            parts.append(self.part(index, {"tool_calls": [rest]}))
        return parts

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Return the choice that ends an answer."""
        return self.part(index, {}, reason)

    def part(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        scores: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return a choice with a delta."""
        return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": reason}


def _sampling(fields: Body) -> tuple[Sampling, dict[str, str], int]:
    sampling, names, count = sampling_of(fields)
    newer = fields.whole("max_completion_tokens", 1, openai_completions.MOST_TOKENS)
    if newer is None:
        return sampling, names, count
    if sampling.max_new_tokens not in {None, newer}:
        raise invalid("max_completion_tokens", "clashes with max_tokens: give one of them")
    names["sampling.max_new_tokens"] = "max_completion_tokens"
    return replace(sampling, max_new_tokens=newer), names, count


def _prediction(fields: Body) -> str:
    """Return the answer that the caller expects; "" for none."""
    given = fields.members("prediction", ("type", "content"))
    if not given:
        return ""
    if given.get("type") != "content":
        raise invalid("prediction.type", "must be content")
    return read_text(given.get("content"), "prediction.content")


def _scores(tokens: Tokens | None) -> dict[str, Any] | None:
    scores = scores_of(tokens)
    return {"content": scores, "refusal": None} if scores else None
