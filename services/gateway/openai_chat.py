"""OpenAI's /v1/chat/completions. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import Role, Sampling
from services.gateway import openai_completions
from services.gateway.answers import finish_reason
from services.gateway.content import read_turns
from services.gateway.objective import open_body
from services.gateway.openai_completions import CompletionsWriter, sampling_of
from services.gateway.parameters import CHAT, Body
from services.gateway.request import Call, choices, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer
    from services.gateway.models import Models

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}


class OpenAiChat(openai_completions.OpenAiBase):
    """Translates chat completions; see request.Api."""

    name = CHAT
    prefix = "chatcmpl-"
    kind = "chat.completion"

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body."""
        fields, model, route, options = open_body(CHAT, body, headers, models)
        turns = read_turns(fields.get("messages"), "messages", _ROLES)
        sampling, names, count = _sampling(fields)
        request = route.request(tuple(turns), sampling, options)
        return Call(
            model,
            choices(request, count),
            {"conversation.messages": "messages", "conversation": "messages", **names, **options.fields},
            fields.flag("stream"),
            fields.includes_usage(),
        )

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return an answer as a choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []},
            "logprobs": None,
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

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return the choice of a text."""
        return self.part(index, {"content": text} if text else {})

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Return the choice that ends an answer."""
        return self.part(index, {}, reason)

    def part(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """Return a choice with a delta."""
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _sampling(fields: Body) -> tuple[Sampling, dict[str, str], int]:
    sampling, names, count = sampling_of(fields)
    newer = fields.whole("max_completion_tokens", 1, openai_completions.MOST_TOKENS)
    if newer is None:
        return sampling, names, count
    if sampling.max_new_tokens not in {None, newer}:
        raise invalid("max_completion_tokens", "clashes with max_tokens: give one of them")
    names["sampling.max_new_tokens"] = "max_completion_tokens"
    whole = Sampling(newer, sampling.temperature, sampling.top_p, sampling.seed, sampling.stop)
    return whole, names, count
