"""Greedy outputs of transformers, which engines are tested against: an implementation that is not ours."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.train.outcomes import MAX_NEW_TOKENS
from suites import split

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BATCH = 100


def write_reference(path: Path, directories: Sequence[Path], prompts: int, device: str) -> None:
    """Write {"prompts": [...], "outputs": {model: [[id, ...], ...]}} for prompts of the split `evaluation`.

    Outputs are in float32, greedy, at most MAX_NEW_TOKENS long, without the end mark.
    """
    torch.set_float32_matmul_precision("highest")
    questions = [task.prompt for task in split("evaluation", prompts, seed=1)]
    outputs = {directory.name: _decode(directory, questions, device) for directory in directories}
    with gzip.open(path, "wt") as file:
        json.dump({"prompts": questions, "outputs": outputs}, file, separators=(",", ":"))


def _decode(directory: Path, questions: list[str], device: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    outputs = []
    for start in range(0, len(questions), _BATCH):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + _BATCH]]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        batch.pop("token_type_ids", None)
        made = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        end_id = tokenizer.eos_token_id
        rows = made[:, batch["input_ids"].shape[1] :].tolist()
        outputs.extend(row[: row.index(end_id)] if end_id in row else row for row in rows)
    return outputs
