"""Log-probabilities of an answer's tokens, in the APIs' forms. Pure."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

from services.gateway.request import invalid

if TYPE_CHECKING:
    from asd.values import Tokens
    from services.gateway.parameters import Body

# The contract's bound on `top_logprobs`.
MOST_LIKELIEST = 20


def read_chat_scores(fields: Body) -> int | None:
    """Return how many of the likeliest tokens chat completions ask for; None for no log-probabilities."""
    count = fields.whole("top_logprobs", 0, MOST_LIKELIEST)
    if fields.flag("logprobs"):
        return count or 0
    if count:
        raise invalid("top_logprobs", "needs logprobs: set it to true")
    return None


def scores_of(tokens: Tokens | None) -> list[dict[str, Any]]:
    """Return the tokens as chat completions and responses have them."""
    if tokens is None:
        return []
    return [
        {
            **_scored(detail.text, logprob),
            "top_logprobs": [_scored(each.text, each.logprob) for each in detail.likeliest],
        }
        for detail, logprob in zip(tokens.details, tokens.logprobs, strict=False)
    ]


class CompletionScores:
    """Tokens of one answer as completions have them, with their places in its text."""

    def __init__(self) -> None:
        # Tokens may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def of(self, tokens: Tokens | None) -> dict[str, Any] | None:
        """Return the object of the tokens that follow those before; None if they have no details."""
        if tokens is None or not tokens.details:
            return None
        places = []
        for detail in tokens.details:
            places.append(self._length)
            self._length += len(self._decoder.decode(detail.text))
        has_likeliest = any(detail.likeliest for detail in tokens.details)
        return {
            "tokens": [_text(detail.text) for detail in tokens.details],
            "token_logprobs": list(tokens.logprobs),
            "top_logprobs": [
                {_text(each.text): each.logprob for each in reversed(detail.likeliest)}
                for detail in tokens.details
            ]
            if has_likeliest
            else None,
            "text_offset": places,
        }


def _scored(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(text), "bytes": list(text), "logprob": logprob}


def _text(text: bytes) -> str:
    return text.decode("utf-8", "replace")
