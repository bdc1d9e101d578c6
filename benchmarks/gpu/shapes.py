"""Directories of models with the true shapes and no weights: the library fills in random ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Shape(NamedTuple):
    """A Llama shape, as the published config.json has it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 32_000


# Llama-2-13b, CodeLlama-34b, Llama-2-70b.
SHAPES = {
    "13b": Shape(5120, 40, 40, 40, 13824),
    "34b": Shape(8192, 48, 64, 8, 22016),
    "70b": Shape(8192, 80, 64, 8, 28672),
    "tiny": Shape(512, 4, 8, 8, 1408),
}
# The tokenizers' words are w3 to wN.
FIRST_WORD = 3
# Of the research system on 8 H100s, with transformers, at batch 1; in ms per token.
RESEARCH_MS = {"13b": 25.0, "34b": 42.0, "70b": 76.0}


def make_model(name: str, folder: Path, context: int = 4096) -> Path:
    """Write config.json and a tokenizer whose every token is a word, w3 to wN; return the directory.

    The word-per-token tokenizer lets a prompt and a draft have exactly the tokens that are wanted. The last
    token ends an answer: a random model hardly ever writes it.
    """
    shape = SHAPES[name]
    end = shape.vocabulary - 1
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": end,
    }
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        f"w{index}": index for index in range(FIRST_WORD, shape.vocabulary)
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder
