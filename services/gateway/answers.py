"""What the APIs' answers have in common: usage, the field `asd`, headers and the fingerprint. Pure."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.values import FinishReason, StageAction
from services.common.shortfall import missed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asd.values import Answer, Request, StageRecord


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    accepted, rejected: of the caller's prediction if there is one, else of drafts, over all stages.
    """

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
    verified = [record for answer in each for record in _drafted(answer)]
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
    if answer.finish_reason == FinishReason.LENGTH:
        # A further call may have been cut off.
        return "length"
    return "tool_calls" if answer.tool_calls else "stop"


def content(answer: Answer) -> str:
    """Return the text of an answer without its tool calls."""
    return answer.content if answer.tool_calls else answer.text


def told(requests: Sequence[Request], answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the field `asd`: how the answer came about. Of several choices, a list and the sum of costs."""
    each = [_told(request, answer) for request, answer in zip(requests, answers, strict=True)]
    if len(each) == 1:
        return each[0]
    return {"cost": _cost(sum(answer.cost for answer in answers)), "choices": each}


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


def _drafted(answer: Answer) -> tuple[StageRecord, ...]:
    """Return the records whose drafts are counted."""
    records = tuple(record for record in answer.stages if record.action != StageAction.PREFILL)
    # The first stage can only have verified what the caller predicted.
    return records[:1] if records and records[0].action == StageAction.VERIFY else records


def _answering(answer: Answer) -> StageRecord | None:
    """Return the record of the stage that answered; None if there is none."""
    for record in reversed(answer.stages):
        if record.stage_index == answer.stage_index and record.action != StageAction.PREFILL:
            return record
    return None


def _cost(value: float) -> float:
    """Return a cost without the noise of sums in binary, such as 4.800000000000001."""
    return round(value, 9)


def _told(request: Request, answer: Answer) -> dict[str, Any]:
    return {
        "request_id": answer.request_id,
        "stage": answer.stage,
        "stage_index": answer.stage_index,
        "p_correct": answer.p_correct,
        "out_of_family": answer.out_of_family,
        "cost": _cost(answer.cost),
        "latency_ms": answer.latency_ms,
        "policy_ms": answer.policy_ms,
        "plan_source": answer.plan_source,
        "policy_version": answer.policy_version,
        "trace_id": answer.trace_id,
        **missed(answer, request.objective),
        # Without the texts: those of earlier stages are drafts, and the last one's is the answer.
        "stages": [
            {name: value for name, value in vars(each).items() if name != "text"} | {"cost": _cost(each.cost)}
            for each in answer.stages
        ],
    }
