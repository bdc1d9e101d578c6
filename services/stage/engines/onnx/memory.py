"""Main memory of a model in the `onnx` engine: weights, KV caches, a pass. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.stage.engines.onnx.llama_config import LlamaShape

# Smallest capacity of a KV cache, in tokens. Chosen: it holds a short conversation, whose turns share one.
LEAST_CAPACITY = 512
# Memory for the intermediate results of one pass: the larger of this and a share of the weights.
_PASS_BYTES = 64 << 20
_PASS_SHARE = 1 / 32


def capacity_for(tokens: int, context: int) -> int:
    """Return the capacity of a KV cache for a number of tokens: the next power of two.

    A growing conversation thus moves to a larger cache, and is computed again, only when it has doubled.
    context: the most that the model serves.
    """
    return min(max(LEAST_CAPACITY, 1 << (tokens - 1).bit_length()), context)


def weight_bytes(shape: LlamaShape) -> int:
    """Return the bytes of the weights in float32; tied embeddings count twice, RoPE's tables once."""
    head = shape.vocabulary * shape.hidden if shape.is_tied else 0
    return 4 * (shape.parameters + head + shape.context * shape.head_dim)


def pass_tokens(shape: LlamaShape) -> int:
    """Return how many tokens one pass may compute: the library holds logits and activations of all."""
    per_token = 4 * (shape.vocabulary + 4 * shape.intermediate + 4 * shape.hidden)
    return max(int(max(_PASS_BYTES, weight_bytes(shape) * _PASS_SHARE)) // per_token, 1)
