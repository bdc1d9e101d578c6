"""Values that the gateway's tests share: a cascade's answer, bodies of every API, and their parsing."""

from __future__ import annotations

from asd.values import Answer, FinishReason, PlanSource, StageAction, StageRecord
from services.gateway.anthropic_messages import AnthropicMessages
from services.gateway.models import Models
from services.gateway.openai_chat import OpenAiChat
from services.gateway.openai_completions import OpenAiCompletions
from services.gateway.openai_responses import OpenAiResponses

MODELS = Models(["small", "medium", "large"])
CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    OpenAiChat(),
    OpenAiCompletions(),
    OpenAiResponses(),
    AnthropicMessages(),
)
USER = {"role": "user", "content": "Hi"}
# The least body of each API.
LEAST = {
    CHAT: {"model": "asd", "messages": [USER]},
    COMPLETIONS: {"model": "asd", "prompt": "Hi"},
    RESPONSES: {"model": "asd", "input": "Hi"},
    MESSAGES: {"model": "asd", "messages": [USER], "max_tokens": 9},
}


def parse(api, changes=None, headers=None):
    """Return the call of an API's least body with some changes."""
    return api.parse(LEAST[api] | (changes or {}), headers or {}, MODELS)


def record(stage, index, action, **fields):
    """Return a stage's record."""
    known = {
        "latency_ms": 1.0,
        "cost": 1.0,
        "decision": "stop",
        "reason": "value",
        "p_correct": None,
        "p_correct_stderr": None,
        "prompt_tokens": 10,
        "cached_prompt_tokens": 0,
        "completion_tokens": 3,
        "proposed_tokens": 0,
        "accepted_tokens": 0,
        "forward_passes": 3,
        "queue_ms": 0.0,
        "prefill_ms": 0.0,
        "decode_ms": 0.0,
        "text": "a draft",
        "model": f"model-{stage}",
    }
    return StageRecord(stage, index, action, **(known | fields))


def answer(text="Forty-two.", finish=FinishReason.EOS, **fields):
    """Return an answer of `large`, which verified a draft of five tokens and accepted three."""
    known = {
        "request_id": "r1",
        "text": text,
        "token_ids": (1, 2, 3, 4),
        "tokenizer_fingerprint": "f",
        "finish_reason": finish,
        "stage": "large",
        "stage_index": 2,
        "p_correct": 0.75,
        "cost": 3.5,
        "latency_ms": 12.0,
        "policy_ms": 1.0,
        "plan_source": PlanSource.POLICY,
        "policy_version": "p7",
        "trace_id": "",
        "stages": (
            record("small", 0, StageAction.GENERATE),
            record(
                "large",
                2,
                StageAction.VERIFY,
                prompt_tokens=12,
                cached_prompt_tokens=8,
                proposed_tokens=5,
                accepted_tokens=3,
            ),
        ),
    }
    return Answer(**(known | fields))
