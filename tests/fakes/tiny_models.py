"""Whole model folders, of the families of chat_templates: scripted models and random ones.

A scripted model writes a set text: its layers add nothing to the residual stream, so that the next token
depends on the last one alone. A random model writes whatever its weights give: half characters, special
tokens, and seldom an end.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from tests.fakes import tiny_llama
from tests.fakes.chat_templates import FAMILIES
from tests.fakes.tiny_tokenizers import write_family

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# A scripted model has a dimension for each token: more than the tokenizers have tokens.
_HIDDEN, _HEADS, _HEAD = 512, 8, 64


def write_model(folder: Path, family: str, *, script: str = "", seed: int = 0) -> None:
    """Write a model folder: scripted, or random where there is no script.

    Of a token that the script holds twice, the first is written.
    """
    write_family(folder, FAMILIES[family])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    end = tokenizer.token_to_id(FAMILIES[family].eos)
    shape = tiny_llama.config(vocab_size=vocabulary, eos_token_id=end, max_position_embeddings=1024)
    if script:
        wide = {"hidden_size": _HIDDEN, "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS}
        shape |= wide | {"head_dim": _HEAD, "num_hidden_layers": 1}
    weights = tiny_llama.weights(shape, seed)
    if script:
        for name, values in weights.items():
            weights[name] = np.full_like(values, 1.0 if "norm" in name else 0.0)
        # What follows a token is one token, so that each is written once.
        ids = dict.fromkeys(tokenizer.encode(script, add_special_tokens=False).ids)
        weights["model.embed_tokens.weight"] = np.eye(vocabulary, _HIDDEN, dtype=np.float32)
        weights["lm_head.weight"] = _following([*ids, end], vocabulary)
    tiny_llama.save(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(shape))


def _following(ids: Sequence[int], vocabulary: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return a head, float32 [V, hidden], under which each id of a chain follows the one before it.

    Any other id is followed by the first of the chain.
    """
    head = np.zeros((vocabulary, _HIDDEN), np.float32)
    follows = dict(itertools.pairwise(ids))
    for token in range(vocabulary):
        head[follows.get(token, ids[0]), token] = 1.0
    return head
