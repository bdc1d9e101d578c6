"""What the APIs' answers have in common: usage, the field `asd`, headers and the fingerprint. Pure."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.values import FinishReason, StageAction

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asd.values import Answer, Request, StageRecord


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. accepted, rejected: draft tokens that a stage verified, over all stages."""

    prompt: int
    cached: int
    completion: int
    accepted: int
    rejected: int

    def openai(self) -> dict[str, Any]:
        """Return OpenAI's object of the older APIs."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            },
        }


def usage_of(answers: Iterable[Answer], prompts: int = 1) -> Usage:
    """Return the tokens of the answers to a request.

    prompts: how many prompts they answer. The choices of one prompt follow each other, and count it once.
    """
    each = list(answers)
    records = [_answering(answer) for answer in each]
    firsts = records[:: max(len(each) // prompts, 1)]
    verified = [record for answer in each for record in answer.stages]
    accepted = sum(record.accepted_tokens for record in verified)
    return Usage(
        sum(record.prompt_tokens for record in firsts if record),
        sum(record.cached_prompt_tokens for record in firsts if record),
        sum(len(answer.token_ids) for answer in each),
        accepted,
        sum(record.proposed_tokens for record in verified) - accepted,
    )


def finish_reason(answer: Answer) -> str:
    """Return OpenAI's reason for the end of an answer."""
    return "length" if answer.finish_reason == FinishReason.LENGTH else "stop"


def told(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the field `asd`: how the answer came about. Of several choices, a list and the sum of costs."""
    each = [_told(answer) for answer in answers]
    if len(each) == 1:
        return each[0]
    return {"cost": sum(answer.cost for answer in answers), "choices": each}


def headers(answers: Sequence[Answer]) -> list[tuple[bytes, bytes]]:
    """Return the `x-asd-*` headers. Of several choices, the values stand in order, with commas.

    A choice without a prediction has an empty place there. The cost is the sum, and the policies are those
    that there were.
    """
    values = {
        "x-asd-request-id": [answer.request_id for answer in answers],
        "x-asd-stage": [answer.stage for answer in answers],
        "x-asd-p-correct": [
            "" if answer.p_correct is None else f"{answer.p_correct:.6g}" for answer in answers
        ],
        "x-asd-cost": [f"{sum(answer.cost for answer in answers):.6g}"],
        "x-asd-policy": list(dict.fromkeys(answer.policy_version for answer in answers)),
    }
    made = []
    for name, texts in values.items():
        text = ",".join(texts)
        # A name of another system may hold what a header cannot.
        if any(texts) and text.isascii() and text.isprintable():
            made.append((name.encode(), text.encode()))
    return made


def early_headers(requests: Sequence[Request]) -> list[tuple[bytes, bytes]]:
    """Return the headers that are known before an answer: the stage, if the request names it."""
    request = requests[0]
    stage = request.stage or (request.chain[-1] if request.chain else "")
    return [(b"x-asd-stage", stage.encode())] if stage.isascii() and stage.isprintable() and stage else []


def fingerprint(answers: Sequence[Answer]) -> str:
    """Return a text that changes with the policy and with the models that worked on the answers."""
    parts = []
    for answer in answers:
        parts += [answer.policy_version, *(f"{each.stage}={each.model}" for each in answer.stages)]
    return _digest(tuple(dict.fromkeys(parts)))


@functools.lru_cache(maxsize=256)
def _digest(parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"asd_{digest[:16]}"


def _answering(answer: Answer) -> StageRecord | None:
    """Return the record of the stage that answered; None if there is none."""
    for record in reversed(answer.stages):
        if record.stage_index == answer.stage_index and record.action != StageAction.PREFILL:
            return record
    return None


def _told(answer: Answer) -> dict[str, Any]:
    return {
        "request_id": answer.request_id,
        "stage": answer.stage,
        "stage_index": answer.stage_index,
        "p_correct": answer.p_correct,
        "out_of_family": answer.out_of_family,
        "cost": answer.cost,
        "latency_ms": answer.latency_ms,
        "policy_ms": answer.policy_ms,
        "plan_source": answer.plan_source,
        "policy_version": answer.policy_version,
        "trace_id": answer.trace_id,
        # Without the texts: those of earlier stages are drafts, and the last one's is the answer.
        "stages": [
            {name: value for name, value in vars(each).items() if name != "text"} for each in answer.stages
        ],
    }
