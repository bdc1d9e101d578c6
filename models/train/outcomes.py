"""Run trained models over tasks: graded answers, token signals, and how drafts fare in verification.

The record format is the policy's (policy_service/outcomes.py); `asd-policy collect` writes the same from
running stages.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.train.corpus import conversation
from models.train.family import CONTEXT, END
from services.stage.resync import Resynchroniser
from suites import grade

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from tokenizers import Tokenizer

    from models.train.llama import Llama
    from suites import Task

MAX_NEW_TOKENS = 160
# Prompts decoded at a time: 16 GB of KV cache for the largest model on a GPU, 1 GB on a CPU.
_BATCH = {"cuda": 4096, "cpu": 256}


@dataclass(frozen=True)
class Answer:
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


def answer_tasks(model: Llama, tokenizer: Tokenizer, tasks: Sequence[Task], device: str) -> list[Answer]:
    """Return the model's greedy answers in float32, in the order of the tasks."""
    torch.set_float32_matmul_precision("highest")
    end_id = tokenizer.token_to_id(END)
    prompts = _encode_prompts(model, tokenizer, tasks)
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    for batch in _batched(order, _BATCH[device]):
        ids, lengths = _pad([prompts[index] for index in batch], device)
        new_tokens = min(MAX_NEW_TOKENS, CONTEXT - ids.shape[1])
        chosen, signals = (t.cpu().numpy() for t in model.decode(ids, lengths, new_tokens, end_id))
        for row, index in enumerate(batch):
            ends = np.flatnonzero(chosen[row] == end_id)
            count = int(ends[0]) if len(ends) else new_tokens
            text = tokenizer.decode(chosen[row, :count].tolist())
            answers[index] = Answer(
                ids=tuple(chosen[row, :count].tolist()),
                text=text,
                has_ended=len(ends) > 0,
                signals=signals[row, :count],
                is_correct=grade(tasks[index], text),
            )
    return [answers[index] for index in range(len(tasks))]


@torch.no_grad()
def check_drafts(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[Task], drafts: Sequence[Answer], device: str
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


def write_outcomes(
    path: Path,
    tasks: Sequence[Task],
    split: str,
    answers: dict[str, list[Answer]],
    checks: dict[tuple[str, str], list[Check]],
    end_id: int,
) -> None:
    """Write an outcome file: a header line, then one JSON record per task. answers: by model, in order.

    end_id: of the end mark in the models' common vocabulary.
    """
    names = list(answers)
    header = {"schema": "asd.outcomes", "version": 1, "cascade": names, "rows": len(tasks)}
    with gzip.open(path, "wt", compresslevel=9) as file:
        file.write(json.dumps(header) + "\n")
        for row, task in enumerate(tasks):
            record = {
                "prompt": task.prompt,
                "suite": task.suite,
                "level": task.level,
                "kind": task.kind,
                "split": split,
                "stages": {name: _stage_record(answers[name][row]) for name in names},
                "verifications": {
                    f"{draft}>{target}": _check_record(
                        check[row], answers[draft][row], answers[target][row], end_id
                    )
                    for (draft, target), check in checks.items()
                },
            }
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def _stage_record(answer: Answer) -> dict[str, object]:
    logprobs, entropies, margins = ([round(float(x), 3) for x in column] for column in answer.signals.T)
    return {
        "text": answer.text,
        "finish_reason": "eos" if answer.has_ended else "length",
        "logprobs": logprobs,
        "entropies": entropies,
        "top2_margins": margins,
        "correct": answer.is_correct,
    }


def _check_record(check: Check, draft: Answer, own: Answer, end_id: int) -> dict[str, object]:
    proposed = [*draft.ids, end_id] if draft.has_ended else list(draft.ids)
    answer = [*own.ids, end_id] if own.has_ended else list(own.ids)
    passes, proposed_again = _count_passes(proposed, answer, check.accepted)
    return {
        "proposed": len(check.ranks),
        "accepted": check.accepted,
        "ranks": [int(rank) for rank in check.ranks],
        "forward_passes": passes,
        "proposed_again": proposed_again,
    }


def _count_passes(draft: list[int], answer: list[int], accepted: int) -> tuple[int, int]:
    """Return the passes that a stage needs to verify a draft and go on to its own answer, as it does them.

    The first one scores the draft and yields what is accepted and one token more; each later one yields what
    it accepts of a proposal and one token more. Second: the tokens proposed in the later ones.
    """
    passes, proposed_again = 1, 0
    written = accepted + 1
    resync = Resynchroniser(draft, accepted)
    while written < len(answer):
        proposal = resync.propose(answer[:written])[: MAX_NEW_TOKENS - written]
        pairs = list(zip(proposal, answer[written:], strict=False))
        kept = next((place for place, (ours, own) in enumerate(pairs) if ours != own), len(pairs))
        resync.judged(len(proposal), kept)
        proposed_again += len(proposal)
        written += kept + 1
        passes += 1
    return passes, proposed_again


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
