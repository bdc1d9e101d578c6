"""The models' tokenizers: byte-level BPE in which every digit is a token of its own."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.train.family import CONTEXT, END, PAD, Vocabulary
from suites import LEVELS, SUITES, generate, split_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The Jinja form of corpus.conversation. AFTER: the vocabulary's after_role.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>AFTER{{ message['content'] }}<|end|>"
    "{% else %}<|{{ message['role'] }}|>AFTER{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>AFTER{% endif %}"
)


def train_tokenizer(vocabulary: Vocabulary, tasks: int = 60_000, seed: int = 0) -> Tokenizer:
    """Return a tokenizer of vocabulary.size entries, trained on tasks of the split `models`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.size,
        special_tokens=list(vocabulary.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(tasks, seed), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, vocabulary: Vocabulary, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE.replace("AFTER", vocabulary.after_role),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": END, "pad_token": PAD}, indent=2) + "\n"
    )


def _texts(tasks: int, seed: int) -> Iterator[str]:
    rng = random.Random(f"vocabulary/{seed}")
    for index in range(tasks):
        task = generate(SUITES[index % len(SUITES)], LEVELS[index // len(SUITES) % len(LEVELS)], rng)
        if split_of(task) == "models":
            yield task.prompt
            yield task.solution
