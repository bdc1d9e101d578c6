"""The config.json of a Llama or a related model, as the `onnx` engine reads it.

Every key is understood, known to be harmless, or refused by name: an unknown key may change the arithmetic,
and an answer from the wrong arithmetic is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any

from asd.errors import PreconditionFailed
from services.common.documents import quoted
from services.stage.engines.checkpoint import read_config, read_count, read_eos_ids
from services.stage.engines.onnx.rope import Rope, read_rope

if TYPE_CHECKING:
    from pathlib import Path

# Keys that this module reads.
_READ = frozenset(
    {
        "architectures",
        "model_type",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
        "max_window_layers",
        "layer_types",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "eos_token_id",
        "pad_token_id",
    }
)
# Architecture by model_type. Mistral may have a sliding window; Qwen2 has biases of query, key and value;
# Qwen3 has norms of query and key.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Keys that change the arithmetic, and the values at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "quantization_config": (None,),
    # Code of the model's own.
    "auto_map": (None,),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
}
# Keys that do not affect a forward pass: they concern training, files and sampling.
_HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        # How training split the products; their sum is the same.
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)
# GroupQueryAttention of onnxruntime 1.32 takes heads of a multiple of this.
_HEAD_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The shape of a model, from its config.json.

    context: tokens of prompt and answer together. window: how many tokens each token attends to, itself
    included; None: all before it. has_qkv_bias: whether there are biases of query, key and value.
    has_qk_norm: whether query and key are normed within each head.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope: Rope
    is_tied: bool
    eos_ids: tuple[int, ...]
    pad_id: int
    window: int | None = None
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    # For messages only: it is not part of the key of derived forms.
    family: str = field(default="llama", repr=False)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        if self.has_qkv_bias:
            block += self.head_dim * (self.heads + 2 * self.kv_heads)
        if self.has_qk_norm:
            block += 2 * self.head_dim
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.layers * block + embeddings + self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, in float32."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


def read_shape(directory: Path) -> LlamaShape:
    """Read config.json, and the end tokens of generation_config.json.

    Raises PreconditionFailed, naming the key, if it is missing, is not JSON, or describes a model that the
    onnx engine does not run.
    """
    path = directory / "config.json"
    config = read_config(path)
    family = config.get("model_type")
    for key, known in (
        ("model_type", tuple(_ARCHITECTURES)),
        ("architectures", (None, [_ARCHITECTURES.get(str(family))])),
        ("hidden_act", ("silu",)),
    ):
        if config.get(key) not in known:
            runs = ", ".join(str(each) for each in known if each)
            raise PreconditionFailed(
                f"{path}: {key} is {quoted(config.get(key))}; the onnx engine runs {runs}: "
                "serve the model with another engine"
            )
    rope = read_rope(config, path)
    for key, value in config.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise PreconditionFailed(
                f"{path}: {key} is {quoted(value)}; the onnx engine does not support it: "
                "serve the model with another engine"
            )
        if key not in _NEUTRAL and key not in _READ and key not in _HARMLESS:
            raise PreconditionFailed(
                f"{path}: {key} is not known to the onnx engine, and may change the model's arithmetic: "
                "remove it if it does not, or serve the model with another engine"
            )
    hidden, heads = (read_count(config, key, path) for key in ("hidden_size", "num_attention_heads"))
    vocabulary = read_count(config, "vocab_size", path)
    eos_ids = read_eos_ids(directory, config, vocabulary)
    return LlamaShape(
        hidden=hidden,
        layers=read_count(config, "num_hidden_layers", path),
        heads=heads,
        kv_heads=_kv_heads(config, heads, path, family),
        head_dim=_head_dim(config, hidden, heads, path, family),
        intermediate=read_count(config, "intermediate_size", path),
        vocabulary=vocabulary,
        context=read_count(config, "max_position_embeddings", path),
        norm_epsilon=_epsilon(config, path),
        rope=rope,
        is_tied=_flag(config, "tie_word_embeddings", path),
        eos_ids=eos_ids,
        pad_id=_pad_id(config, vocabulary, eos_ids[0], path),
        window=_window(config, path, family),
        has_qkv_bias=family == "qwen2",
        has_qk_norm=family == "qwen3",
        family=str(family),
    )


def _window(config: dict[str, Any], path: Path, family: object) -> int | None:
    """Return the sliding window of every layer. Raises PreconditionFailed if only some layers have one."""
    layers = config.get("layer_types")
    kinds = layers if isinstance(layers, list) else [layers]
    if any(kind not in (None, "full_attention") for kind in kinds):
        raise PreconditionFailed(
            f"{path}: layer_types is {quoted(layers)}; the onnx engine runs full_attention in every layer: "
            "serve the model with another engine"
        )
    if family in {"qwen2", "qwen3"} or ("sliding_window" in config and config["sliding_window"] is None):
        # Qwen's files name a window even where their own switch turns it off, as here.
        return None
    if family == "mistral":
        # If it is missing, transformers takes 4096 for Mistral.
        return read_count(config, "sliding_window", path)
    if "sliding_window" in config:
        raise PreconditionFailed(
            f"{path}: sliding_window is {quoted(config['sliding_window'])}; a Llama has none: set it to null"
        )
    return None


def _flag(config: dict[str, Any], key: str, path: Path) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | NoneType):
        raise PreconditionFailed(f"{path}: {key} is {quoted(value)}; it must be true or false")
    return bool(value)


def _epsilon(config: dict[str, Any], path: Path) -> float:
    value = config.get("rms_norm_eps")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:  # type: ignore[operator]
        raise PreconditionFailed(
            f"{path}: rms_norm_eps is {quoted(value)}; it must be a number above 0, and 1 at most"
        )
    return float(value)  # type: ignore[arg-type]


def _kv_heads(config: dict[str, Any], heads: int, path: Path, family: object) -> int:
    # transformers has other defaults for the other families.
    if family == "llama" and config.get("num_key_value_heads") is None:
        return heads
    kv_heads = read_count(config, "num_key_value_heads", path)
    if heads % kv_heads:
        raise PreconditionFailed(
            f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    return kv_heads


def _head_dim(config: dict[str, Any], hidden: int, heads: int, path: Path, family: object) -> int:
    if config.get("head_dim") is not None or family == "qwen3":
        head_dim = read_count(config, "head_dim", path)
    elif hidden % heads:
        raise PreconditionFailed(
            f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}: set head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim % _HEAD_MULTIPLE:
        raise PreconditionFailed(
            f"{path}: head_dim is {head_dim}; the onnx engine runs multiples of {_HEAD_MULTIPLE} only: "
            "serve the model with another engine"
        )
    return head_dim


def _pad_id(config: dict[str, Any], vocabulary: int, otherwise: int, path: Path) -> int:
    value = config.get("pad_token_id")
    if value is None:
        return otherwise
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocabulary:
        raise PreconditionFailed(
            f"{path}: pad_token_id is {quoted(value)}; it must be an id of the vocabulary, "
            f"0 to {vocabulary - 1}, "
            "or null"
        )
    return value
