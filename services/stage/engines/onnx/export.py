"""Exports a Hugging Face directory (Llama or related) to onnxruntime-genai's ONNX form, without torch.

The graph follows onnxruntime-genai's own model builder (GroupQueryAttention with rotary embedding inside,
skip layer norms), with query, key and value in one product and gate and up in another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from asd.errors import PreconditionFailed
from services.common.disks import writing
from services.common.documents import parse_json, quoted
from services.stage.engines.onnx.llama_config import LlamaShape, read_shape
from services.stage.engines.onnx.memory import capacity_for
from services.stage.engines.onnx.partial_folders import find_damage, finish, partial_folder, remove_left
from services.stage.engines.onnx.rope import rope_tables
from services.stage.model_files import check_file, read_json_file

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

# What a user can do about an unusable cache.
_ELSEWHERE = "set ASD_CACHE_DIR to a folder of your own"

# Part of the cache key. Raise it when the derived form changes, or stages would continue to use the form of
# an earlier version. tests/unit/stage/engines/onnx/test_export.py fails if that is forgotten.
FORMAT = 2
_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# The largest header of a safetensors file: the format allows 100 MB. Chosen: a hundred times a real one.
_MOST_HEADER_BYTES = 16 << 20
# Weights that config.json implies: earlier transformers saved RoPE's frequencies.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# The largest tables of cosines and sines. Chosen: a million positions of heads of 128.
_MOST_TABLE_BYTES = 512 << 20

Weights = dict[str, npt.NDArray[np.float32]]


def prepare(
    directory: Path,
    cache: Path | None = None,
    most_tokens: int | None = None,
    *,
    reads_all: bool = False,
) -> Path:
    """Return the directory of a model's ONNX form. Derive it first if there is none.

    It is kept under `cache` (default_cache() if None), by a hash of its sources. Two processes may prepare
    the same model at once, and users may share a cache. A damaged form is derived again, and the remains of
    interrupted derivations are removed.
    most_tokens: of prompt and answer that it must take, as in served_shape. reads_all: whether files larger
    than 64 MiB are checked for damage too, which takes a second per gigabyte or two.
    Raises PreconditionFailed if the model is missing, damaged or unsupported, or if the cache cannot be read
    or written to, ResourceExhausted if its disk is full.
    """
    directory = directory.resolve()
    shape = served_shape(directory, most_tokens)
    files = _weight_files(directory)
    # The shape has everything that is read from config.json and generation_config.json.
    digest = hashlib.sha256(f"{FORMAT} {shape}".encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    target = (cache or default_cache()) / "onnx" / digest.hexdigest()[:32]
    remove_left(target.parent)
    if _is_whole(target, reads_all=reads_all):
        return target
    weights = _read_weights(files)
    try:
        graph = build_graph(shape, weights)
    except PreconditionFailed as error:
        raise PreconditionFailed(f"{directory}: {error}") from error
    with writing(target, _ELSEWHERE), partial_folder(target) as partial:
        _save(graph, partial)
        (partial / "genai_config.json").write_text(json.dumps(_genai_config(shape), indent=2))
        finish(partial, target, reads_all=reads_all)
    return target


def _is_whole(form: Path, *, reads_all: bool) -> bool:
    """Return whether an undamaged prepared model exists; log the damage if there is any.

    Raises PreconditionFailed if this user may not read it.
    """
    if not os.path.lexists(form):
        return False
    try:
        damage = find_damage(form, reads_all=reads_all)
    except PermissionError as error:
        raise PreconditionFailed(
            f"{form} is another user's and may not be read: have it made readable (chmod -R a+rX), or "
            f"{_ELSEWHERE}"
        ) from error
    if damage is not None:
        logger.warning("%s is damaged (%s): the model is prepared anew", form, damage)
    return damage is None


def served_shape(directory: Path, most_tokens: int | None) -> LlamaShape:
    """Return a model's shape with the context that is served, which sizes its tables of positions.

    most_tokens: of prompt and answer; None: the model's own limit. It is rounded up to a power of two, so
    that few forms of a model exist. Raises PreconditionFailed as read_shape does, and if the tables would be
    huge.
    """
    shape = read_shape(directory)
    if most_tokens is not None:
        shape = replace(shape, context=capacity_for(most_tokens, shape.context))
    size = 4 * shape.context * shape.head_dim
    if size > _MOST_TABLE_BYTES:
        raise PreconditionFailed(
            f"{directory / 'config.json'}: for {shape.context} tokens (max_position_embeddings), the tables "
            f"of positions take {size >> 20} MiB, more than {_MOST_TABLE_BYTES >> 20}: "
            "set max_model_len to the tokens of prompt and answer that are to be served"
        )
    return shape


def default_cache() -> Path:
    """Return ASD_CACHE_DIR, or `asd` in the user's cache directory."""
    own = os.environ.get("ASD_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asd"


def build_graph(shape: LlamaShape, weights: Weights) -> onnx.ModelProto:
    """Return the decoder as an ONNX model in float32.

    Inputs: input_ids int64 [b, s], attention_mask int64 [b, past + s], past_key_values.N.key/value float32
    [b, kv_heads, past, head_dim]. Outputs: logits float32 [b, s, vocabulary], present.N.key/value.
    Raises PreconditionFailed if a weight is missing or of another shape.
    """
    import onnx

    graph = _GraphBuilder(shape, weights)
    graph.build()
    return onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "llama", graph.inputs, graph.outputs, graph.constants),
        opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


class _GraphBuilder:
    def __init__(self, shape: LlamaShape, weights: Weights) -> None:
        import onnx

        self._onnx = onnx
        self._shape = shape
        self._weights = weights
        self._used: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def build(self) -> None:
        s, types = self._shape, self._onnx.TensorProto
        self._declare(self.inputs, "input_ids", types.INT64, ["b", "s"])
        self._declare(self.inputs, "attention_mask", types.INT64, ["b", "t"])
        self._declare(self.outputs, "logits", types.FLOAT, ["b", "s", s.vocabulary])
        self._sequence_lengths()
        for name, table in zip(("cos", "sin"), rope_tables(s.rope, s.head_dim, s.context), strict=True):
            self._constant(name, table)
        embeddings = self._weight("model.embed_tokens.weight", s.vocabulary, s.hidden)
        self._constant("embeddings", embeddings)
        self._node("Gather", ["embeddings", "input_ids"], ["x0"])
        first = self._norm_weight("model.layers.0.input_layernorm.weight")
        self._node("SimplifiedLayerNormalization", ["x0", first], ["h0"], axis=-1, epsilon=s.norm_epsilon)
        for layer in range(s.layers):
            self._block(layer)
        head = embeddings if s.is_tied else self._weight("lm_head.weight", s.vocabulary, s.hidden)
        self._constant("head", head.T)
        self._node("MatMul", [f"h{s.layers}", "head"], ["logits"])
        self._check_unused()

    def _check_unused(self) -> None:
        """Refuse weights that the graph leaves out: biases or norms that config.json does not name."""
        unused = [name for name in self._weights if name not in self._used and not _IGNORED.fullmatch(name)]
        if self._shape.is_tied and "lm_head.weight" in unused:
            embeddings = self._weights["model.embed_tokens.weight"]
            if not np.array_equal(self._weights["lm_head.weight"], embeddings):
                raise PreconditionFailed(
                    "lm_head.weight is not the embeddings, though config.json says tie_word_embeddings: "
                    "set it to false, or remove the weight"
                )
            unused.remove("lm_head.weight")
        if unused:
            raise PreconditionFailed(
                f"the weights hold {unused[0]} ({len(unused)} such), which the onnx engine does not use: "
                "serve the model with another engine"
            )

    def _sequence_lengths(self) -> None:
        """Add the inputs of GroupQueryAttention: each row's last position, and the longest row's length."""
        types = self._onnx.TensorProto
        self._constant("axis", np.array([1], np.int64))
        self._constant("one", np.array(1, np.int64))
        self._node("ReduceSum", ["attention_mask", "axis"], ["lengths"], keepdims=0)
        self._node("Sub", ["lengths", "one"], ["last_places"])
        self._node("Cast", ["last_places"], ["seqlens_k"], to=types.INT32)
        self._node("Shape", ["attention_mask"], ["mask_shape"])
        self._node("Gather", ["mask_shape", "one"], ["total"], axis=0)
        self._node("Cast", ["total"], ["total_length"], to=types.INT32)

    def _block(self, n: int) -> None:
        s, prefix = self._shape, f"model.layers.{n}."
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        qkv = np.concatenate(
            [
                self._weight(f"{prefix}self_attn.q_proj.weight", queries, s.hidden),
                self._weight(f"{prefix}self_attn.k_proj.weight", keys, s.hidden),
                self._weight(f"{prefix}self_attn.v_proj.weight", keys, s.hidden),
            ]
        )
        self._constant(f"w_qkv{n}", qkv.T)
        self._node("MatMul", [f"h{n}", f"w_qkv{n}"], [f"products{n}" if s.has_qkv_bias else f"qkv{n}"])
        if s.has_qkv_bias:
            sizes = (("q", queries), ("k", keys), ("v", keys))
            biases = [self._weight(f"{prefix}self_attn.{part}_proj.bias", size) for part, size in sizes]
            self._constant(f"b_qkv{n}", np.concatenate(biases))
            self._node("Add", [f"products{n}", f"b_qkv{n}"], [f"qkv{n}"])
        attention_inputs = self._normed_heads(n) if s.has_qk_norm else [f"qkv{n}", "", ""]
        window = {"local_window_size": s.window} if s.window else {}
        past = [f"past_key_values.{n}.{part}" for part in ("key", "value")]
        present = [f"present.{n}.{part}" for part in ("key", "value")]
        for values, names, length in ((self.inputs, past, "p"), (self.outputs, present, "t")):
            for name in names:
                self._declare(
                    values, name, self._onnx.TensorProto.FLOAT, ["b", s.kv_heads, length, s.head_dim]
                )
        self._node(
            "GroupQueryAttention",
            [*attention_inputs, *past, "seqlens_k", "total_length", "cos", "sin"],
            [f"attended{n}", *present],
            domain="com.microsoft",
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=float(s.head_dim**-0.5),
            **window,
        )
        self._constant(f"w_o{n}", self._weight(f"{prefix}self_attn.o_proj.weight", s.hidden, queries).T)
        self._node("MatMul", [f"attended{n}", f"w_o{n}"], [f"merged{n}"])
        norm = self._norm_weight(f"{prefix}post_attention_layernorm.weight")
        self._skip_norm([f"x{n}", f"merged{n}", norm], f"m{n}", f"y{n}")
        gate_up = np.concatenate(
            [
                self._weight(f"{prefix}mlp.gate_proj.weight", s.intermediate, s.hidden),
                self._weight(f"{prefix}mlp.up_proj.weight", s.intermediate, s.hidden),
            ]
        )
        self._constant(f"w_gate_up{n}", gate_up.T)
        self._node("MatMul", [f"m{n}", f"w_gate_up{n}"], [f"gate_up{n}"])
        self._node("Split", [f"gate_up{n}"], [f"gate{n}", f"up{n}"], axis=-1, num_outputs=2)
        self._node("Sigmoid", [f"gate{n}"], [f"sigmoid{n}"])
        self._node("Mul", [f"gate{n}", f"sigmoid{n}"], [f"silu{n}"])
        self._node("Mul", [f"silu{n}", f"up{n}"], [f"product{n}"])
        self._constant(
            f"w_down{n}", self._weight(f"{prefix}mlp.down_proj.weight", s.hidden, s.intermediate).T
        )
        self._node("MatMul", [f"product{n}", f"w_down{n}"], [f"down{n}"])
        is_last = n + 1 == s.layers
        following = "model.norm.weight" if is_last else f"model.layers.{n + 1}.input_layernorm.weight"
        self._skip_norm(
            [f"y{n}", f"down{n}", self._norm_weight(following)], f"h{n + 1}", "" if is_last else f"x{n + 1}"
        )

    def _normed_heads(self, n: int) -> list[str]:
        """Norm the query and the key of each head; return the names of query, key and value."""
        s, prefix = self._shape, f"model.layers.{n}.self_attn."
        if n == 0:
            sizes = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
            self._constant("qkv_sizes", np.array(sizes, np.int64))
            # A 0 keeps the dimension. Reshape to one row per head, and later back to one row.
            self._constant("by_head", np.array([0, 0, -1, s.head_dim], np.int64))
            self._constant("together", np.array([0, 0, -1], np.int64))
        self._node("Split", [f"qkv{n}", "qkv_sizes"], [f"q{n}", f"k{n}", f"v{n}"], axis=-1)
        for part in ("q", "k"):
            norm = f"{prefix}{part}_norm.weight"
            self._constant(norm, self._weight(norm, s.head_dim))
            self._node("Reshape", [f"{part}{n}", "by_head"], [f"{part}_heads{n}"])
            self._node(
                "SimplifiedLayerNormalization",
                [f"{part}_heads{n}", norm],
                [f"{part}_normed{n}"],
                axis=-1,
                epsilon=s.norm_epsilon,
            )
            self._node("Reshape", [f"{part}_normed{n}", "together"], [f"{part}_all{n}"])
        return [f"q_all{n}", f"k_all{n}", f"v{n}"]

    def _skip_norm(self, inputs: list[str], normed: str, total: str) -> None:
        outputs = [normed, "", "", total] if total else [normed]
        self._node(
            "SkipSimplifiedLayerNormalization",
            inputs,
            outputs,
            domain="com.microsoft",
            epsilon=self._shape.norm_epsilon,
        )

    def _node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> None:
        self.nodes.append(
            self._onnx.helper.make_node(
                kind, inputs, outputs, name=f"{kind}/{outputs[0]}", domain=domain, **attributes
            )
        )

    def _declare(
        self, values: list[onnx.ValueInfoProto], name: str, kind: int, shape: list[str | int]
    ) -> None:
        values.append(self._onnx.helper.make_tensor_value_info(name, kind, shape))

    def _constant(self, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> None:
        self.constants.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))

    def _norm_weight(self, name: str) -> str:
        self._constant(name, self._weight(name, self._shape.hidden))
        return name

    def _weight(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        if name not in self._weights:
            raise PreconditionFailed(
                f"the weights lack {name}, which config.json's model_type {self._shape.family} has: "
                "they are another model's, or of another family"
            )
        if self._weights[name].shape != shape:
            raise PreconditionFailed(
                f"{name} has shape {self._weights[name].shape}; config.json says {shape}"
            )
        self._used.add(name)
        return self._weights[name]


def _save(model: onnx.ModelProto, directory: Path) -> None:
    import onnx

    # The weights are in a file beside the graph, which the library maps into memory. Inside the graph, whose
    # limit is 2 GiB, it would read them into memory and keep that beside its own form of them.
    onnx.save_model(
        model, str(directory / "model.onnx"), save_as_external_data=True, location="model.onnx.data"
    )


_WANTED = "a model directory needs its safetensors weights"


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and "\0" not in name


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = read_json_file(index, _WANTED)
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(named, dict) or not named or not all(map(_is_file_name, named.values())):
            raise PreconditionFailed(f"{index}: weight_map names no files: copy the model again")
        names = sorted(set(named.values()))
    else:
        names = ["model.safetensors"]
    files = [directory / name for name in names]
    for path in files:
        check_file(path, _WANTED)
    return files


def _read_weights(files: list[Path]) -> Weights:
    """Read safetensors files as float32: 8 bytes of header length, a JSON header, raw tensors."""
    weights: Weights = {}
    for path in files:
        with path.open("rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                header, begin = _read_header(raw, path)
                for name, entry in header.items():
                    start, end = (begin + offset for offset in _offsets(entry))
                    data = np.frombuffer(raw[start:end], _DTYPES[entry["dtype"]])
                    weights[name] = data.reshape(entry["shape"]).astype(np.float32)
                    if not np.isfinite(weights[name]).all():
                        raise PreconditionFailed(f"{path}: {name} is not finite: copy the model again")
            except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
                raise PreconditionFailed(f"{path} is damaged or of an unsupported type: {error!r}") from error
    return weights


def _read_header(raw: mmap.mmap, path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the offset of the first tensor's values."""
    length = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    # A larger number is not a length but the first bytes of another format.
    if length > _MOST_HEADER_BYTES:
        raise PreconditionFailed(f"{path} is no safetensors file: copy it again")
    if not length or len(raw) < 8 + length:
        raise _cut_off(path, len(raw))
    header = parse_json(raw[8 : 8 + length], f"{path}: its header")
    if not isinstance(header, dict):
        raise TypeError("its header holds no object")
    header.pop("__metadata__", None)
    ends = [_offsets(entry) for entry in header.values()]
    if len(raw) < 8 + length + max((end for _, end in ends), default=0):
        raise _cut_off(path, len(raw))
    # Overlapping tensors would be read as many copies.
    if sum(end - start for start, end in ends) > len(raw):
        raise ValueError("its tensors overlap")
    return header, 8 + length


def _offsets(entry: Any) -> tuple[int, int]:
    """Return the start and end of a tensor's values. Raises ValueError, TypeError, KeyError."""
    start, end = entry["data_offsets"]
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError(f"data_offsets are {quoted([start, end])}")
    return start, end


def _cut_off(path: Path, size: int) -> PreconditionFailed:
    return PreconditionFailed(f"{path} is cut off after {size} bytes: copy it again")


def _genai_config(s: LlamaShape) -> dict[str, object]:
    return {
        "model": {
            "type": "llama",
            "bos_token_id": s.eos_ids[0],
            "eos_token_id": list(s.eos_ids),
            "pad_token_id": s.pad_id,
            "context_length": s.context,
            "vocab_size": s.vocabulary,
            "decoder": {
                # Spinning threads would take the cores of a small machine from the other services.
                "session_options": {
                    "log_id": "asd",
                    "intra_op_num_threads": 1,
                    "inter_op_num_threads": 1,
                    "session.intra_op.allow_spinning": "0",
                    "provider_options": [],
                },
                "filename": "model.onnx",
                "head_size": s.head_dim,
                "hidden_size": s.hidden,
                "num_attention_heads": s.heads,
                "num_hidden_layers": s.layers,
                "num_key_value_heads": s.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": s.context, "past_present_share_buffer": True},
    }
