"""Rotary position embedding: reads its keys from config.json, and computes its cosine and sine tables.

Sources: Su et al. 2021, RoFormer; Chen et al. 2023, Position Interpolation (`linear`); Peng et al. 2023, YaRN
(`yarn`); Llama 3.1's reference code (`llama3`). Names and defaults of the keys are transformers 5's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asd.errors import PreconditionFailed
from services.common.documents import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

_DICTIONARIES = ("rope_parameters", "rope_scaling")
_KIND_KEYS = ("rope_type", "type")
# Keys of each kind, besides those of every kind. Any other key is refused: it might change the arithmetic.
_KEYS = {
    # The length that a model was trained with does not enter these two, though files say it.
    "default": ("original_max_position_embeddings",),
    "linear": ("original_max_position_embeddings", "factor"),
    "llama3": ("original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings",
        "factor",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
        "truncate",
        # These describe how the weights were made.
        "finetuned",
    ),
}
# The largest number. Chosen: far beyond that of any model, and small enough for finite tables.
_LEAST, _MOST = 1e-6, 1e15
# Positions computed at a time. Chosen.
_BLOCK = 4096
_OF_EVERY_KIND = (*_KIND_KEYS, "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of queries and keys by position.

    kind: "default", "linear", "llama3" or "yarn". original_context: tokens that the unscaled model was
    trained with. low_turns, high_turns: turns within these that bound the interpolated dimensions (llama3:
    low_freq_factor, high_freq_factor; yarn: beta_slow, beta_fast). attention_factor: of cosines and sines.
    truncate: whether yarn's bounds are whole dimensions.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: float = 0.0
    low_turns: float = 0.0
    high_turns: float = 0.0
    attention_factor: float = 1.0
    truncate: bool = True


def read_rope(config: Mapping[str, Any], path: Path) -> Rope:
    """Return the embedding that a config.json describes, in transformers 4's spelling or in 5's.

    config: its content. path: for messages. Raises PreconditionFailed, naming the key, for a kind or a key
    that rope_tables does not implement, a value of the wrong type, and two dictionaries that differ.
    """
    where, found = _dictionary(config, path)
    kinds = {str(found[key]) for key in _KIND_KEYS if found.get(key) is not None}
    if len(kinds) > 1:
        raise PreconditionFailed(f"{where}: type and rope_type differ: keep one of them")
    kind = kinds.pop() if kinds else "default"
    if kind not in _KEYS:
        raise PreconditionFailed(
            f"{where}: rope_type {kind} is not implemented by the onnx engine, which has "
            f"{', '.join(_KEYS)}: serve the model with another engine"
        )
    known = (*_OF_EVERY_KIND, *_KEYS[kind])
    for key, value in found.items():
        if isinstance(value, dict):
            raise PreconditionFailed(
                f"{where}: {key} holds parameters for one kind of layer: the onnx engine has the same for all"
            )
        if key not in known:
            raise PreconditionFailed(
                f"{where}: {key} is not known of rope_type {kind}, and may change the model's arithmetic: "
                "remove it if it does not, or serve the model with another engine"
            )
    for source, given in ((where, found), (str(path), config)):
        turned = _number(given, "partial_rotary_factor", source, 1.0)
        if turned != 1:
            raise PreconditionFailed(
                f"{source}: partial_rotary_factor is {turned}; the onnx engine turns whole heads, which is 1"
            )
    outside = _number(config, "rope_theta", str(path), None)
    theta = _number(found, "rope_theta", where, outside or 10_000.0)
    if outside not in (None, theta):
        raise PreconditionFailed(f"{where}: rope_theta is {theta}, and {outside} outside: keep one of them")
    if theta <= 1:
        raise PreconditionFailed(f"{where}: rope_theta is {theta}; it must be above 1")
    context = _number(config, "max_position_embeddings", str(path), None)
    if kind == "linear":
        return Rope(theta, kind, _needed(found, "factor", where))
    if kind == "llama3":
        return _llama3(found, where, theta)
    if kind == "yarn":
        return _yarn(found, where, theta, context)
    return Rope(theta)


def rope_tables(
    rope: Rope, head_dim: int, context: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return cosines and sines, float32 [context, head_dim / 2], row p for position p."""
    rates, factor = frequencies(rope, head_dim), rope.attention_factor
    cosines, sines = (np.empty((context, len(rates)), np.float32) for _ in range(2))
    # In float64 by blocks: the angles of a long context would take several times the tables.
    for begin in range(0, context, _BLOCK):
        end = min(begin + _BLOCK, context)
        angles = np.outer(np.arange(begin, end), rates)
        cosines[begin:end], sines[begin:end] = np.cos(angles) * factor, np.sin(angles) * factor
    return cosines, sines


def frequencies(rope: Rope, head_dim: int) -> npt.NDArray[np.float64]:
    """Return the angle per position of each pair of dimensions, in radians, float64 [head_dim / 2]."""
    exponents = -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain: npt.NDArray[np.float64] = rope.theta**exponents
    if rope.kind == "default":
        return plain
    scaled: npt.NDArray[np.float64] = plain / rope.factor
    if rope.kind == "linear":
        return scaled
    kept: npt.NDArray[np.floating[Any]]
    if rope.kind == "llama3":
        # The more often a pair turns within the original context, the less it is scaled.
        turns = rope.original_context * plain / (2 * math.pi)
        kept = (turns - rope.low_turns) / (rope.high_turns - rope.low_turns)
    else:
        first, last = _yarn_bounds(rope, head_dim)
        kept = 1 - (np.arange(head_dim // 2) - first) / (last - first)
    kept = np.clip(kept, 0, 1)
    mixed: npt.NDArray[np.float64] = plain * kept + scaled * (1 - kept)
    return mixed


def _yarn_bounds(rope: Rope, head_dim: int) -> tuple[float, float]:
    """Return the pairs between which YaRN passes from unscaled to scaled."""

    def pair(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = pair(rope.high_turns), pair(rope.low_turns)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # A step instead of a ramp of length zero, as in transformers.
    return first, last + 0.001 if first == last else last


def _dictionary(config: Mapping[str, Any], path: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the location of RoPE's parameters, for messages, and the parameters."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in _DICTIONARIES:
        given = config.get(name)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise PreconditionFailed(f"{path}: {name} is {quoted(given)}; it must be an object or null")
        if given:
            found.append((f"{path}: {name}", given))
    if len(found) > 1 and _spelt_alike(found[0][1]) != _spelt_alike(found[1][1]):
        raise PreconditionFailed(f"{path}: {' and '.join(_DICTIONARIES)} differ: keep one of them")
    return found[0] if found else (str(path), {})


def _spelt_alike(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dictionary without the keys that both spellings have elsewhere."""
    kind = given.get("rope_type", given.get("type"))
    return {key: value for key, value in given.items() if key not in _OF_EVERY_KIND} | {"rope_type": kind}


def _llama3(found: Mapping[str, Any], where: str, theta: float) -> Rope:
    rope = Rope(
        theta,
        "llama3",
        _needed(found, "factor", where),
        _needed(found, "original_max_position_embeddings", where),
        _needed(found, "low_freq_factor", where),
        _needed(found, "high_freq_factor", where),
    )
    if rope.high_turns <= rope.low_turns:
        raise PreconditionFailed(f"{where}: high_freq_factor must be above low_freq_factor")
    return rope


def _yarn(found: Mapping[str, Any], where: str, theta: float, context: float | None) -> Rope:
    original = _number(found, "original_max_position_embeddings", where, context)
    factor = _number(found, "factor", where, None)
    if factor is None and original and context:
        factor = context / original
    if factor is None or original is None:
        raise PreconditionFailed(f"{where}: factor is missing")
    slow = _number(found, "beta_slow", where, None) or 1.0
    fast = _number(found, "beta_fast", where, None) or 32.0
    if fast < slow:
        raise PreconditionFailed(f"{where}: beta_fast must not be below beta_slow")
    attention = _number(found, "attention_factor", where, None)
    if attention is None:
        over, under = (_number(found, key, where, None) for key in ("mscale", "mscale_all_dim"))
        attention = _yarn_scale(factor, 1.0)
        if over and under:
            attention = _yarn_scale(factor, over) / _yarn_scale(factor, under)
    truncate = found.get("truncate", True)
    if not isinstance(truncate, bool):
        raise PreconditionFailed(f"{where}: truncate is {quoted(truncate)}; it must be true or false")
    return Rope(theta, "yarn", factor, original, slow, fast, attention, truncate)


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _needed(given: Mapping[str, Any], key: str, where: str) -> float:
    value: float | None = _number(given, key, where, None)
    if value is None:
        raise PreconditionFailed(f"{where}: {key} is missing")
    return value


def _number(given: Mapping[str, Any], key: str, where: str, otherwise: float | None) -> Any:
    """Return a positive number, or the default for a missing or null one."""
    value = given.get(key)
    if value is None:
        return otherwise
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # 0 means unset in mscale and the betas.
    may_be = is_number and (_LEAST <= value <= _MOST or (value == 0 and key in _MAY_BE_ZERO))
    if not may_be:
        raise PreconditionFailed(
            f"{where}: {key} is {quoted(value)}; it must be a number above 0, and in range"
        )
    return float(value)


_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
