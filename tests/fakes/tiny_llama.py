"""Tiny models of Llama's kin with random weights, and the same models computed by hand in float64.

Nothing here uses the project's code. The arithmetic follows the papers and transformers' LlamaForCausalLM.
"""

from __future__ import annotations

import json
import math
import shutil
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

SMALL = Path(__file__).parents[2] / "models" / "small"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


class Absence(Enum):
    """In place of a value: the key is left out. As part of names of tests, the same in every process."""

    ABSENT = "absent"


ABSENT = Absence.ABSENT


def config(**changes: Any) -> dict[str, Any]:
    """Return a config.json with changes."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not ABSENT}


def weights(shape: Mapping[str, Any], seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Return random weights, named as in a checkpoint."""
    rng = np.random.default_rng(seed)
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    heads, kv_heads, head = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        # Attention of some sharpness, so that where a token stands matters.
        return (rng.normal(size=(rows, columns)) * 1.5 / math.sqrt(columns)).astype(np.float32)

    def norm() -> npt.NDArray[np.float32]:
        return (1 + 0.1 * rng.normal(size=hidden)).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": norm()}
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {
            f"{prefix}input_layernorm.weight": norm(),
            f"{prefix}self_attn.q_proj.weight": matrix(heads * head, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(kv_heads * head, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(kv_heads * head, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, heads * head),
            f"{prefix}post_attention_layernorm.weight": norm(),
            f"{prefix}mlp.gate_proj.weight": matrix(shape["intermediate_size"], hidden),
            f"{prefix}mlp.up_proj.weight": matrix(shape["intermediate_size"], hidden),
            f"{prefix}mlp.down_proj.weight": matrix(hidden, shape["intermediate_size"]),
        }
        if shape["model_type"] == "qwen2":
            sizes = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
            for part, size in sizes.items():
                found[f"{prefix}self_attn.{part}_proj.bias"] = rng.normal(size=size).astype(np.float32)
        if shape["model_type"] == "qwen3":
            for part in ("q", "k"):
                norms = 2 + 0.5 * rng.normal(size=head)
                found[f"{prefix}self_attn.{part}_norm.weight"] = norms.astype(np.float32)
    if not shape["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(vocabulary, hidden)
    return found


def save(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write float32 tensors as safetensors."""
    header, place = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write(
    folder: Path, *, generation: Mapping[str, Any] | None = None, seed: int = 0, **changes: Any
) -> dict[str, npt.NDArray[np.float32]]:
    """Write a model's directory with the small model's tokenizer; return its weights.

    generation: content of generation_config.json. changes: to the config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = config(**changes)
    tensors = weights(shape, seed)
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(shape))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder / name)
    return tensors


def logits(
    shape: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[np.float32]], ids: Sequence[int]
) -> Array:
    """Return the logits after each token, float64 [tokens, vocabulary]."""
    heads, kv_heads, head = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    table = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    count = len(ids)
    rates, strength = turning(shape)
    angle = np.arange(count)[:, None] * np.array(rates)[None, :]
    turn = strength * np.exp(1j * angle)

    def turned(x: Array) -> Array:
        # Llama's halves: dimension i and i + head/2 are one complex number.
        z = (x[..., : head // 2] + 1j * x[..., head // 2 :]) * turn[:, None, :]
        return np.concatenate([z.real, z.imag], axis=-1)

    def normed(x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + shape["rms_norm_eps"])
        return x / scale * table[name]

    x = table["model.embed_tokens.weight"][list(ids)]
    back = np.arange(count)[:, None] - np.arange(count)[None, :]
    window = shape.get("sliding_window") if shape["model_type"] == "mistral" else None
    seen = (back >= 0) & (back < (window or count))
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = normed(x, f"{prefix}input_layernorm.weight")
        parts = {}
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            product = h @ table[f"{prefix}self_attn.{part}_proj.weight"].T
            if shape["model_type"] == "qwen2":
                product += table[f"{prefix}self_attn.{part}_proj.bias"]
            parts[part] = product.reshape(count, rows, head)
            if shape["model_type"] == "qwen3" and part != "v":
                parts[part] = normed(parts[part], f"{prefix}self_attn.{part}_norm.weight")
        q, k, v = turned(parts["q"]), turned(parts["k"]), parts["v"]
        outputs = []
        for each in range(heads):
            group = each // (heads // kv_heads)
            scores = q[:, each] @ k[:, group].T / math.sqrt(head)
            scores = np.where(seen, scores, -np.inf)
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            outputs.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(outputs, axis=1) @ table[f"{prefix}self_attn.o_proj.weight"].T
        h = normed(x, f"{prefix}post_attention_layernorm.weight")
        gate = h @ table[f"{prefix}mlp.gate_proj.weight"].T
        up = h @ table[f"{prefix}mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ table[f"{prefix}mlp.down_proj.weight"].T
    head_name = "model.embed_tokens.weight" if shape["tie_word_embeddings"] else "lm_head.weight"
    return normed(x, "model.norm.weight") @ table[head_name].T


def turning(shape: Mapping[str, Any]) -> tuple[list[float], float]:
    """Return the angle per position of each pair of dimensions, and the factor of cosine and sine.

    One pair at a time, as the papers have it: Position Interpolation (Chen et al. 2023, section 3), YaRN
    (Peng et al. 2023, sections 3.2 to 3.4) and Llama 3.1's reference code.
    """
    given = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    base = given.get("rope_theta", shape.get("rope_theta", 10_000.0))
    head = shape["head_dim"]
    rates, strength = [], 1.0
    for pair in range(head // 2):
        rate = base ** (-2 * pair / head)
        wavelength = 2 * math.pi / rate
        if kind == "linear":
            rate /= given["factor"]
        elif kind == "llama3":
            trained = given["original_max_position_embeddings"]
            low, high = given["low_freq_factor"], given["high_freq_factor"]
            if wavelength > trained / low:
                rate /= given["factor"]
            elif wavelength >= trained / high:
                smooth = (trained / wavelength - low) / (high - low)
                rate = (1 - smooth) * rate / given["factor"] + smooth * rate
        elif kind == "yarn":
            trained = given.get("original_max_position_embeddings") or shape["max_position_embeddings"]
            factor = given.get("factor") or shape["max_position_embeddings"] / trained

            def pair_turning(times: float, trained: float = trained) -> float:
                return head / (2 * math.log(base)) * math.log(trained / (2 * math.pi * times))

            start, end = pair_turning(given.get("beta_fast") or 32), pair_turning(given.get("beta_slow") or 1)
            if given.get("truncate", True):
                start, end = math.floor(start), math.ceil(end)
            start, end = max(start, 0), min(end, head - 1)
            ramp = min(max((pair - start) / (end - start), 0), 1)
            rate = rate / factor * ramp + rate * (1 - ramp)
            grown = 0.1 * math.log(factor)
            strength = given.get("attention_factor") or 1 + grown
            if not given.get("attention_factor") and given.get("mscale") and given.get("mscale_all_dim"):
                strength = (1 + given["mscale"] * grown) / (1 + given["mscale_all_dim"] * grown)
        rates.append(rate)
    return rates, strength
