"""Run trained models over tasks: graded answers, token signals, and how drafts fare in verification.

The rows are those of policy_service/train/outcomes.py; `asd-policy collect` writes
the same from running stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.train.corpus import conversation
from models.train.family import CONTEXT, END
from models.train.passes import count_passes
from suites import grade

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from tokenizers import Tokenizer

    from models.train.llama import Llama
    from suites import Task

MAX_NEW_TOKENS = 160
# Prompts decoded at a time: 16 GB of KV cache for the largest model on a GPU, 1 GB on a CPU.
_BATCH = {"cuda": 4096, "cpu": 256}


@dataclass(frozen=True)
class GradedAnswer:
    """One model's greedy answer to one task. signals: float32 [tokens, 3], as of llama.token_signals."""

    ids: tuple[int, ...]
    text: str
    has_ended: bool
    signals: npt.NDArray[np.float32]
    is_correct: bool


@dataclass(frozen=True)
class Check:
    """How a draft fared in a target's scoring pass. ranks: int64 [proposed], 0 where the target agrees."""

    accepted: int
    ranks: npt.NDArray[np.int64]


def answer_tasks(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[Task], device: str
) -> list[GradedAnswer]:
    """Return the model's greedy answers in float32, in the order of the tasks."""
    torch.set_float32_matmul_precision("highest")
    end_id = tokenizer.token_to_id(END)
    prompts = _encode_prompts(model, tokenizer, tasks)
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]))
    answers: dict[int, GradedAnswer] = {}
    for batch in _batched(order, _BATCH[device]):
        ids, lengths = _pad([prompts[index] for index in batch], device)
        new_tokens = min(MAX_NEW_TOKENS, CONTEXT - ids.shape[1])
        chosen, signals = (t.cpu().numpy() for t in model.decode(ids, lengths, new_tokens, end_id))
        for row, index in enumerate(batch):
            ends = np.flatnonzero(chosen[row] == end_id)
            count = int(ends[0]) if len(ends) else new_tokens
            text = tokenizer.decode(chosen[row, :count].tolist())
            answers[index] = GradedAnswer(
                ids=tuple(chosen[row, :count].tolist()),
                text=text,
                has_ended=len(ends) > 0,
                signals=signals[row, :count],
                is_correct=grade(tasks[index], text),
            )
    return [answers[index] for index in range(len(tasks))]


@torch.no_grad()
def check_drafts(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[Task], drafts: Sequence[GradedAnswer], device: str
) -> list[Check]:
    """Score drafts by teacher forcing in float32; the end mark is proposed where the draft ended with it.

    The drafts' ids are taken as they are: draft and target must share a vocabulary.
    """
    end_id = tokenizer.token_to_id(END)
    prompts = _encode_prompts(model, tokenizer, tasks)
    proposed = [[*draft.ids, end_id] if draft.has_ended else list(draft.ids) for draft in drafts]
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]) + len(proposed[index]))
    checks: dict[int, Check] = {}
    for batch in _batched(order, _BATCH[device]):
        ids, _ = _pad([prompts[index] + proposed[index] for index in batch], device)
        logits = model.logits(model(ids))
        target = logits[:, :-1].gather(-1, ids[:, 1:, None])
        ranks = (logits[:, :-1] > target).sum(-1).cpu().numpy()
        for row, index in enumerate(batch):
            start = len(prompts[index]) - 1
            row_ranks = ranks[row, start : start + len(proposed[index])]
            misses = np.flatnonzero(row_ranks)
            checks[index] = Check(int(misses[0]) if len(misses) else len(row_ranks), row_ranks)
    return [checks[index] for index in range(len(tasks))]


def outcome_rows(
    tasks: Sequence[Task],
    split: str,
    answers: dict[str, list[GradedAnswer]],
    checks: dict[tuple[str, str], list[Check]],
    end_id: int,
) -> Iterator[dict[str, object]]:
    """Yield a row of an outcome file per task. answers: by model, in order.

    end_id: of the end mark in the models' common vocabulary.
    """
    for row, task in enumerate(tasks):
        yield {
            "prompt": task.prompt,
            "history": [message for turn in task.history for message in turn],
            "suite": task.suite,
            "level": task.level,
            "kind": task.kind,
            "split": split,
            "stages": {name: _stage_record(each[row]) for name, each in answers.items()},
            "verifications": {
                f"{draft}>{target}": _check_record(
                    check[row], answers[draft][row], answers[target][row], end_id
                )
                for (draft, target), check in checks.items()
            },
        }


def _stage_record(answer: GradedAnswer) -> dict[str, object]:
    logprobs, entropies, margins = answer.signals.round(3).T.tolist()
    return {
        "text": answer.text,
        "finish_reason": "eos" if answer.has_ended else "length",
        "logprobs": logprobs,
        "entropies": entropies,
        "top2_margins": margins,
        "correct": answer.is_correct,
    }


def _check_record(check: Check, draft: GradedAnswer, own: GradedAnswer, end_id: int) -> dict[str, object]:
    proposed = [*draft.ids, end_id] if draft.has_ended else list(draft.ids)
    answer = [*own.ids, end_id] if own.has_ended else list(own.ids)
    passes, proposed_again = count_passes(proposed, answer, check.accepted, MAX_NEW_TOKENS)
    return {
        "proposed": len(check.ranks),
        "accepted": check.accepted,
        "ranks": [int(rank) for rank in check.ranks],
        "forward_passes": passes,
        "proposed_again": proposed_again,
    }


def _encode_prompts(model: Llama, tokenizer: Tokenizer, tasks: Sequence[Task]) -> list[list[int]]:
    texts = [conversation(task, model.vocabulary)[0] for task in tasks]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _batched(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _pad(samples: Sequence[Sequence[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = np.array([len(sample) for sample in samples])
    ids = np.zeros((len(samples), lengths.max()), np.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample
    return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)
