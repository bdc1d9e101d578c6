"""Every key of a config.json is understood by the onnx engine, or harmless, or refused by its name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import PreconditionFailed
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.onnx.llama_config import read_shape
from tests.fakes.tiny_llama import ABSENT, config

if TYPE_CHECKING:
    from pathlib import Path

# The sizes below are tiny; keys and what changes the arithmetic are the published files'.
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rope_scaling": None,
}
LLAMA_3 = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rope_theta": 500_000.0,
    "eos_token_id": [1, 2, 3],
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
MISTRAL = SIZES | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
}
QWEN_2 = SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_window_layers": 28,
    "rope_theta": 1_000_000.0,
    "sliding_window": 131_072,
    "use_sliding_window": False,
}
QWEN_3 = QWEN_2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA = SIZES | {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 32,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "pad_token_id": 0,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
}
PHI_3 = SIZES | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "pad_token_id": 2,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "sliding_window": 2047,
    "attention_bias": False,
}

LOADS = {
    "Llama 2": LLAMA | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "torch_dtype": "float16"},
    "Llama 2, early": LLAMA | {"pad_token_id": 0, "max_length": 4096, "num_key_value_heads": None},
    "Llama 3": LLAMA_3,
    "Llama 3.1": LLAMA_3 | {"rope_scaling": LLAMA3_SCALING},
    "Llama 3.2": LLAMA_3
    | {"head_dim": 16, "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}, "tie_word_embeddings": True},
    "Llama 3.1 by transformers 5": {
        key: value
        for key, value in LLAMA_3.items()
        if key not in {"rope_scaling", "rope_theta", "torch_dtype"}
    }
    | {"dtype": "bfloat16", "rope_parameters": LLAMA3_SCALING | {"rope_theta": 500_000.0}},
    "DeepSeek-R1-Distill-Llama": LLAMA_3 | {"rope_scaling": LLAMA3_SCALING, "eos_token_id": 1},
    "Yi, SmolLM": LLAMA | {"is_llama_config": True, "rope_interleaved": False, "attention_bias": False},
}
KIN = {
    "Mistral 7B v0.1": (MISTRAL, {"window": 4096}),
    "Mistral 7B v0.2, v0.3": (MISTRAL | {"sliding_window": None, "rope_theta": 1e6}, {"window": None}),
    "Mistral Nemo": (
        MISTRAL | {"head_dim": 128, "hidden_size": 320, "sliding_window": None, "attention_dropout": 0.0},
        {"head_dim": 128, "hidden": 320},
    ),
    "Qwen2.5": (QWEN_2, {"has_qkv_bias": True, "has_qk_norm": False, "window": None}),
    "Qwen2.5 with YaRN": (
        QWEN_2 | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}},
        {"has_qkv_bias": True},
    ),
    "DeepSeek-R1-Distill-Qwen": (QWEN_2 | {"use_mrope": False}, {"has_qkv_bias": True}),
    "Qwen2.5 by transformers 5": (
        {key: value for key, value in QWEN_2.items() if key != "rope_theta"}
        | {
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        {"has_qkv_bias": True},
    ),
    "Qwen3": (QWEN_3, {"has_qk_norm": True, "has_qkv_bias": False, "head_dim": 128}),
}
REFUSED = {
    "Gemma": (GEMMA, "model_type is 'gemma'"),
    "Gemma 2": (
        GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256},
        "model_type is 'gemma2'",
    ),
    "Qwen2 with windows": (QWEN_2 | {"use_sliding_window": True}, "use_sliding_window is True"),
    "Qwen3 with windows": (
        QWEN_3 | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is ",
    ),
    "Qwen2-VL": (
        QWEN_2 | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        "rope_type mrope is not",
    ),
    "a Mistral without its window": (
        {key: value for key, value in MISTRAL.items() if key != "sliding_window"},
        "sliding_window is missing",
    ),
    "a Mistral that says it is a Llama": (MISTRAL | {"model_type": "llama"}, "architectures is "),
    "Phi-3": (PHI_3, "model_type is 'phi3'"),
    "Phi-4": (PHI_3 | {"sliding_window": None}, "model_type is 'phi3'"),
    "Phi-4-mini": (PHI_3 | {"partial_rotary_factor": 0.75}, "model_type is 'phi3'"),
    "Yarn-Llama-2": (
        LLAMA
        | {
            "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
            "rope_scaling": {
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "type": "yarn",
                "finetuned": True,
            },
        },
        "auto_map is ",
    ),
    "Llama 3.1 quantized": (
        LLAMA_3 | {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config is ",
    ),
    "a Granite dressed as Llama": (LLAMA | {"residual_multiplier": 0.22}, "residual_multiplier is not known"),
}


def _write(folder: Path, content: dict[str, Any], generation: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("name", LOADS)
def test_the_llama_families_load(name: str, tmp_path: Path) -> None:
    shape = read_shape(_write(tmp_path, LOADS[name]))
    assert shape.head_dim == 16
    assert shape.rope.kind == ("llama3" if "3.1" in name or "3.2" in name or "R1" in name else "default")
    assert shape.rope.theta == (500_000 if "3" in name or "R1" in name else 10_000)


@pytest.mark.parametrize("name", KIN)
def test_the_kin_of_llama_load(name: str, tmp_path: Path) -> None:
    content, wanted = KIN[name]
    shape = read_shape(_write(tmp_path, content))
    assert {key: getattr(shape, key) for key in wanted} == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_the_key(name: str, tmp_path: Path) -> None:
    content, sentence = REFUSED[name]
    with pytest.raises(PreconditionFailed, match=sentence):
        read_shape(_write(tmp_path, content))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 64}, "sliding_window is 64; a Llama has none"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": "4k"}, "'4k'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"logit_scale": 0.5}, "logit_scale is not known"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is "),
        # Sizes.
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": ABSENT}, "hidden_size is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 100}, "head_dim is 100; the onnx engine runs multiples of 16"),
        ({"head_dim": 4}, "head_dim is 4; the onnx engine runs multiples of 16"),
        ({"head_dim": None, "hidden_size": 90}, "hidden_size 90 is no multiple"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        # Padding.
        ({"pad_token_id": 512}, "pad_token_id is 512; it must be an id of the vocabulary, 0 to 511"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"pad_token_id": "0"}, "pad_token_id is '0'"),
        # Positions.
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type dynamic is not"),
        ({"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "rope_scaling: rope_type su is not"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type longrope is not"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor is not known of rope_type default"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; it must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "mscale is not known of rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "type and rope_type differ"),
        ({"rope_scaling": {"mrope_section": [1, 2], "type": "default"}}, "mrope_section is not known"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            "full_attention holds parameters for one kind of layer",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "factor is 0.5"),
        (
            {"rope_scaling": LLAMA3_SCALING, "rope_parameters": LLAMA3_SCALING | {"factor": 4.0}},
            "rope_parameters and rope_scaling differ",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 500000.0, and 10000",
        ),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor must be above"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}},
            "original_max_position_embeddings is missing",
        ),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 4}}, "beta_fast must"),
    ],
    ids=str,
)
def test_what_the_engine_would_compute_wrongly_is_refused_by_name(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    read_shape(_write(tmp_path, config()))
    with pytest.raises(PreconditionFailed, match=sentence):
        read_shape(_write(tmp_path, config(**changes)))


READERS = {
    "onnx": lambda folder: read_shape(folder).eos_ids,
    "vllm and tensorrt_llm": lambda folder: read_checkpoint(folder).eos_ids,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("named", "generation", "wanted"),
    [
        (1, None, (1,)),
        ([1, 7], None, (1, 7)),
        (1, {"eos_token_id": [7, 1, 9]}, (1, 7, 9)),
        (1, {"eos_token_id": 7}, (1, 7)),
        (1, {"do_sample": True}, (1,)),
        (1, {"eos_token_id": None}, (1,)),
        (1, {"eos_token_id": []}, (1,)),
        (None, {"eos_token_id": 0}, (0,)),
        ([], {"eos_token_id": [5]}, (5,)),
        (ABSENT, {"eos_token_id": 511}, (511,)),
    ],
)
def test_what_ends_an_answer_is_named_in_either_file(
    reader: str, named: object, generation: object, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    assert READERS[reader](_write(tmp_path, config(eos_token_id=named), generation)) == wanted


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("named", "generation", "sentence"),
    [
        (None, None, "config.json: eos_token_id is missing, and generation_config.json names none"),
        (ABSENT, {"eos_token_id": []}, "nothing would end an answer"),
        ([], {"eos_token_id": None}, "nothing would end an answer"),
        (512, None, "config.json: eos_token_id is 512; it must be an id of the vocabulary, 0 to 511"),
        (-1, None, "config.json: eos_token_id is -1"),
        (1, {"eos_token_id": [1, 512]}, r"generation_config.json: eos_token_id is \[1, 512\]"),
        (True, None, "eos_token_id is True"),
        ("</s>", None, "eos_token_id is '</s>'"),
        (1.0, None, "eos_token_id is 1.0"),
        (1, {"eos_token_id": [[1]]}, "generation_config.json: eos_token_id is"),
        (1, [], "generation_config.json does not hold an object"),
    ],
)
def test_ends_that_are_no_ids_are_refused(
    reader: str, named: object, generation: object, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(PreconditionFailed, match=sentence):
        READERS[reader](_write(tmp_path, config(eos_token_id=named), generation))
